// The page's few controls. Text from outside is only ever set as text, so nothing in it can become markup.

import {css, inkOn, onTheme, shade} from './colors.js';
import {pictured} from './paint.js';

/** An element: h('button.small', {onclick, title}, 'text', child, …). Properties that elements have none of become attributes. */
export function h(tag, properties = {}, ...children) {
  const [name, ...classes] = tag.split('.');
  const element = document.createElement(name);
  if (classes.length) element.className = classes.join(' ');
  for (const [key, value] of Object.entries(properties)) {
    if (value === undefined || value === null || value === false) continue;
    if (key === 'style') Object.assign(element.style, value);
    else if (key in element && !key.startsWith('aria-')) element[key] = value;
    else element.setAttribute(key, value === true ? '' : value);
  }
  element.append(...children.flat(Infinity).filter(child => child !== null && child !== undefined && child !== false));
  return element;
}

/** A card with a heading; `about` explains it in a sentence or two. Its `body` takes the content, its `tools` what stands at the right. */
export function card(title, about = '', ...children) {
  const tools = h('div.card-tools');
  const body = h('div.card-body', {}, ...children);
  const element = h('section.card', {'aria-label': title}, h('header', {}, h('h2', {}, title), tools),
    about && h('p.about', {}, about), body);
  return Object.assign(element, {body, tools});
}

let ids = 0;

/** A labelled range. `show(value)` is the text beside it, `scale` maps the slider's place to the value and back (default: as it is). */
export function slider({label, min, max, step, value, show = String, onInput, title}) {
  const id = `control-${++ids}`;
  const output = h('output', {htmlFor: id}, show(value));
  const input = h('input', {type: 'range', id, min, max, step, value, title, oninput() {
    output.textContent = show(Number(input.value));
    onInput(Number(input.value));
  }});
  return Object.assign(h('div.control', {}, h('label', {htmlFor: id}, label), input, output), {
    set(now) { input.value = now; output.textContent = show(Number(input.value)); },
  });
}

/** A labelled number. */
export function numberField({label, min, max, step = 1, value, onInput, title}) {
  const id = `control-${++ids}`;
  const input = h('input', {type: 'number', id, min, max, step, value, title, onchange() {
    const now = Math.min(max, Math.max(min, Number(input.value) || min));
    input.value = now;
    onInput(now);
  }});
  return h('div.control', {}, h('label', {htmlFor: id}, label), input);
}

/** A labelled choice; options: [value, text] pairs. */
export function choice({label, options, value, onInput, hideLabel = false}) {
  const id = `control-${++ids}`;
  const select = h('select', {id, onchange: () => onInput(select.value)},
    options.map(([v, text]) => h('option', {value: v, selected: String(v) === String(value)}, text)));
  return Object.assign(h('div.control', {}, h(hideLabel ? 'label.sr' : 'label', {htmlFor: id}, label), select), {select});
}

/** Buttons of which one is pressed; options: [value, text] pairs. */
export function segmented({label, options, value, onInput}) {
  const buttons = options.map(([v, text]) => h('button', {type: 'button', 'aria-pressed': String(v === value), onclick() {
    buttons.forEach(b => b.setAttribute('aria-pressed', String(b === this)));
    onInput(v);
  }}, text));
  return h('div.segmented', {role: 'group', 'aria-label': label}, buttons);
}

/** A check box with its label behind it. */
export function checkbox({label, checked, onInput, title}) {
  const input = h('input', {type: 'checkbox', checked, onchange: () => onInput(input.checked)});
  return h('label.check', {title}, input, label);
}

/** A table: heads, and rows of texts, numbers or elements. The first column is the rows' heading. */
export function table(heads, rows) {
  return h('div.table', {}, h('table', {}, heads && h('thead', {}, h('tr', {}, heads.map(text => h('th', {scope: 'col'}, text)))),
    h('tbody', {}, rows.map(([first, ...rest]) => h('tr', {}, h('th', {scope: 'row'}, first), rest.map(cell => h('td', {}, cell)))))));
}

/** Name and value pairs. */
export const facts = pairs => h('dl.facts', {}, pairs.map(([name, value]) => h('div', {}, h('dt', {}, name), h('dd', {}, value))));

/** A bar from 0 to a share of the width, with what it says. */
export const bar = (share, color) => h('span.meter', {}, h('span', {style: {width: `${100 * Math.min(1, Math.max(0, share || 0))}%`, background: color}}));

/** What colours stand for: [name, CSS colour] pairs. */
export const legend = pairs => h('p.about.legend', {}, pairs.map(([name, color]) =>
  h('span', {}, h('span.swatch', {style: {background: color}}), ` ${name}`)));

/** A small patch of a colour that may change with the theme: color() gives it. */
export function swatch(color, signal) {
  const patch = h('span.swatch');
  const paint = () => { patch.style.background = color(); };
  onTheme(paint, signal);
  paint();
  return patch;
}

/** The colours of a matrix from its lowest to its highest value, with what these are. */
export const ramp = (kind, low, high, signal) =>
  [`${low} `, ...Array.from({length: 9}, (_, i) => swatch(() => shade(kind, i / 8), signal)), ` ${high}`];

/** Something that went wrong, or is not there, in words. */
export const notice = (text, kind = '') => h(kind ? `p.notice.${kind}` : 'p.notice', {role: kind === 'error' ? 'alert' : 'status'}, text);

/** Tell a screen reader. */
export const announce = text => { document.getElementById('live').textContent = text; };

/**
 * Tokens as a row of buttons, walked through with the arrow keys.
 *
 * share(i): 0 to 1 for the colour of token i, or null for none. hint(i): its tooltip. onPick(i): it was chosen. marked: its number.
 * pickOnMove: whether the arrow keys choose, or only move the focus. The element's `mark(i)` moves the mark, `press(isIt)` marks any
 * number of them, `tint(share)` colours anew.
 */
export function tokenStrip({pieces, partial = [], share = () => null, hint = () => '', onPick, marked = null, label = 'Tokens',
  kind = 'sizes', pickOnMove = true}) {
  const buttons = pieces.map((piece, i) => h('button.token', {
    type: 'button', title: hint(i), tabIndex: i === (marked ?? 0) ? 0 : -1, 'data-i': i, 'aria-pressed': String(i === marked),
    onclick: () => pick(i),
  }, piece));
  buttons.forEach((button, i) => {
    if (partial[i]) button.classList.add('partial');
  });
  const strip = h('div.tokens', {role: 'group', 'aria-label': label, onkeydown(event) {
    const at = buttons.indexOf(document.activeElement);
    const to = {ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: buttons.length - 1}[event.key];
    if (at < 0 || to === undefined || !buttons[to]) return;
    event.preventDefault();
    if (pickOnMove) pick(to);
    else buttons.forEach((button, i) => { button.tabIndex = i === to ? 0 : -1; });
    buttons[to].focus();
  }}, buttons.flatMap((button, i) => (pieces[i].includes('⏎') ? [button, h('br')] : [button])));

  function pick(i) {
    if (pickOnMove) strip.mark(i);
    onPick?.(i);
  }

  /** As the buttons lie on the page. */
  function paintStrip(p) {
    const {left, top} = strip.getBoundingClientRect();
    buttons.forEach((button, i) => {
      const box = button.getBoundingClientRect();
      const [x, y] = [box.left - left, box.top - top + strip.scrollTop];
      if (button.style.background) p.rect(x, y, box.width, box.height, button.style.background);
      p.frame(x, y, box.width, box.height, css('line'));
      p.text(x + box.width / 2, y + box.height / 2, pieces[i], {align: 'center', size: 13, mono: true, fill: button.style.color || css('ink')});
    });
  }

  let last = share;
  return Object.assign(strip, {
    retint: () => strip.tint(last),
    figure: pictured(() => [strip.clientWidth, strip.scrollHeight], paintStrip),
    press: isIt => buttons.forEach((button, i) => button.setAttribute('aria-pressed', String(isIt(i)))),
    mark(i) {
      buttons.forEach((button, j) => {
        button.setAttribute('aria-pressed', String(j === i));
        button.tabIndex = j === (i ?? 0) ? 0 : -1;
      });
    },
    tint(now) {
      last = now;
      buttons.forEach((button, i) => {
        const value = now(i);
        button.style.background = value === null ? '' : shade(kind, value);
        button.style.color = value === null ? '' : inkOn(kind, value);
        button.title = hint(i);
      });
      return strip;
    },
  }).tint(share);
}

onTheme(() => document.querySelectorAll('.tokens').forEach(strip => strip.retint?.()));

const floating = h('div.tip', {hidden: true, role: 'tooltip'});

/** Show a tooltip at a place of the window; lines of text, or null to hide it. */
export function tip(lines, x, y) {
  if (!floating.isConnected) document.body.append(floating);
  floating.hidden = !lines;
  if (!lines) return;
  floating.replaceChildren(...lines.map(line => h('div', {}, line)));
  const {width, height} = floating.getBoundingClientRect();
  floating.style.left = `${Math.max(4, Math.min(x + 14, innerWidth - width - 4))}px`;
  floating.style.top = `${y + 18 + height > innerHeight ? Math.max(4, y - height - 10) : y + 18}px`;
}

/** A number as people read it: three significant digits, small ones as powers of ten. */
export function short(x) {
  if (x === null || x === undefined || Number.isNaN(x)) return '–';
  if (x === 0) return '0';
  const size = Math.abs(x);
  if (size >= 1e6 || size < 1e-3) return x.toExponential(1).replace('e+', 'e').replaceAll('-', '−');
  return (size >= 1000 ? Math.round(x).toLocaleString('en') : String(Number(x.toPrecision(3)))).replace('-', '−');
}

/** A number for who holds it against another: six significant digits. */
export function precise(x) {
  const size = Math.abs(x);
  const text = size && (size >= 1e6 || size < 1e-4) ? x.toExponential(3) : String(Number(x.toPrecision(6)));
  return text.replaceAll('-', '−').replace('e+', 'e');
}

/** A probability in percent. */
export const percent = p => (p >= 0.9995 ? '100 %' : p >= 0.0995 ? `${(100 * p).toFixed(1)} %` : p >= 0.000095 ? `${(100 * p).toFixed(2)} %` : `${(100 * p).toExponential(0).replace('-', '−')} %`);
