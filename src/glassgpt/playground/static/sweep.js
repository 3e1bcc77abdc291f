// The same question asked for many parts of a model, one after the other, shown as a matrix that fills.

import {matrix} from './matrix.js';
import {announce, h, notice, short} from './ui.js';

/**
 * rows, cols: names. ask(row, col, signal): the numbers of a cell, {name: number}. views: [{name, text, kind}], of which one is shown.
 * The element's `clear()` forgets them; `figure` and `rows()` are for exports.
 *
 * describe(row, col): words for its place. action: [text, run(row, col)], what a button does with the chosen cell. begin(): what must
 * be known first.
 */
export function sweep({name, button: what, rows, cols, ask, views, begin = null, describe, action, signal, height = 20}) {
  const values = Object.fromEntries(views.map(view => [view.name, new Float64Array(rows.length * cols.length).fill(NaN)]));
  const told = h('span.soft', {role: 'status'});
  const problem = h('div');
  let view = views[0];
  let running = null;
  const start = h('button', {type: 'button', onclick: run, 'data-test': `${name}-start`}, what);
  const stop = h('button', {type: 'button', onclick: () => running?.abort(), disabled: true}, 'Stop');
  const select = views.length > 1 && h('span.segmented', {role: 'group', 'aria-label': 'What is shown'}, views.map(one =>
    h('button', {type: 'button', 'aria-pressed': String(one === view), onclick() {
      view = one;
      for (const other of this.parentNode.children) other.setAttribute('aria-pressed', String(other === this));
      picture.show({values: values[view.name], kind: view.kind});
    }}, one.text)));
  const picture = matrix({rows: rows.length, cols: cols.length, values: values[view.name], kind: view.kind, rowLabels: rows,
    colLabels: cols, cell: 34, cellY: height, signal, label: what, describe: lines,
    onPick: choose});
  picture.dataset.test = name;
  const chosen = h('p.row');
  const place = h('div', {hidden: true}, picture, chosen);
  signal.addEventListener('abort', () => running?.abort());

  function lines(r, c) {
    const found = key => values[key][r * cols.length + c];
    const worded = key => (Number.isNaN(found(key)) ? 'not measured' : short(found(key)));
    return [describe(r, c), ...views.map(one => `${one.text}: ${worded(one.name)}`)];
  }

  function choose(r, c) {
    const [text, act] = action;
    chosen.replaceChildren(h('span', {}, lines(r, c).join(' · ')), h('button', {type: 'button', onclick: () => act(r, c)}, text));
  }

  /** What was measured is no longer of what is looked at. */
  function clear() {
    running?.abort();
    for (const array of Object.values(values)) array.fill(NaN);
    place.hidden = stop.disabled = true;
    told.textContent = '';
    chosen.replaceChildren();
    problem.replaceChildren();
  }

  async function run() {
    clear();
    const mine = running = new AbortController();
    place.hidden = false;
    stop.disabled = false;
    try {
      await begin?.(mine.signal);
      await each(mine.signal);
      announce(`${what}: done`);
    } catch (error) {
      if (!mine.signal.aborted) problem.replaceChildren(notice(error.message, 'error'));
    }
    if (running === mine) stop.disabled = true;
  }

  async function each(stopped) {
    const total = rows.length * cols.length;
    for (let i = 0; i < total; i++) {
      const found = await ask(Math.floor(i / cols.length), i % cols.length, stopped);
      stopped.throwIfAborted();
      for (const [key, value] of Object.entries(found)) values[key][i] = value;
      told.textContent = `${i + 1} of ${total}`;
      if (i % 8 === 7 || i === total - 1) picture.show({});
    }
  }

  return Object.assign(h('div', {}, h('div.row', {}, start, stop, select, told), problem, place), {
    figure: picture.figure, rows: picture.rows, clear,
  });
}
