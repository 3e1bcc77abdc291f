// Cards, controls and tables.
import {onTheme, shade} from './colors.js';
import {h} from './dom.js';
import {csv} from './format.js';
import * as state from './state.js';

// A card. about: one or two sentences of explanation. save: what `exportButtons` takes. wide: whether it takes the full
// width. The element's `body` takes the content, its `tools` the controls at the right of the heading.
export function card(title, {about = '', wide = false, test, save = null} = {}, ...children) {
  const tools = h('div.card-tools', {}, save && exportButtons(save)), body = h('div.card-body', {}, children);
  const element = h(wide ? 'section.card.wide' : 'section.card', {'aria-label': title, test},
    h('header', {}, h('h2', {}, title), tools), about && h('p.about', {}, about), body);
  return Object.assign(element, {body, tools});
}

// Buttons that save a figure and its numbers. name: of the files. figure: an element with `figure.png()` and
// `figure.svg()`, or a function that returns it. rows(): the rows of the CSV, column names first. Before there is a
// picture or a value, nothing is saved.
export function exportButtons({name, figure = null, rows = null}) {
  const picture = () => (typeof figure === 'function' ? figure() : figure)?.figure;
  const status = h('span.soft', {role: 'status'});
  const types = [
    figure && ['png', () => picture()?.png(), 'image/png'], figure && ['svg', () => picture()?.svg(), 'image/svg+xml'],
    rows && ['csv', () => csvOf([...rows()]), 'text/csv'],
  ].filter(Boolean);
  async function save(make, type, extension) {
    const content = await make();
    status.textContent = content ? '' : 'Nothing to save yet ';
    if (content) download(content, type, `${name}.${extension}`);
  }
  return h('span', {}, status, h('span.exports', {role: 'group', 'aria-label': `Save ${name}`},
    types.map(([extension, make, type]) => h('button.small', {type: 'button', 'data-export': extension,
      title: `Save as ${extension.toUpperCase()}`, onclick: () => save(make, type, extension)},
    extension.toUpperCase()))));
}

// The CSV of rows, or null if no row has a value besides its name.
const csvOf = rows => (rows.slice(1).some(row => row.slice(1).some(x => x !== '' && x !== null && !Number.isNaN(x)))
  ? csv(rows) : null);

function download(content, type, name) {
  const address = URL.createObjectURL(content instanceof Blob ? content : new Blob([content], {type}));
  h('a', {href: address, download: name.replace(/[^\p{L}\p{N}._-]+/gu, '-')}).click();
  setTimeout(() => URL.revokeObjectURL(address), 1000);
}

// A message in place of content.
export const notice = (text, kind = '') =>
  h(kind ? `p.notice.${kind}` : 'p.notice', {role: kind === 'error' ? 'alert' : 'status'}, text);

// Run `work`, and show in `place` why it failed. An aborted `signal` silences errors. Returns whether it succeeded.
export async function attempt(place, signal, work) {
  try {
    await work();
    if (!signal.aborted) place.replaceChildren();
    return true;
  } catch (error) {
    if (!signal.aborted) place.replaceChildren(notice(error.message, 'error'));
    return false;
  }
}

let controls = 0;

function labelled(label, input, ...more) {
  input.id = `control-${++controls}`;
  return h('div.control', {}, h('label', {htmlFor: input.id}, label), input, more);
}

// Let a control follow a key of the state: `read()` gives the value to show.
export function bound(control, key, read, signal) {
  state.on([key], () => control.set(read()), signal);
  return control;
}

// A range. show(value): the text at its right.
export function slider({label, min, max, step = 1, value, show = String, onInput, title}) {
  const output = h('output', {}, show(value));
  const input = h('input', {type: 'range', min, max, step, value, title, oninput() {
    output.textContent = show(Number(input.value));
    onInput(Number(input.value));
  }});
  return Object.assign(labelled(label, input, output), {set(now) {
    input.value = now;
    output.textContent = show(Number(input.value));
  }});
}

// A number. An emptied or invalid field takes back its last value.
export function numberField({label, min, max, value, onInput}) {
  const input = h('input', {type: 'number', min, max, step: 1, value, onchange() {
    if (input.value !== '' && Number.isFinite(Number(input.value))) {
      value = Math.min(max, Math.max(min, Math.round(Number(input.value))));
      onInput(value);
    }
    input.value = value;
  }});
  return Object.assign(labelled(label, input), {set(now) { input.value = value = now; }});
}

// A menu. options: [value, text] pairs.
export function choice({label, options, value, onInput, test}) {
  const select = h('select', {test, onchange: () => onInput(select.value)}, options.map(([v, text]) =>
    h('option', {value: v, selected: String(v) === String(value)}, text)));
  return Object.assign(labelled(label, select), {select, set(now) { select.value = now; }});
}

// Buttons of which one is pressed. options: [value, text] pairs.
export function segmented({label, options, value, onInput}) {
  const buttons = options.map(([v, text]) => h('button', {type: 'button', onclick() {
    set(v);
    onInput(v);
  }}, text));
  const set = now => buttons.forEach((b, i) => b.setAttribute('aria-pressed', String(options[i][0] === now)));
  set(value);
  return Object.assign(h('div.segmented', {role: 'group', 'aria-label': label}, buttons), {set});
}

export function checkbox({label, checked, onInput, title, test}) {
  const input = h('input', {type: 'checkbox', checked, test, onchange: () => onInput(input.checked)});
  return Object.assign(h('label.check', {title}, input, label), {set(now) { input.checked = now; }});
}

// The labels of layers, and of heads.
export const layerNames = n => Array.from({length: n}, (_, i) => `layer ${i}`);
export const headNames = n => Array.from({length: n}, (_, i) => String(i));

// A button.
export const button = (text, onclick, {kind = 'button', ...properties} = {}) =>
  h(kind, {type: 'button', onclick, ...properties}, text);

// A table. The first column is the rows' heading; cells are texts, numbers or elements.
export function table(heads, rows, test) {
  return h('div.table', {test}, h('table', {},
    h('thead', {}, h('tr', {}, heads.map(text => h('th', {scope: 'col'}, text)))),
    h('tbody', {}, rows.map(([first, ...rest]) =>
      h('tr', {}, h('th', {scope: 'row'}, first), rest.map(cell => h('td', {}, cell)))))));
}

// Pairs of name and value.
export const facts = pairs =>
  h('dl.facts', {}, pairs.map(([name, value]) => h('div', {}, h('dt', {}, name), h('dd', {}, value))));

// A number with its full value for tests.
export const exact = (test, x, text) => h('span.number', {test, 'data-value': x}, text);

// A bar from 0 to a share of the width.
export const bar = (share, color) => h('span.meter', {}, h('span', {
  style: {width: `${100 * Math.min(1, Math.max(0, share || 0))}%`, background: color}}));

// A patch of a color that may change with the theme: `color()` gives it.
export function swatch(color, signal) {
  const patch = h('span.swatch'), paint = () => { patch.style.background = color(); };
  onTheme(paint, signal);
  paint();
  return patch;
}

// What colors stand for. pairs: [name, color()].
export const legend = (pairs, signal, test) => h('p.about.legend', {test}, pairs.map(([name, color]) =>
  h('span', {}, swatch(color, signal), ` ${name}`)));

// The colors of a scale between its lowest and highest value.
export const ramp = (scale, low, high, signal) => [`${low} `,
  ...Array.from({length: 9}, (_, i) => swatch(() => shade(scale, i / 8), signal)), ` ${high}`];
