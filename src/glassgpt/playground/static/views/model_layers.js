// The layers of the picture of a model: one is open, the others are rows, and distant ones of a deep model are folded.
import {argmax, bar, count, exact, h, kvHeadOf, norm, percent, short, spanOf, spanText} from '../core/index.js';
import {vectorPicture} from '../widgets/index.js';
import {open, stage} from './model_stage.js';

export const NORMS = {layernorm: 'LayerNorm', rmsnorm: 'RMSNorm'};
const HEADS = ['layer', 'sees', 'attention adds', 'feed-forward adds', 'stream after'];
const MOST_ROWS = 14, NEAR = 3;  // a deeper model shows this many layers on each side of the open one

export function layersColumn(now) {
  const {info, layer, found} = now, L = info.config.n_layer, size = found.norms.shape[1];
  const norms = i => found.norms.subarray(size * i, size * (i + 1));
  const most = Math.max(...Array.from({length: L}, (_, i) => Math.max(norms(i)[0], norms(i)[1])));
  const [from, to] = L <= MOST_ROWS ? [0, L] : [Math.max(0, layer - NEAR), Math.min(L, layer + NEAR + 1)];
  return [
    h('div.layer-row.layer-heads', {}, HEADS.map(text => h('span', {}, text))),
    folded(now, norms, most, 0, from),
    Array.from({length: to - from}, (_, i) => [layerRow(now, norms(from + i), most, from + i),
      from + i === layer && openLayer(now)]),
    folded(now, norms, most, to, L),
  ];
}

function layerRow({info, layer}, [attention, feedForward, , after], most, i) {
  const span = spanOf(info, i), {window, globals} = span;
  const adds = (test, x, color) => h('span.both', {}, bar(x / most, `var(--${color})`), exact(test, x, short(x)));
  return h('button.layer-row', {type: 'button', onclick: open({layer: i}), 'aria-expanded': String(i === layer),
    title: `Layer ${i} ${spanText(span)}`, 'data-layer': i},
  h('span', {}, `${i === layer ? '▾' : '▸'} ${i}`),
  h('span', {}, window === null ? 'all' : `last ${window}${globals ? `, first ${globals}` : ''}`),
  adds('attention-adds', attention, 'accent'), adds('feed-forward-adds', feedForward, 'warm'),
  exact('stream-after', after, short(after)));
}

// The layers from ... to - 1 as one row: a cell per layer for what attention and feed-forward add.
function folded({layer, signal}, norms, most, from, to) {
  if (to <= from) return null;
  const cells = (label, part) => vectorPicture({label, scale: 'magnitude', signal, limit: most, columns: to - from,
    values: Array.from({length: to - from}, (_, i) => norms(from + i)[part]),
    describe: i => [`layer ${from + i}: ${label} ${short(norms(from + i)[part])}`]});
  const name = `${from}–${to - 1}`;
  return h('button.layer-row.folded', {type: 'button', 'data-layer': name, title: `Layers ${name}, folded: open one`,
    onclick: open({layer: from < layer ? Math.max(from, layer - 2 * NEAR) : Math.min(to - 1, layer + 2 * NEAR)})},
  h('span', {}, `▸ ${name}`), h('span', {}, `${to - from} layers`), cells('attention adds', 0),
  cells('feed-forward adds', 1),
  exact('stream-after', norms(to - 1)[3], short(norms(to - 1)[3])));
}

function openLayer(now) {
  const {info, layer, found, position, signal} = now, {config} = info, pre = NORMS[config.norm];
  const picture = (label, values) => vectorPicture({label, values, signal});
  const largest = argmax(found.mlp_post.map(Math.abs)), isGated = config.activation === 'swiglu';
  const active = found.mlp_post.filter(x => x > 0).length;
  return h('div.layer-open', {test: 'open-layer', 'aria-label': `Layer ${layer}`, role: 'group'},
    stage('Residual stream', {link: {view: 'lens', position, depth: layer}, value: ['pre-norm',
      norm(found.resid_pre)]}, picture('residual stream', found.resid_pre)),
    stage(`${pre}, then attention`, {link: {view: 'heads', layer, query: position}, value: ['attn-norm',
      norm(found.attn_out)]},
    h('p.about', {}, attentionText(info, layer)), heads(now), h('p.about', {}, 'Added to the stream:'),
    picture('added by attention', found.attn_out)),
    stage(`${pre}, then feed-forward`, {link: {view: 'neurons', layer, position, neuron: null},
      value: ['mlp-norm', norm(found.mlp_out)]},
    h('p.about', {}, `${count(config.n_embd)} → ${count(info.inner_width)} neurons → ${count(config.n_embd)}. `
      + `Activation: ${isGated ? 'SwiGLU, a gate times a value' : config.activation.replace('_', ' ')}.`),
    picture('neuron', found.mlp_post),
    h('p.about', {}, exact('active', active, count(active)), ' neurons are above 0. The strongest is neuron ',
      exact('largest-neuron', largest, largest), ': ',
      exact('largest-value', found.mlp_post[largest], short(found.mlp_post[largest])), '. Added to the stream:'),
    picture('added by the feed-forward block', found.mlp_out)),
    stage('Residual stream after', {link: {view: 'lens', position, depth: layer + 1}, value: ['post-norm',
      norm(found.resid_post)]}, picture('residual stream', found.resid_post)));
}

function attentionText(info, layer) {
  const {config} = info, shared = kvHeadOf(info, 0) !== null;
  return `${config.n_head} heads of width ${info.head_width}`
    + `${shared ? `, in groups that share ${info.kv_heads} key/value heads` : ''}. The layer `
    + `${spanText(spanOf(info, layer))}.${config.position === 'rope' ? ' Queries and keys are rotated by position.' : ''}`
    + `${config.qk_norm ? ' RMSNorm of queries and keys.' : ''} Cells: attention to each token, strongest color: `
    + 'the head’s largest.';
}

// One button per head: its attention to each token, and the token with the most.
function heads({info, layer, found, pieces, position, signal}) {
  const H = info.config.n_head, T = found.pattern.shape[1];
  const one = head => {
    const row = found.pattern.subarray(head * T, (head + 1) * T), best = argmax(row);
    return h('button.model-head', {type: 'button', onclick: open({view: 'heads', layer, head, query: position,
      key: best}), title: `Open head ${head}`}, h('span.soft', {}, `head ${head}`),
    vectorPicture({values: row.map((x, s) => (s > position ? NaN : x)), label: `attention of head ${head}`,
      scale: 'magnitude', limit: row[best], signal, describe: s => [`${pieces[s]} at ${s}: ${percent(row[s])}`]}),
    h('span.mono', {}, `${pieces[best]} `, exact('head-most', row[best], percent(row[best]))));
  };
  const groups = Map.groupBy(Array.from({length: H}, (_, head) => head), head => kvHeadOf(info, head));
  return [...groups].map(([kvHead, members]) => [
    kvHead !== null && h('p.about', {test: 'kv-head'}, `key/value head ${kvHead}`),
    h('div.model-heads', {}, members.map(one))]);
}
