// Sampling as the Python side does it (generation.py), in float64: temperature, then top-k, top-p and min-p, in this order.

/** exp(x) / sum(exp(x)) of any numbers. */
export function softmax(logits) {
  let largest = -Infinity;
  for (const x of logits) largest = Math.max(largest, x);
  const p = new Float64Array(logits.length);
  let total = 0;
  for (let i = 0; i < p.length; i++) total += p[i] = Math.exp(logits[i] - largest);
  for (let i = 0; i < p.length; i++) p[i] /= total;
  return p;
}

/** The token ids from the likeliest down. */
export const ranked = values => Uint32Array.from(values, (_, i) => i).sort((a, b) => values[b] - values[a] || a - b);

/** The distribution that a token is drawn from; 0 for what is left out. topK, topP, minP: null for none. */
export function distribution(logits, {temperature, topK = null, topP = null, minP = null}) {
  const size = logits.length;
  if (temperature === 0) {
    const p = new Float64Array(size);
    p[ranked(logits)[0]] = 1;
    return p;
  }
  const scaled = Float64Array.from(logits, x => x / temperature);
  if (topK !== null && topK < size) {
    const threshold = scaled[ranked(scaled)[topK - 1]];
    for (let i = 0; i < size; i++) if (scaled[i] < threshold) scaled[i] = -Infinity;
  }
  if (topP !== null && topP < 1) {
    const p = softmax(scaled);
    let before = 0;
    for (const i of ranked(p)) {
      if (before >= topP) scaled[i] = -Infinity;
      before += p[i];
    }
  }
  if (minP !== null) {
    const p = softmax(scaled);
    const least = minP * p.reduce((a, b) => Math.max(a, b), 0);
    for (let i = 0; i < size; i++) if (p[i] < least) scaled[i] = -Infinity;
  }
  return softmax(scaled);
}
