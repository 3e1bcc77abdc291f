// Rotary positions (Su et al., 2021): what rotating queries and keys does to a score.
import {attentionRow, card, count, css, exact, facts, h, largest, norm, precise, products, rotaryAngles,
  scoreAtDistance, short, sum} from '../core/index.js';
import {axis, chart, figure, line, matrix, plain, selectable} from '../widgets/index.js';
import {stripRows} from './attention_row.js';

const DIAL = 46, DIAL_LABEL = 12;  // pixels

// The cards; `show(found)` as in `rowCards`.
export function rotaryCards({signal, info, pieces}) {
  const angles = rotaryAngles(info.head_width, info.config.rope_base);
  const cards = [stripsCard, dialsCard, distanceCard].map(create => create({signal, info, pieces, angles}));
  return {cards: cards.map(({element}) => element), show: found => cards.forEach(({show}) => show(found))};
}

function stripsCard({signal, info, pieces}) {
  const half = info.head_width / 2;
  let lines = [];
  const strips = matrix({
    label: 'Query and key before and after rotation', signal, scale: 'signed', rows: 4, cols: 2 * half, value: () => 0,
    cellY: 18, cell: 40, rowLabels: ['q before', 'q after', 'k before', 'k after'], test: 'rotary-strips',
    describe: (r, d) => [`${lines[r].name}, dimension ${d}: ${precise(lines[r].values[d])}`, `pair ${d % half}`],
  });
  const list = h('div');
  const element = card('Rotary positions', {
    about: `Query and key before and after rotation. Dimensions d and d + ${half} are a pair, rotated by position × `
      + `θ_d. ${info.config.qk_norm ? '“Before” is after the QK-norm. ' : ''}Rotation keeps the norm.`,
    save: {name: 'rotary', figure: strips, rows: () => stripRows(lines)},
  }, strips, list);
  return {element, show(found) {
    const {vectors, t, s} = found, {scores} = attentionRow(found);
    const {q_norm: q, rot_q: rotQ, k_norm: k, rot_k: rotK} = vectors;
    lines = [['q before', q, t], ['q after', rotQ, t], ['k before', k, s], ['k after', rotK, s]]
      .map(([name, array, i]) => ({name, values: array.subarray(2 * half * i, 2 * half * (i + 1))}));
    strips.show({value: (r, d) => lines[r].values[d]});
    const norms = lines.map(({values}) => short(norm(values)));
    const unrotated = vectors.scale * sum(products(vectors.q_norm, t, vectors.k_norm, s));
    list.replaceChildren(facts([
      [`|q| before, after (${pieces[t]} at ${t})`, `${norms[0]}, ${norms[1]}`],
      [`|k| before, after (${pieces[s]} at ${s})`, `${norms[2]}, ${norms[3]}`],
      ['score without rotation', exact('score-plain', unrotated, precise(unrotated))],
      ['score with rotation', exact('score-rotated', scores[s], precise(scores[s]))],
    ]));
  }};
}

function dialsCard({signal, info, angles, pieces}) {
  const half = angles.length, lead = h('p');
  let now = null, perRow = 1;
  const hand = (which, j) => [now.vectors[which][now.t * 2 * half + j],
    now.vectors[which][now.t * 2 * half + j + half]];
  const dials = figure({label: 'Pairs of the query, before and after rotation', signal,
    size(width) {
      perRow = Math.max(1, Math.min(half, Math.floor(width / DIAL)));
      return Math.ceil(half / perRow) * (DIAL + DIAL_LABEL);
    },
    paint(p) {
      if (!now) return;
      const longest = Math.max(1e-12, largest(angles.map((_, j) => Math.hypot(...hand('q_norm', j)))));
      angles.forEach((_, j) => {
        const radius = DIAL / 2 - 3, x = (j % perRow + 0.5) * DIAL;
        const y = Math.floor(j / perRow) * (DIAL + DIAL_LABEL) + DIAL / 2;
        p.dot(x, y, radius, css('ground'));
        for (const [which, color, thickness] of [['q_norm', css('soft'), 1], ['rot_q', css('accent'), 2.5]]) {
          const [a, b] = hand(which, j);
          p.line(x, y, x + radius * a / longest, y - radius * b / longest, color, thickness);
        }
        p.text(x, y + DIAL / 2 + 4, j, {align: 'center', size: 10, fill: css('soft')});
      });
    }});
  selectable(dials, {
    signal, grid: () => ({rows: now ? 1 : 0, cols: half}),
    cellAt: (x, y) => [0, x < perRow * DIAL ? Math.floor(y / (DIAL + DIAL_LABEL)) * perRow + x / DIAL : -1],
    lines: (_, j) => [`pair ${j}: dimensions ${j} and ${j + half}`, `θ = ${precise(angles[j])} rad per position`,
      `rotated by ${precise(now.t * angles[j])} rad = ${short(now.t * angles[j] / (2 * Math.PI))} turns`,
      `a full turn takes ${short(2 * Math.PI / angles[j])} positions`],
  });
  const element = card('Rotation angles', {
    about: `Each pair of the query as a hand: thin before, thick after rotation by t × θ_d, where θ_d = `
      + `${count(info.config.rope_base)}^(−2d/${2 * half}). The first pairs rotate fast, the last ones hardly.`,
    save: {name: 'rotary-angles', figure: dials, rows: () => [
      ['pair', 'theta in radians', 'angle in radians', 'before 1', 'before 2', 'after 1', 'after 2'],
      ...Array.from(angles, (angle, j) => [j, angle, now.t * angle, ...hand('q_norm', j), ...hand('rot_q', j)])]},
  }, lead, dials);
  return {element, show(found) {
    now = found;
    lead.replaceChildren('Query ', h('strong.mono', {}, pieces[now.t]), ` at ${now.t}: pair 0 is rotated by ${now.t} `
      + `rad, pair ${half - 1} by ${precise(now.t * angles[half - 1])} rad.`);
    dials.figure.redraw();
  }};
}

function distanceCard({signal, pieces, angles}) {
  let now = null;
  function traces() {
    if (!now) return [];
    const {t, s, vectors} = now, {scores} = attentionRow(now);
    const keys = Array.from({length: t + 1}, (_, i) => t - i), distances = [...pieces.keys()];
    const series = (name, x, y, tokens, i, style) => line(name, x, y, i, {symbol: i, ...style,
      text: tokens.map(plain), hovertemplate: '%{text} at distance %{x}: %{y:.4f}'});
    const ofKeys = (name, i, score) => series(name, keys.map(key => t - key), keys.map(score),
      keys.map(key => pieces[key]), i);
    return [
      ofKeys('with rotation', 0, key => scores[key]),
      ofKeys('without', 1, key => vectors.scale * sum(products(vectors.q_norm, t, vectors.k_norm, key))),
      ...s > t ? [] : [series('the selected key', distances, distances.map(x => scoreAtDistance(now, x, angles)),
        distances.map(() => pieces[s]), 2, {mode: 'lines', dash: 'dot'})],
    ];
  }
  const lines = chart({label: 'Score by distance, with and without rotation', signal, height: 280,
    test: 'distance-chart', traces,
    layout: () => ({showlegend: true, margin: {t: 28}, xaxis: axis('distance t − s'), yaxis: axis('score')})});
  const element = card('Score by distance', {
    wide: true, save: {name: 'score-by-distance', figure: lines, rows: lines.rows},
    about: 'The score of each key with this query by distance. Dotted: the selected key at other distances.',
  }, lines);
  return {element, show(found) {
    now = found;
    lines.redraw();
  }};
}
