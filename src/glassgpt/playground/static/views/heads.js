// All heads, then one, then one of its rows, number by number.

import {latest, post} from '../api.js';
import {css, named} from '../colors.js';
import {exportable} from '../export.js';
import {headGrid} from '../headgrid.js';
import {rowCards} from '../headrow.js';
import {matrix} from '../matrix.js';
import {rotaryCards} from '../rotary.js';
import {sees} from '../span.js';
import * as state from '../state.js';
import {card, checkbox, h, notice, percent, precise, ramp, short, slider, swatch} from '../ui.js';

export default async function show(page, context) {
  const {signal, opened, info, ids} = context;
  const picture = await post('/api/attention', opened.question({ids}), signal);
  const root = {on: state.text('root') === '1'};
  const view = {...context, picture, place: () => placeNow(info, ids.length), kvOf: kvOf(info), spanOf: layer => spanOf(info, layer)};
  const grid = gridCard(view, root), head = headCard(view, root);
  const onKey = s => state.set({col: s});
  const parts = [rowCards({...view, onKey}), ...info.config.position === 'rope' ? [rotaryCards(view)] : []];
  page.append(grid.element, head.element, ...parts.flatMap(({cards}) => cards));
  let found = null;

  function showRow() {
    const {row, col} = view.place();
    if (!found) return;
    const start = row * ids.length;
    const t = row, s = col ?? strongest(found.weights.subarray(start, start + ids.length));
    head.mark(t, s);
    for (const part of parts) part.show({...found, t, s});
  }

  const showHead = latest(async () => {
    const {layer, head: number} = view.place();
    grid.canvas.show({picked: {layer, head: number}});
    try {
      const question = opened.question({ids, layer, head: number});
      const [tile, vectors] = await Promise.all([post('/api/head', question, signal), post('/api/vectors', question, signal)]);
      found = {vectors, weights: tile.pattern, span: {window: tile.window, globals: tile.globals}};
      head.show({layer, head: number, tile, ...found});
      showRow();
    } catch (error) {
      if (!signal.aborted) head.refuse(error.message);
    }
  });

  state.on(['layer', 'head'], showHead, signal);
  state.on(['row', 'col'], showRow, signal);
  state.on(['root'], () => {
    root.on = state.text('root') === '1';
    grid.canvas.show({root: root.on});
    head.tint();
  }, signal);
  await showHead();
}

/** What the address names, as far as this model and text have it: row null stands for the last token. */
function placeNow(info, tokens) {
  const within = (key, size, fallback) => Math.max(0, Math.min(size - 1, Math.round(state.number(key, fallback))));
  return {
    layer: within('layer', info.config.n_layer, 0), head: within('head', info.config.n_head, 0),
    row: within('row', tokens, tokens - 1), col: state.number('col') === null ? null : within('col', tokens, 0),
  };
}

const spanOf = (info, layer) => ({window: info.windows[layer], globals: info.config.window_globals});

/** The key/value head of a query head, or null for each where none is shared. */
function kvOf({config, kv_heads: kvHeads}) {
  const sharedBy = config.n_head / kvHeads;
  return head => (sharedBy > 1 ? Math.floor(head / sharedBy) : null);
}

const strongest = weights => weights.reduce((best, weight, s) => (weight > weights[best] ? s : best), 0);

function spanText({window, globals}) {
  if (window === null) return 'sees all tokens before it';
  return `sees ${window} tokens, itself included${globals ? `, and the text’s first ${globals}` : ''}`;
}

// --- all heads -----------------------------------------------------------------------------------------------------------

function gridCard(view, root) {
  const {signal, picture, place, kvOf: kv, spanOf: span} = view;
  const element = card('Heads', 'A row a layer, a column a head. In each, a row is a query and a column a key: the stronger its colour, '
    + 'the more the query attends to it. Grey: masked.');
  const [layers, heads, cells] = picture.thumbnails.shape;
  const entropy = (layer, head) => picture.entropies[layer * heads + head];
  const canvas = headGrid({
    picture, spanOf: span, kvOf: kv, signal, picked: place(), root: root.on, onPick: ({layer, head}) => state.set({layer, head}),
    describe: (layer, head) => [`layer ${layer}, head ${head}`, ...kv(head) === null ? [] : [`key/value head ${kv(head)}`],
      `mean entropy of its rows ${entropy(layer, head).toFixed(3)} bits`, spanText(span(layer))],
  });
  canvas.dataset.test = 'head-grid';
  element.tools.append(checkbox({label: 'faint ones too', title: 'Colour by the square root of the weight', checked: root.on,
    onInput: on => state.set({root: on ? 1 : null})}));
  element.body.append(canvas, legend(view, kv));
  if (cells < picture.tokens) {
    element.body.append(h('p.about', {},
      `Of ${picture.tokens.toLocaleString('en')} tokens, ${cells} × ${cells} cells: each shows the largest of its weights.`));
  }
  const most = Math.max(...picture.differences), layer = picture.differences.indexOf(most);
  element.body.append(h('p.about', {'data-test': 'difference', 'data-value': most},
    'The weights are formed anew from q and k: Σ weight × v differs from what the attention kernel gave by at most '
    + `${short(most)} (layer ${layer}).`));
  exportable(element, {name: 'heads', canvas, rows: () => [['layer', 'head', 'key/value head', 'mean entropy in bits', 'difference of the layer'],
    ...Array.from({length: layers * heads}, (_, i) => [Math.floor(i / heads), i % heads, kv(i % heads) ?? i % heads, picture.entropies[i],
      picture.differences[Math.floor(i / heads)]])]});
  return {element, canvas};
}

/** Which query heads share a key/value head: its colour is theirs. */
function legend({info: {config, kv_heads: kvHeads}, signal}, kv) {
  if (kv(0) === null) return h('p.about', {}, 'Each query head has a key/value head of its own.');
  const sharedBy = config.n_head / kvHeads;
  return h('p.about.kv-legend', {'data-test': 'kv-legend'}, Array.from({length: kvHeads}, (_, i) => h('span', {},
    swatch(() => named(i), signal), ` key/value head ${i}: query heads ${i * sharedBy}–${(i + 1) * sharedBy - 1}`)));
}

// --- one head ------------------------------------------------------------------------------------------------------------

function headCard({signal, pieces, ids, kvOf: kv}, root) {
  const element = card('One head', 'Rows are queries, columns keys. Pick a row with ↑ ↓, a key with ← →.');
  const lead = h('p', {'data-test': 'head-facts'}), scale = h('span'), problem = h('div');
  const size = ids.length;
  let now = null;
  const labels = pieces.map((piece, i) => `${piece} ${i}`);
  const canvas = matrix({
    label: 'Attention weights of one head', signal, rows: size, cols: size, value: () => 0, range: [0, 1], rowLabels: labels, colLabels: pieces,
    hidden: (t, s) => now && !sees(now.span, t, s), overlay: (p, place) => now && outline(p, place, now.span, size),
    onPick: (t, s) => state.set({row: t, col: s}),
    describe: (t, s) => [`query ${pieces[t]} at ${t}`, `key ${pieces[s]} at ${s}`, ...now ? [weightText(now, t, s)] : []],
  });
  canvas.dataset.test = 'head-matrix';
  const place = (label, name) => slider({
    label, min: 0, max: size - 1, step: 1, value: 0, show: i => labels[i], onInput: i => state.set({[name]: i}),
  });
  const [query, key] = [place('Query', 'row'), place('Key', 'col')];
  element.body.append(problem, lead, h('div.controls.short-labels', {}, query, key), canvas, h('p.about', {}, scale));
  const explained = h('p.about', {'data-test': 'span'});
  element.body.append(explained);
  exportable(element, {name: 'head', canvas, rows: () => [['query', ...labels],
    ...pieces.map((_, t) => [labels[t], ...pieces.map((__, s) => (sees(now.span, t, s) ? now.weights[t * size + s] : ''))])]});
  // Of the root, so that faint weights are seen beside strong ones.
  const tint = () => {
    canvas.show({values: root.on ? now.weights.map(Math.sqrt) : now.weights});
    scale.replaceChildren(...ramp('sizes', 'weight 0', root.on ? '1, by its square root' : 1, signal));
  };

  return {
    element,
    show(found) {
      now = found;
      const shared = kv(found.head) === null ? '' : `, key/value head ${found.tile.kv_head}`;
      problem.replaceChildren();
      lead.textContent = `Layer ${found.layer}, head ${found.head}${shared}: formed anew, it differs from the kernel’s output by at most `
        + `${short(found.tile.difference)}.`;
      explained.textContent = spanLegend(found.span);
      tint();
    },
    mark(row, col) {
      canvas.show({picked: {row, col}});
      query.set(row);
      key.set(col);
    },
    tint: () => now && tint(),
    refuse: text => problem.replaceChildren(notice(text, 'error')),
  };
}

function weightText({weights, span}, t, s) {
  if (!sees(span, t, s)) return s > t ? 'masked: it comes later' : 'masked: it lies before the window';
  const weight = weights[t * Math.sqrt(weights.length) + s];
  return `weight ${precise(weight)} (${percent(weight)})`;
}

function spanLegend(span) {
  const causal = 'Grey cells are masked: a query sees no later key';
  if (span.window === null) return `${causal}. This layer sees all tokens before it.`;
  return `${causal}, and of earlier ones the last ${span.window}, itself included: the band behind the orange line`
    + `${span.globals ? `; the text’s first ${span.globals} tokens, framed at the left, are global: seen from however far` : ''}.`;
}

/** The window's edge, as a staircase where cells are large enough, and a frame around the global tokens' columns. */
function outline(p, {x, y, cell, cellY}, {window, globals}, size) {
  if (window === null || window >= size) return;
  const color = css('warm');
  if (cell < 3) {
    p.line(x, y + window * cellY, x + (size - window) * cell, y + size * cellY, color, 1.5);
  } else {
    for (let t = window; t < size; t++) {
      const s = t - window;  // the nearest key that the query at t no longer sees
      p.line(x + s * cell, y + t * cellY, x + (s + 1) * cell, y + t * cellY, color, 1.5);
      p.line(x + (s + 1) * cell, y + t * cellY, x + (s + 1) * cell, y + (t + 1) * cellY, color, 1.5);
    }
  }
  if (globals) p.frame(x + 1, y + window * cellY, globals * cell - 1, (size - window) * cellY - 1, color, 1.5);
}
