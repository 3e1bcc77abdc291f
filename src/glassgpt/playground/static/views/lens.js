// Logit lens: the residual stream by depth, predictions and ranks over the layers, and what made a logit.
import {attempt, card, category, h, latest, onTheme, percent, post, state, table, vocabulary} from '../core/index.js';
import {axis, chart, depthName, lensCard, line, normCard, pager, trackedTokens, trackField,
  windowSize} from '../widgets/index.js';
import {attributionCards} from './attribution.js';

const TOP = 5;

export default async function show(page, context) {
  const {signal, opened, info, ids, pieces} = context;
  const names = await vocabulary(opened, signal);
  const size = windowSize(page.clientWidth, pieces), layers = info.config.n_layer;
  const position = () => state.index('position', ids.length, ids.length - 1);
  const depth = () => state.index('depth', layers + 1, layers);
  const from = () => state.index('from', ids.length - size + 1, Math.max(0, position() - Math.floor(size / 2)));
  const idOf = key => (state.number(key) === null ? null : state.index(key, names.length));
  const problem = h('div.problem');
  const controls = pager({tokens: ids.length, size, from, position});
  const lens = lensCard({names: () => names, vocabSize: () => info.vocab_size, controls, name: 'logit-lens',
    test: 'lens-grid', signal});
  const norms = normCard({signal});
  const ranks = ranksCard({signal, names}), attribution = attributionCards({signal, info, names});
  page.append(problem, lens.element, norms.element, ranks.element, ...attribution.cards);
  const request = (path, more) => post(path, opened.request({ids, ...more}), signal);
  const select = () => [lens, norms].forEach(grid => grid.select(depth(), position()));
  async function showGrids() {
    controls.show();
    const start = from();
    const found = await request('/api/lens', {start, stop: start + size, k: TOP});
    const data = {
      pieces, ids, start, from: start, size, stride: size, depths: layers + 1, k: found.top_ids.shape[2],
      topIds: found.top_ids, topP: found.top_p, nextRank: found.next_rank, nextP: found.next_p, ...found};
    [lens, norms].forEach(grid => grid.show(data));
    select();
  }
  async function showPosition() {
    const at = position(), tracked = trackedTokens(names.length), next = ids[at + 1] ?? null;
    const range = {start: at, stop: at + 1, k: TOP};
    const first = await request('/api/lens', {...range, watch: tracked});
    const top = [...first.top_ids.subarray(-first.top_ids.shape[2])];
    // The final prediction is also tracked; its rank needs a second request.
    const series = [...new Set([next, top[0], ...tracked].filter(id => id !== null))];
    const found = await request('/api/lens', {...range, watch: series});
    ranks.show({found, series, next, top: top[0], tracked, position: at, piece: pieces[at]}, depth());
    const target = idOf('target') ?? top[0], against = idOf('against') === target ? null : idOf('against');
    const answer = await request('/api/attribution', {position: at, token: target, against});
    const choices = [...new Set([...top, ...series, target, against])].filter(id => id !== null);
    attribution.show({answer, position: at, target, against, choices});
  }
  const [updateGrids, updatePosition] = [showGrids, showPosition].map(work => latest(() => attempt(problem, signal,
    work)));
  state.on(['from'], updateGrids, signal);
  state.on(['position', 'depth'], () => {
    select();
    controls.show();
    ranks.showDepth(depth());
  }, signal);
  state.on(['position', 'track', 'target', 'against'], updatePosition, signal);
  await Promise.all([updateGrids(), updatePosition()]);
}

// Rank and probability of some tokens by layer, after one position, and the top tokens at one depth.
function ranksCard({signal, names}) {
  const lead = h('p', {test: 'lens-position'}), list = h('div', {test: 'lens-top'});
  let now = null;
  const field = trackField({names, color: n => category(now ? now.series.indexOf(now.tracked[n]) : n)});
  onTheme(() => field.show(), signal);
  const depths = () => [...Array(now.found.norm.shape[0]).keys()];
  const at = (depth, i) => depth * now.series.length + i;
  const nameOf = id => `${names[id]}${id === now.next ? ' (next token)' : id === now.top ? ' (top prediction)' : ''}`;
  const lines = chart({
    label: 'Rank and probability by layer', signal, height: 380, test: 'rank-chart',
    traces: () => (now ? now.series.flatMap((id, i) => {
      const trace = (values, more) => line(nameOf(id), depths().map(d => (d ? String(d - 1) : 'embedding')),
        depths().map(d => values[at(d, i)]), i, {symbol: i % 4, legendgroup: String(id), ...more});
      return [trace(now.found.watch_rank.map(rank => rank + 1), {hovertemplate: 'rank %{y}'}),
        trace(now.found.watch_p, {yaxis: 'y2', showlegend: false, hovertemplate: '%{y:.3g}'})];
    }) : []),
    layout: () => ({
      showlegend: true, margin: {t: 30}, hovermode: 'x', xaxis: axis('depth', {anchor: 'y2', type: 'category'}),
      yaxis: axis('rank', {type: 'log', autorange: 'reversed', domain: [0.5, 1], dtick: 1, tickformat: ',d'}),
      yaxis2: axis('probability', {rangemode: 'tozero', domain: [0, 0.42]}),
    }),
  });
  const element = card('Rank by layer', {
    wide: true, about: 'The rank (1: top prediction) and the probability of tokens at each depth, after one position.',
    save: {name: 'ranks', figure: lines, rows: () => [
      ['depth', 'id', 'token', 'rank', 'probability'], ...depths().flatMap(d => now.series.map((id, i) =>
        [depthName(d), id, names[id], now.found.watch_rank[at(d, i)] + 1, now.found.watch_p[at(d, i)]]))]},
  }, lead, field, h('div.split.ranks', {}, lines, list));
  function showDepth(depth) {
    if (!now) return;
    const {found, series} = now, k = found.top_ids.shape[2];
    const where = `${depth === 0 ? 'the embedding' : depthName(depth)}`
      + (depth === found.norm.shape[0] - 1 ? ', the last: the model’s prediction' : '');
    list.replaceChildren(
      h('h3', {}, `Top predictions at ${where}`),
      table(['token', 'probability'], Array.from({length: k}, (_, j) =>
        [names[found.top_ids[depth * k + j]], percent(found.top_p[depth * k + j])])),
      h('h3', {}, 'Rank and probability there'),
      table(['token', 'rank', 'probability'], series.map((id, i) => [nameOf(id),
        h('span', {'data-rank-of': id}, found.watch_rank[at(depth, i)] + 1), percent(found.watch_p[at(depth, i)])])));
  }
  return {element, showDepth, show(data, depth) {
    now = data;
    lead.replaceChildren('After ', h('strong.mono', {}, now.piece), ` at ${now.position}`,
      ...now.next === null ? [', the last token of the text.'] : ['; the next token is ',
        h('strong.mono', {}, names[now.next]), '.']);
    field.show();
    lines.redraw();
    showDepth(depth);
  }};
}
