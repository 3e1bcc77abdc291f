// A probe snapshot's cards: how heads attend, what each depth expects, what surprised the model.

import {exportable} from './export.js';
import {headGrid} from './headgrid.js';
import {depthName, pager, windowSize} from './lensgrid.js';
import {matrix} from './matrix.js';
import {sees} from './span.js';
import * as state from './state.js';
import {card, h, percent, ramp, segmented, short, tokenStrip} from './ui.js';

const MOST_BITS = 12;
const within = (key, size) => Math.max(0, Math.min(size - 1, Math.round(state.number(key, 0))));

// --- attention -----------------------------------------------------------------------------------------------------------

/** All heads on a prompt, and one of them. known(): what is known of the model, or null: windows, shared heads. */
export function attentionCard({known, signal}) {
  const element = card('Attention', 'Left: a row a layer, a column a head. Right: the chosen head, a row a query and a column a key.');
  element.classList.add('wide');
  const lead = h('p', {'data-test': 'snapshot-head'});
  const left = h('div'), tools = h('span.card-tools'), right = h('div', {}, h('div.row.headed', {}, lead, tools));
  element.body.append(h('div.split', {}, left, right), h('p.about', {}, ramp('sizes', 'weight 0', 1, signal), '. Kept in 256 steps. Grey: masked.'));
  let now = null, grid = null, one = null;

  const place = () => ({layer: within('layer', now.layers), head: within('head', now.heads)});
  const spanOf = layer => ({window: known()?.windows[layer] ?? null, globals: known()?.config.window_globals ?? 0});
  const kvOf = head => (known() && known().config.n_head > known().kv_heads ? Math.floor(head * known().kv_heads / known().config.n_head) : null);

  function build() {
    grid = headGrid({
      picture: pictureOf(now), spanOf, kvOf, signal, picked: place(), onPick: picked => state.set(picked),
      describe: (layer, head) => [`layer ${layer}, head ${head}`, `step ${now.step}`],
    });
    grid.dataset.test = 'snapshot-heads';
    one = matrix({
      label: 'Attention weights of one head', signal, rows: 1, cols: 1, value: () => 0, range: [0, 1], cell: 22,
      hidden: (t, s) => !sees(spanOf(place().layer), t, s),
      describe: (t, s) => [`query ${now.pieces[t]} at ${t}`, `key ${now.pieces[s]} at ${s}`,
        sees(spanOf(place().layer), t, s) ? `weight ${(weightsOf(now, place())[t * now.ids.length + s] / 255).toFixed(3)}` : 'masked'],
    });
    one.dataset.test = 'snapshot-head-matrix';
    left.append(grid);
    right.append(one);
    exportable(element, {name: 'heads-of-a-step', canvas: grid, rows: () => [['step', 'layer', 'head', 'query', 'key', 'weight'], ...weightRows(now)]});
    exportable({tools}, {name: 'head-of-a-step', canvas: one, rows: () => one.rows()});
  }

  function showOne() {
    if (!now) return;
    const {layer, head} = place(), size = now.ids.length, weights = weightsOf(now, {layer, head});
    lead.textContent = `Layer ${layer}, head ${head}, at step ${now.step.toLocaleString('en')}`;
    grid.show({picked: {layer, head}});
    one.show({rows: size, cols: size, rowLabels: now.pieces, colLabels: now.pieces, value: (t, s) => weights[t * size + s] / 255});
  }

  state.on(['layer', 'head'], showOne, signal);
  return {element, show(prompt) {
    now = prompt;
    if (!grid) build();
    grid.show({picture: pictureOf(now)});
    showOne();
  }};
}

const pictureOf = ({attention, ids}) => ({thumbnails: attention, tokens: ids.length});

function* weightRows({step, attention, layers, heads, ids}) {
  const size = ids.length;
  for (let i = 0; i < layers * heads * size * size; i++) {
    const query = Math.floor(i / size) % size, head = Math.floor(i / size ** 2), key = i % size;
    if (key <= query) yield [step, Math.floor(head / heads), head % heads, query, key, attention[i] / 255];
  }
}

function weightsOf({attention, heads, ids}, {layer, head}) {
  const size = ids.length ** 2;
  return attention.subarray((layer * heads + head) * size, (layer * heads + head + 1) * size);
}

// --- the lens ------------------------------------------------------------------------------------------------------------

const SHOWN = [['', 'likeliest next'], ['rank', 'rank of the actual next']];

/** What each depth expects, or how it ranks what does come. */
export function depthCard({known, names, signal}) {
  const element = card('Logit lens', 'Last norm and output head applied to the residual stream behind each layer: what it holds for the '
    + 'likeliest next token, or the rank it gives the one that does come (1: likeliest). Columns: the token read.');
  element.classList.add('wide');
  const kind = () => (state.text('lens') === 'rank' ? 'rank' : '');
  const place = h('div'), legend = h('p.about');
  let now = null, size = 1, controls = null, laid = '';
  const from = () => Math.min(now.ids.length - size, Math.max(0, Math.round(state.number('from', 0))));
  const at = (r, c) => (now.layers - r) * now.ids.length + from() + c;
  const name = id => names()?.[id] ?? String(id);
  const rankText = (r, c) => (now.nextRank[at(r, c)] < 0 ? '' : String(now.nextRank[at(r, c)] + 1));
  const worst = () => known()?.vocab_size ?? now.nextRank.reduce((a, b) => Math.max(a, b + 1), 2);
  // Of the logarithm: from 10 to 1 is as much as from 100 to 10.
  const rankShare = rank => (rank < 0 ? NaN : 1 - Math.log(rank + 1) / Math.log(worst()));

  const grid = matrix({
    label: 'Logit lens by depth and position', signal, rows: 1, cols: 1, value: () => 0, range: [0, 1], cell: 90, cellY: 22, rowLabels: [''],
    describe(r, c) {
      const i = at(r, c), k = now.lensIds.shape[2];
      return [`${depthName(now.layers - r)}, behind ${now.pieces[from() + c]} at ${from() + c}`,
        ...Array.from({length: k}, (_, j) => `${j + 1}. ${name(now.lensIds[i * k + j])}  ${percent(now.lensP[i * k + j])}`),
        ...now.nextRank[i] < 0 ? [] : [`the next, ${now.pieces[from() + c + 1]}: rank ${now.nextRank[i] + 1}`]];
    },
  });
  grid.dataset.test = 'snapshot-lens';
  element.tools.prepend(segmented({label: 'Show', options: SHOWN, value: kind(), onInput: value => state.set({lens: value})}));
  element.body.append(place, grid, legend);
  exportable(element, {name: 'lens-of-a-step', canvas: grid, rows: () => [
    ['step', 'depth', 'position', 'token', 'likeliest next', 'its probability', 'rank of the actual next'],
    ...Array.from(now.nextRank, (rank, i) => {
      const k = now.lensIds.shape[2], position = i % now.ids.length;
      return [now.step, depthName(Math.floor(i / now.ids.length)), position, now.pieces[position], name(now.lensIds[i * k]), now.lensP[i * k],
        rank < 0 ? '' : rank + 1];
    })]});

  function layOut() {
    size = windowSize(element.body.clientWidth, now.pieces);
    controls = pager({tokens: now.ids.length, size, from});
    place.replaceChildren(controls);
  }

  function paint() {
    if (!now) return;
    const key = `${element.body.clientWidth} ${now.pieces.join()}`;
    if (key !== laid) layOut();
    laid = key;
    controls.show();
    const k = now.lensIds.shape[2], ofRank = kind() === 'rank';
    grid.show({
      rows: now.layers + 1, cols: size, rowLabels: Array.from({length: now.layers + 1}, (_, r) => depthName(now.layers - r)),
      colLabels: now.pieces.slice(from(), from() + size),
      words: ofRank ? rankText : (r, c) => name(now.lensIds[at(r, c) * k]),
      value: ofRank ? (r, c) => rankShare(now.nextRank[at(r, c)]) : (r, c) => now.lensP[at(r, c) * k],
    });
    legend.replaceChildren(...(ofRank ? ramp('sizes', `rank ${worst().toLocaleString('en')}`, '1, by its logarithm', signal)
      : ramp('sizes', 'probability 0', 1, signal)));
  }

  state.on(['lens', 'from'], paint, signal);
  addEventListener('resize', paint, {signal});
  return {element, show(prompt) {
    now = prompt;
    paint();
  }};
}

// --- surprisal -----------------------------------------------------------------------------------------------------------

export function surprisalCard({signal}) {
  const element = card('Surprisal', 'The stronger the colour, the more the token surprised the model of that step: '
    + '−log₂ of the probability that it gave it.');
  element.classList.add('wide');
  const place = h('div'), mean = h('p', {'data-test': 'snapshot-mean'});
  element.body.append(place, mean, h('p.about', {}, ramp('sizes', '0 bits', `${MOST_BITS} and more`, signal)));
  let now = null, strip = null, of = '';
  const hint = i => `${now.pieces[i]} · id ${now.ids[i]}${i ? ` · ${now.surprisal[i].toFixed(2)} bits` : ''}`;
  exportable(element, {name: 'surprisal-of-a-step', rows: () => [['step', 'position', 'id', 'token', 'surprisal in bits'],
    ...now.ids.map((id, i) => [now.step, i, id, now.pieces[i], i ? now.surprisal[i] : ''])]});
  return {element, show(prompt) {
    now = prompt;
    if (of !== now.ids.join()) {
      strip = tokenStrip({pieces: now.pieces, label: 'Tokens of the prompt', hint});
      strip.classList.add('tall');
      strip.dataset.test = 'snapshot-surprisal';
      place.replaceChildren(strip);
      of = now.ids.join();
    }
    strip.tint(i => (i ? now.surprisal[i] / MOST_BITS : null));
    const bits = now.surprisal.subarray(1);
    mean.textContent = bits.length ? `Mean ${short(bits.reduce((a, b) => a + b, 0) / bits.length)} bits a token at step ${now.step.toLocaleString('en')}.` : '';
  }};
}
