// One row of one head, number by number: q·k, scale, mask, softmax, weighted values.
import {attentionRow, card, category, exact, facts, h, largest, norm, percent, precise, products, short, signColor,
  state, sum, table} from '../core/index.js';
import {bars, matrix} from '../widgets/index.js';

const LISTED = 8;  // keys that have a line; the others are summed in one

const rowAt = (array, i) => array.subarray(i * array.shape[1], (i + 1) * array.shape[1]);

// Strips of {name, values} as rows of a CSV.
export const stripRows = strips => [['', ...strips[0].values.keys()],
  ...strips.map(({name, values}) => [name, ...values])];

// The three cards; `show({vectors, weights, span, t, s})` shows the query at t and the key at s.
export function rowCards(context) {
  const cards = [scoresCard, productsCard, valuesCard].map(create => create(context));
  return {cards: cards.map(({element}) => element), show(found) {
    const row = attentionRow(found), weights = rowAt(found.weights, found.t);  // `weights`: as the model computed them
    const order = Array.from(weights.keys()).filter(s => row.visible[s]).sort((a, b) => weights[b] - weights[a]);
    for (const {show} of cards) show({...found, row, weights, order});
  }};
}

function scoresCard({signal, pieces}) {
  const lead = h('p'), list = h('div.numbers', {test: 'row-table'});
  const selectKey = i => state.set({key: i});
  let now = null;
  const valueNorm = s => norm(rowAt(now.vectors.v, s));
  const figure = bars({
    label: 'Scores and weights of one query over the keys', signal, selected: 0, test: 'row-bars', onSelect: selectKey,
    lanes: [{title: '', values: [0]}], hidden: s => !now?.row.visible[s],
    describe: s => now && [`key ${pieces[s]} at ${s}`, `score ${precise(now.row.scores[s])}`,
      now.row.visible[s] ? `weight ${precise(now.weights[s])}` : 'masked'],
  });
  const element = card('Attention row', {
    about: 'The scores of one query, q·k / √D, and its weights, the softmax over the visible keys. Gray: masked.',
    save: {name: 'row', figure, rows: () => [['key', 'token', 'score', 'visible', 'weight', 'norm of value'],
      ...pieces.map((piece, s) => {
        const {row: {scores, visible}, weights} = now;
        return [s, piece, scores[s], Number(visible[s]), weights[s], valueNorm(s)];
      })]},
  }, lead, figure, list);
  return {element, show(found) {
    now = found;
    const {row, weights, order, t, s} = now, shown = row.scores.filter((_, i) => row.visible[i]);
    lead.replaceChildren('Query ', h('strong.mono', {}, pieces[t]), ` at ${t} sees ${order.length} of ${pieces.length} `
      + `keys. Sum of the weights: `, exact('weights-sum', sum(weights), precise(sum(weights))));
    figure.show({selected: s, labels: pieces, lanes: [
      {title: 'scores, q·k / √D', values: row.scores, color: i => signColor(row.scores[i]),
        range: [Math.min(0, ...shown), Math.max(0, ...shown)]},
      {title: 'weights, softmax of the scores', values: weights, color: () => category(0)},
    ]});
    const keyButton = i => h('button.small', {type: 'button', onclick: () => selectKey(i), title: 'Select this key',
      'aria-pressed': String(i === s)}, pieces[i]);
    list.replaceChildren(table(['key', 'at', 'score', 'weight', '|v|', 'w × |v|'], order.slice(0, LISTED).map(i =>
      [keyButton(i), i, short(row.scores[i]), percent(weights[i]), short(valueNorm(i)),
        short(weights[i] * valueNorm(i))])));
  }};
}

function productsCard({signal, pieces}) {
  const lead = h('p', {test: 'score-lead'}), list = h('div');
  let terms = [0], q = [0], k = [0];
  const figure = bars({
    label: 'The products of query and key', signal, test: 'term-bars', lanes: [{title: '', values: terms}],
    describe: d => [`dimension ${d}`, `q ${precise(q[d])} × k ${precise(k[d])}`, `= ${precise(terms[d])}`],
  });
  const element = card('Attention score', {
    about: 'The dot product q·k, term by term: one product per dimension. Their sum over √D is the score.',
    save: {name: 'score', figure,
      rows: () => [['dimension', 'q', 'k', 'product'], ...Array.from(terms, (x, d) => [d, q[d], k[d], x])]},
  }, lead, figure, list);
  return {element, show({row, weights, vectors, t, s}) {
    [q, k] = [rowAt(vectors.rot_q, t), rowAt(vectors.rot_k, s)];
    terms = products(vectors.rot_q, t, vectors.rot_k, s);
    lead.replaceChildren('Query ', h('strong.mono', {}, pieces[t]), ` at ${t}, key `, h('strong.mono', {}, pieces[s]),
      ` at ${s}.`);
    figure.show({lanes: [{title: `q × k in ${terms.length} dimensions`, values: terms, color: d => signColor(terms[d])}]});
    const number = (test, x) => exact(test, x, precise(x));
    list.replaceChildren(facts([
      ['sum of the products, q·k', number('dot', sum(terms))],
      ...vectors.bias ? [['position bias', number('bias', vectors.bias[t * row.scores.length + s])]] : [],
      [`× 1 / √${terms.length} = ${precise(vectors.scale)}${vectors.bias ? ', + bias' : ''}: the score`,
        number('score', row.scores[s])],
      ...row.visible[s] ? [
        ['exp(score − largest score of the row)',
          `exp(${precise(row.scores[s])} − ${precise(row.max)}) = ${precise(Math.exp(row.scores[s] - row.max))}`],
        ['softmax denominator, the sum of these', number('denominator', row.denominator)],
        ['weight, computed by this page', number('weight-here', row.weights[s])],
        ['weight, computed by the model’s code', number('weight', weights[s])],
      ] : [['masked', s > t ? 'the key is after the query: weight 0' : 'the key is before the window: weight 0']],
    ]));
  }};
}

function valuesCard({signal, pieces}) {
  const lead = h('p');
  let lines = [];
  const strips = matrix({
    label: 'Weighted values of the strongest keys, their sum, and the head’s output', signal, scale: 'signed', rows: 1,
    cols: 1, value: () => 0, cellY: 18, cell: 40, rowLabels: [''], test: 'value-strips',
    describe: (r, d) => [lines[r].name, `dimension ${d}: ${precise(lines[r].values[d])}`],
  });
  const element = card('Weighted values', {
    wide: true, save: {name: 'weighted-values', figure: strips, rows: () => stripRows(lines)},
    about: 'The head’s output for this query, Σ weight × v: a line per key, and the kernel’s output last.',
  }, strips, lead);
  return {element, show({vectors: {v, kernel_out: kernelOutput}, weights, order, t}) {
    const D = v.shape[1], rest = order.slice(LISTED), output = rowAt(kernelOutput, t);
    const weighted = keys => Float64Array.from({length: D}, (_, d) => sum(keys.map(s => weights[s] * v[s * D + d])));
    const total = weighted(order);
    lines = [
      ...order.slice(0, LISTED).map(s => ({name: `${percent(weights[s])} ${pieces[s]}`, values: weighted([s])})),
      ...rest.length ? [{name: `${rest.length} more`, values: weighted(rest)}] : [],
      {name: 'sum', values: total}, {name: 'output', values: output},
    ];
    strips.show({rows: lines.length, cols: D, value: (r, d) => lines[r].values[d],
      rowLabels: lines.map(({name}) => name)});
    const most = largest(lines.flatMap(({values}) => Array.from(values, Math.abs)));
    const difference = largest(total.map((x, d) => Math.abs(x - output[d])));
    lead.replaceChildren(`Blue: negative, orange: positive, up to ±${short(most)}. The sum and the head’s output `
      + `differ by at most `, exact('output-difference', difference, short(difference)), '.');
  }};
}
