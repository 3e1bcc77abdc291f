// A matrix as a picture: cells, labels where there is room, a tooltip, and a cell that the arrow keys move.

import {css, inkOn, isDark, rgb, table} from './colors.js';
import {figure} from './paint.js';
import {pickable, stepped} from './picking.js';

// The smallest cells that have labels, in pixels.
const LEGIBLE = 9;

/**
 * values: row after row (rows x cols), or value(r, c). kind: 'sizes' from range[0], or 'signs' around 0. hidden(r, c): not a value at
 * all, drawn as ground (what a mask hides). describe(r, c): lines of a cell's tooltip. onPick(r, c): it was chosen; picked: {row, col}.
 * cell: the largest width of a cell in pixels, cellY: its height where that is another. words(r, c): text in a cell, where there is room.
 * overlay(p, {x, y, cell, cellY}): painted over the cells. Returns the canvas; its `show(changes)` repaints with other settings.
 *
 * Where there are more cells than pixels, a pixel shows the largest of its cells: none is lost.
 */
export function matrix(given) {
  let m = {kind: 'sizes', range: null, hidden: null, rowLabels: null, colLabels: null, cell: 26, picked: null, describe: null, words: null,
    overlay: null, ...given};
  const signal = m.signal;
  let place = {x: 0, y: 0, cell: 1, cellY: 1};
  let kept = {key: null};  // the picture of the cells: at 1,024 tokens it is a million of them, and picking one changes none
  const at = (r, c) => (m.values ? m.values[r * m.cols + c] : m.value(r, c));

  function room(width) {
    const across = labels => Math.min(m.cell, (width - labels - 1) / m.cols);
    let labels = m.rowLabels ? Math.min(92, 0.25 * width) : 0;
    if ((m.cellY ?? across(labels)) < LEGIBLE) labels = 0;
    const cell = across(labels);
    place = {x: labels, y: 0, cell, cellY: m.cellY ?? cell};
    if (m.colLabels && cell >= LEGIBLE) place.y = head(cell);
    return place;
  }

  /** Room above the columns: their labels lie where the longest fits into a cell, else they stand. */
  function head(cell) {
    const longest = 0.62 * Math.min(12, cell) * Math.max(...m.colLabels.map(label => [...String(label)].length));
    place.isLying = longest <= cell;
    return place.isLying ? 18 : 10 + Math.min(54, longest);
  }

  function pixels() {
    const foldX = Math.max(1, Math.ceil(1 / (place.cell * (devicePixelRatio || 1))));
    const foldY = Math.max(1, Math.ceil(1 / (place.cellY * (devicePixelRatio || 1))));
    const key = `${isDark()} ${foldX} ${foldY}`;
    if (kept.key !== key) kept = {key, foldX, foldY, image: colored(folded(foldX, foldY), Math.ceil(m.cols / foldX))};
    return kept;
  }

  function folded(foldX, foldY) {
    const width = Math.ceil(m.cols / foldX);
    const largest = new Float32Array(width * Math.ceil(m.rows / foldY)).fill(NaN);
    for (let r = 0; r < m.rows; r++) {
      const start = Math.floor(r / foldY) * width;
      for (let c = 0; c < m.cols; c++) {
        if (m.hidden?.(r, c)) continue;
        const value = at(r, c), i = start + Math.floor(c / foldX);
        if (!(Math.abs(value) <= Math.abs(largest[i])) && !Number.isNaN(value)) largest[i] = value;
      }
    }
    return largest;
  }

  const range = () => m.range ?? bounds();
  const shareOf = (value, [low, high]) => (value - low) / (high - low || 1);

  function colored(values, width) {
    const [low, high] = range();
    const colors = table(m.kind);
    const ground = rgb('ground');
    const image = new ImageData(width, values.length / width);
    values.forEach((value, i) => {
      const share = Math.min(255, Math.max(0, Math.round(255 * shareOf(value, [low, high]))));
      const color = Number.isNaN(value) ? ground : colors[share];
      image.data.set(color, 4 * i);
      image.data[4 * i + 3] = 255;
    });
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
    const {image, foldX, foldY} = pixels();
    p.image(x, y, image.width * foldX * cell, image.height * foldY * cellY, image);
    p.frame(x, y, cell * m.cols, cellY * m.rows, css('line'));
    if (m.words && cell >= 14) write(p);
    m.overlay?.(p, place);
    if (x) {
      const size = Math.min(12, cellY);
      m.rowLabels.forEach((label, r) => p.text(x - 5, y + (r + 0.5) * cellY, label,
        {align: 'end', size, mono: true, most: x - 8, fill: css(m.picked?.row === r ? 'accent' : 'soft'), bold: m.picked?.row === r}));
    }
    if (y) {
      const size = Math.min(12, cell);
      const how = place.isLying ? {align: 'center'} : {turn: -90, most: y - 6};
      m.colLabels.forEach((label, c) => p.text(x + (c + 0.5) * cell, y - (place.isLying ? 9 : 4), label, {...how, size, mono: true,
        fill: css(m.picked?.col === c ? 'accent' : 'soft'), bold: m.picked?.col === c}));
    }
    if (m.picked) {
      const {row, col} = m.picked;
      if (row !== null && row !== undefined) p.frame(x, y + row * cellY, cell * m.cols, cellY, css('accent'), 1.5);
      if (col !== null && col !== undefined) {
        p.frame(x + col * cell, y + (row ?? 0) * cellY, cell, row === null || row === undefined ? cellY * m.rows : cellY, css('warm'), 2);
      }
    }
  }

  function write(p) {
    const {x, y, cell, cellY} = place;
    const limits = range();
    for (let r = 0; r < m.rows; r++) {
      for (let c = 0; c < m.cols; c++) {
        const size = Math.min(12, 0.75 * cellY);
        p.text(x + (c + 0.5) * cell, y + (r + 0.5) * cellY, m.words(r, c),
          {align: 'center', size, mono: true, most: cell - 3, fill: inkOn(m.kind, shareOf(at(r, c), limits))});
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

  pickable(canvas, {
    under: cellAt,
    lines: ({row, col}) => m.describe?.(row, col) ?? null,
    onPick: m.onPick && (({row, col}) => {
      m.picked = {row, col};
      canvas.figure.redraw();
      m.onPick(row, col);
    }),
    moved(key) {
      const to = stepped(key, [m.picked?.row ?? 0, m.picked?.col ?? 0], m.rows, m.cols);
      return to && {row: to[0], col: to[1]};
    },
    signal,
  });

  return Object.assign(canvas, {
    show(changes) {
      m = {...m, ...changes};
      const isPickAlone = Object.keys(changes).join() === 'picked';
      if (!isPickAlone) kept = {key: null};  // nothing named: the values are others in the same place
      canvas.figure.redraw();
      return canvas;
    },
    // The numbers themselves, for a CSV.
    rows: () => [['', ...Array.from({length: m.cols}, (_, c) => m.colLabels?.[c] ?? c)],
      ...Array.from({length: m.rows}, (_, r) => [m.rowLabels?.[r] ?? r, ...Array.from({length: m.cols}, (_, c) => at(r, c))])],
  });
}
