// Which heads are of a known kind, at a step and over all steps.

import {chart} from './charts.js';
import {named} from './colors.js';
import {exportable} from './export.js';
import {matrix} from './matrix.js';
import * as state from './state.js';
import {card, h, ramp} from './ui.js';

const MOST_LOADED = 60;  // snapshots that the chart over steps is made of
const MEANINGS = {
  'previous token': 'w[t, t − 1]: looks at the token right before',
  'duplicate token': 'w[t, t − p]: looks at the same token’s first occurrence',
  'induction': 'w[t, t − p + 1]: looks at what followed the same token before (Olsson et al., 2022)',
  'first-token sink': 'w[t, 0]: rests on the first token (Xiao et al., 2023)',
};

/** The scores of all heads at a step. */
export function kindsCard({signal}) {
  const element = card('Kinds of heads', 'On p random tokens that come twice: the mean weight on one earlier token over the rows t of the second half. '
    + 'The four scores of a head sum to 1 at most.');
  element.classList.add('wide');
  const place = h('div.kinds');
  element.body.append(place, h('p.about', {}, ramp('sizes', 'score 0', 1, signal)));
  let now = null, grids = null;
  exportable(element, {name: 'kinds-of-heads', rows: () => [['step', 'kind', 'layer', 'head', 'score'],
    ...Array.from(now.head_scores, (score, i) => {
      const [, layers, heads] = now.head_scores.shape;
      return [now.step, now.head_types[Math.floor(i / (layers * heads))], Math.floor(i / heads) % layers, i % heads, score];
    })]});

  const scores = kind => {
    const [, layers, heads] = now.head_scores.shape;
    return now.head_scores.subarray(kind * layers * heads, (kind + 1) * layers * heads);
  };

  function build() {
    const [, layers, heads] = now.head_scores.shape;
    grids = now.head_types.map((kind, k) => {
      const grid = matrix({
        label: `Heads of the kind ${kind}`, signal, rows: layers, cols: heads, range: [0, 1], cell: 34, cellY: 22, value: (r, c) => scores(k)[r * heads + c],
        rowLabels: Array.from({length: layers}, (_, i) => `layer ${i}`), colLabels: Array.from({length: heads}, (_, i) => String(i)),
        words: (r, c) => scores(k)[r * heads + c].toFixed(2), onPick: (layer, head) => state.set({layer, head}),
        describe: (r, c) => [`${kind}`, `layer ${r}, head ${c}: ${scores(k)[r * heads + c].toFixed(3)}`],
      });
      grid.dataset.test = `kind-${k}`;
      return grid;
    });
    place.append(...now.head_types.map((kind, k) => {
      const tools = h('span.card-tools');
      exportable({tools}, {name: `${kind}-heads`, canvas: grids[k]});
      return h('div', {}, h('div.row.headed', {}, h('h3', {}, kind), tools), grids[k], h('p.about', {}, MEANINGS[kind] ?? ''));
    }));
  }

  return {element, show(snapshot) {
    now = snapshot;
    if (!grids) build();
    grids.forEach(grid => grid.show({values: null}));
  }};
}

/** Each kind's strongest head over the steps; snapshots are loaded one after the other. load(step): a promise of one. marked(): a step. */
export function kindsOverSteps({load, steps, marked, signal}) {
  const element = card('Strongest head of each kind over the steps', 'When heads of a kind come into being: the highest score among all heads, from 0 to 1.');
  element.classList.add('wide');
  const about = h('p.about', {'data-test': 'kinds-count'});
  const best = new Map();  // step -> the kinds' strongest heads
  let kinds = [], loading = null;
  const drawn = chart({
    label: 'Strongest head of each kind over the steps', signal, height: 260, traces,
    layout: () => ({showlegend: true, hovermode: 'x unified', margin: {t: 24}, uirevision: 'kinds', xaxis: {title: {text: 'step'}, rangemode: 'tozero'},
      yaxis: {rangemode: 'tozero', hoverformat: '.3f'},
      shapes: marked() === null ? [] : [{type: 'line', x0: marked(), x1: marked(), y0: 0, y1: 1, yref: 'paper',
        line: {color: named(7), width: 1, dash: 'dot'}}]}),
  });
  drawn.dataset.test = 'kinds-over-steps';
  element.body.append(drawn, about);
  exportable(element, {name: 'kinds-over-steps', png: () => drawn.figure.png(), svg: () => drawn.figure.svg(), rows: () => drawn.rows()});

  function traces() {
    const found = [...best].sort(([a], [b]) => a - b);
    return kinds.map((name, k) => ({
      name, x: found.map(([step]) => step), y: found.map(([, heads]) => heads[k].score), mode: 'lines+markers',
      line: {color: named(k), width: 2, dash: ['solid', 'dash', 'dot', 'dashdot'][k % 4]}, marker: {color: named(k), size: 5},
      customdata: found.map(([, heads]) => heads[k].name), hovertemplate: '%{y} %{customdata}',
    }));
  }

  async function gather() {
    for (const step of spread(steps(), MOST_LOADED)) {
      if (best.has(step)) continue;
      const snapshot = await load(step).catch(() => null);  // removed meanwhile
      if (signal.aborted) return;
      if (snapshot) {
        kinds = snapshot.head_types;
        best.set(step, strongest(snapshot));
      }
      if (best.size % 10 === 0) drawn.redraw();
    }
    about.textContent = best.size < steps().length ? `Of ${best.size} of the ${steps().length} snapshots.` : `Of all ${best.size} snapshots.`;
    drawn.redraw();
  }

  return {
    element,
    /** Load what is new. */
    update: () => (loading = (loading ?? Promise.resolve()).then(gather)),
    clear: () => best.clear(),
    mark: () => drawn.redraw(),
  };
}

function strongest({head_scores: scores}) {
  const [kinds, layers, heads] = scores.shape, size = layers * heads;
  return Array.from({length: kinds}, (_, k) => {
    const own = scores.subarray(k * size, (k + 1) * size);
    const i = own.reduce((most, score, j) => (score > own[most] ? j : most), 0);
    return {score: own[i], name: `layer ${Math.floor(i / heads)}, head ${i % heads}`};
  });
}

/** At most so many of them, evenly spread, the first and the last included. */
const spread = (all, most) => (all.length <= most ? all : Array.from({length: most}, (_, i) => all[Math.round(i * (all.length - 1) / (most - 1))]));
