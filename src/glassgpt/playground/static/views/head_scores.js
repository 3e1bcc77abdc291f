// Head scores: how much each head behaves like a known type, at one step and over all steps.
import {argmax, card, count, exportButtons, h, headNames, layerNames, ramp, state} from '../core/index.js';
import {axis, chart, line, matrix, verticalLine} from '../widgets/index.js';

const MAX_LOADED = 60;  // snapshots in the chart over steps
const DASHES = ['solid', 'dash', 'dot', 'dashdot'];
const MEANINGS = {
  'previous token': 'w[t, t − 1]: attends to the previous token',
  'duplicate token': 'w[t, t − p]: attends to the first occurrence of the same token',
  'induction': 'w[t, t − p + 1]: attends to the token after that occurrence (Olsson et al., 2022)',
  'first-token sink': 'w[t, 0]: attends to the first token (Xiao et al., 2023)',
};

// The scores (layers x heads) of the k-th type.
function scoresOf({head_scores: scores}, k) {
  const size = scores.shape[1] * scores.shape[2];
  return scores.subarray(k * size, (k + 1) * size);
}

// The scores of all heads at a step; `show(snapshot)`.
export function headScoresCard({signal}) {
  const place = h('div.head-types');
  let now = null, grids = null;
  function createGrid(type, k) {
    const [, rows, cols] = now.head_scores.shape, at = (r, c) => scoresOf(now, k)[r * cols + c];
    const grid = matrix({
      label: `Scores of the type ${type}`, signal, rows, cols, range: [0, 1], cell: 34, cellY: 22, value: at,
      test: `head-type-${k}`, rowLabels: layerNames(rows), colLabels: headNames(cols),
      words: (r, c) => at(r, c).toFixed(2), onSelect: (layer, head) => state.set({layer, head}),
      describe: (r, c) => [type, `layer ${r}, head ${c}: ${at(r, c).toFixed(3)}`],
    });
    place.append(h('div', {}, h('div.row.headed', {}, h('h3', {}, type),
      exportButtons({name: `${type}-heads`, figure: grid})), grid, h('p.about', {}, MEANINGS[type] ?? '')));
    return grid;
  }
  const element = card('Head scores', {
    wide: true, about: 'The mean weight on one earlier token, for queries t in the second half of p random tokens, '
      + 'repeated once. The four scores of a head sum to at most 1.',
    save: {name: 'head-scores', rows: () => {
      const [, layers, heads] = now.head_scores.shape;
      return [['step', 'type', 'layer', 'head', 'score'], ...Array.from(now.head_scores, (score, i) => [now.step,
        now.head_types[Math.floor(i / (layers * heads))], Math.floor(i / heads) % layers, i % heads, score])];
    }},
  }, place, h('p.about', {}, ramp('magnitude', 'score 0', 1, signal)));
  return {element, show(snapshot) {
    now = snapshot;
    grids ??= now.head_types.map(createGrid);
    grids.forEach(grid => grid.show({}));
  }};
}

// The best head of each type over the steps. load(step): a promise of a snapshot, loaded one after the other.
export function scoresOverSteps({load, steps, marked, signal}) {
  const about = h('p.about', {test: 'scores-count'}), best = new Map();  // by step: the best head of each type
  let types = [], loading = Promise.resolve();
  const drawing = chart({
    label: 'Best head of each type over the steps', signal, test: 'scores-over-steps', traces() {
      const found = [...best].sort(([a], [b]) => a - b);
      const steps = found.map(([step]) => step), of = (k, key) => found.map(([, heads]) => heads[k][key]);
      return types.map((type, k) => line(type, steps, of(k, 'score'), k, {dash: DASHES[k % DASHES.length],
        customdata: of(k, 'name'), hovertemplate: '%{y} %{customdata}'}));
    },
    layout: () => ({showlegend: true, hovermode: 'x unified', margin: {t: 24}, uirevision: 'scores',
      xaxis: axis('step', {rangemode: 'tozero'}), yaxis: axis('', {rangemode: 'tozero', hoverformat: '.3f'}),
      shapes: marked() === null ? [] : [verticalLine(marked())]}),
  });
  const element = card('Best head of each type over the steps', {
    wide: true, about: 'The highest score among all heads, from 0 to 1: when heads of a type emerge.',
    save: {name: 'scores-over-steps', figure: drawing, rows: drawing.rows},
  }, drawing, about);
  async function gather() {
    for (const step of evenlySpaced(steps(), MAX_LOADED)) {
      if (best.has(step)) continue;
      const snapshot = await load(step).catch(() => null);  // removed in the meantime, or damaged
      if (signal.aborted) return;
      if (!snapshot) continue;
      types = snapshot.head_types;
      best.set(step, types.map((_, k) => {
        const scores = scoresOf(snapshot, k), i = argmax(scores), heads = snapshot.head_scores.shape[2];
        return {score: scores[i], name: `layer ${Math.floor(i / heads)}, head ${i % heads}`};
      }));
      if (best.size % 10 === 0) drawing.redraw();
    }
    about.textContent = `${count(best.size)} of ${count(steps().length)} snapshots.`;
    drawing.redraw();
  }
  return {element, update: () => (loading = loading.then(gather)), clear: () => best.clear(), redraw: drawing.redraw};
}

// At most `max` of the values, evenly spaced, with the first and the last.
const evenlySpaced = (all, max) => (all.length <= max ? all
  : Array.from({length: max}, (_, i) => all[Math.round(i * (all.length - 1) / (max - 1))]));
