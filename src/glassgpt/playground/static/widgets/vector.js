// Numbers as colored cells, row by row.
import {colorTable, largest, short} from '../core/index.js';
import {figure, selectable} from './figure.js';

// values: NaN leaves a cell empty. columns: most cells in a row. limit: the number with the strongest color.
// describe(i): the lines of a tooltip.
export function vectorPicture({values, label, scale = 'signed', columns = 64, limit = largest(values.map(Math.abs)),
  describe = i => [`${label}, number ${i}: ${short(values[i])}`], signal, test}) {
  const cols = Math.min(columns, values.length), rows = Math.ceil(values.length / cols);
  const cellHeight = width => (rows === 1 ? 14 : Math.min(8, Math.max(3, width / cols)));
  const canvas = figure({label, test, signal, size: width => Math.ceil(rows * cellHeight(width)), paint(p, width) {
    const pixels = new ImageData(cols, rows), colors = colorTable(scale);
    values.forEach((x, i) => {
      if (Number.isNaN(x)) return;
      const share = scale === 'signed' ? (1 + x / (limit || 1)) / 2 : x / (limit || 1);
      pixels.data.set([...colors[Math.round(255 * Math.min(1, Math.max(0, share)))], 255], 4 * i);
    });
    p.image(0, 0, width, rows * cellHeight(width), pixels);
  }});
  selectable(canvas, {signal, grid: () => ({rows, cols}),
    cellAt: (x, y) => [y / cellHeight(canvas.clientWidth), x * cols / canvas.clientWidth],
    lines: (r, c) => (r * cols + c < values.length ? describe(r * cols + c) : null)});
  return canvas;
}
