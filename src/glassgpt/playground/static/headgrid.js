// All heads at a glance: layers as rows, heads as columns, on one canvas.

import {css, isDark, named, rgb, table} from './colors.js';
import {figure} from './paint.js';
import {pickable, stepped} from './picking.js';
import {seesAny} from './span.js';

const GAP = 4, LEFT = 26, TOP = 20, STRIPE = 3;

/**
 * picture: the answer of /api/attention. spanOf(layer): {window, globals}. kvOf(head): its key/value head, where heads share them, else
 * null. picked: {layer, head}. root: colour by the weights' square roots. describe(layer, head): a tooltip's lines. The canvas' `show`
 * repaints with other settings; another picture has as many layers and heads.
 */
export function headGrid({describe, onPick, signal, ...given}) {
  let g = {picked: null, root: false, ...given};
  const [layers, heads] = g.picture.thumbnails.shape;
  let kept = {key: null}, side = 1;

  const xOf = head => LEFT + head * (side + GAP);
  const yOf = layer => TOP + layer * (side + GAP);

  /** Each head's picture; as many cells as there are tokens, or fewer, and then each is the largest of its own. */
  function images() {
    const key = `${isDark()} ${g.root}`;
    if (kept.key !== key || kept.picture !== g.picture) kept = {key, picture: g.picture, all: Array.from({length: layers * heads}, (_, i) => imageOf(i))};
    return kept.all;
  }

  function imageOf(i) {
    const {thumbnails, tokens} = g.picture, cells = thumbnails.shape[2];
    const colors = table('sizes'), ground = rgb('ground'), span = g.spanOf(Math.floor(i / heads));
    const from = cell => Math.floor(cell * tokens / cells), to = cell => Math.ceil((cell + 1) * tokens / cells);
    const image = new ImageData(cells, cells);
    for (let r = 0, at = 0; r < cells; r++) {
      for (let c = 0; c < cells; c++, at++) {
        const weight = thumbnails[i * cells * cells + at];
        const shown = g.root ? Math.round(Math.sqrt(255 * weight)) : weight;
        image.data.set(seesAny(span, from(r), to(r), from(c), to(c)) ? colors[shown] : ground, 4 * at);
        image.data[4 * at + 3] = 255;
      }
    }
    return image;
  }

  function paint(p) {
    const all = images(), size = Math.max(8, Math.min(12, side / 2));
    for (let head = 0; head < heads; head++) {
      const isIt = head === g.picked?.head, kv = g.kvOf(head);
      p.text(xOf(head) + side / 2, 8, head, {align: 'center', size, fill: css(isIt ? 'accent' : 'soft'), bold: isIt});
      // One stripe over all heads that share a key/value head.
      const isLast = head === heads - 1 || g.kvOf(head + 1) !== kv;
      if (kv !== null) p.rect(xOf(head), TOP - STRIPE - 2, side + (isLast ? 0 : GAP), STRIPE, named(kv));
    }
    for (let layer = 0; layer < layers; layer++) {
      const isIt = layer === g.picked?.layer;
      p.text(LEFT - 6, yOf(layer) + side / 2, layer, {align: 'end', size, fill: css(isIt ? 'accent' : 'soft'), bold: isIt});
      for (let head = 0; head < heads; head++) {
        p.image(xOf(head), yOf(layer), side, side, all[layer * heads + head]);
        const kv = g.kvOf(head);
        p.frame(xOf(head), yOf(layer), side, side, kv === null ? css('line') : named(kv));
      }
    }
    if (g.picked) p.frame(xOf(g.picked.head) - 2, yOf(g.picked.layer) - 2, side + 4, side + 4, css('warm'), 2.5);
  }

  const canvas = figure({label: `Attention of ${layers} layers with ${heads} heads each`, signal, paint, size(width) {
    side = Math.max(4, Math.min(120, (width - LEFT - 4) / heads - GAP));
    return Math.ceil(yOf(layers) + 2);
  }});

  function under(event) {
    const box = canvas.getBoundingClientRect();
    const head = Math.floor((event.clientX - box.left - LEFT) / (side + GAP));
    const layer = Math.floor((event.clientY - box.top - TOP) / (side + GAP));
    return head >= 0 && head < heads && layer >= 0 && layer < layers ? {layer, head} : null;
  }

  pickable(canvas, {
    under,
    lines: ({layer, head}) => describe(layer, head),
    onPick(picked) {
      canvas.show({picked});
      onPick(picked);
    },
    moved(key) {
      const to = stepped(key, [g.picked.layer, g.picked.head], layers, heads);
      return to && {layer: to[0], head: to[1]};
    },
    signal,
  });
  canvas.show = changes => {
    g = {...g, ...changes};
    canvas.figure.redraw();
  };
  return canvas;
}
