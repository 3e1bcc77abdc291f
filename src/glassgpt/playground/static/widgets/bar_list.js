// Horizontal bars with names and numbers: elements, so that they can be read, focused and selected.
import {css, exportableElement, h, legend} from '../core/index.js';
import {roving} from './figure.js';

// series: [{name, color: 'accent' or 'warm'}]. A row has {label, values, texts, title, faint}, with a value and a text
// per series. signed: bars start in the middle, colored by sign. onSelect(row): optional. full(largest): the value of a
// full bar. ownScales: whether each series has its own scale. The element has `show(rows)` and `scale()`, a full bar's
// value.
export function barList({label, series, signed = false, onSelect = null, full = largest => largest, ownScales = false,
  test}) {
  const list = h('div.bars', {role: 'group', 'aria-label': label, test});
  const lines = [];
  let shown = [];
  const color = (s, value) => (!signed ? series[s].color : value < 0 ? 'accent' : 'warm');
  const largest = s => shown.reduce((most, {values}) => Math.max(most, Math.abs(values[s])), 0);
  const scale = s => full(ownScales ? largest(s) : Math.max(...series.map((_, i) => largest(i)))) || 1;
  function createLine(i) {
    const name = h('span.bars-name'), fills = series.map(() => h('span')),
      numbers = series.map(() => h('span.bars-number'));
    const behaviour = onSelect && {type: 'button', tabIndex: i ? -1 : 0, onclick: () => onSelect(shown[i])};
    const element = h(onSelect ? 'button.bars-row' : 'div.bars-row', behaviour ?? {},
      name, h(signed ? 'span.bars-track.signed' : 'span.bars-track', {}, fills), numbers);
    return {element, name, fills, numbers};
  }
  function fillLine({element, name, fills, numbers}, row) {
    name.textContent = row.label;
    element.title = row.title ?? '';
    element.classList.toggle('faint', Boolean(row.faint));
    row.values.forEach((value, s) => {
      const share = Math.min(1, Math.abs(value) / scale(s) || 0) * (signed ? 50 : 100);
      const left = signed ? `${value < 0 ? 50 - share : 50}%` : '';
      Object.assign(fills[s].style, {background: `var(--${color(s, value)})`, width: `${share}%`, marginLeft: left});
      numbers[s].textContent = row.texts[s];
    });
  }
  if (onSelect) roving(list, () => [...list.children], {columns: 1});
  return Object.assign(list, {
    scale: () => scale(0), show(rows) {
      shown = rows;
      while (lines.length < rows.length) lines.push(createLine(lines.length));
      rows.forEach((row, i) => fillLine(lines[i], row));
      if (list.childElementCount !== rows.length) list.replaceChildren(...rows.map((_, i) => lines[i].element));
    },
    figure: exportableElement(list),
    rows: () => [['', ...series.map(({name}) => name)], ...shown.map(row => [row.label, ...row.values])],
  });
}

// What the colors of the series stand for.
export const barLegend = (series, signal) => legend(series.map(({name, color}) => [name, () => css(color)]), signal);
