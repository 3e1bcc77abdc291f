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

/** The controls for which positions are shown: `size` at once, from `from()`; `token()` is the chosen one, if any. */
export function pager({tokens, size, from, token = from}) {
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

/**
 * One of the two grids: the last layer at the top, as the stream is drawn, positions as columns. given: what differs for `matrix`;
 * paint(now): its settings for an answer. now: {found, start, at(r, c)}, at: the cell's place in the arrays, whose row 0 is the embedding.
 */
function depthGrid({signal, pieces, given, lines, paint}) {
  let now = null;
  const depthOf = r => now.found.norm.shape[0] - 1 - r;
  const grid = matrix({
    signal, rows: 1, cols: 1, value: () => 0, cell: 90, rowLabels: [''], ...given,
    describe: (r, c) => (now ? [`${depthName(depthOf(r))}, behind ${pieces[now.start + c]} at ${now.start + c}`, ...lines(now, r, c)] : []),
    // Which positions are shown stays as it is.
    onPick: (r, c) => state.set({depth: depthOf(r), token: now.start + c, from: now.start}),
  });
  const repaint = () => {
    if (!now) return;
    const [rows, cols] = now.found.norm.shape;
    const rowLabels = Array.from({length: rows}, (_, r) => depthName(depthOf(r)));
    grid.show({rows, cols, rowLabels, colLabels: pieces.slice(now.start, now.start + cols), ...paint(now)});
  };
  return {grid, repaint, show({found, start}) {
    now = {found, start, at: (r, c) => (found.norm.shape[0] - 1 - r) * found.norm.shape[1] + c};
    repaint();
  }, mark(depth, token) {
    if (!now) return;
    const [rows, cols] = now.found.norm.shape, col = token - now.start;
    grid.show({picked: col >= 0 && col < cols ? {row: rows - 1 - depth, col} : null});
  }, rows: make => Array.from(now.found.norm, (_, i) => {
    const n = now.found.norm.shape[1], position = now.start + i % n;
    return [depthName(Math.floor(i / n)), position, pieces[position], ...make(now.found, i)];
  })};
}

/** The card of the logit lens; `show({found, start})` takes an answer of /api/lens from the position `start` on. */
export function lensCard({signal, ids, pieces, names, controls}) {
  const element = card('Logit lens', 'What the model would say next if it stopped at that depth: last norm and output head applied to the residual '
    + 'stream (nostalgebraist, 2020). Read from the embedding, at the bottom, upwards. Columns: the token read; cells: the likeliest next one, '
    + 'the stronger its colour, the surer.');
  element.classList.add('wide');
  const top = ({found, at}, r, c, j = 0) => found.top_ids[at(r, c) * found.top_ids.shape[2] + j];
  const p = ({found, at}, r, c, j = 0) => found.top_p[at(r, c) * found.top_p.shape[2] + j];

  function lines(now, r, c) {
    const {found, at, start} = now, rank = found.next_rank[at(r, c)];
    return [
      ...Array.from({length: found.top_ids.shape[2]}, (_, j) => `${j + 1}. ${names[top(now, r, c, j)]}  ${percent(p(now, r, c, j))}`),
      ...rank < 0 ? [] : [`the next, ${pieces[start + c + 1]}: rank ${rank + 1}, ${percent(found.next_p[at(r, c)])}`],
      `entropy ${found.entropy[at(r, c)].toFixed(2)} bits`,
    ];
  }

  function underline(now, paint, {x, y, cell, cellY}) {
    const [rows, cols] = now.found.norm.shape;
    for (let r = 0; r < rows; r++) {
      for (let c = 0; c < cols; c++) {
        const isRight = top(now, r, c) === ids[now.start + c + 1];
        if (isRight) paint.rect(x + c * cell + 2, y + (r + 1) * cellY - 3, cell - 4, 2, css('warm'));
      }
    }
  }

  const {grid, rows, ...rest} = depthGrid({
    signal, pieces, lines, given: {label: 'The likeliest next token by depth and position', range: [0, 1], cellY: 22},
    paint: now => ({words: (r, c) => names[top(now, r, c)], value: (r, c) => p(now, r, c), overlay: (paint, place) => underline(now, paint, place)}),
  });
  grid.dataset.test = 'lens-grid';
  element.body.append(controls, grid,
    h('p.about', {}, ramp('sizes', 'probability 0', 1, signal), '. Underlined: it is the token that does come next.'));
  exportable(element, {name: 'logit-lens', canvas: grid, rows: () => [
    ['depth', 'position', 'token', 'likeliest next', 'probability of the likeliest', 'rank of the next', 'probability of the next', 'entropy in bits'],
    ...rows(({top_ids: topIds, top_p: topP, next_rank: rank, next_p: nextP, entropy}, i) => {
      const first = i * topIds.shape[2];
      return [names[topIds[first]], topP[first], ...rank[i] < 0 ? ['', ''] : [rank[i] + 1, nextP[i]], entropy[i]];
    })]});
  return {element, ...rest};
}

/** The card of the residual stream's length, shown likewise. */
export function streamCard({signal, pieces}) {
  const element = card('Residual stream', 'Length of the residual stream’s vector, ‖x‖, by depth and position: every block adds to it.');
  element.classList.add('wide');
  const isLog = () => state.text('log') === '1', ends = h('p.about');
  const {grid, rows, ...rest} = depthGrid({
    signal, pieces, lines: ({found, at}, r, c) => [`length ${precise(found.norm[at(r, c)])}`],
    given: {label: 'Length of the residual stream by depth and position', cellY: 18},
    paint({found: {norm}, at}) {
      const least = Math.min(...norm), most = Math.max(...norm);
      ends.replaceChildren(...ramp('sizes', isLog() ? precise(least) : 0, precise(most), signal));
      if (!isLog()) return {range: [0, most], value: (r, c) => norm[at(r, c)]};
      return {range: [Math.log(least), Math.log(most)], value: (r, c) => Math.log(norm[at(r, c)])};
    },
  });
  grid.dataset.test = 'stream-grid';
  element.tools.append(checkbox({label: 'logarithmic', title: 'Colour by the logarithm of the length', checked: isLog(),
    onInput: on => state.set({log: on ? 1 : null})}));
  element.body.append(grid, ends);
  exportable(element, {name: 'residual-stream', canvas: grid, rows: () =>
    [['depth', 'position', 'token', 'length'], ...rows(({norm}, i) => [norm[i]])]});
  state.on(['log'], rest.repaint, signal);
  return {element, ...rest};
}
