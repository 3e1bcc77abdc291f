// Interventions, as the address keeps them: h2.5 is head 5 of layer 2, a2 its attention, f2 its feed-forward, b2 the
// whole block, r2 the residual stream after layer 2, p7 token 7 hidden; a suffix @7 restricts one to position 7.

const KINDS = {h: 'head', a: 'attention', f: 'feed_forward', b: 'block', r: 'residual', p: 'position'};
const NAMES = {h: 'head', a: 'attention', f: 'feed-forward', b: 'block', r: 'residual stream'};

// The codes in a text that are valid for the model and the text, as a Set.
export function parseEdits(text, {layers, heads, tokens}) {
  return new Set(text.split(',').filter(code => {
    const edit = parse(code);
    if (!edit) return false;
    const {letter, number, head, position} = edit;
    const isPlace = letter === 'p' ? number < tokens && head === null
      : number < layers && (head !== null) === (letter === 'h');
    return isPlace && (head ?? 0) < heads && (position ?? 0) < tokens;
  }));
}

// An edit as the server takes it. by: 'zero', 'mean' or 'patch'.
export function editRequest(code, by) {
  const {letter, number, head, position} = parse(code);
  return letter === 'p' ? {kind: 'position', position: number} : {kind: KINDS[letter], layer: number, head, position,
    by};
}

// An edit in words.
export function editText(code) {
  const {letter, number, head, position} = parse(code);
  if (letter === 'p') return `token ${number} hidden`;
  const part = `${NAMES[letter]}${head === null ? '' : ` ${head}`} ${letter === 'r' ? 'after' : 'of'} layer ${number}`;
  return position === null ? part : `${part} at token ${position}`;
}

function parse(code) {
  const match = /^([hafbrp])(\d{1,5})(?:\.(\d{1,4}))?(?:@(\d{1,5}))?$/.exec(code);
  if (!match) return null;
  const [number, head, position] = match.slice(2).map(digits => (digits === undefined ? null : Number(digits)));
  return {letter: match[1], number, head, position};
}
