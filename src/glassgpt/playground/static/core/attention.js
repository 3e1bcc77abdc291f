// Attention's arithmetic for one head: which keys a query sees, scores, weights, and rotary positions.
import {sum} from './sampling.js';

// A layer's span. info: of the model, or null if unknown.
export const spanOf = (info, layer) =>
  ({window: info?.windows[layer] ?? null, globals: info?.config.window_globals ?? 0});

// The key/value head of a query head if heads share them, otherwise null.
export function kvHeadOf(info, head) {
  const size = info ? info.config.n_head / info.kv_heads : 1;
  return size > 1 ? Math.floor(head / size) : null;
}

// The rule of `Span.visible` in model/attention.py: whether the query at t sees the key at s.
export const isVisible = ({window, globals}, t, s) => s <= t && (window === null || t - s < window || s < globals);

// Whether any query in [t, tEnd) sees any key in [s, sEnd).
export const isAnyVisible = ({window, globals}, t, tEnd, s, sEnd) =>
  s < tEnd && (window === null || t - (sEnd - 1) < window || s < globals);

export function spanText({window, globals}) {
  if (window === null) return 'sees all earlier tokens';
  const first = globals === 1 ? 'the first token' : `the first ${globals} tokens`;
  return `sees the last ${window} tokens, itself included${globals ? `, and ${first}` : ''}`;
}

// The products of row i of q and row j of k, one per dimension; their sum is the dot product. Both are (tokens, D).
export function products(q, i, k, j) {
  const D = q.shape[1];
  return Float64Array.from({length: D}, (_, d) => q[i * D + d] * k[j * D + d]);
}

export const norm = values => Math.sqrt(sum(values.map(x => x * x)));

// The attention row of the query at t, computed from the vectors (the answer of /api/vectors).
export function attentionRow({vectors: {rot_q: q, rot_k: k, scale, bias}, span, t}) {
  const T = q.shape[0];
  const scores = Float64Array.from({length: T}, (_, s) => scale * sum(products(q, t, k, s)) + (bias?.[t * T + s] ?? 0));
  const visible = Array.from({length: T}, (_, s) => isVisible(span, t, s));
  const max = scores.reduce((most, score, s) => (visible[s] ? Math.max(most, score) : most), -Infinity);
  const exps = scores.map((score, s) => (visible[s] ? Math.exp(score - max) : 0));
  const denominator = sum(exps);
  return {scores, visible, max, denominator, weights: exps.map(x => x / denominator)};
}

// The angle in radians by which one position turns each pair of dimensions (Su et al., 2021).
export const rotaryAngles = (D, base) => Float64Array.from({length: D / 2}, (_, j) => base ** (-2 * j / D));

// The score of the query at t with the key at s if they were `distance` positions apart.
export function scoreAtDistance({vectors: {q_norm: q, k_norm: k, scale}, t, s}, distance, angles) {
  const half = angles.length, D = 2 * half;
  let dot = 0;
  for (let j = 0; j < half; j++) {
    const [a, b, c, d] = [q[t * D + j], q[t * D + j + half], k[s * D + j], k[s * D + j + half]];
    dot += Math.cos(distance * angles[j]) * (a * c + b * d) + Math.sin(distance * angles[j]) * (a * d - b * c);
  }
  return scale * dot;
}
