// A figure whose parts are pointed at, picked, and walked through with the arrow keys.

import {announce, tip} from './ui.js';

/**
 * under(event): the part of the figure there, or null. lines(part): its tooltip's lines, or null. onPick(part): it was chosen (left out:
 * nothing can be). moved(key): the part that a key leads to from the chosen one, or undefined.
 */
export function pickable(canvas, {under, lines, onPick, moved, signal}) {
  canvas.addEventListener('pointermove', event => {
    const part = under(event);
    canvas.style.cursor = part !== null && onPick ? 'pointer' : '';
    tip(part === null ? null : lines(part), event.clientX, event.clientY);
  });
  canvas.addEventListener('pointerleave', () => tip(null));
  signal?.addEventListener('abort', () => tip(null));
  if (!onPick) return;
  const pick = part => {
    onPick(part);
    announce(lines(part)?.join(', ') ?? '');
  };
  canvas.tabIndex = 0;
  canvas.addEventListener('click', event => {
    const part = under(event);
    if (part !== null) pick(part);
  });
  canvas.addEventListener('keydown', event => {
    const part = event.ctrlKey || event.metaKey || event.altKey ? undefined : moved(event.key);
    if (part === undefined) return;
    event.preventDefault();
    pick(part);
  });
}

const STEPS = {ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0], Home: [0, -Infinity], End: [0, Infinity]};

/** The cell [row, col] that a key leads to in a grid, or undefined where the key is none of these. */
export function stepped(key, [row, col], rows, cols) {
  const step = STEPS[key];
  return step && [Math.min(rows - 1, Math.max(0, row + step[0])), Math.min(cols - 1, Math.max(0, col + step[1]))];
}
