// A grid of switches, layers by components, that the arrow keys walk through.

import {h} from '../core/index.js';

/**
 * rows: names. columns: [{code(row), name, short}]. isOn(code), onToggle(code). The element's `show()` follows `isOn`.
 */
export function switchGrid({rows, columns, isOn, onToggle, label, test}) {
  const buttons = rows.map((rowName, r) => columns.map(({code, name}) => h('button.switch', {
    type: 'button', tabIndex: -1, 'data-code': code(r), 'aria-label': `${rowName}, ${name}`,
      title: `${rowName}, ${name}`,
    onclick() {
      focus(this);
      onToggle(code(r));
    },
  })));
  const all = buttons.flat();
  all[0].tabIndex = 0;

  function focus(button) {
    for (const other of all) other.tabIndex = other === button ? 0 : -1;
    button.focus();
  }

  const grid = h('div.switches', {role: 'group', 'aria-label': label, test, onkeydown(event) {
    const move = {ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns.length, ArrowDown: columns.length}[event.key];
    const to = all[all.indexOf(document.activeElement) + move];
    if (!to) return;
    event.preventDefault();
    focus(to);
  }}, h('span'), columns.map(({short}) => h('span.switch-head', {}, short)),
  rows.map((_, r) => [h('span.switch-row', {}, r), buttons[r]]));
  grid.style.gridTemplateColumns = `1.6rem repeat(${columns.length}, minmax(1.15rem, 2rem))`;
  return Object.assign(grid, {show() {
    for (const button of all) button.setAttribute('aria-pressed', String(isOn(button.dataset.code)));
  }});
}
