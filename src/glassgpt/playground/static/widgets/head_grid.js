// All attention heads at a glance: layers as rows, heads as columns, on one canvas.
import {category, colorTable, css, isAnyVisible, isDark, kvHeadOf, rgb, spanOf} from '../core/index.js';
import {figure, selectable} from './figure.js';

const GAP = 4, LEFT = 26, TOP = 20, STRIPE = 3;

// picture: {thumbnails (layers, heads, cells, cells) of 0 to 255, tokens}. info: of the model, or null if unknown.
// selected: {layer, head}. isSqrt: color by the square roots of the weights. describe(layer, head): more lines of a
// tooltip. The canvas' `show(changes)` repaints with other settings; layers and heads stay.
export function headGrid({describe = () => [], onSelect, test, signal, ...settings}) {
  let g = {selected: null, isSqrt: false, info: null, ...settings};
  const [layers, heads] = g.picture.thumbnails.shape;
  let images = {key: null}, side = 1;
  const xOf = head => LEFT + head * (side + GAP), yOf = layer => TOP + layer * (side + GAP);
  const kvOf = head => kvHeadOf(g.info, head);
  function cellImages() {
    const key = `${isDark()} ${g.isSqrt} ${Boolean(g.info)}`;
    if (images.key !== key || images.picture !== g.picture) {
      images = {key, picture: g.picture, all: Array.from({length: layers * heads}, (_, i) => imageOf(i))};
    }
    return images.all;
  }
  // A head's picture. A cell of a long text is the largest of several weights.
  function imageOf(i) {
    const {thumbnails, tokens} = g.picture, cells = thumbnails.shape[2];
    const colors = colorTable('magnitude'), ground = rgb('ground'), span = spanOf(g.info, Math.floor(i / heads));
    const first = cell => Math.floor(cell * tokens / cells), end = cell => Math.ceil((cell + 1) * tokens / cells);
    const pixels = new ImageData(cells, cells);
    for (let at = 0; at < cells * cells; at++) {
      const r = Math.floor(at / cells), c = at % cells, weight = thumbnails[i * cells * cells + at];
      const level = g.isSqrt ? Math.round(Math.sqrt(255 * weight)) : weight;
      pixels.data.set(isAnyVisible(span, first(r), end(r), first(c), end(c)) ? colors[level] : ground, 4 * at);
      pixels.data[4 * at + 3] = 255;
    }
    return pixels;
  }
  function paint(p) {
    const all = cellImages(), size = Math.max(8, Math.min(12, side / 2));
    const style = isSelected => ({size, fill: css(isSelected ? 'accent' : 'soft'), bold: isSelected});
    for (let head = 0; head < heads; head++) {
      const kv = kvOf(head), isLast = head === heads - 1 || kvOf(head + 1) !== kv;
      p.text(xOf(head) + side / 2, 8, head, {align: 'center', ...style(head === g.selected?.head)});
      // One stripe over all heads that share a key/value head.
      if (kv !== null) p.rect(xOf(head), TOP - STRIPE - 2, side + (isLast ? 0 : GAP), STRIPE, category(kv));
    }
    for (let layer = 0; layer < layers; layer++) {
      p.text(LEFT - 6, yOf(layer) + side / 2, layer, {align: 'end', ...style(layer === g.selected?.layer)});
      for (let head = 0; head < heads; head++) {
        p.image(xOf(head), yOf(layer), side, side, all[layer * heads + head]);
        p.frame(xOf(head), yOf(layer), side, side, kvOf(head) === null ? css('line') : category(kvOf(head)));
      }
    }
    if (g.selected) p.frame(xOf(g.selected.head) - 2, yOf(g.selected.layer) - 2, side + 4, side + 4, css('warm'), 2.5);
  }
  function size(width) {
    side = Math.max(4, Math.min(120, (width - LEFT - 4) / heads - GAP));
    return Math.ceil(yOf(layers) + 2);
  }
  const canvas = figure({label: `Attention of ${layers} layers with ${heads} heads each`, test, signal, paint, size});
  selectable(canvas, {
    signal, grid: () => ({rows: layers, cols: heads, selected: [g.selected.layer, g.selected.head]}),
    cellAt: (x, y) => [(y - TOP) / (side + GAP), (x - LEFT) / (side + GAP)],
    lines: (layer, head) => [`layer ${layer}, head ${head}`,
      ...kvOf(head) === null ? [] : [`key/value head ${kvOf(head)}`], ...describe(layer, head)],
    onSelect(layer, head) {
      canvas.show({selected: {layer, head}});
      onSelect({layer, head});
    },
  });
  return Object.assign(canvas, {show(changes) {
    g = {...g, ...changes};
    canvas.figure.redraw();
  }});
}
