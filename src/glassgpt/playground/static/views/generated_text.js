// The generated text: tokens sampled, taken back, branched from; and the sampling settings.
import {bound, button, card, count, h, numberField, percent, slider, state, sum, tokenCount} from '../core/index.js';
import {tokenStrip} from '../widgets/index.js';

const PROMPT_SHOWN = 400, BRANCH_SHOWN = 80;  // characters

// The sampling settings of the address; the defaults are those of `glassgpt generate`.
export const settings = vocabSize => ({
  temperature: Math.min(2, Math.max(0, state.number('temperature', 0.8))),
  topK: state.number('top_k') === null ? null : Math.min(vocabSize, Math.max(1, Math.round(state.number('top_k')))),
  topP: share('top_p'), minP: share('min_p'),
});
const share = name => (state.number(name) > 0 && state.number(name) < 1 ? state.number(name) : null);
// The seed of the steps and of the continuations.
export const seed = () => Math.round(Math.max(0, state.number('seed', 1337)));

// The card, with `show(paths, isReady)`. edit(method, ...values): change the paths by one of their methods.
export function generatedCard({prompt, names, vocabSize, signal, onStep, onTop, onReject, edit}) {
  const step = button('Sample', onStep, {title: 'Sample the next token', test: 'step', kind: 'button.main'});
  const top = button('Take the top token', onTop, {title: 'Append the most likely token', test: 'accept'});
  const reject = button('Reject', onReject, {title: 'Take back the last token and sample again without it',
    test: 'reject'});
  const back = button('Back', () => edit('back'), {title: 'Take back the last token', test: 'back'});
  const branch = button('Branch', () => edit('branch'), {title: 'Keep this text as a branch, and continue a copy',
    test: 'branch'});
  const seedField = bound(numberField({label: 'seed', min: 0, max: 2 ** 32 - 1, value: seed(),
    onInput: value => state.set({seed: value})}), 'seed', seed, signal);
  const text = h('div.tokens.tall.so-far', {test: 'generated'}), problem = h('div');
  const list = h('div.branches', {role: 'group', 'aria-label': 'Branches', test: 'branches'});
  const controls = settingsControls(vocabSize, signal);
  let shown = {paths: [], at: 0};
  const element = card('Generated text', {
    wide: true, about: 'Generated tokens are colored by their probability under the model. Select one to continue from '
      + 'before it; what followed is kept as a branch.',
    save: {name: 'generated', rows: () => [
      ['branch', 'position', 'id', 'token', 'probability'], ...shown.paths.flatMap((path, b) =>
        path.map(({id, p}, i) => [b === shown.at ? 'current' : b, i, id, names[id], p ?? '']))]},
  }, text, h('div.row', {}, step, top, reject, back, branch, seedField), problem, list, controls,
  h('p.about', {}, 'Sampled from p ∝ exp(logit / temperature) over the tokens that top-k, then top-p, then min-p keep. '
    + 'This page derives the random number of a step from seed, position and rejections, not from torch’s generator.'));
  const wordsOf = path => path.map(({id}) => names[id]).join('').slice(-BRANCH_SHOWN) || 'empty';
  const branchRow = (path, i) => h('div.row', {},
    button(wordsOf(path), () => edit('select', i), {kind: 'button.branch', 'aria-pressed': String(i === shown.at)}),
    h('span.soft', {}, pathSummary(path)),
    button('×', () => edit('remove', i), {kind: 'button.small', 'aria-label': `Remove branch ${i + 1}`,
      title: 'Remove'}));
  return {
    element, problem, show(paths, isReady) {
      shown = paths;
      const {current} = paths;
      const strip = tokenStrip({pieces: current.map(({id}) => names[id]), selectOnMove: false,
        onSelect: i => edit('branch', i), signal, label: 'Generated tokens', share: i => current[i].p,
        hint: i => `${names[current[i].id]} · ${percent(current[i].p)} · continue from before it`});
      strip.style.display = 'inline';
      strip.classList.remove('tall');
      const start = prompt.length > PROMPT_SHOWN ? `…${prompt.slice(-PROMPT_SHOWN)}` : prompt;
      text.replaceChildren(h('span.mono.soft.before', {}, start), strip);
      for (const each of [reject, back]) each.disabled = !current.length;
      for (const each of [step, top]) each.setAttribute('aria-disabled', String(!isReady));
      list.replaceChildren(...paths.paths.length > 1 ? paths.paths.map(branchRow) : []);
    },
  };
}

function pathSummary(path) {
  if (!path.length) return '';
  const isKnown = path.every(({p}) => p !== null);
  return tokenCount(path.length) + (isKnown ? `, ${sum(path.map(({p}) => -Math.log2(p))).toFixed(1)} bits` : '');
}

// Sliders for temperature, top-k, top-p and min-p.
function settingsControls(vocabSize, signal) {
  // Slider positions of top-k: 0 to 100 on a logarithmic scale; 100 disables it.
  const kAt = place => Math.max(1, Math.round(vocabSize ** (place / 100)));
  const placeOf = k => (k === null ? 100 : 100 * Math.log(k) / Math.log(vocabSize));
  const control = (key, read, options, write) => bound(slider({...options, value: read(settings(vocabSize)),
    onInput: value => state.set({[key]: write(value)})}), key, () => read(settings(vocabSize)), signal);
  return h('div.controls.settings', {test: 'settings'},
    control('temperature', now => now.temperature, {label: 'temperature', min: 0, max: 2, step: 0.05,
      show: t => (t ? t.toFixed(2) : '0: greedy')}, t => (t === 0.8 ? null : t)),
    control('top_k', now => placeOf(now.topK), {label: 'top-k', min: 0, max: 100, step: 'any',
      show: place => (place >= 100 ? 'off' : count(kAt(place)))}, place => (place >= 100 ? null : kAt(place))),
    control('top_p', now => now.topP ?? 1, {label: 'top-p', min: 0.01, max: 1, step: 0.01,
      show: p => (p < 1 ? p.toFixed(2) : 'off')}, p => (p < 1 ? p : null)),
    control('min_p', now => now.minP ?? 0, {label: 'min-p', min: 0, max: 0.99, step: 0.01,
      show: p => (p ? p.toFixed(2) : 'off')}, p => p || null));
}
