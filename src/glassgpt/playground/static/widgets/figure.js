// A canvas that repaints when its width or the theme changes, and whose cells can be pointed at, selected and exported.
import {announce, CanvasPainter, exportable, onTheme, tip} from '../core/index.js';

// size(width): the height for a width, in CSS pixels. paint(p, width, height). label: for screen readers. The element's
// `figure` has `redraw()`, `png()` and `svg()`.
export function figure({size, paint, label, test, signal}) {
  const canvas = document.createElement('canvas');
  canvas.className = 'figure';
  canvas.setAttribute('role', 'img');
  canvas.setAttribute('aria-label', label);
  if (test) canvas.dataset.test = test;
  let width = 0, height = 0;
  function redraw() {
    if (!width) return;
    height = size(width);
    canvas.style.height = `${height}px`;
    const scale = devicePixelRatio || 1, context = canvas.getContext('2d');
    canvas.width = Math.max(1, Math.round(width * scale));
    canvas.height = Math.max(1, Math.round(height * scale));
    context.scale(scale, scale);
    paint(new CanvasPainter(context), width, height);
  }
  const observer = new ResizeObserver(() => {
    const now = Math.floor(canvas.parentElement?.clientWidth ? canvas.clientWidth : 0);
    if (!now || now === width) return;
    width = now;
    redraw();
  });
  observer.observe(canvas);
  onTheme(redraw, signal);
  signal?.addEventListener('abort', () => observer.disconnect());
  canvas.figure = {redraw, ...exportable(() => [width, height], paint)};
  return canvas;
}

// The place of a pointer event within an element.
export function pointIn(element, event) {
  const box = element.getBoundingClientRect();
  return [event.clientX - box.left, event.clientY - box.top];
}

const MOVES = {
  ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0], Home: [0, -Infinity],
    End: [0, Infinity]};

// Let the cells of a grid be pointed at, and selected by clicks and arrow keys. grid(): {rows, cols, selected: [row,
// col]}. cellAt(x, y): row and col there, also outside of the grid. lines(row, col): a tooltip. onSelect: optional.
export function selectable(canvas, {grid, cellAt, lines, onSelect, signal}) {
  const cellUnder = event => {
    const [row, col] = cellAt(...pointIn(canvas, event)).map(Math.floor), {rows, cols} = grid();
    return row >= 0 && row < rows && col >= 0 && col < cols ? [row, col] : null;
  };
  canvas.addEventListener('pointermove', event => {
    const cell = cellUnder(event);
    canvas.style.cursor = cell && onSelect ? 'pointer' : '';
    tip(cell && (lines(...cell) ?? null), event.clientX, event.clientY);
  });
  canvas.addEventListener('pointerleave', () => tip(null));
  signal?.addEventListener('abort', () => tip(null));
  if (!onSelect) return;
  const select = (event, cell) => {
    if (!cell) return;
    event.preventDefault();
    onSelect(...cell);
    announce(lines(...cell)?.join(', ') ?? '');
  };
  canvas.tabIndex = 0;
  canvas.addEventListener('click', event => select(event, cellUnder(event)));
  canvas.addEventListener('keydown', event => {
    const {rows, cols, selected} = grid(), move = MOVES[event.key];
    if (!move || (rows === 1 && move[0]) || event.ctrlKey || event.metaKey || event.altKey) return;
    select(event, [rows, cols].map((size, i) => Math.min(size - 1, Math.max(0, selected[i] + move[i]))));
  });
}

// Let arrow keys, Home and End move the focus through buttons, of which one at a time is reachable by Tab. buttons():
// all. columns: of a grid; a list moves with the horizontal keys, or with the vertical ones if columns is 1.
export function roving(container, buttons, {columns = Infinity, onMove} = {}) {
  const reachable = i => buttons().forEach((button, j) => { button.tabIndex = j === i ? 0 : -1; });
  container.addEventListener('keydown', event => {
    const all = buttons(), at = all.indexOf(document.activeElement), isList = columns === 1 || columns === Infinity;
    const steps = {ArrowUp: -columns, ArrowDown: columns, ...columns !== 1 && {ArrowLeft: -1, ArrowRight: 1},
      ...isList && {Home: -at, End: all.length - 1 - at}};
    const to = at + (steps[event.key] ?? NaN);
    if (at < 0 || !all[to]) return;
    event.preventDefault();
    reachable(to);
    onMove?.(to);
    all[to].focus();
  });
  return reachable;
}
