// Values of a second text put into the pass over the first: where the difference of two texts is carried (Vig et al., 2020).

import {post} from './api.js';
import {editFor, editsOf, told} from './edits.js';
import {exportable} from './export.js';
import {encode} from './models.js';
import {divergence, ranked, softmax} from './sampling.js';
import * as state from './state.js';
import {sweep} from './sweep.js';
import {card, choice, h, notice, numberField, percent, tokenStrip} from './ui.js';

const PARTS = [['r', 'residual stream'], ['a', 'attention'], ['f', 'feed-forward'], ['h', 'head']];

/**
 * The card, with `source()`: the second text's ids, `edits()`: what is patched in, and `begin(changed)`, which reads the text of the
 * address and calls `changed` when another is there.
 */
export function patching({signal, opened, ids, pieces, names, shape, position}) {
  const it = card('Patch from a second text', 'In the pass over the text above, a part’s values are replaced by those that it has in the '
    + 'pass over a second text, which must have as many tokens.');
  it.classList.add('wide');
  it.dataset.test = 'patching';
  const place = h('div');
  const problem = h('div');
  const field = h('input.second', {type: 'text', value: state.text('from'), 'aria-label': 'Second text', 'data-test': 'second-text',
    placeholder: 'a second text, for example with another name or number', onchange: () => state.set({from: field.value, patch: null})});
  it.body.append(field, problem, place);
  const codes = () => editsOf(state.text('patch'), shape);
  let second = null;
  let stage = new AbortController();
  let view = null;
  exportable(it, {name: 'patching', png: () => view?.figure.png(), svg: async () => view?.figure.svg(), rows: () => view?.rows() ?? []});

  async function read() {
    second = null;
    stage.abort();
    stage = new AbortController();
    place.replaceChildren();
    problem.replaceChildren();
    view = null;
    const text = field.value = state.text('from');
    if (!text) return;
    try {
      const found = await encode(opened, text, signal);
      if (found.ids.length !== ids.length) {
        problem.replaceChildren(notice(`It has ${found.ids.length} tokens and the text above ${ids.length}: make them the same number.`));
        return;
      }
      second = found;
      build();
    } catch (error) {
      if (!signal.aborted) problem.replaceChildren(notice(error.message, 'error'));
    }
  }

  function build() {
    const differs = i => second.ids[i] !== ids[i];
    const strip = tokenStrip({pieces: second.pieces, partial: second.partial, label: 'Tokens of the second text', pickOnMove: false,
      onPick: i => state.set({token: i}), hint: i => (differs(i) ? `«${second.pieces[i]}» in place of «${pieces[i]}»` : second.pieces[i])});
    strip.press(differs);
    const list = h('div.row', {role: 'status', 'data-test': 'patches'});
    const showPatches = () => list.replaceChildren(...[...codes()].map(code => h('button.small', {type: 'button', title: 'Take it out',
      onclick: () => change(now => now.delete(code))}, `${told(code)} ×`)));
    state.on(['patch'], showPatches, stage.signal);
    showPatches();
    const where = h('div');
    const mapped = () => {
      view = tracing(AbortSignal.any([signal, stage.signal]));
      where.replaceChildren(view);
    };
    state.on(['token'], mapped, stage.signal);
    place.replaceChildren(strip, picker(), list, h('h3', {}, 'Where the difference is carried'),
      h('p.about', {}, 'The residual stream behind each layer at each token patched alone, as in causal tracing (Meng et al., 2022). The '
        + 'way to the second text is 1 − D(second ‖ patched) / D(second ‖ text), with D the Kullback–Leibler divergence of the next token’s '
        + 'distribution: 1 where the patch alone makes the model expect what it expects after the second text.'), where);
    mapped();
  }

  function change(how) {
    const now = codes();
    how(now);
    state.set({patch: [...now].join(',')});
  }

  function picker() {
    const chosen = {part: 'r', layer: 0, head: 0};
    const head = numberField({label: 'head', min: 0, max: shape.heads - 1, value: 0, onInput: value => { chosen.head = value; }});
    head.hidden = true;
    const at = choice({label: 'at', options: [['', 'all tokens'], ...pieces.map((piece, i) => [i, `${i}: ${piece}`])], value: '',
      onInput: value => { chosen.position = value; }});
    const code = () => chosen.part + chosen.layer + (chosen.part === 'h' ? `.${chosen.head}` : '')
      + (chosen.position ? `@${chosen.position}` : '');
    return h('div.row', {},
      choice({label: 'patch', options: PARTS, value: 'r', onInput(value) { chosen.part = value; head.hidden = value !== 'h'; }}),
      numberField({label: 'layer', min: 0, max: shape.layers - 1, value: 0, onInput: value => { chosen.layer = value; }}), head, at,
      h('button', {type: 'button', 'data-test': 'patch', onclick: () => change(now => now.add(code()))}, 'Patch it in'));
  }

  function tracing(stopped) {
    const last = position();
    const first = ids.findIndex((id, i) => id !== second.ids[i]);
    let text = null, other = null, token = 0;
    const told = h('p.about', {role: 'status'});
    const picture = sweep({
      name: 'tracing', button: 'Patch each place alone', signal: stopped, height: 22,
      rows: Array.from({length: shape.layers}, (_, i) => `layer ${i}`), cols: pieces.slice(0, last + 1),
      views: [{name: 'way', text: 'way to the second text', kind: 'signs'}, {name: 'p', text: 'change of probability', kind: 'signs'}],
      describe: (layer, i) => `layer ${layer}, token ${i} «${pieces[i]}»`,
      action: ['Patch it in', (layer, i) => change(now => now.add(`r${layer}@${i}`))],
      async begin(aborted) {
        const logits = async question => (await post('/api/next', opened.question({position: last, ...question}), aborted)).logits;
        [text, other] = await Promise.all([logits({ids}), logits({ids: second.ids})]);
        token = ranked(other)[0];
        const [p, q] = [softmax(text)[token], softmax(other)[token]];
        told.textContent = `Likeliest after the second text, at token ${last}: «${names[token]}», ${percent(q)}, and after the text above `
          + `${percent(p)}; change of probability is its own.`;
      },
      async ask(layer, i, aborted) {
        // Before the first token that differs the two streams are the same.
        if (first < 0 || i < first) return {way: 0, p: 0};
        const {logits} = await post('/api/next',
          opened.question({ids, position: last, edits: [editFor(`r${layer}@${i}`, 'patch')], source: second.ids}), aborted);
        return {way: 1 - divergence(other, logits) / divergence(other, text), p: softmax(logits)[token] - softmax(text)[token]};
      },
    });
    return Object.assign(h('div', {}, picture, told), {figure: picture.figure, rows: picture.rows});
  }

  return {
    card: it,
    source: () => second?.ids ?? null,
    edits: () => (second ? [...codes()].map(code => editFor(code, 'patch')) : []),
    async begin(changed) {
      state.on(['from'], async () => {
        await read();
        changed();
      }, signal);
      await read();
    },
  };
}
