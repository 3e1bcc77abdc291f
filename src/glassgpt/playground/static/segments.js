// Two cuts of the same text held against each other: the stretches at whose ends both begin a token.

/**
 * a, b: {ids, pieces, bytes} of this text. Stretches [{a: [from, to], b: [from, to], bytes}] of tokens, in order; with one tokenizer
 * each is a token. Null where what the tokens stand for is not the text in both.
 */
export function segmentsOf(a, b, text) {
  if (sameIds(a, b)) return a.ids.map((_, i) => ({a: [i, i + 1], b: [i, i + 1], bytes: a.bytes[i].length / 2}));
  const whole = hexOf(text);
  let i = leadOf(a, whole), j = leadOf(b, whole);
  if (i === null || j === null) return null;
  const endsA = endsOf(a, i), endsB = endsOf(b, j), found = [];
  while (i < a.ids.length && j < b.ids.length) {
    let [lastA, lastB] = [i, j];
    while (endsA[lastA] !== endsB[lastB]) endsA[lastA] < endsB[lastB] ? lastA++ : lastB++;
    found.push({a: [i, lastA + 1], b: [j, lastB + 1], bytes: endsA[lastA] - (i ? endsA[i - 1] : 0)});
    [i, j] = [lastA + 1, lastB + 1];
  }
  return found;
}

const sameIds = (a, b) => a.ids.length === b.ids.length && a.ids.every((id, i) => id === b.ids[i] && a.pieces[i] === b.pieces[i]);
const hexOf = text => Array.from(new TextEncoder().encode(text), byte => byte.toString(16).padStart(2, '0')).join('');

/** How many tokens come before the text's own: none, or one that begins every text. Null where the rest is not the text. */
function leadOf({bytes}, whole) {
  const lead = [0, 1].find(skipped => bytes.slice(skipped).join('') === whole);
  return whole && lead !== undefined ? lead : null;
}

/** The place in the text's bytes at which each token ends. */
function endsOf({bytes}, lead) {
  let end = 0;
  return bytes.map((hex, i) => (i < lead ? 0 : end += hex.length / 2));
}

/** Bits of the tokens [from, to): NaN where one of them was given no probability. */
export function bitsOf(surprisal, [from, to]) {
  let bits = 0;
  for (let i = from; i < to; i++) bits += i ? surprisal[i] : NaN;
  return bits;
}
