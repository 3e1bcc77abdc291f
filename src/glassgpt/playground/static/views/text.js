// Text: how it is split into tokens, and how much each token surprised the model.
import {attempt, bar, button, card, count, facts, h, notice, percent, post, ramp, shade, state, sum, table,
  vocabulary} from '../core/index.js';
import {SURPRISAL_ENDS, surprisalStrip} from '../widgets/index.js';

const MAX_MERGE_CHARACTERS = 64;

export default async function show(page, {signal, opened, info, text, ids, pieces, partial, bytes}) {
  const [{surprisal, entropy, top_ids: topIds, top_p: topP}, names] = await Promise.all([
    post('/api/predictions', opened.request({ids}), signal), vocabulary(opened, signal)]);
  const selected = () => state.index('position', ids.length);
  const strip = surprisalStrip({pieces, ids, surprisal, partial},
    {selected: selected(), onSelect: i => state.set({position: i}), signal});
  const token = card('Token'), predictions = card('Predictions at this position');
  page.append(card('Tokens', {
    wide: true, about: 'The tokens that the model reads. Color: surprisal, −log₂ of a token’s probability.',
    save: {name: 'tokens', figure: strip, rows: () => [['position', 'id', 'token', 'bytes', 'surprisal in bits'],
      ...ids.map((id, i) => [i, id, pieces[i], bytes[i], i ? surprisal[i] : ''])]},
  }, strip, h('p.about', {}, ramp('magnitude', ...SURPRISAL_ENDS, signal), '. Dashed: part of a character.')),
  token, predictions, card('Text statistics', {}, facts(statistics(text, ids, bytes, [...surprisal].slice(1)))));
  function showToken() {
    const i = selected();
    strip.select(i);
    token.body.replaceChildren(facts([
      ['token', h('span.mono', {}, pieces[i])],
      ['id', ids[i]],
      ['bytes', h('span.mono', {}, bytes[i].replace(/../g, '$& ').trim() || 'none')],
      ['surprisal', i ? `${surprisal[i].toFixed(3)} bits` : 'none: it is the first token'],
      ['probability', i ? percent(2 ** -surprisal[i]) : '–'],
      ['entropy of the prediction', i ? `${entropy[i - 1].toFixed(2)} bits` : '–'],
    ]), partial[i] ? notice('Part of a character: the other bytes are in the tokens next to it.') : '');
    if (info.has_merges) token.body.append(mergeList(i));
    predictions.body.replaceChildren(i ? topTokens(i - 1, ids[i])
      : notice('The model gives no probability to the first token.'));
  }
  function topTokens(before, actual) {
    const k = topIds.shape[1];
    return table(['token', '', 'probability'], Array.from({length: k}, (_, j) => {
      const id = topIds[before * k + j], p = topP[before * k + j];
      return [id === actual ? h('strong', {}, names[id]) : names[id], bar(p, shade('magnitude', 0.75)), percent(p)];
    }));
  }
  function mergeList(i) {
    const problem = h('div'), list = h('div');
    return h('div', {}, button('Show BPE merges', () => attempt(problem, signal, async () => {
      const request = opened.request({text: wordAround(pieces, bytes, i)});
      const {states} = await post('/api/merges', request, signal);
      list.replaceChildren(table(['merge', 'pieces'],
        states.map((parts, n) => [n || 'bytes', h('span.mono', {}, parts.join(' │ '))])));
    }), {kind: 'button.small'}), problem, list);
  }
  state.on(['position'], showToken, signal);
  showToken();
}

function statistics(text, ids, bytes, surprisal) {
  const bits = sum(surprisal), n = surprisal.length;
  const size = new TextEncoder().encode(text).length;
  const predicted = size - (bytes[0] ? bytes[0].length / 2 : 0);  // bytes: the first token has no probability
  return [
    ['tokens', count(ids.length)],
    ['bytes', count(size)],
    ['bytes per token', (size / ids.length).toFixed(2)],
    ['mean surprisal', n ? `${(bits / n).toFixed(3)} bits per token` : '–'],
    ['', n && predicted > 0 ? `${(bits / predicted).toFixed(3)} bits per byte` : '–'],
    ['perplexity', n ? (2 ** (bits / n)).toLocaleString('en', {maximumFractionDigits: 2}) : '–'],
  ];
}

// The text of the tokens around token i, from one space to the next.
function wordAround(pieces, bytes, i) {
  const startsWord = j => j === 0 || /^[␣⏎→␍]/.test(pieces[j]) || /[␣⏎→␍]$/.test(pieces[j - 1]);
  let from = i, to = i + 1;
  while (from > 0 && !startsWord(from)) from--;
  while (to < pieces.length && !startsWord(to)) to++;
  const data = Uint8Array.from(bytes.slice(from, to).join('').match(/../g) ?? [], pair => parseInt(pair, 16));
  return [...new TextDecoder().decode(data)].slice(0, MAX_MERGE_CHARACTERS).join('');
}
