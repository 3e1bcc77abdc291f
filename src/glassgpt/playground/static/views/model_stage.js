// A part of the picture of a model: its heading opens its view.
import {button, exact, h, short, state} from '../core/index.js';

export const open = link => () => state.set(link, {push: true});

// link: the state that its heading opens. value: [test, number, text] at the right of it.
export const stage = (title, {link = null, value = null} = {}, ...children) => h('div.stage', {role: 'group', 'aria-label': title}, h('span.arrow', {'aria-hidden': 'true'}, '↓'),
  h('header', {}, link ? button(title, open(link), {kind: 'button.part', title: `Open: ${link.view}`})
    : h('span.part', {}, title), value && exact(value[0], value[1], value[2] ?? `norm ${short(value[1])}`)), children);
