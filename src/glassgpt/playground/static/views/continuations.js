// Whole continuations of a text, side by side, shown while they are generated.
import {bound, button, card, count, h, inkOn, lines, notice, numberField, percent, shade, shellQuoted, slider, state}
  from '../core/index.js';
import {seed, settings} from './generated_text.js';

const DEFAULT_SAMPLES = 3, DEFAULT_TOKENS = 64;

// The card. currentIds(): the prompt and what was generated above.
export function continuationsCard({signal, opened, info, entry, limits, text, ids: prompt, currentIds}) {
  const samples = () => state.index('n', limits.samples + 1, DEFAULT_SAMPLES) || 1;
  const maxNewTokens = () => state.index('max_new_tokens', limits.new_tokens + 1, DEFAULT_TOKENS) || 1;
  const columns = h('div.continuations'), summary = h('p.about', {role: 'status', test: 'speed'});
  const command = h('pre.soft', {test: 'command'});
  const generate = button('Generate', start, {test: 'generate', kind: 'button.main'});
  const stop = button('Stop', () => running?.abort(), {disabled: true});
  let running = null, pause = 0, rows = [];
  const field = (label, key, max, read) => bound(numberField({label, min: 1, max, value: read(),
    onInput: value => state.set({[key]: value})}), key, read, signal);
  const element = card('Continuations', {
    wide: true, test: 'continuations', about: 'Generated with the settings and the seed above. Color: probability '
      + 'before temperature. The command below gives the same texts.',
    save: {name: 'continuations', rows: () => [['text', 'id', 'token', 'probability'], ...rows]},
  }, h('div.row', {}, generate, stop, field('texts', 'n', limits.samples, samples),
    field('tokens each', 'max_new_tokens', limits.new_tokens, maxNewTokens),
    slider({label: 'slow down', min: 0, max: 500, step: 10, value: 0, title: 'A pause after each token',
      show: ms => (ms ? `${ms} ms` : 'off'), onInput: ms => { pause = ms; }})), summary, columns, command);
  signal.addEventListener('abort', () => running?.abort());
  state.on(['temperature', 'top_k', 'top_p', 'min_p', 'seed', 'n', 'max_new_tokens', 'paths'], showCommand, signal);
  showCommand();
  function showCommand() {
    const {temperature, topK, topP, minP} = settings(info.vocab_size);
    const reference = entry.kind === 'run' && info.step !== null ? `${entry.name}@${info.step}` : entry.name;
    const options = {prompt: shellQuoted(text), temperature, 'top-k': topK, 'top-p': topP, 'min-p': minP, n: samples(),
      seed: seed(), 'max-new-tokens': maxNewTokens()};
    // A value that starts with a dash needs the equals sign.
    const given = Object.entries(options).filter(([, value]) => value !== null)
      .map(([name, value]) => `--${name}${/^'?-/.test(value) ? '=' : ' '}${value}`);
    if (info.tokenizer === null) command.textContent = 'This model has no tokenizer, so no command with a prompt '
      + 'repeats them.';
    else if (currentIds().length > prompt.length) {
      command.textContent = 'The continuations include the text generated above; without it, the command that repeats '
        + 'them is here.';
    } else command.textContent = `glassgpt generate ${shellQuoted(reference)} ${given.join(' ')}`;
  }
  async function start() {
    running?.abort();
    const run = running = new AbortController(), {temperature, topK, topP, minP} = settings(info.vocab_size);
    const texts = Array.from({length: samples()}, (_, i) => h('div.continuation',
      {role: 'group', 'aria-label': `Text ${i + 1}`}));
    columns.replaceChildren(...texts);
    rows = [];
    stop.disabled = false;
    summary.textContent = 'Generating…';
    try {
      const request = {ids: currentIds(), temperature, top_k: topK, top_p: topP, min_p: minP, n: texts.length,
        seed: seed(), max_new_tokens: maxNewTokens()};
      for await (const line of lines('/api/write', opened.request(request), run.signal)) {
        const {done, tokens, seconds, sample, token, text: piece, p} = line;
        if (done) {
          summary.textContent = `${count(tokens)} tokens in ${seconds.toFixed(2)} s: `
            + `${(tokens / seconds).toFixed(0)} tokens/s, all texts together.`;
          continue;
        }
        texts[sample].append(h('span', {title: `id ${token} · ${percent(p)}`,
          style: {background: shade('magnitude', p), color: inkOn('magnitude', p)}}, piece));
        rows.push([sample + 1, token, piece, p]);
        if (pause) await new Promise(resolve => setTimeout(resolve, pause));
        run.signal.throwIfAborted();
      }
    } catch (error) {
      if (!run.signal.aborted) summary.replaceChildren(notice(error.message, 'error'));
      else if (running === run) summary.textContent = `Stopped after ${count(rows.length)} tokens.`;
    }
    if (running === run) stop.disabled = true;
  }
  return element;
}
