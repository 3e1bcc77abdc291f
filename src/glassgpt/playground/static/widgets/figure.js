// A canvas that repaints when its width or the theme changes, and whose parts can be pointed at, selected and exported.

import {announce, CanvasPainter, exportable, onTheme, tip} from '../core/index.js';

/**
 * size(width): the height for a width, in CSS pixels. paint(p, width, height). label: for screen readers. The element's
 * `figure` has `redraw()`, `png()` and `svg()`.
 */
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
    const scale = devicePixelRatio || 1;
    canvas.width = Math.max(1, Math.round(width * scale));
    canvas.height = Math.max(1, Math.round(height * scale));
    const context = canvas.getContext('2d');
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

/** The place of a pointer event within an element. */
export function pointIn(element, event) {
  const box = element.getBoundingClientRect();
  return [event.clientX - box.left, event.clientY - box.top];
}

/**
 * Let parts of a figure be pointed at and selected. partAt(x, y): the part there, or null. lines(part): its tooltip, or
 * null. onSelect(part): optional. next(key): the part that a key leads to from the selected one, or undefined.
 */
export function selectable(canvas, {partAt, lines, onSelect, next, signal}) {
  canvas.addEventListener('pointermove', event => {
    const part = partAt(...pointIn(canvas, event));
    canvas.style.cursor = part !== null && onSelect ? 'pointer' : '';
    tip(part === null ? null : lines(part), event.clientX, event.clientY);
  });
  canvas.addEventListener('pointerleave', () => tip(null));
  signal?.addEventListener('abort', () => tip(null));
  if (!onSelect) return;
  const select = part => {
    onSelect(part);
    announce(lines(part)?.join(', ') ?? '');
  };
  canvas.tabIndex = 0;
  canvas.addEventListener('click', event => {
    const part = partAt(...pointIn(canvas, event));
    if (part !== null) select(part);
  });
  canvas.addEventListener('keydown', event => {
    const part = event.ctrlKey || event.metaKey || event.altKey ? undefined : next(event.key);
    if (part === undefined) return;
    event.preventDefault();
    select(part);
  });
}

const MOVES = {
  ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0], Home: [0, -Infinity],
    End: [0, Infinity]};

/** The cell [row, col] that a key leads to in a grid, or undefined for any other key. */
export function cellAfterKey(key, [row, col], rows, cols) {
  const move = MOVES[key], clamp = (i, size) => Math.min(size - 1, Math.max(0, i));
  return move && [clamp(row + move[0], rows), clamp(col + move[1], cols)];
}
