// The same request for many parts of a model, one after the other, shown as a matrix that fills.
import {announce, attempt, button, h, segmented, short} from '../core/index.js';
import {matrix} from './matrix.js';

// rows, cols: labels. measures: [name, text, scale], of which one is shown. measure(row, col, signal): {name:
// number}. prepare(signal): runs first. describe(row, col): the words for a cell. action: [text, run(row, col)], a
// button for the selected cell. The element's `clear()` discards the results; `figure` and `rows()` are for exports.
export function sweep({test, title, rows, cols, measure, measures, prepare, describe, action, signal, height = 22}) {
  const size = rows.length * cols.length;
  const values = Object.fromEntries(measures.map(([name]) => [name, new Float64Array(size).fill(NaN)]));
  const progress = h('span.soft', {role: 'status'}), problem = h('div'), selected = h('p.row');
  let running = null;
  const start = button(title, run, {test: `${test}-start`});
  const stop = button('Stop', () => running?.abort(), {disabled: true});
  const select = segmented({label: 'Measure', value: measures[0][0],
    options: measures,
    onInput: name => picture.show({values: values[name], scale: measures.find(each => each[0] === name)[2]})});
  const picture = matrix({rows: rows.length, cols: cols.length, values: values[measures[0][0]],
    scale: measures[0][2],
    rowLabels: rows, colLabels: cols, cell: 34, cellY: height, signal, label: title, test, describe: lines,
    onSelect: (r, c) => selected.replaceChildren(
      h('span', {}, lines(r, c).join(' · ')), button(action[0], () => action[1](r, c)))});
  const results = h('div', {hidden: true}, picture, selected);
  signal.addEventListener('abort', () => running?.abort());
  function lines(r, c) {
    const value = name => values[name][r * cols.length + c];
    return [describe(r, c),
      ...measures.map(([name, text]) => `${text}: ${Number.isNaN(value(name)) ? 'not measured' : short(value(name))}`)];
  }
  function clear() {
    running?.abort();
    for (const array of Object.values(values)) array.fill(NaN);
    results.hidden = stop.disabled = true;
    progress.textContent = '';
    selected.replaceChildren();
    problem.replaceChildren();
  }
  async function run() {
    clear();
    const mine = running = new AbortController();
    results.hidden = stop.disabled = false;
    const isDone = await attempt(problem, mine.signal, async () => {
      await prepare?.(mine.signal);
      for (let i = 0; i < size; i++) {
        const result = await measure(Math.floor(i / cols.length), i % cols.length, mine.signal);
        mine.signal.throwIfAborted();
        for (const [name, value] of Object.entries(result)) values[name][i] = value;
        progress.textContent = `${i + 1} of ${size}`;
        if (i % 8 === 7 || i === size - 1) picture.show({});
      }
    });
    if (isDone) announce(`${title}: done`);
    if (running === mine) stop.disabled = true;
  }
  return Object.assign(h('div', {}, h('div.row', {}, start, stop, select, progress), problem, results),
    {figure: picture.figure, rows: picture.rows, clear});
}
