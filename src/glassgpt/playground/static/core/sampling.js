// Sampling as in generation/generate.py: temperature, then top-k, top-p and min-p, in this order. Logits are scaled in
// float32 as there, so that the same tokens tie; sums are in float64.

const TINY = 2 ** -126;  // the smallest normal float32: a smaller temperature would become 0

// exp(x) / sum(exp(x)).
export function softmax(logits) {
  const max = largest(logits);
  const p = new Float64Array(logits.length);
  let total = 0;
  for (let i = 0; i < p.length; i++) total += p[i] = Math.exp(logits[i] - max);
  return p.map(x => x / total);
}

// The logarithms of `softmax`, exact even if a probability underflows.
export function logSoftmax(logits) {
  const max = largest(logits);
  let total = 0;
  for (let i = 0; i < logits.length; i++) total += Math.exp(logits[i] - max);
  return Float64Array.from(logits, x => x - max - Math.log(total));
}

// Indices from the largest value to the smallest; ties by index.
export const ranked = values => Uint32Array.from(values, (_, i) => i).sort((a, b) => values[b] - values[a] || a - b);

// The distribution from which a token is sampled. topK, topP, minP: null disables one. order: `ranked(logits)`, if
// known. without: a Set of ids that are excluded.
export function samplingDistribution(logits, {temperature, topK = null, topP = null, minP = null},
  {order = ranked(logits), without = new Set()} = {}) {
  const left = without.size ? order.filter(id => !without.has(id)) : order;
  const scaled = new Float64Array(logits.length).fill(-Infinity);
  // Subtract the largest first, so that a tiny temperature gives -inf and not inf - inf.
  const max = logits[left[0]], divisor = Math.max(Math.fround(temperature), TINY);
  if (temperature === 0) scaled[left[0]] = 0;
  else for (const i of left) scaled[i] = Math.fround(Math.fround(logits[i] - max) / divisor);
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
    const p = softmax(scaled), threshold = minP * largest(p);
    for (const i of left) if (p[i] < threshold) scaled[i] = -Infinity;
  }
  return softmax(scaled);
}

// The token at a share from 0 to 1 of the cumulative distribution.
export function tokenAt(probabilities, share) {
  const total = sum(probabilities);
  let cumulative = 0, last = 0;
  for (let i = 0; i < probabilities.length; i++) {
    if (!probabilities[i]) continue;
    cumulative += probabilities[i];
    last = i;
    if (cumulative > share * total) break;
  }
  return last;
}

// A pseudo-random share from 0 to 1 that depends on the numbers only, by murmur3's 32-bit finalizer (Appleby, 2011). It
// has no generator state, so a step that is taken back and repeated samples the same token.
export function randomShare(...numbers) {
  const half = salt => [salt, ...numbers].reduce(
    (hash, number) => mixed((hash ^ mixed((number >>> 0) + 0x9e3779b9)) + 0x7f4a7c15), 0);
  return (half(1) * 2 ** 21 + (half(2) >>> 11)) / 2 ** 53;
}

function mixed(x) {
  let hash = x >>> 0;
  hash = Math.imul(hash ^ (hash >>> 16), 0x85ebca6b);
  hash = Math.imul(hash ^ (hash >>> 13), 0xc2b2ae35);
  return (hash ^ (hash >>> 16)) >>> 0;
}

// The entropy of a distribution in bits.
export function entropy(p) {
  let bits = 0;
  for (const x of p) if (x > 0) bits -= x * Math.log2(x);
  return bits;
}

// The Kullback–Leibler divergence D(p ‖ q) in bits of the distributions of two arrays of logits.
export function klDivergence(pLogits, qLogits) {
  const logP = logSoftmax(pLogits), logQ = logSoftmax(qLogits);
  let nats = 0;
  for (let i = 0; i < logP.length; i++) nats += Math.exp(logP[i]) * (logP[i] - logQ[i]);
  return Math.max(0, nats) / Math.LN2;
}

// The Jensen–Shannon divergence of two distributions in bits.
export const jensenShannon = (p, q) =>
  Math.max(0, entropy(p.map((x, i) => (x + q[i]) / 2)) - (entropy(p) + entropy(q)) / 2);

// How many tokens are dropped when the context is full: the older half goes (`window_start` in generation).
export function droppedTokens(length, contextLength) {
  const half = Math.max(1, Math.floor(contextLength / 2));
  return Math.max(0, Math.ceil((length - contextLength) / half)) * half;
}

export const sum = values => values.reduce((a, b) => a + b, 0);

// The largest value; `Math.max(...values)` fails for very long arrays.
export function largest(values) {
  let max = -Infinity;
  for (const x of values) if (x > max) max = x;
  return max;
}

// The index of the largest value.
export const argmax = values => values.reduce((best, x, i) => (x > values[best] ? i : best), 0);
