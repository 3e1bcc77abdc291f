// The text so far: tokens drawn, taken back, branched from; and how they are drawn.

import {exportable} from './export.js';
import * as state from './state.js';
import {card, h, notice, numberField, percent, slider, tokenStrip} from './ui.js';

/** Sampling's settings as the address holds them; the same defaults as `glassgpt generate`. */
export const settings = vocabSize => ({
  temperature: Math.min(2, Math.max(0, state.number('t', 0.8))),
  topK: state.number('k') === null ? null : Math.min(vocabSize, Math.max(1, Math.round(state.number('k')))),
  topP: between01('p'), minP: between01('minp'),
});
const between01 = name => (state.number(name) > 0 && state.number(name) < 1 ? state.number(name) : null);

/** The seed of the steps and of the continuations. */
export const seed = () => Math.round(Math.max(0, state.number('seed', 1337)));

/** The card, with `show(paths, isReady)`, `fail(message)` and `hasFailed()`. controls: what stands below the branches. */
export function writtenCard({prompt, names, onStep, onLikeliest, onReject, onBack, onBranch, onCut, onJump, onDrop, controls}) {
  const it = card('The text so far', 'What was written is coloured by its probability under the model; choose one of its tokens to go on '
    + 'from before it (what was behind stays as a branch).');
  it.classList.add('wide');
  const button = (name, onclick, title, test, kind = 'button') => h(kind, {type: 'button', onclick, title, 'data-test': test}, name);
  const reject = button('Reject', onReject, 'Take back the last token and draw again without it', 'reject');
  const back = button('Back', onBack, 'Take back the last token', 'back');
  const step = button('Step', onStep, 'Draw the next token', 'step', 'button.main');
  const accept = button('Accept the likeliest', onLikeliest, 'Take the likeliest token', 'accept');
  const text = h('div', {'data-test': 'written'});
  const list = h('div.branches', {role: 'group', 'aria-label': 'Branches', 'data-test': 'branches'});
  const problem = h('div');
  const seedField = numberField({label: 'seed', min: 0, max: 2 ** 32 - 1, value: seed(), onInput: value => state.set({seed: value})});
  it.body.append(text, h('div.row', {}, step, accept, reject, back,
    button('Branch', onBranch, 'Keep this text as a branch and go on with a copy', 'branch'), seedField), problem, list, controls,
  h('p.about', {}, 'Drawn from p ∝ exp(logit / temperature) over the tokens that top-k, then top-p, then min-p leave. A step’s random '
    + 'share is mixed from seed, place and try by murmur3’s 32-bit finalizer, here in the page: the same seed draws the same tokens. (The '
    + 'continuations below are drawn by torch’s generator, as glassgpt generate draws.)'));
  exportable(it, {name: 'written', rows: () => [['branch', 'place', 'id', 'token', 'probability'], ...shown.paths.flatMap((path, b) =>
    path.map(({id, p}, i) => [b === shown.at ? 'current' : b, i, id, names[id], p ?? '']))]});
  let shown = {paths: [], at: 0};

  const words = path => path.map(({id}) => names[id]).join('');
  const line = (paths, i) => h('div.row', {},
    h('button.branch', {type: 'button', 'aria-pressed': String(i === paths.at), onclick: () => onJump(i)},
      `${i === paths.at ? 'here: ' : ''}${words(paths.paths[i]).slice(-80) || 'nothing written yet'}`),
    h('span.soft', {}, likelihood(paths.paths[i])),
    h('button.small', {type: 'button', 'aria-label': `Forget branch ${i + 1}`, title: 'Forget it', onclick: () => onDrop(i)}, '×'));

  return {
    card: it,
    hasFailed: () => problem.childElementCount > 0,
    fail: message => problem.replaceChildren(notice(message, 'error')),
    show(paths, isReady) {
      shown = paths;
      problem.replaceChildren();
      const strip = tokenStrip({pieces: paths.current.map(({id}) => names[id]), pickOnMove: false, onPick: onCut, label: 'Written tokens',
        share: i => paths.current[i].p,
        hint: i => `${names[paths.current[i].id]} · ${percentOf(paths.current[i].p)} · go on from before it`});
      text.replaceChildren(h('span.mono.soft.before', {}, prompt.length > 400 ? `…${prompt.slice(-400)}` : prompt), strip);
      text.className = 'tokens tall so-far';
      strip.className = 'inline';
      for (const b of [reject, back]) b.disabled = !paths.current.length;
      for (const b of [step, accept]) b.setAttribute('aria-disabled', String(!isReady));
      list.replaceChildren(...(paths.paths.length > 1 ? paths.paths.map((_, i) => line(paths, i)) : []));
    },
  };
}

const percentOf = p => (p === null ? '–' : percent(p));

function likelihood(path) {
  if (!path.length) return '';
  const tokens = `${path.length} token${path.length === 1 ? '' : 's'}`;
  return path.some(({p}) => p === null) ? tokens : `${tokens}, ${(-path.reduce((sum, {p}) => sum + Math.log2(p), 0)).toFixed(1)} bits`;
}

/** Temperature, top-k, top-p and min-p as sliders. */
export function settingsControls(vocabSize) {
  const now = settings(vocabSize);
  // Places from 0 to 100 on a logarithmic scale, the last one for all tokens.
  const kAt = place => Math.max(1, Math.round(vocabSize ** (place / 100)));
  const placeOf = k => (k === null ? 100 : 100 * Math.log(k) / Math.log(vocabSize));
  return h('div.controls.settings', {'data-test': 'settings'},
    slider({label: 'temperature', min: 0, max: 2, step: 0.05, value: now.temperature, show: t => (t ? t.toFixed(2) : '0: likeliest'),
      onInput: t => state.set({t: t === 0.8 ? null : t})}),
    slider({label: 'top-k', min: 0, max: 100, step: 'any', value: placeOf(now.topK),
      show: place => (place >= 100 ? 'all' : kAt(place).toLocaleString('en')),
      onInput: place => state.set({k: place >= 100 ? null : kAt(place)})}),
    slider({label: 'top-p', min: 0.01, max: 1, step: 0.01, value: now.topP ?? 1, show: p => (p < 1 ? p.toFixed(2) : 'all'),
      onInput: p => state.set({p: p < 1 ? p : null})}),
    slider({label: 'min-p', min: 0, max: 0.99, step: 0.01, value: now.minP ?? 0, show: p => (p ? p.toFixed(2) : 'none'),
      onInput: p => state.set({minp: p || null})}));
}
