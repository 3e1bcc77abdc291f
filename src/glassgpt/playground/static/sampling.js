// Sampling as the Python side does it (generation.py): temperature, then top-k, top-p and min-p, in this order.
// Logits are scaled in float32 as there, so that the same tokens tie; sums are taken in float64.

/** exp(x) / sum(exp(x)) of any numbers. */
export function softmax(logits) {
  const largest = most(logits);
  const p = new Float64Array(logits.length);
  let total = 0;
  for (let i = 0; i < p.length; i++) total += p[i] = Math.exp(logits[i] - largest);
  for (let i = 0; i < p.length; i++) p[i] /= total;
  return p;
}

/** The natural logarithms of `softmax`, exact where a probability is too small for a number. */
export function logSoftmax(logits) {
  const largest = most(logits);
  let total = 0;
  for (let i = 0; i < logits.length; i++) total += Math.exp(logits[i] - largest);
  return Float64Array.from(logits, x => x - largest - Math.log(total));
}

/** The token ids from the likeliest down. */
export const ranked = values => Uint32Array.from(values, (_, i) => i).sort((a, b) => values[b] - values[a] || a - b);

/**
 * The distribution that a token is drawn from; 0 for what is left out. topK, topP, minP: null for none.
 * order: `ranked(logits)`, where the caller has it already. without: a Set of ids that are not to be drawn, as if they had no logits.
 */
export function distribution(logits, {temperature, topK = null, topP = null, minP = null},
  {order = ranked(logits), without = new Set()} = {}) {
  const left = without.size ? order.filter(id => !without.has(id)) : order;
  const scaled = new Float64Array(logits.length).fill(-Infinity);
  // The largest becomes 0 first, so that a tiny temperature leads to -inf and not to inf - inf.
  const largest = logits[left[0]];
  if (temperature === 0) scaled[left[0]] = 0;
  else for (const i of left) scaled[i] = Math.fround(Math.fround(logits[i] - largest) / Math.fround(temperature));
  if (topK !== null && topK < left.length) {
    const threshold = scaled[left[topK - 1]];
    for (const i of left) if (scaled[i] < threshold) scaled[i] = -Infinity;
  }
  if (topP !== null && topP < 1) {
    const p = softmax(scaled);
    let before = 0;
    for (const i of left) {
      if (before >= topP) scaled[i] = -Infinity;
      before += p[i];
    }
  }
  if (minP !== null) {
    const p = softmax(scaled);
    const least = minP * most(p);
    for (const i of left) if (p[i] < least) scaled[i] = -Infinity;
  }
  return softmax(scaled);
}

/** The token of a share from 0 to 1: the first at which the running sum passes it. */
export function tokenAt(probabilities, share) {
  let total = 0, last = 0;
  for (const p of probabilities) total += p;
  let sum = 0;
  for (let i = 0; i < probabilities.length; i++) {
    if (!probabilities[i]) continue;
    sum += probabilities[i];
    last = i;
    if (sum > share * total) break;
  }
  return last;
}

/**
 * A random share from 0 to 1, always the same one for the same numbers: murmur3's 32-bit mixing (Appleby, 2011) of each in turn.
 * Without a state that moves on, so that a step taken back and taken again draws the same token.
 */
export function shareOf(...numbers) {
  const half = salt => [salt, ...numbers].reduce((hash, number) => mixed((hash ^ mixed((number >>> 0) + 0x9e3779b9)) + 0x7f4a7c15), 0);
  return (half(1) * 2 ** 21 + (half(2) >>> 11)) / 2 ** 53;
}

function mixed(x) {
  let hash = x >>> 0;
  hash = Math.imul(hash ^ (hash >>> 16), 0x85ebca6b);
  hash = Math.imul(hash ^ (hash >>> 13), 0xc2b2ae35);
  return (hash ^ (hash >>> 16)) >>> 0;
}

/** The entropy of a distribution in bits. */
export function entropy(p) {
  let bits = 0;
  for (const x of p) if (x > 0) bits -= x * Math.log2(x);
  return bits;
}

/** The Kullback–Leibler divergence in bits of the distribution of logits `after` from that of `before`: sum of p (log2 p - log2 q). */
export function divergence(before, after) {
  const p = logSoftmax(before), q = logSoftmax(after);
  let nats = 0;
  for (let i = 0; i < p.length; i++) nats += Math.exp(p[i]) * (p[i] - q[i]);
  return Math.max(0, nats) / Math.LN2;
}

/** How many of a text's tokens are out of sight when the context is full: the older half goes (generation.py, `window_start`). */
export function outOfSight(length, contextLength) {
  const half = Math.max(1, Math.floor(contextLength / 2));
  return Math.max(0, Math.ceil((length - contextLength) / half)) * half;
}

function most(values) {
  let largest = -Infinity;
  for (const x of values) if (x > largest) largest = x;
  return largest;
}
