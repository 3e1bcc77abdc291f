// A grid of switches, layers by components, that the arrow keys walk through.
import {button, h} from '../core/index.js';
import {roving} from './figure.js';

// rows: names. columns: [{code(row), name, short}]. isOn(code), onToggle(code). The element's `show()` follows `isOn`.
export function switchGrid({rows, columns, isOn, onToggle, label, test}) {
  const buttons = rows.map((rowName, r) => columns.map(({code, name}, c) => button('', () => {
    reachable(r * columns.length + c);
    onToggle(code(r));
  }, {kind: 'button.switch', 'data-code': code(r), 'aria-label': `${rowName}, ${name}`,
    title: `${rowName}, ${name}`})));
  const grid = h('div.switches', {role: 'group', 'aria-label': label, test}, h('span'),
    columns.map(({short}) => h('span.switch-head', {}, short)),
    rows.map((_, r) => [h('span.switch-row', {}, r), buttons[r]]));
  grid.style.gridTemplateColumns = `1.6rem repeat(${columns.length}, minmax(1.15rem, 2rem))`;
  const reachable = roving(grid, () => buttons.flat(), {columns: columns.length});
  reachable(0);
  return Object.assign(grid, {show() {
    for (const each of buttons.flat()) each.setAttribute('aria-pressed', String(isOn(each.dataset.code)));
  }});
}
