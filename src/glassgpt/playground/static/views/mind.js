// What the model thinks, depth by depth: the residual stream, the logit lens, ranks over layers, and what made a logit.

import {latest, post} from '../api.js';
import {attributionCards} from '../attribution.js';
import {chart, plain} from '../charts.js';
import {css, named, onTheme} from '../colors.js';
import {exportable} from '../export.js';
import {depthName, lensCard, pager, streamCard, windowSize} from '../lensgrid.js';
import {vocabulary} from '../models.js';
import * as state from '../state.js';
import {card, h, notice, percent, table} from '../ui.js';
import {watched, watchField} from '../watching.js';

const TOP = 5;

export default async function show(page, context) {
  const {signal, opened, info, ids, pieces} = context;
  const names = await vocabulary(opened, signal);
  const place = placesOf(context, names, page.clientWidth);
  const problem = h('div.problem');
  const controls = pager({tokens: ids.length, size: place.size, from: () => place.now().from, token: () => place.now().token});
  const grids = [lensCard({signal, ids, pieces, names, controls}), streamCard({signal, pieces})];
  const ranks = ranksCard({signal, names});
  const attribution = attributionCards({signal, info, names, ask: change => state.set({
    ...'token' in change ? {target: change.token} : {}, ...'against' in change ? {against: change.against} : {}})});
  page.append(problem, ...grids.map(({element}) => element), ranks.element, ...attribution.cards);
  const ask = (path, more) => post(path, opened.question({ids, ...more}), signal);

  async function showLens() {
    const {from, depth, token} = place.now();
    controls.show();
    const found = await ask('/api/lens', {start: from, stop: from + place.size, k: TOP});
    for (const grid of grids) {
      grid.show({found, start: from});
      grid.mark(depth, token);
    }
  }

  async function showPosition() {
    const {depth, token, watch} = place.now();
    const lens = await ask('/api/lens', {start: token, stop: token + 1, k: TOP, watch});
    // What it expects in the end, which the address need not name: its rank takes a second look.
    const last = [...lens.top_ids.subarray(-lens.top_ids.shape[2])], next = ids[token + 1] ?? null;
    const series = [...new Set([next, last[0], ...watch].filter(id => id !== null))];
    const found = await ask('/api/lens', {start: token, stop: token + 1, k: TOP, watch: series});
    ranks.show({found, series, next, likeliest: last[0], watch, depth, token, piece: pieces[token]});
    const target = place.idOf('target') ?? last[0], against = place.idOf('against');
    const other = against === target ? null : against;
    const answer = await ask('/api/attribution', {position: token, token: target, against: other});
    const choices = [...new Set([...last, ...series, target, other])].filter(id => id !== null);
    attribution.show({answer, position: token, token: target, against: other, choices});
  }

  const guarded = work => latest(async () => {
    try {
      await work();
      problem.replaceChildren();
    } catch (error) {
      if (!signal.aborted) problem.replaceChildren(notice(error.message, 'error'));
    }
  });
  const [askLens, askPosition] = [guarded(showLens), guarded(showPosition)];
  state.on(['from'], askLens, signal);
  state.on(['token', 'depth'], () => {
    const {depth, token} = place.now();
    for (const grid of grids) grid.mark(depth, token);
    ranks.choose(depth);
  }, signal);
  state.on(['token', 'watch', 'target', 'against'], askPosition, signal);
  await Promise.all([askLens(), askPosition()]);
}

/** What the address names, as far as this model and text have it. The chosen token: the last, or the middle of what is shown. */
function placesOf({info, ids, pieces}, names, width) {
  const size = windowSize(width, pieces);
  const within = (key, most, fallback) => Math.max(0, Math.min(most, Math.round(state.number(key, fallback))));
  return {
    size,
    now() {
      const token = within('token', ids.length - 1, ids.length - 1);
      const from = within('from', ids.length - size, Math.max(0, Math.min(ids.length - size, token - Math.floor(size / 2))));
      return {token, from, depth: within('depth', info.config.n_layer, info.config.n_layer), watch: watched(names.length)};
    },
    idOf(key) {
      const id = state.number(key);
      return id !== null && Number.isInteger(id) && id >= 0 && id < names.length ? id : null;
    },
  };
}

// --- ranks ---------------------------------------------------------------------------------------------------------------

/** Rank and probability of some tokens over the layers, behind one position, and the likeliest tokens at one depth. */
function ranksCard({signal, names}) {
  const element = card('Rank over layers', 'Behind one position: how many tokens the lens finds likelier at each depth, plus one (1: the likeliest), '
    + 'and the probability that it gives.');
  element.classList.add('wide');
  const lead = h('p', {'data-test': 'mind-position'}), list = h('div', {'data-test': 'mind-top'});
  let now = null;
  const field = watchField({names, color: n => named(now ? now.series.indexOf(now.watch[n]) : n)});
  onTheme(() => field.show(), signal);
  const depths = () => Array.from({length: now.found.norm.shape[0]}, (_, d) => d);
  const nameOf = id => `${names[id]}${id === now.next ? ' (comes next)' : id === now.likeliest ? ' (likeliest)' : ''}`;
  const values = (array, i) => depths().map(d => array[d * now.series.length + i]);

  const lines = chart({
    label: 'Rank and probability over the layers', signal, height: 380,
    traces: () => (now ? now.series.flatMap((id, i) => {
      const common = {
        name: plain(nameOf(id)), x: depths().map(shortDepth), mode: 'lines+markers', line: {color: named(i)}, marker: {symbol: i % 4, size: 7},
        legendgroup: String(id),
      };
      return [{...common, y: values(now.found.watch_rank, i).map(rank => rank + 1), hovertemplate: 'rank %{y}'},
        {...common, y: values(now.found.watch_p, i), yaxis: 'y2', showlegend: false, hovertemplate: '%{y:.3g}'}];
    }) : []),
    layout: () => ({
      showlegend: true, margin: {t: 30}, hovermode: 'x', xaxis: {anchor: 'y2', type: 'category', title: {text: 'depth'}},
      yaxis: {type: 'log', autorange: 'reversed', domain: [0.5, 1], title: {text: 'rank'}, dtick: 1, tickformat: ',d'},
      yaxis2: {gridcolor: css('line'), linecolor: css('line'), zerolinecolor: css('line'), automargin: true, rangemode: 'tozero',
        exponentformat: 'e', domain: [0, 0.42], title: {text: 'probability'}},
    }),
  });
  lines.dataset.test = 'rank-chart';
  element.body.append(lead, field, h('div.split.ranks', {}, lines, list));
  const rankRows = () => depths().flatMap(d => now.series.map((id, i) =>
    [depthName(d), id, names[id], now.found.watch_rank[d * now.series.length + i] + 1, now.found.watch_p[d * now.series.length + i]]));
  exportable(element, {name: 'ranks', canvas: lines, rows: () => [['depth', 'id', 'token', 'rank', 'probability'], ...rankRows()]});

  function choose(depth) {
    if (!now) return;
    const {found, series} = now, k = found.top_ids.shape[2], isLast = depth === found.norm.shape[0] - 1;
    const top = Array.from({length: k}, (_, j) => depth * k + j), at = i => depth * series.length + i;
    list.replaceChildren(
      h('h3', {}, `Likeliest at ${depth === 0 ? 'the embedding' : depthName(depth)}${isLast ? ', the last: what the model expects' : ''}`),
      table(['token', 'probability'], top.map(j => [names[found.top_ids[j]], percent(found.top_p[j])])),
      h('h3', {}, 'Rank and probability there'),
      table(['token', 'rank', 'probability'], series.map((id, i) =>
        [nameOf(id), h('span', {'data-rank-of': id}, found.watch_rank[at(i)] + 1), percent(found.watch_p[at(i)])])));
  }

  return {element, choose, show(given) {
    now = given;
    lead.replaceChildren('Behind ', h('strong.mono', {}, now.piece), ` at ${now.token}`,
      ...now.next === null ? [', the text’s last token.'] : ['; next comes ', h('strong.mono', {}, names[now.next]), '.']);
    field.show();
    lines.redraw();
    choose(now.depth);
  }};
}

const shortDepth = depth => (depth === 0 ? 'embedding' : String(depth - 1));
