// Changes of what a model computes, as the address keeps them: h2.5 for head 5 of layer 2, a2 attention, f2 feed-forward, b2 block,
// r2 residual stream behind layer 2, p7 for token 7 hidden; with @7 at that position only.

const KINDS = {h: 'head', a: 'attention', f: 'feed_forward', b: 'block', r: 'residual', p: 'position'};
const NAMES = {h: 'head', a: 'attention', f: 'feed-forward', b: 'block', r: 'residual stream'};

/** The edits of a text that such a model and text have, as a Set of codes. */
export function editsOf(text, {layers, heads, tokens}) {
  return new Set(text.split(',').filter(code => {
    const edit = parts(code);
    if (!edit) return false;
    const {letter, number, head, position} = edit;
    const isPlace = letter === 'p' ? number < tokens && head === null : number < layers && (head !== null) === (letter === 'h');
    return isPlace && (head ?? 0) < heads && (position ?? 0) < tokens;
  }));
}

/** An edit as the server is asked for it. by: 'zero', 'mean' or 'patch'. */
export function editFor(code, by) {
  const {letter, number, head, position} = parts(code);
  return letter === 'p' ? {kind: 'position', position: number} : {kind: KINDS[letter], layer: number, head, position, by};
}

/** An edit in words. */
export function told(code) {
  const {letter, number, head, position} = parts(code);
  if (letter === 'p') return `token ${number} hidden`;
  const what = `${NAMES[letter]}${head === null ? '' : ` ${head}`} ${letter === 'r' ? 'behind' : 'of'} layer ${number}`;
  return position === null ? what : `${what} at token ${position}`;
}

function parts(code) {
  const found = /^([hafbrp])(\d{1,5})(?:\.(\d{1,4}))?(?:@(\d{1,5}))?$/.exec(code);
  if (!found) return null;
  const [, letter, number, head, position] = found;
  const given = text => (text === undefined ? null : Number(text));
  return {letter, number: Number(number), head: given(head), position: given(position)};
}
