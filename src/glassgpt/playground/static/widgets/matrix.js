// A matrix as a picture: cells, labels if there is room, a tooltip, and a cell that the arrow keys move.
import {colorTable, css, inkOn, isDark, rgb} from '../core/index.js';
import {figure, selectable} from './figure.js';

const MIN_LABELLED = 9;  // pixels of the smallest cell that has labels
const MAX_ROW_LABEL = 92, MAX_FONT = 12;

// values: row after row, or value(r, c). scale: 'magnitude' from range[0], or 'signed' around 0. hidden(r, c): no
// value, shown as background (masked). describe(r, c): the lines of a tooltip. onSelect(r, c); selected: {row, col}.
// cell: the largest width of a cell in pixels; cellY: its height if it is not square. words(r, c): the text in a cell,
// if there is room. transform(value): before coloring. overlay(p, {x, y, cell, cellY}): painted over the cells. The
// canvas' `show(changes)` repaints with other settings.
// If there are more cells than pixels, a pixel shows the largest of its cells.
export function matrix(settings) {
  let m = {scale: 'magnitude', range: null, cell: 26, selected: null, ...settings};
  const {signal} = m;
  let place = {x: 0, y: 0, cell: 1, cellY: 1};
  let picture = {key: null};  // the cells' image: a million cells at 1,024 tokens, and a selection changes none of them
  const at = (r, c) => (m.values ? m.values[r * m.cols + c] : m.value(r, c));
  function layOut(width) {
    const cellFor = labels => Math.min(m.cell, (width - labels - 1) / m.cols);
    let x = m.rowLabels ? Math.min(MAX_ROW_LABEL, 0.25 * width) : 0;
    if ((m.cellY ?? cellFor(x)) < MIN_LABELLED) x = 0;
    const cell = cellFor(x);
    place = {x, y: 0, cell, cellY: m.cellY ?? cell};
    if (!m.colLabels || cell < MIN_LABELLED) return;
    // Column labels are horizontal if the longest fits into a cell.
    const longest = 0.62 * Math.min(MAX_FONT, cell) * Math.max(...m.colLabels.map(label => [...String(label)].length));
    place.isFlat = longest <= cell;
    place.y = place.isFlat ? 18 : 10 + Math.min(54, longest);
  }
  function image() {
    const fold = size => Math.max(1, Math.ceil(1 / (size * (devicePixelRatio || 1))));
    const foldX = fold(place.cell), foldY = fold(place.cellY), key = `${isDark()} ${foldX} ${foldY}`;
    if (picture.key === key) return picture;
    const width = Math.ceil(m.cols / foldX), height = Math.ceil(m.rows / foldY);
    const pixels = new ImageData(width, height), colors = colorTable(m.scale), ground = rgb('ground'), limits = range();
    folded(foldX, foldY, width, height).forEach((value, i) => {
      const level = Math.min(255, Math.max(0, Math.round(255 * shareOf(value, limits))));
      pixels.data.set(Number.isNaN(value) ? ground : colors[level], 4 * i);
      pixels.data[4 * i + 3] = 255;
    });
    return picture = {key, foldX, foldY, pixels};
  }
  function folded(foldX, foldY, width, height) {
    const result = new Float32Array(width * height).fill(NaN);
    for (let r = 0; r < m.rows; r++) {
      const start = Math.floor(r / foldY) * width;
      for (let c = 0; c < m.cols; c++) {
        if (m.hidden?.(r, c)) continue;
        const value = m.transform ? m.transform(at(r, c)) : at(r, c), i = start + Math.floor(c / foldX);
        if (!(Math.abs(value) <= Math.abs(result[i])) && !Number.isNaN(value)) result[i] = value;
      }
    }
    return result;
  }
  const shareOf = (value, [low, high]) => (value - low) / (high - low || 1);
  function range() {
    if (m.range) return m.range;
    let most = 0, least = 0;
    for (let r = 0; r < m.rows; r++) {
      for (let c = 0; c < m.cols; c++) {
        const value = at(r, c);
        if (value > most) most = value;
        if (value < least) least = value;
      }
    }
    return m.scale === 'signed' ? [-Math.max(most, -least), Math.max(most, -least)] : [least, most];
  }
  function paint(p, width) {
    layOut(width);
    const {x, y, cell, cellY, isFlat} = place, {pixels, foldX, foldY} = image();
    p.image(x, y, pixels.width * foldX * cell, pixels.height * foldY * cellY, pixels);
    p.frame(x, y, cell * m.cols, cellY * m.rows, css('line'));
    if (m.words && cell >= 14) paintWords(p);
    m.overlay?.(p, place);
    const {row = null, col = null} = m.selected ?? {};
    const style = isSelected => ({mono: true, fill: css(isSelected ? 'accent' : 'soft'), bold: isSelected});
    if (x) {
      m.rowLabels.forEach((label, r) => p.text(x - 5, y + (r + 0.5) * cellY, label,
        {align: 'end', size: Math.min(MAX_FONT, cellY), room: x - 8, ...style(r === row)}));
    }
    if (y) {
      const direction = isFlat ? {align: 'center'} : {turn: -90, room: y - 6};
      m.colLabels.forEach((label, c) => p.text(x + (c + 0.5) * cell, y - (isFlat ? 9 : 4), label,
        {size: Math.min(MAX_FONT, cell), ...direction, ...style(c === col)}));
    }
    if (row !== null) p.frame(x, y + row * cellY, cell * m.cols, cellY, css('accent'), 1.5);
    if (col !== null) p.frame(x + col * cell, y + (row ?? 0) * cellY, cell, row === null ? cellY * m.rows : cellY,
      css('warm'), 2);
  }
  function paintWords(p) {
    const {x, y, cell, cellY} = place, limits = range(), size = Math.min(MAX_FONT, 0.75 * cellY);
    for (let r = 0; r < m.rows; r++) {
      for (let c = 0; c < m.cols; c++) {
        p.text(x + (c + 0.5) * cell, y + (r + 0.5) * cellY, m.words(r, c),
          {align: 'center', size, mono: true, room: cell - 3, fill: inkOn(m.scale, shareOf(at(r, c), limits))});
      }
    }
  }
  const canvas = figure({label: m.label, test: m.test, signal, paint, size(width) {
    layOut(width);
    return Math.ceil(place.y + place.cellY * m.rows) + 1;
  }});
  selectable(canvas, {
    signal, grid: () => ({rows: m.rows, cols: m.cols, selected: [m.selected?.row ?? 0, m.selected?.col ?? 0]}),
    cellAt: (x, y) => [(y - place.y) / place.cellY, (x - place.x) / place.cell],
    lines: (row, col) => m.describe?.(row, col), onSelect: m.onSelect && ((row, col) => {
      canvas.show({selected: {row, col}});
      m.onSelect(row, col);
    }),
  });
  const indices = size => Array.from({length: size}, (_, i) => i);
  return Object.assign(canvas, {
    show(changes) {
      m = {...m, ...changes};
      // Without changes, the array of values was changed in place.
      if (Object.keys(changes).join() !== 'selected') picture = {key: null};
      canvas.figure.redraw();
      return canvas;
    },
    // The values with their labels, for a CSV.
    rows: () => [['', ...indices(m.cols).map(c => m.colLabels?.[c] ?? c)],
      ...indices(m.rows).map(r => [m.rowLabels?.[r] ?? r,
        ...indices(m.cols).map(c => (m.hidden?.(r, c) ? '' : at(r, c)))])],
  });
}
