// The logit lens over depth and position, and the residual stream's length there.

import {css} from './colors.js';
import {exportable} from './export.js';
import {matrix} from './matrix.js';
import * as state from './state.js';
import {card, checkbox, h, percent, precise, ramp, slider} from './ui.js';

const MOST_POSITIONS = 40, LEAST_POSITIONS = 5, LABELS = 92;

/** How many positions are shown at once: as many as have room for their tokens. */
export function windowSize(width, pieces) {
  const lengths = pieces.map(piece => [...piece].length).sort((a, b) => a - b);
  const characters = Math.min(7, lengths[Math.floor(0.9 * (lengths.length - 1))]);
  const cell = 14 + 7.5 * characters;
  return Math.min(pieces.length, MOST_POSITIONS, Math.max(LEAST_POSITIONS, Math.floor((width - LABELS - 36) / cell)));
}

/** Name of a depth: row 0 of the lens is the embedding, row d the stream behind block d − 1. */
export const depthName = depth => (depth === 0 ? 'embedding' : `layer ${depth - 1}`);

/** The controls for which positions are shown: `size` at once, from `from()`; `token()` is the chosen one. */
export function pager({tokens, size, from, token}) {
  if (size >= tokens) return Object.assign(h('span'), {show() {}});
  const last = tokens - size;
  const go = start => state.set({from: Math.min(last, Math.max(0, start))});
  const range = slider({label: 'Positions from', min: 0, max: last, step: 1, value: from(), onInput: go});
  const before = h('button', {type: 'button', onclick: () => go(from() - size), title: 'Earlier positions'}, '‹ earlier');
  const after = h('button', {type: 'button', onclick: () => go(from() + size), title: 'Later positions'}, 'later ›');
  const back = h('button.small', {type: 'button', onclick: () => state.set({from: null})}, 'to the chosen one');
  return Object.assign(h('div.row', {}, before, range, after, h('span.soft', {}, `of ${tokens.toLocaleString('en')}`), back), {show() {
    back.hidden = token() >= from() && token() < from() + size;
    range.set(from());
    before.disabled = from() === 0;
    after.disabled = from() === last;
  }});
}

/** Settings that both grids share: the last layer at the top, as the stream is drawn, positions as columns. */
const frameOf = ({found, start, pieces}) => {
  const [rows, cols] = found.norm.shape;
  return {rows, cols, rowLabels: Array.from({length: rows}, (_, r) => depthName(rows - 1 - r)), colLabels: pieces.slice(start, start + cols)};
};

export function lensCard({signal, info, ids, pieces, names, controls}) {
  const element = card('Logit lens', 'What the model would say next if it stopped at that depth: last norm and output head applied to the residual stream '
    + '(nostalgebraist, 2020). Read from the embedding, at the bottom, upwards. Columns: the token read; cells: the likeliest next one, darker the surer.');
  element.classList.add('wide');
  let now = null;
  const at = (r, c) => (now.found.norm.shape[0] - 1 - r) * now.found.norm.shape[1] + c;  // of a cell, in the arrays whose row 0 is the embedding
  const top = (r, c, j = 0) => names[now.found.top_ids[at(r, c) * now.found.top_ids.shape[2] + j]];
  const isRight = (r, c) => now.found.top_ids[at(r, c) * now.found.top_ids.shape[2]] === ids[now.start + c + 1];
  const grid = matrix({
    label: 'The likeliest next token by depth and position', signal, rows: 1, cols: 1, value: () => 0, range: [0, 1], cell: 90, cellY: 22, rowLabels: [''],
    describe,
    overlay(p, {x, y, cell, cellY}) {
      for (let r = 0; now && r < now.found.norm.shape[0]; r++) {
        for (let c = 0; c < now.found.norm.shape[1]; c++) {
          if (isRight(r, c)) p.rect(x + c * cell + 2, y + (r + 1) * cellY - 3, cell - 4, 2, css('warm'));
        }
      }
    },
    onPick: (r, c) => state.set(chosen(now, r, c)),
  });
  grid.dataset.test = 'lens-grid';

  function describe(r, c) {
    if (!now) return [];
    const {found, start} = now, k = found.top_ids.shape[2], rank = found.next_rank[at(r, c)];
    return [`${depthName(found.norm.shape[0] - 1 - r)}, behind ${pieces[start + c]} at ${start + c}`,
      ...Array.from({length: k}, (_, j) => `${j + 1}. ${top(r, c, j)}  ${percent(found.top_p[at(r, c) * k + j])}`),
      ...rank < 0 ? [] : [`the next, ${pieces[start + c + 1]}: rank ${rank + 1}, ${percent(found.next_p[at(r, c)])}`],
      `entropy ${found.entropy[at(r, c)].toFixed(2)} bits`];
  }

  element.body.append(controls, grid, h('p.about', {}, ramp('sizes', 'probability 0', 1, signal), '. Underlined: it is the token that does come next.'));
  exportable(element, {name: 'logit-lens', canvas: grid, rows: () => [['depth', 'position', 'token', 'likeliest next', 'probability of the likeliest', 'rank of the actual next',
    'probability of the actual next', 'entropy in bits'],
    ...Array.from(now.found.norm, (_, i) => {
      const {found, start} = now, n = found.norm.shape[1], k = found.top_ids.shape[2], position = start + i % n, hasNext = found.next_rank[i] >= 0;
      return [depthName(Math.floor(i / n)), position, pieces[position], names[found.top_ids[i * k]], found.top_p[i * k],
        hasNext ? found.next_rank[i] + 1 : '', hasNext ? found.next_p[i] : '', found.entropy[i]];
    })]});
  return {element, show(given) {
    now = given;
    const {found} = now;
    grid.show({...frameOf({...now, pieces}), words: (r, c) => top(r, c), value: (r, c) => found.top_p[at(r, c) * found.top_p.shape[2]]});
  }, mark: (depth, token) => now && grid.show({picked: marked(now, depth, token)})};
}

/** What the address says of a cell; which positions are shown stays as it is. */
const chosen = ({found, start}, r, c) => ({depth: found.norm.shape[0] - 1 - r, token: start + c, from: start});

/** The picked cell, where the shown positions hold it. */
function marked({found, start}, depth, token) {
  const [rows, cols] = found.norm.shape;
  return token >= start && token < start + cols ? {row: rows - 1 - depth, col: token - start} : null;
}

export function streamCard({signal, pieces}) {
  const element = card('Residual stream', 'Length of the residual stream’s vector, ‖x‖, by depth and position: every block adds to it.');
  element.classList.add('wide');
  let now = null;
  const isLog = () => state.text('log') === '1';
  const at = (r, c) => now.found.norm[(now.found.norm.shape[0] - 1 - r) * now.found.norm.shape[1] + c];
  const grid = matrix({
    label: 'Length of the residual stream by depth and position', signal, rows: 1, cols: 1, value: () => 0, cell: 90, cellY: 18, rowLabels: [''],
    describe: (r, c) => (now ? [`${depthName(now.found.norm.shape[0] - 1 - r)}, ${pieces[now.start + c]} at ${now.start + c}`, `length ${precise(at(r, c))}`] : []),
    onPick: (r, c) => state.set(chosen(now, r, c)),
  });
  grid.dataset.test = 'stream-grid';
  const ends = h('p.about');
  element.tools.append(checkbox({label: 'logarithmic', title: 'Colour by the logarithm of the length', checked: isLog(), onInput: on => state.set({log: on ? 1 : null})}));
  element.body.append(grid, ends);
  exportable(element, {name: 'residual-stream', canvas: grid, rows: () => [['depth', 'position', 'token', 'length'],
    ...Array.from(now.found.norm, (length, i) => {
      const n = now.found.norm.shape[1], position = now.start + i % n;
      return [depthName(Math.floor(i / n)), position, pieces[position], length];
    })]});

  function tint() {
    if (!now) return;
    const [least, most] = now.found.norm.reduce(([low, high], x) => [Math.min(low, x), Math.max(high, x)], [Infinity, 0]);
    const range = isLog() ? [Math.log(least), Math.log(most)] : [0, most];
    grid.show({...frameOf({...now, pieces}), range, value: (r, c) => (isLog() ? Math.log(at(r, c)) : at(r, c))});
    ends.replaceChildren(...ramp('sizes', isLog() ? precise(least) : 0, precise(most), signal));
  }

  state.on(['log'], tint, signal);
  return {element, show(given) {
    now = given;
    tint();
  }, mark: (depth, token) => now && grid.show({picked: marked(now, depth, token)})};
}
