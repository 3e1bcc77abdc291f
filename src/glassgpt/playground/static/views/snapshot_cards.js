// The cards of a snapshot's prompt: attention, logit lens, surprisal.
import {card, count, exportButtons, h, ramp, short, spanOf, state, sum} from '../core/index.js';
import {headGrid, headMatrix, lensCard, pager, SURPRISAL_ENDS, surprisalStrip, windowSize} from '../widgets/index.js';

const LEVELS = 255;  // weights are stored as 0 to 255

// model: {info, names} of a checkpoint, both null while unknown. Each card has `show(prompt)`.
export const snapshotCards = context => [attentionCard, depthCard, surprisalCard].map(create => create(context));

function attentionCard({model, signal}) {
  const lead = h('p', {test: 'snapshot-head'}), left = h('div');
  const one = headMatrix({signal, cell: 22, test: 'snapshot-head-matrix'});
  let now = null, grid = null;
  const element = card('Attention', {
    wide: true, about: 'Left: layers by heads. Right: the selected head, queries by keys.',
    save: {name: 'heads-of-a-step', figure: () => grid, rows: () =>
      [['step', 'layer', 'head', 'query', 'key', 'weight'], ...weightRows(now)]},
  }, h('div.split', {}, left, h('div', {}, h('div.row.headed', {}, lead,
    exportButtons({name: 'head-of-a-step', figure: one, rows: one.rows})), one)),
  h('p.about', {}, ramp('magnitude', 'weight 0', 1, signal), '. Stored in 256 levels. Gray: masked.'));
  function showOne() {
    if (!now) return;
    const layer = state.index('layer', now.layers), head = state.index('head', now.heads), size = now.ids.length ** 2;
    const start = (layer * now.heads + head) * size;
    lead.textContent = `Layer ${layer}, head ${head}, at step ${count(now.step)}`;
    grid.show({picture: {thumbnails: now.attention, tokens: now.ids.length}, info: model.info,
      selected: {layer, head}});
    one.showHead({pieces: now.pieces, weights: now.attention.subarray(start, start + size), scale: LEVELS,
      span: spanOf(model.info, layer)});
  }
  state.on(['layer', 'head'], showOne, signal);
  return {element, show(prompt) {
    now = prompt;
    if (!grid) {
      grid = headGrid({picture: {thumbnails: now.attention, tokens: now.ids.length}, signal, test: 'snapshot-heads',
        onSelect: selected => state.set(selected)});
      left.append(grid);
    }
    showOne();
  }};
}

function* weightRows({step, attention, heads, ids}) {
  const size = ids.length;
  for (let i = 0; i < attention.length; i++) {
    const query = Math.floor(i / size) % size, head = Math.floor(i / size ** 2), key = i % size;
    if (key <= query) yield [step, Math.floor(head / heads), head % heads, query, key, attention[i] / LEVELS];
  }
}

function depthCard({model, signal}) {
  const place = h('div');
  let now = null, size = 1, controls = null, layout = '';
  const from = () => state.index('from', now.ids.length - size + 1);
  const {element, ...lens} = lensCard({
    names: () => model.names, controls: place, name: 'lens-of-a-step', test: 'snapshot-lens', signal,
    vocabSize: () => model.info?.vocab_size ?? now.nextRank.reduce((a, b) => Math.max(a, b + 1), 2)});
  function draw() {
    if (!now) return;
    const key = `${element.body.clientWidth} ${now.pieces.join()}`;
    if (key !== layout) {
      size = windowSize(element.body.clientWidth, now.pieces);
      place.replaceChildren(controls = pager({tokens: now.ids.length, size, from}));
    }
    layout = key;
    controls.show();
    lens.show({...now, k: now.topIds.shape[2], depths: now.layers + 1, start: 0, stride: now.ids.length, from: from(),
      size});
  }
  state.on(['from'], draw, signal);
  addEventListener('resize', draw, {signal});
  return {element, show(prompt) {
    now = prompt;
    draw();
  }};
}

function surprisalCard({signal}) {
  const place = h('div'), mean = h('p', {test: 'snapshot-mean'});
  let now = null;
  const element = card('Surprisal', {
    wide: true, about: 'Color: surprisal, −log₂ of the probability that the model of that step gave the token.',
    save: {name: 'surprisal-of-a-step', rows: () => [['step', 'position', 'id', 'token', 'surprisal in bits'],
      ...now.ids.map((id, i) => [now.step, i, id, now.pieces[i], i ? now.surprisal[i] : ''])]},
  }, place, mean, h('p.about', {}, ramp('magnitude', ...SURPRISAL_ENDS, signal)));
  return {element, show(prompt) {
    now = prompt;
    place.replaceChildren(surprisalStrip(now, {label: 'Tokens of the prompt', test: 'snapshot-surprisal', signal}));
    const bits = now.surprisal.subarray(1);
    mean.textContent = bits.length ? `Mean: ${short(sum(bits) / bits.length)} bits per token at step `
      + `${count(now.step)}.` : '';
  }};
}
