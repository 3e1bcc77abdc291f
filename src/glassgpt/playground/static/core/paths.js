// Generated text with branches: paths of tokens that share beginnings.

export const MAX_LINK_TOKENS = 300;

// The paths, of which `current` is continued. A token is {id, p}: p is its probability, null while unknown.
export class Paths {
  constructor(paths = [[]]) {
    this.paths = paths;
    this.at = 0;
    this.rejections = new Map();
  }
  get current() { return this.paths[this.at]; }
  // The ids that were sampled and rejected at this point.
  get rejected() { return this.rejections.get(keyOf(this.current)) ?? new Set(); }
  append(token) { this.paths[this.at] = [...this.current, token]; }
  back() { this.paths[this.at] = this.current.slice(0, -1); }
  // Take back the last token and exclude it here. Once all `vocabSize` tokens are rejected, start over.
  reject(vocabSize) {
    const {id} = this.current.at(-1);
    this.back();
    const isFull = this.rejected.size + 1 >= vocabSize;
    this.rejections.set(keyOf(this.current), new Set(isFull ? [] : [...this.rejected, id]));
  }
  // Keep the current path, and continue from its first `length` tokens.
  branch(length = this.current.length) {
    this.paths.push(this.current.slice(0, length));
    this.at = this.paths.length - 1;
  }
  select(i) { this.at = i; }
  remove(i) {
    this.paths.splice(i, 1);
    if (!this.paths.length) this.paths.push([]);
    if (this.at > i || this.at === this.paths.length) this.at--;
  }
  // The paths for a link, the current one first. Paths that would make it too long are left out.
  toText(tag) {
    const order = [this.current, ...this.paths.filter((_, i) => i !== this.at)];
    let room = MAX_LINK_TOKENS;
    const fit = order.filter(path => (room -= path.length) >= 0 && path.length);
    return fit.length ? [tag, ...fit.map(keyOf)].join('~') : '';
  }
}

// Read the paths of a link. Those of another text or model are ignored.
export function parsePaths(text, tag, vocabSize) {
  const [linkTag, ...paths] = text.split('~');
  const read = paths.map(path => path.split('.').map(id => ({id: parseInt(id, 36), p: null})));
  const isValid = linkTag === tag && read.every(path => path.every(({id}) => id >= 0 && id < vocabSize));
  return new Paths(isValid && read.length ? read : undefined);
}

const keyOf = path => path.map(({id}) => id.toString(36)).join('.');

// A short hash that identifies a model and a prompt.
export function tagOf(name, ids) {
  let hash = 0;
  for (const character of name) hash = Math.imul(hash ^ character.codePointAt(0), 0x01000193);
  for (const id of ids) hash = Math.imul(hash ^ id, 0x01000193) ^ (hash >>> 15);
  return (hash >>> 0).toString(36);
}
