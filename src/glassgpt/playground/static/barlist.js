// Bars with their names and numbers, a row each: elements, so that they can be read, reached by keys and chosen; painted for exports.

import {css} from './colors.js';
import {pictured} from './paint.js';
import {h, legend} from './ui.js';

const ROW = 22;

/**
 * series: [{name, color: 'accent' or 'warm'}]; a row has a value and a text for each. signed: whether bars begin in the middle, in the
 * colours of 'signs' instead. onPick(row): it was chosen. most(largest): what a full bar stands for (default: the largest value shown).
 * ownScales: whether that is so for each series by itself.
 *
 * The element's `show(rows)` shows rows of {label, values, texts, title, faint, …}, `scale()` is what a full bar stands for
 * now; `figure` and `rows()` are for exports.
 */
export function barList({label, series, signed = false, onPick = null, most = largest => largest, ownScales = false}) {
  const list = h('div.bars', {role: 'group', 'aria-label': label, onkeydown: move});
  const lines = [];
  let shown = [];
  const color = (s, value) => (!signed ? series[s].color : value < 0 ? 'accent' : 'warm');
  const largest = s => shown.reduce((most, {values}) => Math.max(most, Math.abs(values[s])), 0);
  const scale = (s = null) => most(s !== null && ownScales ? largest(s) : Math.max(...series.map((_, i) => largest(i)))) || 1;

  function line(i) {
    const name = h('span.bars-name');
    const fills = series.map(() => h('span'));
    const track = h(signed ? 'span.bars-track.signed' : 'span.bars-track', {}, fills);
    const numbers = series.map(() => h('span.bars-number'));
    const element = h(onPick ? 'button.bars-row' : 'div.bars-row', {
      type: onPick ? 'button' : undefined, tabIndex: onPick ? (i ? -1 : 0) : undefined, onclick: onPick && (() => onPick(shown[i])),
    }, name, track, numbers);
    return {element, name, fills, numbers};
  }

  function fill({element, name, fills, numbers}, row, wholes) {
    name.textContent = row.label;
    element.title = row.title ?? '';
    element.classList.toggle('faint', Boolean(row.faint));
    row.values.forEach((value, s) => {
      const share = Math.min(1, Math.abs(value) / wholes[s] || 0) * (signed ? 50 : 100);
      fills[s].style.background = `var(--${color(s, value)})`;
      fills[s].style.width = `${share}%`;
      fills[s].style.marginLeft = signed ? `${value < 0 ? 50 - share : 50}%` : '';
      numbers[s].textContent = row.texts[s];
    });
  }

  function move(event) {
    if (!onPick) return;
    const at = lines.findIndex(({element}) => element === document.activeElement);
    const to = {ArrowUp: at - 1, ArrowDown: at + 1, Home: 0, End: shown.length - 1}[event.key];
    if (at < 0 || to === undefined || !lines[to] || to >= shown.length) return;
    event.preventDefault();
    lines[at].element.tabIndex = -1;
    lines[to].element.tabIndex = 0;
    lines[to].element.focus();
  }

  function paint(p, width, top = 0) {
    const wholes = series.map((_, s) => scale(s)), room = 110, digits = 70 * series.length, track = width - room - digits - 12;
    shown.forEach((row, i) => {
      const y = top + i * ROW + ROW / 2;
      p.text(room - 6, y, row.label, {align: 'end', mono: true, most: room - 10, fill: css(row.faint ? 'soft' : 'ink')});
      const thick = (ROW - 6) / series.length;
      row.values.forEach((value, s) => {
        const long = track * Math.min(1, Math.abs(value) / wholes[s] || 0) * (signed ? 0.5 : 1);
        const from = room + (signed ? track / 2 - (value < 0 ? long : 0) : 0);
        p.rect(from, y - (ROW - 6) / 2 + s * thick, long, thick, css(color(s, value)));
        p.text(width - digits + 70 * (s + 1) - 6, y, row.texts[s], {align: 'end', size: 11, fill: css('soft')});
      });
    });
  }

  return Object.assign(list, {
    scale,
    show(rows) {
      shown = rows;
      while (lines.length < rows.length) lines.push(line(lines.length));
      const wholes = series.map((_, s) => scale(s));
      rows.forEach((row, i) => fill(lines[i], row, wholes));
      const children = rows.map((_, i) => lines[i].element);
      if (list.childElementCount !== rows.length) list.replaceChildren(...children);
      return list;
    },
    paint,
    tall: () => Math.max(ROW, shown.length * ROW),
    figure: pictured(() => [wide(list), list.tall()], (p, width) => paint(p, width)),
    rows: () => [['', ...series.map(({name}) => name)], ...shown.map(row => [row.label, ...row.values])],
  });
}

const wide = list => Math.max(360, Math.floor(list.clientWidth));

/** Several lists of bars, one below the other with their names, as one picture for exports. */
export const together = lists => ({figure: pictured(
  () => [wide(lists[0]), lists.reduce((sum, list) => sum + ROW + list.tall(), 0)],
  (p, width) => lists.reduce((top, list) => {
    p.text(6, top + ROW / 2, list.ariaLabel, {bold: true, fill: css('soft')});
    list.paint(p, width, top + ROW);
    return top + ROW + list.tall();
  }, 0))});

/** What the bars' colours stand for. */
export const key = series => legend(series.map(({name, color}) => [name, `var(--${color})`]));
