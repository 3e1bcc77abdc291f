// One row of one head, number by number: q·k, scale, mask, softmax, weighted values. All of it from the model's q, k and v.

import {bars, signed} from './bars.js';
import {named} from './colors.js';
import {exportable} from './export.js';
import {matrix} from './matrix.js';
import {sees} from './span.js';
import {card, facts, h, percent, precise, short, table} from './ui.js';

// Keys that have a line of their own; the others come together in one.
const LISTED = 8;

/** A dot product of row i of one array (n, D) and row j of another, term by term. */
export function terms(q, i, k, j) {
  const D = q.shape[1];
  return Float64Array.from({length: D}, (_, d) => q[i * D + d] * k[j * D + d]);
}

export const sum = values => values.reduce((a, b) => a + b, 0);

/**
 * What the query at t does, formed from vectors (the answer of /api/vectors): score of each key, whether it is seen, the softmax's
 * largest score, denominator and weights.
 */
export function rowOf({vectors, span, t}) {
  const T = vectors.rot_q.shape[0];
  const scores = Float64Array.from({length: T}, (_, s) => vectors.scale * sum(terms(vectors.rot_q, t, vectors.rot_k, s)));
  const isSeen = Array.from({length: T}, (_, s) => sees(span, t, s));
  const largest = scores.reduce((most, score, s) => (isSeen[s] ? Math.max(most, score) : most), -Infinity);
  const exps = scores.map((score, s) => (isSeen[s] ? Math.exp(score - largest) : 0));
  const denominator = sum(exps);
  return {scores, isSeen, largest, denominator, weights: exps.map(x => x / denominator)};
}

/** A number that a test, or who looks closely, may hold against another. */
const figureOf = (name, x, text = precise(x)) => h('span.number', {'data-test': name, 'data-value': x}, text);

/** The three cards; `show({vectors, weights, span, t, s, name})` fills them for the query at t and the key at s. */
export function rowCards({signal, pieces, onKey}) {
  const cards = [scoresCard, termsCard, valuesCard].map(make => make({signal, pieces, onKey}));
  return {cards: cards.map(({element}) => element), show(found) {
    const row = rowOf(found);
    // The weights as the model's own code formed them, which these here must equal.
    const D = found.weights.shape[1];
    const formed = found.weights.subarray(found.t * D, (found.t + 1) * D);
    const ranked = Array.from(formed.keys()).filter(s => row.isSeen[s]).sort((a, b) => formed[b] - formed[a]);
    for (const {show} of cards) show({...found, row, formed, ranked});
  }};
}

function scoresCard({signal, pieces, onKey}) {
  const element = card('One row', 'Of one query: its score with each key, q·k / √D, and its weights, softmax over the keys that it sees: '
    + 'exp(score) / Σ exp(score). Grey: masked.');
  const lead = h('p'), list = h('div.numbers', {'data-test': 'row-table'});
  let now = null;
  const figure = bars({
    label: 'Scores and weights of one query over the keys', signal, picked: 0, lanes: [{title: '', values: [0]}], onPick: onKey,
    hidden: s => !now?.row.isSeen[s], describe: s => now && [`key ${pieces[s]} at ${s}`, `score ${precise(now.row.scores[s])}`,
      now.row.isSeen[s] ? `weight ${precise(now.formed[s])}` : `masked: ${s > now.t ? 'it comes later' : 'before the window'}`],
  });
  figure.dataset.test = 'row-bars';
  element.body.append(lead, figure, list);
  exportable(element, {name: 'row', canvas: figure, rows: () => [['key', 'token', 'score', 'seen', 'weight', 'length of value'],
    ...pieces.map((piece, s) => [s, piece, now.row.scores[s], now.row.isSeen[s] ? 1 : 0, now.formed[s], valueLength(now, s)])]});
  return {element, show(found) {
    now = found;
    const {row, formed, ranked, t, s} = now;
    lead.replaceChildren('Query ', h('strong.mono', {}, pieces[t]),
      ` at ${t}: it sees ${ranked.length} of ${pieces.length} keys, and their weights sum to `, figureOf('weights-sum', sum(formed)), '.');
    figure.show({picked: s, labels: pieces, lanes: [
      {title: 'scores, q·k / √D', values: row.scores, color: signed(row.scores), range: rangeOf(row)},
      {title: 'weights, softmax of the scores', values: formed, color: () => named(0)},
    ]});
    const keyButton = i => h('button.small', {
      type: 'button', onclick: () => onKey(i), title: 'Look at this key', 'aria-pressed': String(i === s),
    }, pieces[i]);
    list.replaceChildren(table(['key', 'at', 'score', 'weight', '|v|', 'w × |v|'], ranked.slice(0, LISTED).map(i =>
      [keyButton(i), i, short(row.scores[i]),
        percent(formed[i]), short(valueLength(now, i)), short(formed[i] * valueLength(now, i))])));
  }};
}

/** From the least to the largest score that counts: what is masked has no bar. */
const rangeOf = ({scores, isSeen}) => {
  const seen = scores.filter((_, s) => isSeen[s]);
  return [Math.min(0, ...seen), Math.max(0, ...seen)];
};

/** Strips {name, values} as rows of a CSV. */
export const stripRows = lines => [['', ...lines[0].values.keys()], ...lines.map(({name, values}) => [name, ...values])];

const valueLength = ({vectors: {v}}, s) => Math.sqrt(sum(terms(v, s, v, s)));

function termsCard({signal, pieces}) {
  const element = card('One score', 'q·k term by term: each of a head’s D dimensions gives one product, and their sum, over √D, is the score.');
  const lead = h('p'), list = h('div');
  let products = [0], now = null;
  const figure = bars({
    label: 'The products of query and key, dimension by dimension', signal, lanes: [{title: '', values: products}],
    describe: d => [`dimension ${d}`, `q ${precise(of('q', d))} × k ${precise(of('k', d))}`, `= ${precise(products[d])}`],
  });
  const of = (which, d) => now.vectors[`rot_${which}`][(which === 'q' ? now.t : now.s) * products.length + d];
  figure.dataset.test = 'term-bars';
  element.body.append(lead, figure, list);
  exportable(element, {name: 'score', canvas: figure, rows: () => [['dimension', 'q', 'k', 'product'],
    ...Array.from(products, (x, d) => [d, of('q', d), of('k', d), x])]});
  return {element, show(found) {
    now = found;
    const {row, formed, vectors, t, s} = now;
    products = terms(vectors.rot_q, t, vectors.rot_k, s);
    lead.replaceChildren('Query ', h('strong.mono', {}, pieces[t]), ` at ${t}, key `, h('strong.mono', {}, pieces[s]), ` at ${s}.`);
    figure.show({lanes: [{title: `q × k in ${products.length} dimensions`, values: products, color: signed(products)}]});
    list.replaceChildren(facts([
      ['sum of the products, q·k', figureOf('dot', sum(products))],
      [`× 1 / √${products.length} = ${precise(vectors.scale)}: the score`, figureOf('score', row.scores[s])],
      ...row.isSeen[s] ? [
        ['exp(score − the row’s largest)',
          `exp(${precise(row.scores[s])} − ${precise(row.largest)}) = ${precise(Math.exp(row.scores[s] - row.largest))}`],
        ['softmax’s denominator, the sum of these', figureOf('denominator', row.denominator)],
        ['weight, formed here', figureOf('weight-here', row.weights[s])],
        ['weight, formed by the model’s code', figureOf('weight', formed[s])],
      ] : [['masked', s > t ? 'the key comes after the query: weight 0' : 'the key lies before the window: weight 0']],
    ]));
  }};
}

function valuesCard({signal, pieces}) {
  const element = card('Weighted values', 'What the head gives for this query: Σ weight × v over the keys. The strongest keys each on a line '
    + 'of its own; the last line is what the kernel gave.');
  element.classList.add('wide');
  const lead = h('p');
  let lines = [];
  const strips = matrix({
    label: 'Weighted values of the strongest keys, their sum, and the head’s output', signal, kind: 'signs', rows: 1, cols: 1, value: () => 0,
    cellY: 18, cell: 40, rowLabels: [''], describe: (r, d) => [lines[r].name, `dimension ${d}: ${precise(lines[r].values[d])}`],
  });
  strips.dataset.test = 'value-strips';
  element.body.append(strips, lead);
  exportable(element, {name: 'weighted-values', canvas: strips, rows: () => stripRows(lines)});
  return {element, show(found) {
    const {vectors: {v, kernel_out: out}, formed, ranked, t} = found;
    const D = v.shape[1];
    const took = keys => Float64Array.from({length: D}, (_, d) => sum(keys.map(s => formed[s] * v[s * D + d])));
    const rest = ranked.slice(LISTED), all = took(ranked), gave = out.subarray(t * D, (t + 1) * D);
    lines = [
      ...ranked.slice(0, LISTED).map(s => ({name: `${percent(formed[s])} ${pieces[s]}`, values: took([s])})),
      ...rest.length ? [{name: `${rest.length} more`, values: took(rest)}] : [],
      {name: 'sum', values: all}, {name: 'output', values: gave},
    ];
    const most = Math.max(1e-12, ...lines.flatMap(({values}) => Array.from(values, Math.abs)));
    strips.show({rows: lines.length, cols: D, value: (r, d) => lines[r].values[d], range: [-most, most],
      rowLabels: lines.map(({name}) => name)});
    const difference = Math.max(...all.map((x, d) => Math.abs(x - gave[d])));
    lead.replaceChildren('Blue: negative, orange: positive, up to ±', short(most), '. The sum and the head’s output differ by at most ',
      figureOf('output-difference', difference, short(difference)), '.');
  }};
}
