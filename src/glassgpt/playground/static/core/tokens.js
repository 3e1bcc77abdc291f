// Searching a vocabulary, and aligning the tokens of two tokenizers.

// A text as the vocabulary shows it, with visible white space.
export const visible = text => text.replaceAll(' ', '␣').replaceAll('\n', '⏎').replaceAll('\t', '→');

// Ids of the tokens that contain a text, ignoring case; exact matches first, then in the order of `ids`.
export function findTokens(names, text, ids = names.keys()) {
  const wanted = visible(text).toLowerCase(), exactMatches = [], others = [];
  if (!wanted) return [];
  for (const id of ids) {
    const name = names[id].toLowerCase();
    if (name === wanted || name === `␣${wanted}`) exactMatches.push(id);
    else if (name.includes(wanted)) others.push(id);
  }
  return [...exactMatches, ...others];
}

// Align two tokenizations {ids, pieces, bytes} of a text at the places where both start a token. Returns segments {a:
// [from, to], b: [from, to], bytes} of tokens in order, or null if the tokens are not the text's bytes.
export function alignTokens(a, b, text) {
  const isSame = a.ids.length === b.ids.length && a.ids.every((id, i) => id === b.ids[i]
    && a.pieces[i] === b.pieces[i]);
  if (isSame) return a.ids.map((_, i) => ({a: [i, i + 1], b: [i, i + 1], bytes: a.bytes[i].length / 2}));
  let [i, j] = [prefixLength(a, text), prefixLength(b, text)];
  if (i === null || j === null) return null;
  const endsA = byteEnds(a, i), endsB = byteEnds(b, j), segments = [];
  while (i < a.ids.length && j < b.ids.length) {
    let [lastA, lastB] = [i, j];
    while (endsA[lastA] !== endsB[lastB]) endsA[lastA] < endsB[lastB] ? lastA++ : lastB++;
    segments.push({a: [i, lastA + 1], b: [j, lastB + 1], bytes: endsA[lastA] - (i ? endsA[i - 1] : 0)});
    [i, j] = [lastA + 1, lastB + 1];
  }
  return segments;
}

// How many tokens precede the text: 0, or 1 for a start token. Null if the rest is not the text.
function prefixLength({bytes}, text) {
  const hex = Array.from(new TextEncoder().encode(text), byte => byte.toString(16).padStart(2, '0')).join('');
  const length = [0, 1].find(skipped => bytes.slice(skipped).join('') === hex);
  return hex && length !== undefined ? length : null;
}

// The byte of the text at which each token ends.
function byteEnds({bytes}, prefix) {
  let end = 0;
  return bytes.map((hex, i) => (i < prefix ? 0 : end += hex.length / 2));
}

// The bits of the tokens [from, to): NaN if one of them has no probability (the first of the text).
export function bitsOf(surprisal, [from, to]) {
  let bits = 0;
  for (let i = from; i < to; i++) bits += i ? surprisal[i] : NaN;
  return bits;
}
