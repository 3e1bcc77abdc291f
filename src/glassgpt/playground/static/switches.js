// A grid of switches, layers by parts, walked through with the arrow keys.

import {h} from './ui.js';

/**
 * rows: their names. columns: [{code(row), name, short}]. isOff(code), onToggle(code). The element's `show()` follows `isOff`.
 */
export function switches({rows, columns, isOff, onToggle, label}) {
  const buttons = rows.map((rowName, r) => columns.map(({code, name}) => h('button.switch', {
    type: 'button', tabIndex: -1, 'data-code': code(r), 'aria-label': `${rowName}, ${name}`, title: `${rowName}, ${name}`,
    onclick() { focusOn(this); onToggle(code(r)); },
  })));
  const all = buttons.flat();
  all[0].tabIndex = 0;
  const head = [h('span'), ...columns.map(({short}) => h('span.switch-head', {}, short))];
  const grid = h('div.switches', {role: 'group', 'aria-label': label, onkeydown: move}, head,
    rows.map((name, r) => [h('span.switch-row', {}, r), buttons[r]]));
  grid.style.gridTemplateColumns = `1.6rem repeat(${columns.length}, minmax(1.15rem, 2rem))`;

  function focusOn(button) {
    for (const other of all) other.tabIndex = other === button ? 0 : -1;
    button.focus();
  }

  function move(event) {
    const at = all.indexOf(document.activeElement);
    const to = at + ({ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns.length, ArrowDown: columns.length}[event.key] ?? NaN);
    if (at < 0 || !all[to]) return;
    event.preventDefault();
    focusOn(all[to]);
  }

  return Object.assign(grid, {show() {
    for (const button of all) button.setAttribute('aria-pressed', String(isOff(button.dataset.code)));
  }});
}
