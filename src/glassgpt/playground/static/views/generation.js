// Generation: the distribution of the next token, sampling token by token with branches, and whole continuations.
import {announce, attempt, card, count, css, droppedTokens, entropy, facts, findTokens, h, latest, onTheme, parsePaths,
  percent, post, randomShare, ranked, samplingDistribution, short, softmax, state, sum, tagOf, tokenAt,
  vocabulary} from '../core/index.js';
import {axis, barLegend, barList, chart, line, verticalLine} from '../widgets/index.js';
import {continuationsCard} from './continuations.js';
import {generatedCard, seed, settings} from './generated_text.js';

const SHOWN = 25, MATCHES = 8, MAX_CHART_POINTS = 240;
// The values a full bar can stand for: the smallest that holds the largest probability, so that bars do not jump.
const FULL_BARS = [0.05, 0.1, 0.25, 0.5, 1];
const SERIES = [{name: 'model', color: 'accent'}, {name: 'sampled from', color: 'warm'}];

export default async function show(page, context) {
  const {signal, opened, info, ids: prompt, pieces} = context, vocabSize = info.vocab_size;
  const names = await vocabulary(opened, signal);
  const tag = tagOf(`${info.name} ${info.step}`, prompt);
  let paths = parsePaths(state.text('paths'), tag, vocabSize);
  const currentIds = () => [...prompt, ...paths.current.map(({id}) => id)];
  let point = null, updating = null;  // the distribution after the current ids; null while it loads
  const generated = generatedCard({
    prompt: pieces.join(info.tokenizer === null ? ' ' : ''), names, vocabSize, signal,
    onStep: step, onTop: () => point && append(point.order[0]), onReject: reject, edit: change,
  });
  const cards = [nextCard, ranksCard, searchCard].map(create => create({names, vocabSize, signal, onSelect: append}));
  page.append(generated.element, cards[0].element, h('div.stack', {}, cards[1].element, cards[2].element),
    continuationsCard({...context, currentIds}));
  async function update() {
    const ids = currentIds(), visible = ids.slice(droppedTokens(ids.length, info.most_tokens));
    point = null;
    generated.show(paths, false);
    await attempt(generated.problem, signal, async () => {
      const {logits} = await post('/api/next', opened.request({ids: visible}), signal);
      await fillIn(ids, visible);
      if (signal.aborted || String(ids) !== String(currentIds())) return;
      const p = softmax(logits);
      point = {ids, logits, order: ranked(logits), p, entropy: entropy(p), isCut: visible.length < ids.length};
      generated.show(paths, true);
      refresh();
    });
  }
  // Add the probabilities of tokens that came with a link.
  async function fillIn(ids, visible) {
    if (paths.current.every(({p}) => p !== null)) return;
    const path = paths.current;
    const {surprisal} = await post('/api/predictions', opened.request({ids: visible}), signal);
    path.forEach((token, i) => {
      const position = prompt.length + i - (ids.length - visible.length);
      token.p ??= position > 0 ? 2 ** -surprisal[position] : null;
    });
  }
  function refresh() {
    if (!point) return;
    point.rejected = paths.rejected;
    point.q = samplingDistribution(point.logits, settings(vocabSize), {order: point.order, without: point.rejected});
    for (const each of cards) each.show(point);
  }
  function change(method, ...values) {
    paths[method](...values);
    state.set({paths: paths.toText(tag)});
    updating = update();
  }
  function append(id) {
    if (!point) return;
    announce(`${names[id]}, ${percent(point.p[id])}`);
    change('append', {id, p: point.p[id]});
  }
  function step() {
    if (!point) return;
    // The place and the number of rejections select the random number: the same seed repeats the same text.
    append(tokenAt(point.q, randomShare(seed(), point.ids.length, paths.rejected.size)));
  }
  async function reject() {
    if (!point || !paths.current.length) return;
    change('reject', vocabSize);
    await updating;
    step();
  }
  state.on(['temperature', 'top_k', 'top_p', 'min_p', 'seed'], refresh, signal);
  state.on(['paths'], () => {
    if (state.text('paths') === paths.toText(tag)) return;
    paths = parsePaths(state.text('paths'), tag, vocabSize);  // Back, or a link
    update();
  }, signal);
  onTheme(() => generated.show(paths, point !== null), signal);
  await update();
}

function rowOf({logits, p, q, rejected}, names, id, rank, label = names[id]) {
  return {id, label, values: [p[id], q[id]], texts: [percent(p[id]), q[id] ? percent(q[id]) : '–'], faint: q[id] === 0,
    title: `id ${id} · rank ${rank + 1} · logit ${short(logits[id])}${rejected.has(id) ? ' · rejected here' : ''}`};
}

function nextCard({names, vocabSize, signal, onSelect}) {
  let point = null;
  const list = barList({label: 'Top next tokens', series: SERIES, onSelect: row => onSelect(row.id), test: 'next-bars',
    full: largest => FULL_BARS.find(value => largest <= value) ?? 1});
  const full = h('span.soft');
  const element = card('Next token', {
    about: `The top ${SHOWN} of ${count(vocabSize)} tokens, before and after the sampling settings. Select one to `
      + `append.`,
    save: {name: 'next-token', figure: list, rows: () => [
      ['rank', 'id', 'token', 'logit', 'probability', 'sampled from'],
      ...Array.from(point.order, (id, i) => [i + 1, id, names[id], point.logits[id], point.p[id], point.q[id]])]},
  }, h('div.row', {}, barLegend(SERIES, signal), full), list);
  return {element, show(now) {
    point = now;
    list.show(Array.from(point.order.subarray(0, SHOWN), (id, rank) => rowOf(point, names, id, rank)));
    full.textContent = `full bar: ${percent(list.scale())}`;
  }};
}

function ranksCard({vocabSize, signal}) {
  let point = null;
  const ranks = [...new Set([1, vocabSize, ...Array.from({length: MAX_CHART_POINTS}, (_, i) =>
    Math.round(vocabSize ** (i / MAX_CHART_POINTS)))])].sort((a, b) => a - b);
  function traces() {
    if (!point) return [];
    const idAt = rank => point.order[rank - 1];
    return [[SERIES[0], point.p, ranks], [SERIES[1], point.q, ranks.filter(rank => point.q[idAt(rank)])]]
      .map(([{name, color}, values, x]) => ({...line(name, x, x.map(rank => values[idAt(rank)]), 0),
        line: {color: css(color), width: 1.5}, marker: {size: 4, color: css(color)}}));
  }
  const drawing = chart({label: 'Probability by rank', height: 250, signal, traces, layout() {
    const axes = {xaxis: axis('rank', {type: 'log', dtick: 1, tickformat: ',d'}),
      yaxis: axis('probability', {type: 'log', nticks: 6})};
    if (!point || point.q.every(q => q > 0)) return axes;
    const last = point.order.findLastIndex(id => point.q[id] > 0) + 1;
    return {...axes, shapes: [verticalLine(last, `kept up to ${count(last)}`, css('warm'))]};
  }});
  const numbers = h('div', {test: 'next-facts'}), redraw = latest(drawing.redraw);
  const element = card('Probability by rank', {
    about: `The whole vocabulary by rank, on logarithmic axes, at up to ${MAX_CHART_POINTS} ranks. The CSV has all.`,
    save: {name: 'ranks', figure: drawing, rows: () => [['rank', 'probability', 'sampled from'],
      ...Array.from(point.order, (id, i) => [i + 1, point.p[id], point.q[id]])]},
  }, numbers, drawing);
  return {element, show(now) {
    point = now;
    const {p, q} = point, kept = p.filter((_, id) => q[id]);
    numbers.replaceChildren(facts([
      ['sum over the whole vocabulary', h('span', {test: 'next-sum'}, sum(p).toFixed(6))],
      ['sum of the sampling distribution', h('span', {test: 'sampled-sum'}, sum(q).toFixed(6))],
      ['tokens kept', h('span', {test: 'next-kept'}, `${count(kept.length)} of ${count(p.length)}`)],
      ['their probability under the model', percent(sum(kept))],
      ['entropy', h('span', {test: 'next-entropy'}, `${point.entropy.toFixed(3)} bits`)],
      ['entropy of the sampling distribution', `${entropy(q).toFixed(3)} bits`],
      ...point.isCut ? [['context', 'full: the older half of the text is dropped']] : [],
    ]));
    redraw();
  }};
}

function searchCard({names, onSelect}) {
  let point = null;
  const list = barList({label: 'Matching tokens', series: SERIES, onSelect: row => onSelect(row.id), test: 'matches'});
  const summary = h('p.about', {role: 'status'});
  const field = h('input', {type: 'text', 'aria-label': 'Part of a token', placeholder: 'token', test: 'find',
    oninput: update});
  const element = card('Find a token', {
    about: 'Tokens that contain a text, by probability. A space is shown as ␣.',
    save: {name: 'matches', figure: list, rows: list.rows},
  }, field, summary, list);
  function update() {
    if (!point) return;
    const found = findTokens(names, field.value, point.order), shown = found.slice(0, MATCHES);
    summary.textContent = !field.value ? '' : found.length ? `${count(found.length)} found` : 'No token contains this.';
    list.show(shown.map(id => {
      const rank = point.order.indexOf(id);
      return rowOf(point, names, id, rank, `${rank + 1}. ${names[id]}`);
    }));
  }
  return {element, show(now) {
    point = now;
    update();
  }};
}
