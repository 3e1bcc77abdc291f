// Tokens that are watched: looked up in the vocabulary, kept in the address.

import * as state from './state.js';
import {announce, h} from './ui.js';

const MOST = 6, SUGGESTED = 8;

/** The watched ids, as far as this vocabulary has them. */
export const watched = size => [...new Set(state.text('watch').split(',').filter(Boolean).map(Number))]
  .filter(id => Number.isInteger(id) && id >= 0 && id < size).slice(0, MOST);

const keep = ids => state.set({watch: ids.join(',')});

/** A text as the vocabulary shows it: white space visible. */
export const shown = text => text.replaceAll(' ', '␣').replaceAll('\n', '⏎').replaceAll('\t', '→');

/** Ids of the tokens that begin with the text, then of those that hold it; the text itself first, alone and behind a space. */
export function suggested(names, text) {
  const wanted = shown(text), found = [[], [], []];
  for (let id = 0; id < names.length; id++) {
    const name = names[id];
    if (name === wanted || name === `␣${wanted}`) found[0].push(id);
    else if (found[1].length < SUGGESTED && (name.startsWith(wanted) || name.startsWith(`␣${wanted}`))) found[1].push(id);
    else if (found[2].length < SUGGESTED && name.includes(wanted)) found[2].push(id);
  }
  return found.flat().slice(0, SUGGESTED);
}

/**
 * The field, what it suggests, and the watched tokens, to be taken off. color(n): of the n-th. The element's `show()` reads the address.
 */
export function watchField({names, color}) {
  const chips = h('span.chips', {'data-test': 'watched'}), offered = h('span.chips', {'data-test': 'suggested'});
  const input = h('input', {type: 'text', size: 14, placeholder: 'a token', 'aria-label': 'Watch a token', maxLength: 40, spellcheck: false,
    autocomplete: 'off', 'data-test': 'watch', oninput: suggest, onkeydown(event) {
      if (event.key !== 'Enter' || !input.value) return;
      const exact = names.indexOf(shown(input.value));
      if (exact >= 0) add(exact);
      else announce(`no token is exactly ${input.value}`);
    }});

  function suggest() {
    const ids = input.value ? suggested(names, input.value) : [];
    offered.replaceChildren(...ids.map(id =>
      h('button.small.mono', {type: 'button', title: `Watch it (id ${id})`, onclick: () => add(id)}, names[id])));
    if (input.value && !ids.length) offered.replaceChildren(h('span.soft', {}, 'no token has this in it'));
  }

  function add(id) {
    const now = watched(names.length);
    if (now.length >= MOST && !now.includes(id)) return announce(`${MOST} are watched: take one off first`);
    input.value = '';
    offered.replaceChildren();
    keep([...now.filter(other => other !== id), id]);
    input.focus();
  }

  const element = h('div.row', {}, h('label.soft', {}, 'Watch ', input), offered, chips);
  return Object.assign(element, {show() {
    const now = watched(names.length);
    chips.replaceChildren(...now.map((id, n) => h('button.small.mono', {
      type: 'button', title: `Take ${names[id]} off (id ${id})`, 'data-id': id, 'aria-label': `Take ${names[id]} off`,
      style: {borderColor: color(n), color: color(n)}, onclick: () => keep(now.filter(other => other !== id)),
    }, `${names[id]} ×`)));
  }});
}
