// Whole continuations of a text, side by side, as they are written.

import {lines} from './api.js';
import {inkOn, shade} from './colors.js';
import {exportable} from './export.js';
import * as state from './state.js';
import {card, h, notice, numberField, percent, slider} from './ui.js';

/** The card. idsNow(): the text so far; settings(vocabSize) and seed(): as the address has them. */
export function continuations({signal, opened, info, offer, limits, text, ids: prompt, idsNow, settings, seed}) {
  const it = card('Continuations', 'Written with the settings and the seed above, coloured by each token’s probability under the model '
    + '(before temperature). The same seed gives the same texts as the command below.');
  it.classList.add('wide');
  it.dataset.test = 'continuations';
  const samples = () => Math.min(limits.samples, Math.max(1, Math.round(state.number('n', 3))));
  const length = () => Math.min(limits.new_tokens, Math.max(1, Math.round(state.number('new', 64))));
  const columns = h('div.continuations');
  const told = h('p.about', {role: 'status', 'data-test': 'speed'});
  const command = h('pre.soft', {'data-test': 'command'});
  const write = h('button.main', {type: 'button', onclick: start, 'data-test': 'write'}, 'Write');
  const stop = h('button', {type: 'button', onclick: () => running?.abort(), disabled: true}, 'Stop');
  let running = null;
  let pause = 0;
  let rows = [];

  it.body.append(h('div.row', {}, write, stop,
    numberField({label: 'texts', min: 1, max: limits.samples, value: samples(), onInput: n => state.set({n})}),
    numberField({label: 'tokens each', min: 1, max: limits.new_tokens, value: length(), onInput: count => state.set({new: count})}),
    slider({label: 'slower', min: 0, max: 500, step: 10, value: 0, title: 'A pause behind each token, to watch; the model is not slower',
      show: ms => (ms ? `${ms} ms` : 'no pause'), onInput: ms => { pause = ms; }})), told, columns, command);
  exportable(it, {name: 'continuations', rows: () => [['text', 'id', 'written', 'probability'], ...rows]});
  signal.addEventListener('abort', () => running?.abort());
  state.on(['t', 'k', 'p', 'minp', 'seed', 'n', 'new', 'w'], showCommand, signal);
  showCommand();

  function showCommand() {
    const sampling = settings(info.vocab_size);
    const reference = offer.kind === 'run' && info.step !== null ? `${offer.name}@${info.step}` : offer.name;
    const options = [['prompt', quoted(text)], ['temperature', sampling.temperature], ['top-k', sampling.topK], ['top-p', sampling.topP],
      ['min-p', sampling.minP], ['n', samples()], ['seed', seed()], ['max-new-tokens', length()]];
    // An option's value that begins with a dash needs the sign.
    const told = options.filter(([, value]) => value !== null).map(([name, value]) => `--${name}${/^'?-/.test(value) ? '=' : ' '}${value}`);
    const isFurther = idsNow().length > prompt.length;
    command.textContent = info.tokenizer === null ? 'This model has no tokenizer, so no command with a text repeats them.'
      : isFurther ? 'They go on from what was written above, too; without it, a command that repeats them is shown here.'
      : `glassgpt generate ${quoted(reference)} ${told.join(' ')}`;
  }

  async function start() {
    running?.abort();
    const run = running = new AbortController();
    const sampling = settings(info.vocab_size);
    const texts = Array.from({length: samples()}, (_, i) => h('div.continuation', {role: 'group', 'aria-label': `Text ${i + 1}`}));
    columns.replaceChildren(...texts);
    rows = [];
    stop.disabled = false;
    told.textContent = 'Writing…';
    try {
      const answer = lines('/api/write', opened.question({ids: idsNow(), temperature: sampling.temperature, top_k: sampling.topK,
        top_p: sampling.topP, min_p: sampling.minP, n: texts.length, seed: seed(), max_new_tokens: length()}), run.signal);
      await shown(answer, run.signal, texts);
    } catch (error) {
      if (!run.signal.aborted) told.replaceChildren(notice(error.message, 'error'));
      else if (running === run) told.textContent = `Stopped after ${rows.length.toLocaleString('en')} tokens.`;
    }
    if (running === run) stop.disabled = true;
  }

  /** Show an answer's tokens as they come, or later: the server is not kept waiting by who watches slowly. */
  async function shown(answer, stopped, texts) {
    const arrived = [];
    let failure = null;
    const all = (async () => { for await (const line of answer) arrived.push(line); })().catch(error => { failure = error; });
    for (let i = 0; ; i++) {
      while (i === arrived.length && !failure) await Promise.race([all, new Promise(resolve => setTimeout(resolve, 15))]);
      stopped.throwIfAborted();
      if (i === arrived.length) throw failure;
      const line = arrived[i];
      if (line.done) {
        told.textContent = `${line.tokens.toLocaleString('en')} tokens in ${line.seconds.toFixed(2)} s: `
          + `${(line.tokens / line.seconds).toFixed(0)} tokens/s, all texts together.`;
        return;
      }
      texts[line.sample].append(written(line));
      rows.push([line.sample + 1, line.token, line.text, line.p]);
      if (pause) await new Promise(resolve => setTimeout(resolve, pause));
    }
  }

  return it;
}

const written = ({text, token, p}) => h('span', {
  title: `id ${token} · ${percent(p)}`, style: {background: shade('sizes', p), color: inkOn('sizes', p)},
}, text);

/** As a POSIX shell reads it back. */
const quoted = text => (/^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll('\'', `'\\''`)}'`);
