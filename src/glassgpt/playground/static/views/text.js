// Text in, tokens: how the text is cut, and how much each token surprised the model.

import {post} from '../api.js';
import {shade} from '../colors.js';
import {exportable} from '../export.js';
import {vocabulary} from '../models.js';
import * as state from '../state.js';
import {bar, card, facts, h, notice, percent, ramp, table, tokenStrip} from '../ui.js';

// Bits at which a token's colour is at its strongest.
const MOST_BITS = 12;

export default async function show(page, {signal, opened, info, text, ids, pieces, partial, bytes}) {
  const question = opened.question({ids});
  const [found, names] = await Promise.all([post('/api/predictions', question, signal), vocabulary(opened, signal)]);
  const marked = () => Math.min(state.number('token', 0), ids.length - 1);
  const hint = i => `${pieces[i]} · id ${ids[i]}` + (i ? ` · ${found.surprisal[i].toFixed(2)} bits` : '');

  const tokens = card('Tokens', 'The text as the model reads it. The stronger the colour, the more the token surprised it: −log₂ of the probability '
    + 'that it gave it.');
  tokens.classList.add('wide');
  const share = i => (i ? found.surprisal[i] / MOST_BITS : null);
  const strip = tokenStrip({pieces, partial, share, hint, marked: marked(), onPick: i => state.set({token: i})});
  strip.classList.add('tall');
  tokens.body.append(strip, h('p.about', {}, ramp('sizes', '0 bits', `${MOST_BITS} bits and more. Dashed: a part of a character.`, signal)));
  exportable(tokens, {name: 'tokens', canvas: strip, rows: () => [['place', 'id', 'token', 'bytes', 'surprisal in bits'],
    ...ids.map((id, i) => [i, id, pieces[i], bytes[i], i ? found.surprisal[i] : ''])]});

  const one = card('The token');
  const expected = card('Expected in its place');
  const whole = card('The text');
  const measured = [...found.surprisal].slice(1);
  const bits = measured.reduce((a, b) => a + b, 0);
  const size = new TextEncoder().encode(text).length;
  const first = bytes[0] ? bytes[0].length / 2 : 0;
  whole.body.append(facts([
    ['tokens', ids.length.toLocaleString('en')],
    ['bytes', size.toLocaleString('en')],
    ['bytes a token', (size / ids.length).toFixed(2)],
    ['mean surprisal', measured.length ? `${(bits / measured.length).toFixed(3)} bits a token` : '–'],
    ['', measured.length && size > first ? `${(bits / (size - first)).toFixed(3)} bits a byte` : '–'],
    ['perplexity', measured.length ? (2 ** (bits / measured.length)).toLocaleString('en', {maximumFractionDigits: 2}) : '–'],
  ]));
  page.append(tokens, one, expected, whole);

  function showToken() {
    const i = marked();
    strip.mark(i);
    one.body.replaceChildren(facts([
      ['token', h('span.mono', {}, pieces[i])],
      ['id', ids[i]],
      ['bytes', h('span.mono', {}, bytes[i].replace(/../g, '$& ').trim() || 'none')],
      ['surprisal', i ? `${found.surprisal[i].toFixed(3)} bits` : 'none: nothing comes before it'],
      ['its probability', i ? percent(2 ** -found.surprisal[i]) : '–'],
      ['in doubt before it', i ? `${found.entropy[i - 1].toFixed(2)} bits of entropy` : '–'],
    ]), partial[i] ? notice('These bytes are a part of a character: the rest is in the tokens beside it.') : '');
    if (info.has_merges) one.body.append(mergesOf(i));
    expected.body.replaceChildren(i ? likeliest(i - 1, ids[i]) : notice('The model gives no probability to the first token.'));
  }

  function likeliest(before, actual) {
    const k = found.top_ids.shape[1];
    const rows = Array.from({length: k}, (_, j) => {
      const id = found.top_ids[before * k + j], p = found.top_p[before * k + j];
      return [id === actual ? h('strong', {}, names[id]) : names[id], bar(p, shade('sizes', 0.75)), percent(p)];
    });
    return table(['token', '', 'probability'], rows);
  }

  function mergesOf(i) {
    const place = h('div');
    const button = h('button.small', {type: 'button', async onclick() {
      try {
        const {states} = await post('/api/merges', opened.question({text: wordAround(text, pieces, bytes, i)}), signal);
        place.replaceChildren(table(['merge', 'pieces'], states.map((now, n) => [n || 'bytes', h('span.mono', {}, now.join(' │ '))])));
      } catch (error) {
        if (!signal.aborted) place.replaceChildren(notice(error.message, 'error'));
      }
    }}, 'How its word is merged');
    return h('div', {}, button, place);
  }

  state.on(['token'], showToken, signal);
  showToken();
}

/** The text of the tokens around token i from one space to the next, at most 64 characters. */
function wordAround(text, pieces, bytes, i) {
  const begins = j => j === 0 || /^[␣⏎→␍]/.test(pieces[j]) || /[␣⏎→␍]$/.test(pieces[j - 1]);
  let from = i, to = i + 1;
  while (from > 0 && !begins(from)) from--;
  while (to < pieces.length && !begins(to)) to++;
  const hex = bytes.slice(from, to).join('');
  const data = Uint8Array.from(hex.match(/../g) ?? [], pair => parseInt(pair, 16));
  return [...new TextDecoder().decode(data)].slice(0, 64).join('');
}
