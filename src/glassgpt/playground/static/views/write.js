// What it writes: the distribution of the next token, token by token with branches, and whole continuations.

import {post} from '../api.js';
import {barList, key} from '../barlist.js';
import {chart} from '../charts.js';
import {css, onTheme} from '../colors.js';
import {continuations} from '../continuations.js';
import {exportable} from '../export.js';
import {vocabulary} from '../models.js';
import {pathsOf, tagOf} from '../paths.js';
import {distribution, entropy, outOfSight, ranked, shareOf, softmax, tokenAt} from '../sampling.js';
import * as state from '../state.js';
import {announce, card, facts, h, percent, short} from '../ui.js';
import {seed, settings, settingsControls, writtenCard} from '../written.js';

const SHOWN = 25;
const FOUND = 8;
// What a full bar stands for: the least of these that holds the largest, so that bars do not jump with every step of a slider.
const FULL = [0.05, 0.1, 0.25, 0.5, 1];
const SERIES = [{name: 'the model', color: 'accent'}, {name: 'drawn from', color: 'warm'}];

export default async function show(page, context) {
  const {signal, opened, info, ids: prompt, pieces} = context;
  const names = await vocabulary(opened, signal);
  const tag = tagOf(`${info.name} ${info.step}`, prompt);
  let paths = pathsOf(state.text('w'), tag, info.vocab_size);
  const idsNow = () => [...prompt, ...paths.current.map(({id}) => id)];

  // How the next token is distributed at this point; `ids` tells whether it is still this point.
  let point = null;

  const written = writtenCard({
    prompt: pieces.join(info.tokenizer === null ? ' ' : ''), names, controls: settingsControls(info.vocab_size),
    onStep: step, onLikeliest: () => point && take(point.order[0]), onReject: reject, onBack: () => change(() => paths.back()),
    onBranch: () => change(() => paths.branch()), onCut: i => change(() => paths.branch(i)),
    onJump: i => change(() => paths.jump(i)), onDrop: i => change(() => paths.drop(i)),
  });
  const next = nextCard(names, info.vocab_size, take);
  const ranks = ranksCard(signal);
  const search = searchCard(names, take);
  page.append(written.card, next.card,
    h('div.stack', {}, ranks.card, search.card), continuations({...context, idsNow, settings, seed}));

  async function look() {
    const ids = idsNow();
    point = null;
    written.show(paths, false);
    const seen = ids.slice(outOfSight(ids.length, info.most_tokens));
    try {
      const {logits} = await post('/api/next', opened.question({ids: seen}), signal);
      await fillIn(ids, seen);
      if (signal.aborted || String(ids) !== String(idsNow())) return;
      const p = softmax(logits);
      point = {ids, logits, order: ranked(logits), p, entropy: entropy(p), isCut: seen.length < ids.length};
    } catch (error) {
      if (!signal.aborted) written.fail(error.message);
      return;
    }
    written.show(paths, true);
    refresh();
  }

  /** The probabilities of tokens that came with a link. */
  async function fillIn(ids, seen) {
    if (paths.current.every(({p}) => p !== null)) return;
    const path = paths.current;
    const {surprisal} = await post('/api/predictions', opened.question({ids: seen}), signal);
    path.forEach((token, i) => {
      const place = prompt.length + i - (ids.length - seen.length);
      token.p ??= place > 0 ? 2 ** -surprisal[place] : null;
    });
  }

  /** Show what the settings make of the logits that are there. */
  function refresh() {
    if (!point) return;
    point.q = distribution(point.logits, settings(info.vocab_size), {order: point.order, without: paths.rejected});
    point.rejected = paths.rejected;
    next.show(point);
    ranks.show(point);
    search.show(point);
  }

  function change(how) {
    how();
    state.set({w: paths.toText(tag)});
    look();
  }

  function take(id) {
    if (!point) return;
    announce(`${names[id]}, ${percent(point.p[id])}`);
    change(() => paths.take({id, p: point.p[id]}));
  }

  function step() {
    if (!point) return;
    // The place and the try name the draw, so that the same seed writes the same text however often one goes back.
    take(tokenAt(point.q, shareOf(seed(), point.ids.length, paths.rejected.size)));
  }

  async function reject() {
    if (!point || !paths.current.length) return;
    change(() => paths.reject(info.vocab_size));
    await settled();
    step();
  }

  /** Once the distribution of this point is there. */
  async function settled() {
    while (!point && !signal.aborted && !written.hasFailed()) await new Promise(resolve => requestAnimationFrame(resolve));
  }

  state.on(['t', 'k', 'p', 'minp', 'seed'], refresh, signal);
  state.on(['w'], () => {
    if (state.text('w') === paths.toText(tag)) return;
    paths = pathsOf(state.text('w'), tag, info.vocab_size);  // Back, or a link
    look();
  }, signal);
  onTheme(() => written.show(paths, point !== null), signal);
  await look();
}

// --- the next token ------------------------------------------------------------------------------------------------------

function nextCard(names, vocabSize, onPick) {
  const it = card('The next token', `The ${SHOWN} likeliest of all ${vocabSize.toLocaleString('en')}: softmax of the logits, and what `
    + 'remains of it after the settings. Choose one to write it.');
  const list = barList({label: 'The likeliest next tokens', series: SERIES, onPick: row => onPick(row.id),
    most: largest => FULL.find(full => largest <= full) ?? 1});
  list.dataset.test = 'next-bars';
  const full = h('span.soft');
  it.body.append(h('div.row', {}, key(SERIES), full), list);
  let point = null;
  exportable(it, {name: 'next-token', canvas: list, rows: () => [['rank', 'id', 'token', 'logit', 'probability', 'drawn from'],
    ...Array.from(point.order, (id, rank) => [rank + 1, id, names[id], point.logits[id], point.p[id], point.q[id]])]});
  return {card: it, show(now) {
    point = now;
    list.show(Array.from(point.order.subarray(0, SHOWN), (id, rank) => rowOf(point, names, id, rank)));
    full.textContent = `full bar: ${percent(list.scale())}`;
  }};
}

function rowOf({logits, p, q, rejected}, names, id, rank) {
  return {id, label: names[id], values: [p[id], q[id]], texts: [percent(p[id]), q[id] ? percent(q[id]) : '–'], faint: q[id] === 0,
    title: `id ${id} · rank ${rank + 1} · logit ${short(logits[id])}${rejected.has(id) ? ' · rejected here' : ''}`};
}

const sumOf = values => values.reduce((a, b) => a + b, 0);

function keptOf({p, q}) {
  let kept = 0, mass = 0;
  for (let i = 0; i < q.length; i++) {
    if (!q[i]) continue;
    kept++;
    mass += p[i];
  }
  return {kept, mass};
}

// --- rank and probability ------------------------------------------------------------------------------------------------

/** Ranks from 1 to `size`, at most `most` of them, even on a logarithmic scale. */
function ranksShown(size, most = 240) {
  const ranks = new Set([1, size]);
  for (let i = 0; i < most; i++) ranks.add(Math.round(size ** (i / most)));
  return [...ranks].sort((a, b) => a - b);
}

function ranksCard(signal) {
  const it = card('All tokens', 'Rank and probability of the whole vocabulary, both logarithmic, at up to 240 ranks (the CSV has all).');
  let point = null;
  let wanted = 0;
  const lines = () => {
    if (!point) return [];
    const ranks = ranksShown(point.p.length);
    const drawn = ranks.filter(rank => point.q[point.order[rank - 1]]);
    const line = (series, x, values) => ({name: series.name, x, y: x.map(rank => values[point.order[rank - 1]]), type: 'scatter',
      mode: 'lines+markers', line: {color: css(series.color), width: 1.5}, marker: {size: 4, color: css(series.color)}});
    return [line(SERIES[0], ranks, point.p), line(SERIES[1], drawn, point.q)];
  };
  const isWhole = () => point?.q.every(q => q > 0) ?? true;
  const drawing = chart({label: 'Probability by rank', height: 250, signal, traces: lines, layout: () => {
    const last = point ? point.order.findLastIndex(id => point.q[id] > 0) + 1 : 1;
    const axes = {
      xaxis: {type: 'log', title: {text: 'rank'}, dtick: 1, tickformat: ',d'},
      yaxis: {type: 'log', title: {text: 'probability'}, nticks: 6},
    };
    if (isWhole()) return {...axes, shapes: [], annotations: []};
    const color = css('warm');
    return {
      ...axes, shapes: [{type: 'line', x0: last, x1: last, yref: 'paper', y0: 0, y1: 1, line: {color, dash: 'dot', width: 1.5}}],
      annotations: [{x: Math.log10(last), yref: 'paper', y: 1, yanchor: 'top', xanchor: last > point.p.length ** 0.6 ? 'right' : 'left',
        text: `kept up to ${last.toLocaleString('en')}`, showarrow: false, font: {color}}],
    };
  }});
  const numbers = h('div', {'data-test': 'next-facts'});
  it.body.append(numbers, drawing);
  exportable(it, {name: 'ranks', canvas: drawing, rows: () => [['rank', 'probability', 'drawn from'],
    ...Array.from(point.order, (id, i) => [i + 1, point.p[id], point.q[id]])]});

  /** A slider moves faster than a chart is drawn: draw what is wanted last, once. */
  async function redraw() {
    if (wanted++) return;
    for (let drawn = 0; drawn !== wanted;) {
      drawn = wanted;
      await drawing.redraw();
    }
    wanted = 0;
  }

  return {card: it, show(now) {
    point = now;
    numbers.replaceChildren(inNumbers(point));
    redraw();
  }};
}

function inNumbers(point) {
  const {kept, mass} = keptOf(point);
  return facts([
    ['sum over the whole vocabulary', h('span', {'data-test': 'next-sum'}, sumOf(point.p).toFixed(6))],
    ['sum of what is drawn from', h('span', {'data-test': 'drawn-sum'}, sumOf(point.q).toFixed(6))],
    ['tokens kept', h('span', {'data-test': 'next-kept'}, `${kept.toLocaleString('en')} of ${point.p.length.toLocaleString('en')}`)],
    ['their probability under the model', percent(mass)],
    ['entropy', h('span', {'data-test': 'next-entropy'}, `${point.entropy.toFixed(3)} bits`)],
    ['entropy of what is drawn from', `${entropy(point.q).toFixed(3)} bits`],
    ...(point.isCut ? [['the context is full', 'the older half of the text is out of sight']] : []),
  ]);
}

// --- a token of the vocabulary -------------------------------------------------------------------------------------------

function searchCard(names, onPick) {
  const it = card('Find a token', 'Part of a token; a space counts as ␣.');
  const list = barList({label: 'Tokens found', series: SERIES, onPick: row => onPick(row.id)});
  list.dataset.test = 'found';
  const told = h('p.about', {role: 'status'});
  const field = h('input', {type: 'text', 'aria-label': 'Part of a token', placeholder: 'token', 'data-test': 'find',
    oninput: () => show(point)});
  it.body.append(field, told, list);
  exportable(it, {name: 'found', canvas: list, rows: list.rows});
  let point = null;

  function show(now) {
    point = now;
    const wanted = field.value.replaceAll(' ', '␣').toLowerCase();
    if (!point || !wanted) return void (list.show([]), told.textContent = '');
    const rankOf = new Map();
    let found = 0;
    point.order.forEach((id, rank) => {
      const name = names[id].toLowerCase();
      if (!name.includes(wanted)) return;
      found++;
      // Whole tokens first, then the likeliest.
      if (rankOf.size < FOUND || name === wanted) rankOf.set(id, rank);
    });
    const isWhole = id => names[id].toLowerCase() === wanted;
    const shown = [...rankOf.keys()].sort((a, b) => isWhole(b) - isWhole(a) || rankOf.get(a) - rankOf.get(b)).slice(0, FOUND);
    told.textContent = found ? `${found.toLocaleString('en')} found` : 'No token has it.';
    list.show(shown.map(id => ({...rowOf(point, names, id, rankOf.get(id)), label: `${rankOf.get(id) + 1}. ${names[id]}`})));
  }
  return {card: it, show};
}
