// Activation patching: activations from a second text put into the pass over the first (Vig et al., 2020).
import {attempt, button, card, choice, editRequest, editText, encode, h, klDivergence, layerNames, numberField,
  parseEdits, percent, post, ranked, softmax, state} from '../core/index.js';
import {sweep, tokenStrip} from '../widgets/index.js';

const COMPONENTS = [['r', 'residual stream'], ['a', 'attention'], ['f', 'feed-forward'], ['h', 'head']];
const TYPING_MS = 500;

// The card, with `source()`: the second text's ids, `edits()`: the patches, and `start(onChange)`, which reads the
// second text of the address and calls `onChange` when it changes.
export function patchingCard({signal, opened, ids, pieces, names, shape, position}) {
  const body = h('div'), problem = h('div');
  const codes = () => parseEdits(state.text('patch'), shape);
  let second = null, stage = new AbortController(), tracing = null, timer = 0;
  function read() {
    clearTimeout(timer);
    if (field.value !== state.text('source')) state.set({source: field.value, patch: null});
  }
  const field = h('input.second', {type: 'text', value: state.text('source'), 'aria-label': 'Second text',
    test: 'second-text',
    placeholder: 'a second text, for example with another name or number', onchange: read, oninput() {
      clearTimeout(timer);
      timer = setTimeout(read, TYPING_MS);
    }});
  const element = card('Activation patching', {
    wide: true, test: 'patching', about: 'Replace activations by those from a second text with as many tokens.',
    save: {name: 'patching', figure: () => tracing, rows: () => tracing.rows()},
  }, field, problem, body);
  async function load() {
    second = tracing = null;
    stage.abort();
    stage = new AbortController();
    body.replaceChildren();
    element.tools.hidden = true;
    const text = state.text('source');
    if (document.activeElement !== field) field.value = text;  // do not change what the user is typing
    await attempt(problem, signal, async () => {
      if (!text) return;
      const found = await encode(opened, text, signal);
      if (found.ids.length !== ids.length) {
        throw new Error(`the second text has ${found.ids.length} tokens, the text above ${ids.length}: make them the `
          + `same`);
      }
      second = found;
      element.tools.hidden = false;
      build(AbortSignal.any([signal, stage.signal]));
    });
  }
  function build(stopped) {
    const differs = i => second.ids[i] !== ids[i];
    const strip = tokenStrip({pieces: second.pieces, partial: second.partial, label: 'Tokens of the second text',
      signal: stopped, selectOnMove: false, onSelect: i => state.set({position: i}),
      hint: i => (differs(i) ? `«${second.pieces[i]}» instead of «${pieces[i]}»` : second.pieces[i])});
    strip.press(differs);
    const list = h('div.row', {role: 'status', test: 'patches'}), map = h('div');
    const showPatches = () => list.replaceChildren(...[...codes()].map(code =>
      button(`${editText(code)} ×`, () => change(now => now.delete(code)), {kind: 'button.small', title: 'Remove'})));
    const showMap = () => {
      tracing = tracingMap(stopped);
      map.replaceChildren(tracing);
    };
    state.on(['patch'], showPatches, stopped);
    state.on(['position'], showMap, stopped);
    showPatches();
    showMap();
    body.replaceChildren(strip, picker(), list, h('h3', {}, 'Causal tracing'),
      h('p.about', {}, 'The residual stream after each layer, patched at one token (Meng et al., 2022). Recovery is 1 '
        + '− D(second ‖ patched) / D(second ‖ text), where D is the Kullback–Leibler divergence of the next token’s '
        + 'distribution. 1: the patch alone gives the second text’s prediction.'), map);
  }
  function change(edit) {
    const now = codes();
    edit(now);
    state.set({patch: [...now].join(',')});
  }
  function picker() {
    const chosen = {component: 'r', layer: 0, head: 0, position: ''};
    const set = key => value => { chosen[key] = value; };
    const head = numberField({label: 'head', min: 0, max: shape.heads - 1, value: 0, onInput: set('head')});
    head.hidden = true;
    const code = () => chosen.component + chosen.layer + (chosen.component === 'h' ? `.${chosen.head}` : '')
      + (chosen.position === '' ? '' : `@${chosen.position}`);
    return h('div.row', {},
      choice({label: 'patch', options: COMPONENTS, value: 'r', onInput(value) {
        chosen.component = value;
        head.hidden = value !== 'h';
      }}),
      numberField({label: 'layer', min: 0, max: shape.layers - 1, value: 0, onInput: set('layer')}), head,
      choice({label: 'at', value: '', onInput: set('position'),
        options: [['', 'all tokens'], ...pieces.map((piece, i) => [i, `${i}: ${piece}`])]}),
      button('Patch', () => change(now => now.add(code())), {test: 'patch'}));
  }
  function tracingMap(stopped) {
    const last = position(), first = ids.findIndex((id, i) => id !== second.ids[i]);
    const about = h('p.about', {role: 'status'});
    const logitsOf = async (request, aborted) =>
      (await post('/api/next', opened.request({position: last, ...request}), aborted)).logits;
    let text = null, other = null, top = 0;
    const map = sweep({
      test: 'tracing', title: 'Patch each place alone', signal: stopped,
      rows: layerNames(shape.layers), cols: pieces.slice(0, last + 1),
      measures: [['recovery', 'recovery', 'signed'], ['p', 'probability change', 'signed']],
      describe: (layer, i) => `layer ${layer}, token ${i} «${pieces[i]}»`,
      action: ['Patch', (layer, i) => change(now => now.add(`r${layer}@${i}`))],
      async prepare(aborted) {
        [text, other] = await Promise.all([logitsOf({ids}, aborted), logitsOf({ids: second.ids}, aborted)]);
        top = ranked(other)[0];
        about.textContent = `The top token after the second text, at position ${last}, is «${names[top]}»: `
          + `${percent(softmax(other)[top])}, and ${percent(softmax(text)[top])} after the text above. The probability `
          + `change is its.`;
      },
      async measure(layer, i, aborted) {
        // Before the first token that differs, both residual streams are the same.
        if (first < 0 || i < first) return {recovery: 0, p: 0};
        const edits = [editRequest(`r${layer}@${i}`, 'patch')];
        const logits = await logitsOf({ids, edits, source: second.ids}, aborted);
        return {recovery: 1 - klDivergence(other, logits) / klDivergence(other, text),
          p: softmax(logits)[top] - softmax(text)[top]};
      },
    });
    return Object.assign(h('div', {}, map, about), {figure: map.figure, rows: map.rows});
  }
  return {
    element, source: () => second?.ids ?? null,
    edits: () => (second ? [...codes()].map(code => editRequest(code, 'patch')) : []),
    async start(onChange) {
      state.on(['source'], async () => {
        await load();
        onChange();
      }, signal);
      await load();
    },
  };
}
