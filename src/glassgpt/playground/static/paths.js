// What was written behind a text, token by token, with branches: paths of tokens that share beginnings.

const MOST_IN_A_LINK = 300;

/** The paths, of which `current` is gone on with. A token is {id, p}: p its probability under the model, null where unknown yet. */
export class Paths {
  constructor(paths = [[]]) {
    this.paths = paths;
    this.at = 0;
    this.rejections = new Map();
  }

  get current() {
    return this.paths[this.at];
  }

  /** What was drawn and sent back at this point: ids. */
  get rejected() {
    return this.rejections.get(keyOf(this.current)) ?? new Set();
  }

  take(token) {
    this.paths[this.at] = [...this.current, token];
  }

  back() {
    this.paths[this.at] = this.current.slice(0, -1);
  }

  /** Take back the last token and remember that it is not wanted here; once all `most` are, begin anew. */
  reject(most) {
    const {id} = this.current.at(-1);
    this.back();
    this.rejections.set(keyOf(this.current), new Set(this.rejected.size + 1 < most ? [...this.rejected, id] : []));
  }

  /** Keep the current path as it is, and go on from its first `length` tokens. */
  branch(length = this.current.length) {
    this.paths.push(this.current.slice(0, length));
    this.at = this.paths.length - 1;
  }

  jump(i) {
    this.at = i;
  }

  drop(i) {
    this.paths.splice(i, 1);
    if (!this.paths.length) this.paths.push([]);
    if (this.at > i || this.at === this.paths.length) this.at--;
  }

  /** The paths in few letters for a link, the current one first; those that would make it too long are left out. */
  toText(tag) {
    const order = [this.current, ...this.paths.filter((_, i) => i !== this.at)];
    let room = MOST_IN_A_LINK;
    const fit = order.filter(path => (room -= path.length) >= 0 && path.length);
    return fit.length ? [tag, ...fit.map(keyOf)].join('~') : '';
  }
}

/** The paths of a link. Those of another text or model, and what is none, are no paths. */
export function pathsOf(text, tag, vocabSize) {
  const [found, ...paths] = text.split('~');
  const read = paths.map(path => path.split('.').map(id => ({id: parseInt(id, 36), p: null})));
  const isWhole = found === tag && paths.length && read.every(path => path.every(({id}) => id >= 0 && id < vocabSize));
  return new Paths(isWhole ? read : undefined);
}

const keyOf = path => path.map(({id}) => id.toString(36)).join('.');

/** A few letters that tell one model's text from another. */
export function tagOf(name, ids) {
  let hash = 0;
  for (const character of name) hash = Math.imul(hash ^ character.codePointAt(0), 0x01000193);
  for (const id of ids) hash = Math.imul(hash ^ id, 0x01000193) ^ (hash >>> 15);
  return (hash >>> 0).toString(36);
}
