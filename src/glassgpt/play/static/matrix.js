// A matrix as a picture: cells, labels where there is room, a tooltip, and a cell that the arrow keys move.

import {css, table} from './colors.js';
import {figure} from './paint.js';
import {announce, tip} from './ui.js';

/**
 * values: row after row (rows x cols), or value(r, c). kind: 'sizes' from range[0], or 'signs' around 0. hidden(r, c): not a value at
 * all, drawn as ground (what a mask hides). describe(r, c): lines of a cell's tooltip. onPick(r, c): it was chosen; picked: {row, col}.
 * cell: the largest width of a cell in pixels. Returns the canvas; its `show(changes)` repaints with other settings.
 */
export function matrix(given) {
  let m = {kind: 'sizes', range: null, hidden: null, rowLabels: null, colLabels: null, cell: 26, picked: null, describe: null, ...given};
  const signal = m.signal;
  let place = {x: 0, y: 0, cell: 1, cellY: 1};
  const at = (r, c) => (m.values ? m.values[r * m.cols + c] : m.value(r, c));

  function room(width) {
    const labels = m.rowLabels ? Math.min(92, 0.25 * width) : 0;
    const cell = Math.min(m.cell, (width - labels - 1) / m.cols);
    const longest = Math.max(0, ...(m.colLabels ?? []).map(label => String(label).length));
    const head = m.colLabels && cell >= 9 ? Math.min(64, 12 + 8 * longest) : 0;
    const cellY = m.cellY ?? cell;
    place = {x: cell * m.rows >= 0 && m.rowLabels ? labels : 0, y: head, cell, cellY};
    return place;
  }

  function pixels() {
    const [low, high] = m.range ?? bounds();
    const colors = table(m.kind);
    const ground = rgb(css('ground'));
    const image = new ImageData(m.cols, m.rows);
    for (let r = 0, i = 0; r < m.rows; r++) {
      for (let c = 0; c < m.cols; c++, i += 4) {
        const value = at(r, c);
        const share = Math.min(255, Math.max(0, Math.round(255 * (value - low) / (high - low || 1))));
        const color = m.hidden?.(r, c) || Number.isNaN(value) ? ground : colors[share];
        image.data[i] = color[0];
        image.data[i + 1] = color[1];
        image.data[i + 2] = color[2];
        image.data[i + 3] = 255;
      }
    }
    return image;
  }

  function bounds() {
    let most = 0, least = Infinity;
    for (let r = 0; r < m.rows; r++) {
      for (let c = 0; c < m.cols; c++) {
        const value = at(r, c);
        if (Number.isNaN(value)) continue;
        most = Math.max(most, m.kind === 'signs' ? Math.abs(value) : value);
        least = Math.min(least, value);
      }
    }
    return m.kind === 'signs' ? [-most, most] : [Math.min(0, least), most];
  }

  function paint(p, width) {
    const {x, y, cell, cellY} = room(width);
    p.image(x, y, cell * m.cols, cellY * m.rows, pixels());
    p.frame(x, y, cell * m.cols, cellY * m.rows, css('line'));
    if (m.rowLabels && cellY >= 9) {
      const size = Math.min(12, cellY);
      m.rowLabels.forEach((label, r) => p.text(x - 5, y + (r + 0.5) * cellY, label,
        {align: 'end', size, mono: true, most: x - 8, fill: css(m.picked?.row === r ? 'accent' : 'soft'), bold: m.picked?.row === r}));
    }
    if (y) {
      const size = Math.min(12, cell);
      m.colLabels.forEach((label, c) => p.text(x + (c + 0.5) * cell, y - 5, label,
        {turn: -90, size, mono: true, most: y - 8, fill: css(m.picked?.col === c ? 'accent' : 'soft'), bold: m.picked?.col === c}));
    }
    if (m.picked) {
      const {row, col} = m.picked;
      if (row !== null && row !== undefined) p.frame(x, y + row * cellY, cell * m.cols, cellY, css('accent'), 1.5);
      if (col !== null && col !== undefined) {
        p.frame(x + col * cell, y + (row ?? 0) * cellY, cell, row === null || row === undefined ? cellY * m.rows : cellY, css('warm'), 2);
      }
    }
  }

  const canvas = figure({label: m.label, signal, paint, size(width) {
    const {y, cellY} = room(width);
    return Math.ceil(y + cellY * m.rows) + 1;
  }});

  function cellAt(event) {
    const box = canvas.getBoundingClientRect();
    const row = Math.floor((event.clientY - box.top - place.y) / place.cellY);
    const col = Math.floor((event.clientX - box.left - place.x) / place.cell);
    return row >= 0 && row < m.rows && col >= 0 && col < m.cols ? {row, col} : null;
  }

  canvas.addEventListener('pointermove', event => {
    const over = cellAt(event);
    canvas.style.cursor = over && m.onPick ? 'pointer' : '';
    tip(over && m.describe ? m.describe(over.row, over.col) : null, event.clientX, event.clientY);
  });
  canvas.addEventListener('pointerleave', () => tip(null));
  signal?.addEventListener('abort', () => tip(null));
  if (m.onPick) {
    canvas.tabIndex = 0;
    canvas.addEventListener('click', event => {
      const over = cellAt(event);
      if (over) pick(over);
    });
    canvas.addEventListener('keydown', event => {
      const step = {ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0]}[event.key];
      if (!step) return;
      event.preventDefault();
      const {row, col} = {row: m.picked?.row ?? 0, col: m.picked?.col ?? 0};
      pick({row: Math.min(m.rows - 1, Math.max(0, row + step[0])), col: Math.min(m.cols - 1, Math.max(0, col + step[1]))});
    });
  }

  function pick({row, col}) {
    m.picked = {row, col};
    canvas.figure.redraw();
    if (m.describe) announce(m.describe(row, col).join(', '));
    m.onPick(row, col);
  }

  return Object.assign(canvas, {
    show(changes) {
      m = {...m, ...changes};
      canvas.figure.redraw();
      return canvas;
    },
    // The numbers themselves, for a CSV.
    rows: () => [['', ...Array.from({length: m.cols}, (_, c) => m.colLabels?.[c] ?? c)],
      ...Array.from({length: m.rows}, (_, r) => [m.rowLabels?.[r] ?? r, ...Array.from({length: m.cols}, (_, c) => at(r, c))])],
  });
}

function rgb(color) {
  const hex = color.replace('#', '');
  return [0, 2, 4].map(i => parseInt(hex.slice(i, i + 2), 16));
}
