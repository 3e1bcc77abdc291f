// Attention heads: all of them, then one, then one of its rows, number by number.
import {argmax, attempt, bound, card, category, checkbox, exact, h, kvHeadOf, latest, legend, post, ramp, short, slider,
  spanOf, spanText, state} from '../core/index.js';
import {headGrid, headMatrix} from '../widgets/index.js';
import {rowCards} from './attention_row.js';
import {rotaryCards} from './rotary.js';

const isSqrt = () => state.text('sqrt') === '1';

export default async function show(page, context) {
  const {signal, opened, info, ids} = context;
  const picture = await post('/api/attention', opened.request({ids}), signal);
  const place = () => ({layer: state.index('layer', info.config.n_layer),
    head: state.index('head', info.config.n_head)});
  const grid = gridCard(context, picture, place()), one = headCard(context);
  const parts = [rowCards(context), ...info.config.position === 'rope' ? [rotaryCards(context)] : []];
  page.append(grid.element, one.element, ...parts.flatMap(({cards}) => cards));
  let found = null;
  function showRow() {
    if (!found) return;
    const t = state.index('query', ids.length, ids.length - 1);
    const strongest = argmax(found.weights.subarray(t * ids.length, (t + 1) * ids.length));
    const s = state.index('key', ids.length, strongest);
    one.select(t, s);
    for (const part of parts) part.show({...found, t, s});
  }
  const showHead = latest(() => attempt(one.problem, signal, async () => {
    const now = place();
    grid.canvas.show({selected: now});
    const request = opened.request({ids, ...now});
    const [tile, vectors] = await Promise.all([
      post('/api/head', request, signal), post('/api/vectors', request, signal)]);
    found = {...now, vectors, weights: tile.pattern, difference: tile.difference, span: spanOf(info, now.layer)};
    one.show(found);
    showRow();
  }));
  state.on(['layer', 'head'], showHead, signal);
  state.on(['query', 'key'], showRow, signal);
  state.on(['sqrt'], () => {
    grid.canvas.show({isSqrt: isSqrt()});
    one.tint();
  }, signal);
  await showHead();
}

function gridCard({signal, info}, picture, selected) {
  const [layers, heads, cells] = picture.thumbnails.shape;
  const canvas = headGrid({
    picture, info, signal, selected, isSqrt: isSqrt(), test: 'head-grid', onSelect: picked => state.set(picked),
    describe: (layer, head) => [`mean entropy of its rows ${picture.entropies[layer * heads + head].toFixed(3)} bits`,
      spanText(spanOf(info, layer))],
  });
  const most = Math.max(...picture.differences);
  const element = card('All heads', {
    about: 'Layers by heads; in each, queries by keys. Color: attention weight. Gray: masked.',
    save: {name: 'heads', figure: canvas, rows: () => [
      ['layer', 'head', 'key/value head', 'mean entropy in bits', 'difference of the layer'],
      ...Array.from(picture.entropies, (bits, i) => {
        const layer = Math.floor(i / heads), head = i % heads;
        return [layer, head, kvHeadOf(info, head) ?? head, bits, picture.differences[layer]];
      })]},
  }, canvas, kvLegend(info, signal),
  cells < picture.tokens && h('p.about', {}, `${cells} × ${cells} cells; a cell shows the largest of its weights.`),
  h('p.about', {}, 'The weights are recomputed from q and k. Σ weight × v differs from the attention kernel’s output '
    + 'by at most ', exact('difference', most, short(most)), ` (layer ${picture.differences.indexOf(most)}).`));
  element.tools.prepend(bound(checkbox({label: 'square root', title: 'Color by the square root, to show small weights',
    checked: isSqrt(), onInput: on => state.set({sqrt: on ? 1 : null})}), 'sqrt', isSqrt, signal));
  return {element, canvas};
}

// Which query heads share a key/value head.
function kvLegend(info, signal) {
  if (kvHeadOf(info, 0) === null) return h('p.about', {}, 'Each query head has its own key/value head.');
  const size = info.config.n_head / info.kv_heads;
  return legend(Array.from({length: info.kv_heads}, (_, i) =>
    [`key/value head ${i}: query heads ${i * size}–${(i + 1) * size - 1}`, () => category(i)]), signal, 'kv-legend');
}

function headCard({signal, info, pieces}) {
  const lead = h('p', {test: 'head-facts'}), scale = h('p.about'), explanation = h('p.about', {test: 'span'});
  const problem = h('div'), labels = pieces.map((piece, i) => `${piece} ${i}`);
  let now = null;
  const canvas = headMatrix({signal, test: 'head-matrix', onSelect: (query, key) => state.set({query, key})});
  const [query, key] = ['query', 'key'].map(name => slider({label: name, min: 0, max: pieces.length - 1, value: 0,
    show: i => labels[i], onInput: i => state.set({[name]: i})}));
  const element = card('One head', {
    about: 'Rows are queries, columns are keys. Select a query with ↑ ↓ and a key with ← →.',
    save: {name: 'head', figure: canvas, rows: canvas.rows},
  }, problem, lead, h('div.controls.short-labels', {}, query, key), canvas, scale, explanation);
  function tint() {
    if (!now) return;
    canvas.showHead({pieces, labels, weights: now.weights, span: now.span, isSqrt: isSqrt()});
    scale.replaceChildren(...ramp('magnitude', 'weight 0', isSqrt() ? '1, by its square root' : 1, signal));
  }
  return {element, problem, tint, show(found) {
    now = found;
    const kv = kvHeadOf(info, now.head);
    lead.textContent = `Layer ${now.layer}, head ${now.head}${kv === null ? '' : `, key/value head ${kv}`}: the `
      + `recomputed output differs from the kernel’s by at most ${short(now.difference)}.`;
    explanation.textContent = `Gray: masked. A query ${spanText(now.span)}.`
      + (now.span.window === null ? '' : ' The orange line is the window’s edge; a frame marks the global tokens.');
    tint();
  }, select(row, col) {
    canvas.show({selected: {row, col}});
    query.set(row);
    key.set(col);
  }};
}
