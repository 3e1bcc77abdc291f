// The attention weights of one head: rows are queries, columns are keys.
import {css, isVisible, percent, precise} from '../core/index.js';
import {matrix} from './matrix.js';

// The canvas; `showHead({pieces, labels, weights, scale, isSqrt, span})` shows a head. labels: of the rows, default
// `pieces`. weights: (T, T), divided by `scale` (default 1). isSqrt: color by the square root. Others: see `matrix`.
export function headMatrix(settings) {
  let head = null;
  const weight = (t, s) => head.weights[t * head.pieces.length + s] / (head.scale ?? 1);
  function weightText(t, s) {
    if (isVisible(head.span, t, s)) return `weight ${precise(weight(t, s))} (${percent(weight(t, s))})`;
    return s > t ? 'masked: after the query' : 'masked: before the window';
  }
  const canvas = matrix({
    label: 'Attention weights of one head', rows: 1, cols: 1, value: () => 0, range: [0, 1], ...settings,
    hidden: (t, s) => head && !isVisible(head.span, t, s),
    overlay: (p, place) => head && outlineWindow(p, place, head.span, head.pieces.length),
    describe: (t, s) => (head ? [`query ${head.pieces[t]} at ${t}`, `key ${head.pieces[s]} at ${s}`, weightText(t, s)]
      : []),
  });
  return Object.assign(canvas, {showHead(now) {
    head = now;
    const size = head.pieces.length;
    canvas.show({rows: size, cols: size, rowLabels: head.labels ?? head.pieces, colLabels: head.pieces, value: weight,
      transform: head.isSqrt ? Math.sqrt : null});
  }});
}

// The window's edge, and a frame around the columns of the global tokens.
function outlineWindow(p, {x, y, cell, cellY}, {window, globals}, size) {
  if (window === null || window >= size) return;
  const color = css('warm');
  if (cell < 3) {
    p.line(x, y + window * cellY, x + (size - window) * cell, y + size * cellY, color, 1.5);
  } else {
    for (let t = window; t < size; t++) {
      const right = x + (t - window + 1) * cell;  // the edge of the nearest key that the query at t does not see
      p.line(right - cell, y + t * cellY, right, y + t * cellY, color, 1.5);
      p.line(right, y + t * cellY, right, y + (t + 1) * cellY, color, 1.5);
    }
  }
  if (globals) p.frame(x + 1, y + window * cellY, globals * cell - 1, (size - window) * cellY - 1, color, 1.5);
}
