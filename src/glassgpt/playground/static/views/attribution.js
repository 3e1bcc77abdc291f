// Direct logit attribution (Elhage et al., 2021): a logit as the sum of the contributions of all components.
import {button, card, category, choice, exact, h, headNames, largest, layerNames, legend, precise, ramp, short, state,
  sum, table} from '../core/index.js';
import {bars, matrix} from '../widgets/index.js';

const LISTED = 10;
const KINDS = {  // name and color of each kind of component
  embedding: ['embedding', 2], attention: ['a layer’s heads, and its bias if it has one', 0],
  feed_forward: ['feed-forward', 1], norm_bias: ['bias of the final norm', 4], patch: ['patched in', 3],
};

// The components by block: the heads and the bias of a layer's attention become one. In the model's order.
export function byBlock(parts) {
  const blocks = [];
  for (const {name, kind, layer, value} of parts) {
    const isAttention = kind === 'head' || kind === 'attention_bias', last = blocks.at(-1);
    if (isAttention && last?.kind === 'attention' && last.layer === layer) last.value += value;
    else if (isAttention) blocks.push({name: `${layer} attention`, kind: 'attention', layer, value});
    else blocks.push({name: kind === 'feed_forward' ? `${layer} feed-forward` : name, kind, layer, value});
  }
  return blocks;
}

const total = parts => sum(parts.map(({value}) => value));

// Two cards: by block and by head. show({answer, position, target, against, choices}): choices are the menus' ids.
export function attributionCards({signal, info, names}) {
  const menus = h('div.row'), lead = h('p', {test: 'attribution-sum'}), colors = h('div');
  let blocks = [], answer = null;
  const figure = bars({
    label: 'Contribution of each block to the logit', signal, height: 150, lanes: [{title: '', values: [0]}],
    test: 'attribution-bars', describe: i => (blocks[i] ? [blocks[i].name, precise(blocks[i].value),
      `sum up to here ${precise(total(blocks.slice(0, i + 1)))}`] : []),
  });
  const element = card('Logit attribution', {
    about: 'The residual stream is a sum, so a token’s logit is one too. A component’s contribution is what it wrote, '
      + 'after the final norm (at its actual scale) and the output head, in the token’s direction.',
    save: {name: 'attribution', figure, rows: () => [['part', 'kind', 'layer', 'head', 'contribution'],
      ...answer.parts.map(({name, kind, layer, head, value}) => [name, kind, layer ?? '', head ?? '', value])]},
  }, menus, lead, figure, colors);
  const heads = headsCard({signal, info});
  return {cards: [element, heads.element], show({answer: now, position, target, against, choices}) {
    answer = now;
    blocks = byBlock(answer.parts);
    const options = ids => ids.map(id => [id, `${names[id]} (${id})`]);
    menus.replaceChildren(
      choice({label: 'Token', value: target, options: options(choices), onInput: id => state.set({target: id})}),
      choice({label: 'against', value: against ?? '', onInput: id => state.set({against: id}),
        options: [['', 'none'], ...options(choices.filter(id => id !== target))]}));
    lead.replaceChildren(...sentence(answer));
    figure.show({labels: blocks.map(({name}) => name), lanes: [{
      title: against === null ? 'contribution to the logit' : 'contribution to the difference of the logits',
      values: blocks.map(({value}) => value), color: i => category(KINDS[blocks[i].kind][1]),
    }]});
    const kinds = [...new Set(blocks.map(({kind}) => kind))];
    colors.replaceChildren(legend(kinds.map(kind => [KINDS[kind][0], () => category(KINDS[kind][1])]), signal));
    heads.show(answer, position);
  }};
}

function sentence({logit, against_logit: other, capped, parts}) {
  const number = (test, x) => h('strong', {}, exact(test, x, precise(x)));
  return ['The ', parts.length, ' components sum to ', number('parts-sum', total(parts)),
    other === null ? '; the logit is ' : '; the logits differ by ', number('logit', logit - (other ?? 0)),
    other === null ? '' : ` (${precise(logit)} − ${precise(other)})`, capped ? ', before the soft-cap.' : '.'];
}

function headsCard({signal, info}) {
  const {n_layer: rows, n_head: cols} = info.config, scale = h('p.about'), list = h('div', {test: 'attribution-table'});
  let values = new Float64Array(rows * cols), position = 0;
  const grid = matrix({
    label: 'Contribution of each head to the logit', signal, scale: 'signed', rows, cols, values, cell: 44,
    cellY: rows > 24 ? 14 : 22, test: 'attribution-heads', rowLabels: layerNames(rows), colLabels: headNames(cols),
    describe: (r, c) => [`layer ${r}, head ${c}`, precise(values[r * cols + c])],
    onSelect: (layer, head) => state.set({layer, head}),
  });
  const open = button('', () => state.set({view: 'heads', query: position, key: null}, {push: true}),
    {kind: 'button.small'});
  const element = card('Attribution by head', {
    about: 'What each head wrote for (orange) or against (blue) the token. Rows: layers, columns: heads.',
    save: {name: 'attribution-heads', figure: grid, rows: grid.rows},
  }, grid, scale, open, h('h3', {}, 'Largest contributions'), list);
  function select() {
    const row = state.index('layer', rows), col = state.index('head', cols);
    grid.show({selected: {row, col}});
    open.textContent = `Open layer ${row}, head ${col}`;
  }
  state.on(['layer', 'head'], select, signal);
  return {element, show({parts}, at) {
    position = at;
    values = new Float64Array(rows * cols);
    for (const {kind, layer, head, value} of parts) if (kind === 'head') values[layer * cols + head] = value;
    const most = largest(values.map(Math.abs));
    scale.replaceChildren(...ramp('signed', `−${short(most)}`, short(most), signal));
    grid.show({values});
    const strongest = [...parts].sort((a, b) => Math.abs(b.value) - Math.abs(a.value)).slice(0, LISTED);
    list.replaceChildren(table(['component', 'contribution'], strongest.map(part => [part.name, precise(part.value)])));
    select();
  }};
}
