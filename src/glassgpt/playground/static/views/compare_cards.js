// Two models on one text: their attention heads, their predictions, and how far these are apart.
import {attempt, bar, bound, card, category, entropy, exportButtons, facts, h, jensenShannon, klDivergence, latest,
  notice, numberField, percent, post, ramp, ranked, softmax, spanOf, state, table} from '../core/index.js';
import {axis, chart, depthName, headGrid, headMatrix, line} from '../widgets/index.js';

const TOP = 10;
const RANK_TICKS = [0, 1, 2, 3, 4, 5].flatMap(power => [1, 2, 5].map(digit => digit * 10 ** power));
const HEAD_KEYS = [['layer', 'head'], ['other_layer', 'other_head']];  // of the address

// The sides next to each other, each with an element.
export const columns = (pair, elements) => h('div.split', {}, pair.map(({mark, label}, k) =>
  h('div', {}, h('h3', {}, `${mark} · ${label}`), elements[k])));

export function headsCard(pair, signal) {
  const parts = pair.map((side, k) => headsOf(side, HEAD_KEYS[k], signal));
  const element = card('Attention heads', {
    wide: true, about: 'Above: layers by heads. Below, the selected head: queries by keys. Gray: masked.',
  }, columns(pair, parts.map(part => part.element)), h('p.about', {}, ramp('magnitude', 'weight 0', 1, signal)));
  return {element, update: () => Promise.all(parts.map(part => part.update()))};
}

function headsOf({mark, opened, tokens: {ids, pieces}, picture, info}, [layerKey, headKey], signal) {
  const [layers, heads] = picture.thumbnails.shape, problem = h('div');
  const place = () => ({layer: state.index(layerKey, layers), head: state.index(headKey, heads)});
  const field = (label, key, size) => bound(numberField({label, min: 0, max: size - 1, value: place()[label],
    onInput: value => state.set({[key]: value})}), key, () => place()[label], signal);
  const grid = headGrid({
    picture, info, signal, selected: place(), test: `heads-${layerKey}`,
    onSelect: ({layer, head}) => state.set({[layerKey]: layer, [headKey]: head}),
    describe: (layer, head) =>
    [`mean entropy of its rows ${picture.entropies[layer * heads + head].toFixed(3)} bits`]});
  const one = headMatrix({signal, test: `head-matrix-${layerKey}`});
  const saveGrid = exportButtons({name: `heads-${mark}`, figure: grid,
    rows: () => [['layer', 'head', 'mean entropy in bits'],
    ...Array.from(picture.entropies, (bits, i) => [Math.floor(i / heads), i % heads, bits])]});
  return {
    element: h('div.stack', {}, h('div.row', {}, saveGrid), grid, h('div.row', {}, field('layer', layerKey, layers),
      field('head', headKey, heads), exportButtons({name: `head-${mark}`, figure: one, rows: one.rows})), problem, one),
    update: latest(() => attempt(problem, signal, async () => {
      const now = place();
      grid.show({selected: now});
      const {pattern} = await post('/api/head', opened.request({ids, ...now}), signal);
      one.showHead({pieces, weights: pattern, span: spanOf(info, now.layer)});
    })),
  };
}

// Predictions, ranks and divergences before the selected segment.
export function predictionCards(pair, segments, {selected, signal}) {
  const place = h('div', {test: 'expected'}), problem = h('div'), list = h('div');
  let rows = [], lenses = [], divergences = [];
  const drawing = chart({
    label: 'Rank of the token by depth', signal, height: 280, test: 'ranks',
    traces: () => lenses.map(({rank, layers}, k) =>
      line(`${pair[k].mark} · ${pair[k].label}`, rank.map((_, d) => d / layers), rank, k, {
        dash: k ? 'dash' : 'solid', symbol: k ? 'square' : 'circle', customdata: rank.map((_, d) => depthName(d)),
        hovertemplate: 'rank %{y}, %{customdata}'})),
    layout: () => ({showlegend: true, margin: {t: 30}, xaxis: axis('depth', {range: [-0.03, 1.03]}),
      // Rank 1 is at the top.
      yaxis: axis('rank', {type: 'log', tickformat: ',d', tickvals: RANK_TICKS, range: [
        Math.log10(1.3 * Math.max(2, ...lenses.flatMap(({rank}) => rank))), Math.log10(0.85)]})}),
  });
  const next = card('Predictions at this position', {about: 'The top tokens of both models before the selected token.',
    save: {name: 'predictions', rows: () => [['token', 'probability under A', 'under B'], ...rows]}}, place);
  const ranks = card('Rank by depth', {about: 'The rank of the actual token from the embedding (0) to the last layer '
    + '(1).', save: {name: 'rank-by-depth', figure: drawing, rows: drawing.rows}},
  problem, drawing);
  const apart = card('Divergence', {about: 'The two distributions over the whole vocabulary.',
    save: {name: 'divergence', rows: () => [['', 'value'], ...divergences]}}, list);
  const update = latest(() => attempt(problem, signal, async () => {
    ranks.hidden = apart.hidden = !segments?.length;
    if (!segments?.length) return void place.replaceChildren(notice('The positions of the two models cannot be '
      + 'compared on this text.'));
    const {a, b} = segments[selected()], first = [a[0], b[0]], isFirst = first.includes(0);
    drawing.hidden = apart.hidden = isFirst;
    if (isFirst) return void place.replaceChildren(notice('The first token has no prediction.'));
    const logits = await Promise.all(pair.map((side, k) => nextLogits(side, first[k], signal)));
    lenses = await Promise.all(pair.map((side, k) => lensRanks(side, first[k], signal)));
    if (signal.aborted) return;
    const isSame = hasSameVocabulary(pair, logits);
    rows = topTokens(pair, logits, isSame);
    divergences = divergencesOf(pair, logits, isSame);
    place.replaceChildren(...predictionTable(pair, rows, first));
    list.replaceChildren(facts(divergences.map(([name, bits]) => [name, `${bits.toFixed(4)} bits`])), isSame ? ''
      : h('p.about', {}, 'The vocabularies differ, so the divergence is not defined; tokens are matched by text.'));
    drawing.redraw();
  }));
  return {cards: [next, h('div.stack', {}, ranks, apart)], update};
}

const nextLogits = async ({opened, tokens: {ids}}, first, signal) =>
  (await post('/api/next', opened.request({ids, position: first - 1}), signal)).logits;

async function lensRanks({opened, tokens: {ids}}, first, signal) {
  const {next_rank: rank} = await post('/api/lens', opened.request({ids, start: first - 1, stop: first, k: 1}), signal);
  return {rank: Array.from(rank, x => x + 1), layers: rank.shape[0] - 1};
}

const hasSameVocabulary = ([a, b], [p, q]) =>
  p.length === q.length && a.names.slice(0, p.length).every((name, id) => name === b.names[id]);

// The top tokens of both: [piece, probability under A, under B], null if a vocabulary has no such token.
function topTokens(pair, logits, isSame) {
  const p = logits.map(softmax), rows = new Map();
  const ids = pair.map(({names}, k) => new Map(names.slice(0, logits[k].length).map((name, id) => [name, id])));
  pair.forEach(({names}, k) => {
    for (const id of ranked(logits[k]).subarray(0, TOP)) {
      const idIn = j => (isSame || j === k ? id : ids[j].get(names[id]) ?? null);
      rows.set(names[id], [names[id], ...[0, 1].map(j => (idIn(j) === null ? null : p[j][idIn(j)]))]);
    }
  });
  const most = ([, a, b]) => Math.max(a ?? 0, b ?? 0);
  return [...rows.values()].sort((x, y) => most(y) - most(x));
}

function predictionTable(pair, rows, first) {
  const actual = pair.map(({tokens}, k) => tokens.pieces[first[k]]);
  const cell = (p, k) => (p === null ? '–' : h('span.both', {}, bar(p, category(k)), percent(p)));
  return [h('p', {}, 'Before ', h('span.mono', {}, [...new Set(actual)].join(' and ')), ':'),
    table(['token', 'A', 'B'], rows.map(([piece, ...p]) =>
      [actual.includes(piece) ? h('strong', {title: 'the actual token'}, piece) : piece, ...p.map(cell)]))];
}

function divergencesOf(pair, logits, isSame) {
  const p = logits.map(softmax), entropies = pair.map(({mark}, k) => [`entropy of ${mark}`, entropy(p[k])]);
  return !isSame ? entropies : [...entropies, ['D(A ‖ B) = Σ pA log₂(pA / pB)', klDivergence(...logits)],
    ['D(B ‖ A)', klDivergence(logits[1], logits[0])], ['Jensen–Shannon', jensenShannon(...p)]];
}
