// Tokens to track over the layers: found in the vocabulary, kept in the address.
import {announce, button, findTokens, h, state, visible} from '../core/index.js';

const MAX_TRACKED = 6, SUGGESTED = 8;

// The tracked ids that the vocabulary has.
export const trackedTokens = size => [...new Set(state.text('track').split(',').filter(Boolean).map(Number))]
  .filter(id => Number.isInteger(id) && id >= 0 && id < size).slice(0, MAX_TRACKED);

// A field with suggestions, and the tracked tokens as buttons that remove them. color(n): of the n-th.
export function trackField({names, color}) {
  const chips = h('span.chips', {test: 'tracked'}), suggestions = h('span.chips', {test: 'suggested'});
  const input = h('input', {type: 'text', size: 14, placeholder: 'a token', 'aria-label': 'Track a token',
    maxLength: 40, spellcheck: false, autocomplete: 'off', test: 'track', oninput: suggest, onkeydown(event) {
      if (event.key !== 'Enter' || !input.value) return;
      const id = names.indexOf(visible(input.value));
      if (id >= 0) add(id);
      else announce(`no token is exactly ${input.value}`);
    }});
  function suggest() {
    const ids = findTokens(names, input.value).slice(0, SUGGESTED);
    suggestions.replaceChildren(...ids.map(id =>
      button(names[id], () => add(id), {kind: 'button.small.mono', title: `Track it (id ${id})`})));
    if (input.value && !ids.length) suggestions.replaceChildren(h('span.soft', {}, 'no token contains this'));
  }
  function add(id) {
    const now = trackedTokens(names.length);
    if (now.length >= MAX_TRACKED && !now.includes(id)) return announce(`at most ${MAX_TRACKED} tokens: remove one `
      + `first`);
    input.value = '';
    suggestions.replaceChildren();
    state.set({track: [...now.filter(other => other !== id), id].join(',')});
    input.focus();
  }
  const element = h('div.row', {}, h('label.soft', {}, 'Track ', input), suggestions, chips);
  return Object.assign(element, {show() {
    const now = trackedTokens(names.length);
    chips.replaceChildren(...now.map((id, n) => button(`${names[id]} ×`,
      () => state.set({track: now.filter(other => other !== id).join(',')}), {kind: 'button.small.mono', 'data-id': id,
        title: `Remove (id ${id})`, 'aria-label': `Remove ${names[id]}`, style: {borderColor: color(n),
          color: color(n)}})));
  }});
}
