// Rotary positions (Su et al., 2021), before and after: what turning queries and keys does to a score.

import {chart, plain} from './charts.js';
import {css, named} from './colors.js';
import {exportable} from './export.js';
import {rowOf, stripRows, sum, terms} from './headrow.js';
import {matrix} from './matrix.js';
import {figure} from './paint.js';
import {pickable} from './picking.js';
import {card, facts, h, precise, short} from './ui.js';

/** Angles that a step of one position turns each pair by, in radians. */
export const frequencies = (D, base) => Float64Array.from({length: D / 2}, (_, j) => base ** (-2 * j / D));

/** Score of the query at t with the key at s, were they `distance` positions apart: from what they are before they are turned. */
export function scoreAt({vectors: {q_norm: q, k_norm: k, scale}, t, s}, distance, turns) {
  const half = turns.length, D = 2 * half;
  let dot = 0;
  for (let j = 0; j < half; j++) {
    const [a, b, c, d] = [q[t * D + j], q[t * D + j + half], k[s * D + j], k[s * D + j + half]];
    // Turned by distance × θ against each other: only the difference of the positions is left.
    dot += Math.cos(distance * turns[j]) * (a * c + b * d) + Math.sin(distance * turns[j]) * (a * d - b * c);
  }
  return scale * dot;
}

/** The cards, and `show(found)` as in `rowCards`. */
export function rotaryCards({signal, info, pieces}) {
  const turns = frequencies(info.head_width, info.config.rope_base);
  const cards = [stripsCard, dialsCard, distanceCard].map(make => make({signal, info, pieces, turns}));
  return {cards: cards.map(({element}) => element), show: found => cards.forEach(({show}) => show(found))};
}

function stripsCard({signal, info, pieces}) {
  const half = info.head_width / 2;
  const norm = 'Before that each was brought to a root mean square of 1 and weighted (QK-norm): «before» is behind that norm. ';
  const element = card('Rotary positions', `Query and key before and after they are turned: dimensions d and d + ${half} are a pair, `
    + `turned by position × θ_d. ${info.config.qk_norm ? norm : ''}Turning changes no length.`);
  let lines = [];
  const strips = matrix({
    label: 'Query and key before and after turning', signal, kind: 'signs', rows: 4, cols: 2 * half, value: () => 0, cellY: 18, cell: 40,
    rowLabels: ['q before', 'q after', 'k before', 'k after'],
    describe: (r, d) => [`${lines[r].name}, dimension ${d}: ${precise(lines[r].values[d])}`, `pair ${d % half}`],
  });
  strips.dataset.test = 'rotary-strips';
  const list = h('div');
  element.body.append(strips, list);
  exportable(element, {name: 'rotary', canvas: strips, rows: () => stripRows(lines)});
  return {element, show(found) {
    const {vectors, t, s} = found;
    const line = (name, array, i) => ({name, values: array.subarray(2 * half * i, 2 * half * (i + 1))});
    lines = [
      line('q before', vectors.q_norm, t), line('q after', vectors.rot_q, t), line('k before', vectors.k_norm, s), line('k after', vectors.rot_k, s),
    ];
    strips.show({value: (r, d) => lines[r].values[d]});
    const length = ({values}) => short(Math.sqrt(sum(values.map(x => x * x))));
    const plain = vectors.scale * sum(terms(vectors.q_norm, t, vectors.k_norm, s));
    list.replaceChildren(facts([
      [`|q| before, after (${pieces[t]} at ${t})`, `${length(lines[0])}, ${length(lines[1])}`],
      [`|k| before, after (${pieces[s]} at ${s})`, `${length(lines[2])}, ${length(lines[3])}`],
      ['score without rotation', h('span', {'data-test': 'score-plain', 'data-value': plain}, precise(plain))],
      ['score with it', h('span', {'data-test': 'score-turned', 'data-value': rowOf(found).scores[s]}, precise(rowOf(found).scores[s]))],
    ]));
  }};
}

const DIAL = 46;

function dialsCard({signal, info, turns, pieces}) {
  const half = turns.length, base = info.config.rope_base;
  const element = card('The pairs’ angles', 'Each pair of the query as a hand: thin before, thick after turning by t × θ_d, '
    + `θ_d = ${base.toLocaleString('en')}^(−2d/${2 * half}). `
    + 'The first pairs turn fast and tell near positions apart; the last hardly turn and carry content.');
  const lead = h('p');
  let now = null, perRow = 1;
  const hand = (which, j) => [now.vectors[which][now.t * 2 * half + j], now.vectors[which][now.t * 2 * half + j + half]];
  const dials = figure({label: 'Pairs of the query, before and after turning', signal,
    size(width) {
      perRow = Math.max(1, Math.min(half, Math.floor(width / DIAL)));
      return Math.ceil(half / perRow) * (DIAL + 12);
    },
    paint(p) {
      if (!now) return;
      const longest = Math.max(1e-12, ...Array.from(turns, (_, j) => Math.hypot(...hand('q_norm', j))));
      turns.forEach((_, j) => {
        const x = (j % perRow + 0.5) * DIAL, y = Math.floor(j / perRow) * (DIAL + 12) + DIAL / 2, radius = DIAL / 2 - 3;
        p.dot(x, y, radius, css('ground'));
        for (const [which, color, thickness] of [['q_norm', css('soft'), 1], ['rot_q', css('accent'), 2.5]]) {
          const [a, b] = hand(which, j);
          p.line(x, y, x + radius * a / longest, y - radius * b / longest, color, thickness);
        }
        p.text(x, y + DIAL / 2 + 4, j, {align: 'center', size: 10, fill: css('soft')});
      });
    }});
  pickable(dials, {
    signal,
    under(event) {
      const box = dials.getBoundingClientRect();
      const col = Math.floor((event.clientX - box.left) / DIAL), row = Math.floor((event.clientY - box.top) / (DIAL + 12));
      const j = row * perRow + col;
      return now && col < perRow && j < half ? j : null;
    },
    lines: j => [`pair ${j}: dimensions ${j} and ${j + half}`, `θ = ${precise(turns[j])} rad a position`,
      `turned by ${precise(now.t * turns[j])} rad = ${short(now.t * turns[j] / (2 * Math.PI))} turns`,
      `a whole turn takes ${short(2 * Math.PI / turns[j])} positions`],
  });
  element.body.append(lead, dials);
  exportable(element, {name: 'rotary-angles', canvas: dials, rows: () => [
    ['pair', 'theta in radians', 'angle in radians', 'before 1', 'before 2', 'after 1', 'after 2'],
    ...Array.from(turns, (turn, j) => [j, turn, now.t * turn, ...hand('q_norm', j), ...hand('rot_q', j)])]});
  return {element, show(found) {
    now = found;
    lead.replaceChildren('Query ', h('strong.mono', {}, pieces[now.t]),
      ` at ${now.t}: pair 0 is turned by ${now.t} rad, pair ${half - 1} by ${precise(now.t * turns[half - 1])} rad.`);
    dials.figure.redraw();
  }};
}

function distanceCard({signal, pieces, turns}) {
  const element = card('Score by distance', 'Each key’s score with this query as it is, and as it would be without rotation, by how far back '
    + 'the key lies. Dotted: the chosen key alone, were it at another distance.');
  element.classList.add('wide');
  let now = null;
  const series = () => {
    const {row, t, s, vectors} = now, keys = Array.from({length: t + 1}, (_, i) => t - i);
    const line = (name, score) => ({name, x: keys.map(key => t - key), y: keys.map(score), text: keys.map(key => plain(pieces[key]))});
    const distances = [...pieces.keys()];
    return [
      line('with rotation', key => row.scores[key]),
      line('without', key => vectors.scale * sum(terms(vectors.q_norm, t, vectors.k_norm, key))),
      ...s > t ? [] : [{
        name: 'the chosen key', x: distances, y: distances.map(x => scoreAt(now, x, turns)), text: distances.map(() => plain(pieces[s])),
      }],
    ];
  };
  const style = i => ({
    mode: i < 2 ? 'lines+markers' : 'lines', line: {color: named(i), dash: i < 2 ? 'solid' : 'dot'}, marker: {size: 4, symbol: i},
  });
  const lines = chart({label: 'Score by distance, with and without rotation', signal, height: 280,
    traces: () => (now ? series().map((one, i) => ({...one, ...style(i), hovertemplate: '%{text} at distance %{x}: %{y:.4f}'})) : []),
    layout: () => ({showlegend: true, margin: {t: 28}, xaxis: {title: {text: 'distance t − s'}}, yaxis: {title: {text: 'score'}}})});
  lines.dataset.test = 'distance-chart';
  element.body.append(lines);
  exportable(element, {name: 'score-by-distance', canvas: lines, rows: lines.rows});
  return {element, show(found) {
    now = {...found, row: rowOf(found)};
    lines.redraw();
  }};
}
