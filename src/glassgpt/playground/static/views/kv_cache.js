// The KV cache of generation after the selected token: which positions each kind of layer keeps, and their bytes.
import {count, h, isVisible, spanOf, spanText, tokenCount} from '../core/index.js';
import {stage} from './model_stage.js';

// A cache keeps what its newest token sees: `LayerCache` in model/kv_cache.py.
const isKept = (span, p, length) => isVisible(span, length - 1, p);
const keptCount = (span, length) => Array.from({length}, (_, p) => p).filter(p => isKept(span, p, length)).length;

export function cacheStage({info, pieces, position, dropped}) {
  const length = position + 1, bytesEach = 2 * info.kv_heads * info.head_width * info.bytes_per_number;
  const kinds = [...Map.groupBy(info.windows.keys(), layer => info.windows[layer])].map(([, layers]) => {
    const span = spanOf(info, layers[0]);
    return {span, layers, kept: keptCount(span, length), before: keptCount(span, position)};
  });
  const bytes = kinds.reduce((total, {layers, kept}) => total + layers.length * kept * bytesEach, 0);
  const most = info.windows.length * length * bytesEach, isWindowed = kinds.some(({span}) => span.window !== null);
  return stage('KV cache', {value: ['cache-bytes', bytes, `${count(bytes)} bytes`]},
    h('p.about', {}, `During generation, each layer keeps the keys and values of earlier tokens, so that only the `
      + `newest token is computed. Per position and layer: 2 × ${info.kv_heads} heads × ${info.head_width} numbers × `
      + `${info.bytes_per_number} bytes = ${count(bytesEach)} bytes.`,
    isWindowed && ` Without windows, it would hold ${count(most)} bytes.`,
    ' Blue: kept. Orange: new. Gray: evicted. Empty: not read yet.'),
    dropped > 0 && h('p.about', {}, `The text was longer than ${tokenCount(info.most_tokens)}: the oldest `
      + `${tokenCount(dropped)} were dropped, and the rest was read again.`),
    kinds.map(kind => cacheRow(kind, pieces, length)));
}

function cacheRow({span, layers, kept, before}, pieces, length) {
  const evicted = before + 1 - kept, layerText = layers.length > 1 ? `${layers.length} layers` : '1 layer';
  const kindOf = p => (p === length - 1 ? 'new' : isKept(span, p, length) ? 'kept' : p >= length ? 'later'
    : isKept(span, p, length - 1) ? 'leaving' : 'evicted');
  const words = {new: 'new', kept: 'kept', later: 'not read yet', leaving: 'evicted now', evicted: 'evicted'};
  const text = `${layerText} (each token ${spanText(span)}): ${count(kept)} of `
    + `${count(length)} positions kept${evicted ? ', 1 evicted now' : ''}`;
  return h('div', {test: 'cache-row', 'data-kept': kept, 'data-layers': layers.join(' ')}, h('p', {}, text),
    h('div.cells', {role: 'img', 'aria-label': text}, pieces.map((piece, p) =>
      h(`span.cell.${kindOf(p)}`, {title: `${piece} at ${p}: ${words[kindOf(p)]}`}))));
}
