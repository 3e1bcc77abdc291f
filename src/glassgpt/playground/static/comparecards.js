// Two models on one text, side by side: how much it surprises them, their heads, what they expect, how they are made.

import {latest, post} from './api.js';
import {chart} from './charts.js';
import {named, shade} from './colors.js';
import {exportable} from './export.js';
import {headGrid} from './headgrid.js';
import {depthName} from './lensgrid.js';
import {matrix} from './matrix.js';
import {divergence, entropy, ranked, softmax} from './sampling.js';
import {bitsOf} from './segments.js';
import {sees} from './span.js';
import * as state from './state.js';
import {bar, card, facts, h, numberField, notice, percent, ramp, short, table, tokenStrip} from './ui.js';

const MOST_BITS = 12, MOST_DIFFERENCE = 6, EXPECTED = 10;
const RANKS = [0, 1, 2, 3, 4, 5].flatMap(power => [1, 2, 5].map(digit => digit * 10 ** power));

const sum = values => values.reduce((a, b) => a + b, 0);
const titled = (side, ...children) => h('div', {}, h('h3', {}, `${side.mark} · ${side.label}`), ...children);

/** A card of two columns: make(side) gives each its content. */
function pairCard(title, about, pair, make) {
  const element = card(title, about);
  element.classList.add('wide');
  element.body.append(h('div.split', {}, pair.map(side => titled(side, make(side)))));
  return element;
}

// --- surprisal -----------------------------------------------------------------------------------------------------------

/** The bits of each stretch under both, as far as both gave it a probability. */
export function comparedBits([a, b], segments) {
  return segments.map(segment => ({...segment, bits: [bitsOf(a.seen.surprisal, segment.a), bitsOf(b.seen.surprisal, segment.b)]}));
}

export const differenceOf = ({bits: [a, b]}) => b - a;

export function totalsCard(pair, compared) {
  const element = card('In all', 'Bits: −log₂ of the probabilities given, added up. Fewer are better.');
  const numbers = pair.map((side, k) => {
    const own = [...side.seen.surprisal].filter(bits => !Number.isNaN(bits));
    const both = (compared ?? []).filter(each => !Number.isNaN(differenceOf(each)));
    return {tokens: side.cut.ids.length, bits: sum(own), predicted: own.length,
      common: sum(both.map(({bits}) => bits[k])), bytes: sum(both.map(({bytes}) => bytes))};
  });
  const per = (bits, n) => (n ? (bits / n).toFixed(3) : '–');
  const rows = [
    ['tokens', ...numbers.map(({tokens}) => tokens.toLocaleString('en'))],
    ['bits', ...numbers.map(({bits}) => bits.toFixed(2))],
    ['bits a token', ...numbers.map(({bits, predicted}) => per(bits, predicted))],
    ...compared ? [['bits of what both predicted', ...numbers.map(({common}) => common.toFixed(2))],
      ['bits a byte of it', ...numbers.map(({common, bytes}) => per(common, bytes))]] : [],
  ];
  const shown = table(['', ...pair.map(({mark}) => mark)], rows);
  shown.classList.add('worded');
  shown.dataset.test = 'totals';
  element.body.append(shown);
  if (!compared) element.body.append(notice('The two do not cut this text into the same bytes, so that no stretch of it can be held against the other’s.'));
  exportable(element, {name: 'totals', rows: () => [['', ...pair.map(({label}) => label)], ...rows]});
  return element;
}

/** Both strips, and the difference. chosen(): the number of a stretch; `mark()` follows it. */
export function surprisalCard(pair, compared, {chosen, onPick, signal}) {
  const element = card('Surprisal', 'The stronger the colour, the more the token surprised the model. Below: how many more bits B needed '
    + '(orange) or fewer (blue). '
    + 'Choose a token to see what was expected in its place.');
  element.classList.add('wide');
  const pieceOf = ({a}) => pair[0].cut.pieces.slice(...a).join('');
  const strips = pair.map((side, k) => {
    const {surprisal} = side.seen, {pieces, ids, partial} = side.cut, key = 'ab'[k];
    const strip = tokenStrip({pieces, partial, label: `Surprisal under ${side.label}`, share: i => (i ? surprisal[i] / MOST_BITS : null),
      hint: i => `${pieces[i]} · id ${ids[i]}${i ? ` · ${surprisal[i].toFixed(2)} bits` : ''}`,
      onPick: i => compared && onPick(compared.findIndex(each => i >= each[key][0] && i < each[key][1]))});
    strip.classList.add('tall');
    strip.dataset.test = `strip-${key}`;
    return strip;
  });
  const difference = compared && tokenStrip({
    pieces: compared.map(pieceOf), label: 'Difference of the two', kind: 'signs', onPick,
    share: i => (Number.isNaN(differenceOf(compared[i])) ? null : 0.5 + differenceOf(compared[i]) / (2 * MOST_DIFFERENCE)),
    hint: i => `${pieceOf(compared[i])} · A ${short(compared[i].bits[0])}, B ${short(compared[i].bits[1])} bits`,
  });
  element.body.append(h('div.split', {}, pair.map((side, k) => titled(side, strips[k]))),
    h('p.about', {}, ramp('sizes', '0 bits', `${MOST_BITS} and more`, signal)));
  if (difference) {
    difference.classList.add('tall');
    difference.dataset.test = 'difference';
    element.body.append(h('h3', {}, 'Difference, B − A'), difference, h('p.about', {},
      ramp('signs', `B ${MOST_DIFFERENCE} bits better`, `B ${MOST_DIFFERENCE} bits worse`, signal)));
    exportable(element, {name: 'difference', rows: () => [['stretch', 'bytes', 'bits under A', 'bits under B', 'B - A'],
      ...compared.map(each => [pieceOf(each), each.bytes, ...each.bits, differenceOf(each)])]});
  }
  return {element, mark() {
    const at = compared?.[chosen()];
    if (!at) return;
    difference.mark(chosen());
    strips.forEach((strip, k) => strip.press(i => i >= at['ab'[k]][0] && i < at['ab'[k]][1]));
  }};
}

// --- heads ---------------------------------------------------------------------------------------------------------------

/** The keys of the address for a side's layer and head. */
const HEAD_KEYS = [['layer', 'head'], ['layer2', 'head2']];

export function headsCard(pair, {signal}) {
  const parts = pair.map((side, k) => oneSidesHeads(side, HEAD_KEYS[k], signal));
  const element = pairCard('Heads', 'A row a layer, a column a head; below, the chosen one: a row a query, a column a key. Grey: masked.', pair,
    side => parts[pair.indexOf(side)].element);
  element.body.append(h('p.about', {}, ramp('sizes', 'weight 0', 1, signal)));
  return {element, show: () => Promise.all(parts.map(part => part.show()))};
}

function oneSidesHeads({mark, opened, cut, heads: picture, info}, [layerKey, headKey], signal) {
  const [layers, heads] = picture.thumbnails.shape, {ids, pieces} = cut;
  const within = (key, size) => Math.max(0, Math.min(size - 1, Math.round(state.number(key, 0))));
  const place = () => ({layer: within(layerKey, layers), head: within(headKey, heads)});
  const spanOf = layer => ({window: info.windows[layer], globals: info.config.window_globals});
  const sharedBy = heads / info.kv_heads;
  const pick = ({layer, head}) => state.set({[layerKey]: layer, [headKey]: head});
  const field = (label, key, size) => numberField({label, min: 0, max: size - 1, value: place()[label], onInput: value => state.set({[key]: value})});
  const fields = h('div.row'), problem = h('div'), ofAll = h('div.row'), ofOne = h('div.row');
  const grid = headGrid({
    picture, spanOf, kvOf: head => (sharedBy > 1 ? Math.floor(head / sharedBy) : null), signal, picked: place(), onPick: pick,
    describe: (layer, head) => [`layer ${layer}, head ${head}`, `mean entropy of its rows ${picture.entropies[layer * heads + head].toFixed(3)} bits`],
  });
  grid.dataset.test = `heads-${layerKey}`;
  let weights = null;
  const span = () => spanOf(place().layer);
  const one = matrix({
    label: 'Attention weights of the chosen head', signal, rows: ids.length, cols: ids.length, value: () => 0, range: [0, 1],
    rowLabels: pieces, colLabels: pieces,
    hidden: (t, s) => !sees(span(), t, s),
    describe: (t, s) => [`query ${pieces[t]} at ${t}`, `key ${pieces[s]} at ${s}`,
      sees(span(), t, s) ? `weight ${weights ? weights[t * ids.length + s].toFixed(4) : '…'}` : 'masked'],
  });
  one.dataset.test = `head-matrix-${layerKey}`;
  exportable({tools: ofAll}, {name: `heads-${mark}`, canvas: grid, rows: () => [['layer', 'head', 'mean entropy in bits'],
    ...Array.from(picture.entropies, (bits, i) => [Math.floor(i / heads), i % heads, bits])]});
  exportable({tools: ofOne}, {name: `head-${mark}`, canvas: one, rows: () => one.rows()});
  return {
    element: h('div.stack', {}, ofAll, grid, h('div.row', {}, fields, ofOne), problem, one),
    show: latest(async () => {
      grid.show({picked: place()});
      fields.replaceChildren(field('layer', layerKey, layers), field('head', headKey, heads));
      try {
        weights = (await post('/api/head', opened.question({ids, ...place()}), signal)).pattern;
        one.show({values: weights});
        problem.replaceChildren();
      } catch (error) {
        if (!signal.aborted) problem.replaceChildren(notice(error.message, 'error'));
      }
    }),
  };
}

// --- what is expected ----------------------------------------------------------------------------------------------------

/** Distributions and ranks before the chosen stretch. */
export function expectedCards(pair, compared, {chosen, signal}) {
  const next = card('Expected in its place', 'What each gives the most probability, right before the chosen token.');
  const ranks = card('Rank over depth', 'Where the logit lens of each depth ranks the token that does come (1: likeliest), '
    + 'from the embedding (0) to the last layer (1).');
  const apart = card('How far apart', 'The two distributions over the whole vocabulary.');
  const place = h('div', {'data-test': 'expected'}), problem = h('div');
  next.body.append(place);
  let rows = [], lenses = null, distances = [];
  exportable(next, {name: 'expected', rows: () => [['token', 'probability under A', 'under B'], ...rows]});
  exportable(apart, {name: 'how-far-apart', rows: () => [['', 'value'], ...distances]});
  const drawn = chart({
    label: 'Rank of the token over depth', signal, height: 280,
    traces: () => (lenses ?? []).map(({rank, layers}, k) => ({
      name: `${pair[k].mark} · ${pair[k].label}`, x: rank.map((_, d) => d / layers), y: rank, mode: 'lines+markers',
      customdata: rank.map((_, d) => depthName(d)), hovertemplate: 'rank %{y}, %{customdata}',
      line: {color: named(k), width: 2, dash: k ? 'dash' : 'solid'}, marker: {color: named(k), size: 6, symbol: k ? 'square' : 'circle'},
    })),
    layout: () => ({showlegend: true, margin: {t: 30}, xaxis: {title: {text: 'depth'}, range: [-0.03, 1.03]},
      // Rank 1 at the top, always.
      yaxis: {type: 'log', range: [Math.log10(1.3 * Math.max(2, ...(lenses ?? []).flatMap(({rank}) => rank))), Math.log10(0.85)], title: {text: 'rank'},
        tickformat: ',d', tickvals: RANKS}}),
  });
  drawn.dataset.test = 'ranks';
  ranks.body.append(problem, drawn);
  exportable(ranks, {name: 'rank-over-depth', png: () => drawn.figure.png(), svg: () => drawn.figure.svg(), rows: () => drawn.rows()});

  const firsts = () => [compared[chosen()].a[0], compared[chosen()].b[0]];

  const show = latest(async () => {
    ranks.hidden = apart.hidden = !compared;
    if (!compared) return void place.replaceChildren(notice('No place of this text can be held against the same place of the other.'));
    const first = firsts();
    drawn.hidden = apart.hidden = first.includes(0);
    if (first.includes(0)) {
      problem.replaceChildren(notice('Nothing comes before the first token: there is no rank.'));
      return void place.replaceChildren(notice('A model gives no probability to the first token.'));
    }
    try {
      const logits = await Promise.all(pair.map((side, k) => askNext(side, first[k], signal)));
      lenses = await Promise.all(pair.map((side, k) => askLens(side, first[k], signal)));
      if (signal.aborted) return;
      problem.replaceChildren();
      rows = bothTops(pair, logits);
      place.replaceChildren(...expectedTable(pair, rows, first));
      distances = measures(pair, logits);
      apart.body.replaceChildren(...told(distances, hasSameVocabulary(pair, logits)));
      drawn.redraw();
    } catch (error) {
      if (!signal.aborted) problem.replaceChildren(notice(error.message, 'error'));
    }
  });
  return {cards: [next, h('div.stack', {}, ranks, apart)], show};
}

const askNext = async ({opened, cut}, first, signal) =>
  (await post('/api/next', opened.question({ids: cut.ids, position: first - 1}), signal)).logits;

async function askLens({opened, cut}, first, signal) {
  const found = await post('/api/lens', opened.question({ids: cut.ids, start: first - 1, stop: first, k: 1}), signal);
  return {rank: Array.from(found.next_rank, rank => rank + 1), layers: found.next_rank.shape[0] - 1};
}

/** The likeliest tokens of both: [piece, probability under A, under B], null where a vocabulary has none of that look. */
function bothTops(pair, logits) {
  const p = logits.map(softmax);
  const idOf = pair.map(({names}, k) => new Map(names.slice(0, logits[k].length).map((name, id) => [name, id])));
  const same = hasSameVocabulary(pair, logits);
  const found = new Map();
  pair.forEach(({names}, k) => {
    for (const id of ranked(logits[k]).subarray(0, EXPECTED)) {
      const of = j => (same || j === k ? id : idOf[j].get(names[id]) ?? null);
      const row = [0, 1].map(j => (of(j) === null ? null : p[j][of(j)]));
      found.set(names[id], [names[id], ...row]);
    }
  });
  return [...found.values()].sort((x, y) => Math.max(y[1] ?? 0, y[2] ?? 0) - Math.max(x[1] ?? 0, x[2] ?? 0));
}

const hasSameVocabulary = ([a, b], [p, q]) => p.length === q.length && a.names.slice(0, p.length).every((name, id) => name === b.names[id]);

function expectedTable(pair, rows, first) {
  const cell = (p, k) => (p === null ? '–' : h('span.both', {}, bar(p, named(k)), percent(p)));
  const actual = pair.map(({cut}, k) => cut.pieces[first[k]]);
  const shown = table(['token', ...pair.map(({mark}) => mark)], rows.map(([piece, ...p]) => [
    actual.includes(piece) ? h('strong', {title: 'the one that does come'}, piece) : piece, ...p.map(cell)]));
  shown.dataset.test = 'expected-table';
  return [h('p', {}, 'Before ', h('span.mono', {}, actual[0] === actual[1] ? actual[0] : actual.join(' and ')), ':'), shown];
}

/** How far the two distributions are apart in bits, where they are over the same ids: [name, value] pairs. */
function measures(pair, logits) {
  const p = logits.map(softmax);
  const entropies = pair.map(({mark}, k) => [`entropy of ${mark}`, entropy(p[k])]);
  if (!hasSameVocabulary(pair, logits)) return entropies;
  return [...entropies, ['D(A ‖ B) = Σ pA log₂(pA / pB)', divergence(logits[0], logits[1])], ['D(B ‖ A)', divergence(logits[1], logits[0])],
    ['Jensen–Shannon', jensenShannon(...p)]];
}

function told(distances, isSame) {
  const list = facts(distances.map(([name, bits]) => [name, `${bits.toFixed(4)} bits`]));
  list.dataset.test = 'divergences';
  return [list, isSame ? '' : h('p.about', {}, 'The vocabularies differ: tokens are matched by their look, and a divergence has no meaning.')];
}

/** The mean divergence of both from their mean, in bits: 0 for the same, 1 at most. */
const jensenShannon = (p, q) => Math.max(0, entropy(p.map((x, i) => (x + q[i]) / 2)) - (entropy(p) + entropy(q)) / 2);

// --- how they are made ---------------------------------------------------------------------------------------------------

export function settingsCard(pair) {
  const element = card('How they are made', 'The settings in which the two models differ.');
  const settings = ({info}) => ({...info.config, parameters: info.parameters, tokenizer: info.tokenizer, 'kv heads': info.kv_heads, 'head width': info.head_width,
    'inner width': info.inner_width,
    windows: info.windows.every(each => each === null) ? null : info.windows.map(each => each ?? '∞').join(' '), step: info.step});
  const [a, b] = pair.map(settings);
  const keys = [...new Set([...Object.keys(a), ...Object.keys(b)])];
  const text = value => (typeof value === 'number' ? value.toLocaleString('en', {maximumFractionDigits: 8}) : String(value ?? 'none'));
  const differing = keys.filter(key => text(a[key]) !== text(b[key]));
  const rows = differing.map(key => [key, text(a[key]), text(b[key])]);
  element.body.append(rows.length ? table(['', ...pair.map(({mark}) => mark)], rows) : notice('All settings are the same.'),
    h('p.about', {}, `${keys.length - differing.length} settings are the same in both.`));
  element.dataset.test = 'settings';
  exportable(element, {name: 'settings', rows: () => [['setting', ...pair.map(({label}) => label)], ...rows]});
  return element;
}
