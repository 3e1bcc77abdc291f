// Direct logit attribution (Elhage et al., 2021): a logit as the sum of what each part wrote into the residual stream.

import {bars} from './bars.js';
import {named} from './colors.js';
import {exportable} from './export.js';
import {matrix} from './matrix.js';
import * as state from './state.js';
import {card, choice, h, precise, ramp, short, swatch, table} from './ui.js';

const KIND_COLORS = {embedding: 2, attention: 0, feed_forward: 1, norm_bias: 4, patch: 3};
const KIND_NAMES = {
  embedding: 'embedding', attention: 'a layer’s heads, and its bias if it has one', feed_forward: 'feed-forward', norm_bias: 'last norm’s bias',
  patch: 'patched in',
};
const LISTED = 10;

/** The parts block by block: all that a layer's attention wrote together. [{name, kind, layer, value}], in the model's order. */
export function blocks(parts) {
  const found = [];
  for (const {name, kind, layer, value} of parts) {
    const isAttention = kind === 'head' || kind === 'attention_bias', last = found.at(-1);
    if (isAttention && last?.kind === 'attention' && last.layer === layer) last.value += value;
    else if (isAttention) found.push({name: `${layer} attention`, kind: 'attention', layer, value});
    else found.push({name: kind === 'feed_forward' ? `${layer} feed-forward` : name, kind, layer, value});
  }
  return found;
}

const total = parts => parts.reduce((all, {value}) => all + value, 0);

/**
 * Two cards: the sum block by block, and head by head. `ask({token, against})` is told which tokens are chosen.
 * show({answer, position, token, against, choices}): choices are ids that the two menus offer.
 */
export function attributionCards({signal, info, names, ask}) {
  const sumCard = card('What made the logit', 'The residual stream is a sum, so a token’s logit is one too: each part’s share is what it wrote, '
    + 'through the last norm (at its actual scale) and the head, along that token’s direction.');
  const menus = h('div.row'), lead = h('p', {'data-test': 'attribution-sum'}), legend = h('p.about.kv-legend');
  let shown = [], answer = null;
  const figure = bars({
    label: 'Share of each block in the logit', signal, height: 150, lanes: [{title: '', values: [0]}],
    describe: i => (shown[i] ? [shown[i].name, precise(shown[i].value), `so far ${precise(total(shown.slice(0, i + 1)))}`] : []),
  });
  figure.dataset.test = 'attribution-bars';
  sumCard.body.append(menus, lead, figure, legend);
  const partRows = () => [['part', 'kind', 'layer', 'head', 'share'],
    ...answer.parts.map(({name, kind, layer, head, value}) => [name, kind, layer ?? '', head ?? '', value])];
  exportable(sumCard, {name: 'attribution', canvas: figure, rows: partRows});
  const heads = headsCard({signal, info});

  return {cards: [sumCard, heads.element], show({answer: given, position, token, against, choices}) {
    answer = given;
    shown = blocks(answer.parts);
    const options = ids => ids.map(id => [id, `${names[id]} (${id})`]);
    menus.replaceChildren(
      choice({label: 'Token', value: token, options: options(choices), onInput: id => ask({token: Number(id)})}),
      choice({label: 'against', value: against ?? '', options: [['', 'none'], ...options(choices.filter(id => id !== token))],
        onInput: id => ask({against: id === '' ? null : Number(id)})}));
    lead.replaceChildren(...sentence(answer));
    figure.show({labels: shown.map(({name}) => name), lanes: [{
      title: against === null ? 'share in the logit' : 'share in the difference of the logits',
      values: shown.map(({value}) => value), color: i => named(KIND_COLORS[shown[i].kind]),
    }]});
    const kinds = new Set(shown.map(({kind}) => kind));
    legend.replaceChildren(...[...kinds].map(kind => h('span', {}, swatch(() => named(KIND_COLORS[kind]), signal), ` ${KIND_NAMES[kind]}`)));
    heads.show(answer, position);
  }};
}

function sentence({logit, against_logit: other, capped, parts}) {
  const wanted = logit - (other ?? 0);
  const number = (name, x) => h('strong', {'data-test': name, 'data-value': x}, precise(x));
  return ['The ', parts.length, ' parts sum to ', number('parts-sum', total(parts)),
    other === null ? '; the logit is ' : '; the logits differ by ', number('logit', wanted),
    other === null ? '' : ` (${precise(logit)} − ${precise(other)})`, capped ? ', before the soft-cap.' : '.'];
}

function headsCard({signal, info}) {
  const element = card('Head by head', 'What each head wrote for (orange) or against (blue) the token. A row a layer, a column a head.');
  const {n_layer: rows, n_head: cols} = info.config;
  let values = new Float64Array(rows * cols);
  const grid = matrix({
    label: 'Share of each head in the logit', signal, kind: 'signs', rows, cols, values, cell: 44, cellY: rows > 24 ? 14 : 22,
    rowLabels: Array.from({length: rows}, (_, i) => `layer ${i}`), colLabels: Array.from({length: cols}, (_, i) => i),
    describe: (r, c) => [`layer ${r}, head ${c}`, precise(values[r * cols + c])], onPick(layer, head) {
      state.set({layer, head});
      mark();
    },
  });
  grid.dataset.test = 'attribution-heads';
  const scale = h('p.about');
  const open = h('button.small', {type: 'button', onclick: () => state.set({view: 'heads', row: position, col: null}, {push: true})});
  const mark = () => {
    const row = Math.min(rows - 1, state.number('layer', 0)), col = Math.min(cols - 1, state.number('head', 0));
    grid.show({picked: {row, col}});
    open.textContent = `Look at layer ${row}, head ${col}`;
  };
  let position = 0;
  const list = h('div', {'data-test': 'attribution-table'});
  element.body.append(grid, scale, open, h('h3', {}, 'The strongest parts'), list);
  exportable(element, {name: 'attribution-heads', canvas: grid, rows: grid.rows});
  return {element, show({parts}, at) {
    values = new Float64Array(rows * cols);
    for (const {kind, layer, head, value} of parts) if (kind === 'head') values[layer * cols + head] = value;
    const most = values.reduce((a, b) => Math.max(a, Math.abs(b)), 0);
    position = at;
    grid.show({values});
    const strongest = [...parts].sort((a, b) => Math.abs(b.value) - Math.abs(a.value)).slice(0, LISTED);
    list.replaceChildren(table(['part', 'share'], strongest.map(part => [part.name, precise(part.value)])));
    scale.replaceChildren(...ramp('signs', `−${short(most)}`, short(most), signal));
    mark();
  }};
}
