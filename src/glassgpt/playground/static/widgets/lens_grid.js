// The logit lens, and the norm of the residual stream, over depth and position.
import {bound, button, card, checkbox, count, css, h, percent, precise, ramp, segmented, slider,
  state} from '../core/index.js';
import {matrix} from './matrix.js';

const MAX_POSITIONS = 40, MIN_POSITIONS = 5, LABELS = 92;

// How many positions are shown at once: as many as have room for their tokens.
export function windowSize(width, pieces) {
  const lengths = pieces.map(piece => [...piece].length).sort((a, b) => a - b);
  const cell = 14 + 7.5 * Math.min(7, lengths[Math.floor(0.9 * (lengths.length - 1))]);
  return Math.min(pieces.length, MAX_POSITIONS, Math.max(MIN_POSITIONS, Math.floor((width - LABELS - 36) / cell)));
}

// The name of a depth: 0 is the embedding, d the residual stream after layer d - 1.
export const depthName = depth => (depth === 0 ? 'embedding' : `layer ${depth - 1}`);

// Controls for which `size` positions are shown. from(): the first of them; position(): the selected one.
export function pager({tokens, size, from, position = from}) {
  if (size >= tokens) return Object.assign(h('span'), {show() {}});
  const last = tokens - size, go = start => state.set({from: Math.min(last, Math.max(0, start))});
  const range = slider({label: 'Positions from', min: 0, max: last, value: from(), onInput: go});
  const before = button('‹ earlier', () => go(from() - size), {title: 'Earlier positions'});
  const after = button('later ›', () => go(from() + size), {title: 'Later positions'});
  const back = button('to the selected one', () => state.set({from: null}), {kind: 'button.small'});
  const total = h('span.soft', {}, `of ${count(tokens)}`);
  return Object.assign(h('div.row', {}, before, range, after, total, back), {show() {
    back.hidden = position() >= from() && position() < from() + size;
    range.set(from());
    before.disabled = from() === 0;
    after.disabled = from() === last;
  }});
}

// A grid of depths (the last layer at the top) by positions. `show(data)` takes {pieces, depths, start, stride, from,
// size}: arrays of the data are (depths, stride) from position `start`; shown are `size` positions from `from`.
// lines(data, i): of the tooltip of entry i; paint(data, index): settings of `matrix`; index(r, c) is a cell's entry.
function depthGrid({lines, paint, ...settings}) {
  let data = null;
  const depthOf = r => data.depths - 1 - r;
  const index = (r, c) => depthOf(r) * data.stride + data.from - data.start + c;
  const grid = matrix({
    rows: 1, cols: 1, value: () => 0, cell: 90, rowLabels: [''], ...settings, describe(r, c) {
      if (!data) return [];
      const position = data.from + c;
      return [`${depthName(depthOf(r))}, after ${data.pieces[position]} at ${position}`,
        ...lines(data, index(r, c), position)];
    },
    onSelect: (r, c) => state.set({depth: depthOf(r), position: data.from + c, from: data.from}),
  });
  const repaint = () => data && grid.show({
    rows: data.depths, cols: data.size, rowLabels: Array.from({length: data.depths}, (_, r) => depthName(depthOf(r))),
    colLabels: data.pieces.slice(data.from, data.from + data.size), ...paint(data, index),
  });
  return {
    grid, repaint, show(now) {
      data = now;
      repaint();
    },
    select(depth, position) {
      if (!data) return;
      const col = position - data.from;
      grid.show({selected: col >= 0 && col < data.size ? {row: data.depths - 1 - depth, col} : null});
    },
    // Rows of a CSV, one per entry.
    rows: cells => Array.from({length: data.depths * data.stride}, (_, i) => {
      const position = data.start + i % data.stride;
      return [data.step ?? '', depthName(Math.floor(i / data.stride)), position, data.pieces[position],
        ...cells(data, i)];
    }),
  };
}

const MODES = [['', 'top prediction'], ['rank', 'rank of the actual next token']];

// The card of the logit lens. names(): the vocabulary's display forms, or null if unknown. vocabSize(). Its
// `show(data)` takes what `depthGrid` takes, and {ids, topIds, topP, k, nextRank, nextP, entropy}; the last two can be
// missing.
export function lensCard({names, vocabSize, controls, name, test, signal}) {
  const isRank = () => state.text('lens') === 'rank';
  const nameOf = id => names()?.[id] ?? String(id);
  const rankText = rank => (rank < 0 ? '' : String(rank + 1));
  // By logarithm: from rank 10 to 1 is as much as from 100 to 10.
  const rankShare = rank => (rank < 0 ? NaN : 1 - Math.log(rank + 1) / Math.log(vocabSize()));
  function lines({pieces, topIds, topP, k, nextRank, nextP, entropy}, i, position) {
    const top = Array.from({length: k},
      (_, j) => `${j + 1}. ${nameOf(topIds[i * k + j])}  ${percent(topP[i * k + j])}`);
    const next = `next token ${pieces[position + 1]}: rank ${nextRank[i] + 1}${nextP ? `, ${percent(nextP[i])}` : ''}`;
    return [...top, ...nextRank[i] < 0 ? [] : [next], ...entropy ? [`entropy ${entropy[i].toFixed(2)} bits`] : []];
  }
  function underline({ids, depths, size, from, topIds, k}, index, p, {x, y, cell, cellY}) {
    for (let r = 0; r < depths; r++) {
      for (let c = 0; c < size; c++) {
        const isRight = topIds[index(r, c) * k] === ids[from + c + 1];
        if (isRight) p.rect(x + c * cell + 2, y + (r + 1) * cellY - 3, cell - 4, 2, css('warm'));
      }
    }
  }
  const scale = h('p.about');
  const {grid, rows, ...rest} = depthGrid({
    label: 'Logit lens by depth and position', range: [0, 1], cellY: 22, lines, test, signal, paint(data, index) {
      const {topIds, topP, nextRank, k} = data;
      scale.replaceChildren(...isRank() ? ramp('magnitude', `rank ${count(vocabSize())}`, '1, logarithmic', signal)
        : ramp('magnitude', 'probability 0', 1, signal), '. Underlined: the top prediction is the actual next token.');
      return {
        words: (r, c) => (isRank() ? rankText(nextRank[index(r, c)]) : nameOf(topIds[index(r, c) * k])),
        value: (r, c) => (isRank() ? rankShare(nextRank[index(r, c)]) : topP[index(r, c) * k]),
        overlay: (p, place) => underline(data, index, p, place),
      };
    },
  });
  const element = card('Logit lens', {
    wide: true,
    about: 'The prediction at each depth: final norm and output head applied to the residual stream (nostalgebraist, '
    + '2020).', save: {name, figure: grid, rows: () => [
      ['step', 'depth', 'position', 'token', 'top token', 'top probability', 'rank of the next token',
        'probability of the next token', 'entropy in bits'],
      ...rows(({topIds, topP, k, nextRank, nextP, entropy}, i) => [nameOf(topIds[i * k]), topP[i * k],
        rankText(nextRank[i]), nextRank[i] < 0 ? '' : nextP?.[i], entropy?.[i]])]},
  }, controls, grid, scale);
  element.tools.prepend(bound(segmented({label: 'Show', options: MODES, value: state.text('lens'),
    onInput: value => state.set({lens: value})}), 'lens', () => state.text('lens'), signal));
  state.on(['lens'], rest.repaint, signal);
  return {element, ...rest};
}

// The card of the residual stream's norm; its `show(data)` takes what `depthGrid` takes, and {norm}.
export function normCard({signal}) {
  const isLog = () => state.text('log') === '1', ends = h('p.about');
  const {grid, rows, ...rest} = depthGrid({
    label: 'Norm of the residual stream by depth and position', cellY: 18, test: 'stream-grid', signal,
    lines: ({norm}, i) => [`norm ${precise(norm[i])}`], paint({norm}, index) {
      const least = Math.min(...norm), most = Math.max(...norm), f = isLog() ? Math.log : x => x;
      ends.replaceChildren(...ramp('magnitude', isLog() ? precise(least) : 0, precise(most), signal));
      return {range: [isLog() ? Math.log(least) : 0, f(most)], value: (r, c) => f(norm[index(r, c)])};
    },
  });
  const element = card('Residual stream norm', {
    wide: true, about: 'The length ‖x‖ of the residual stream by depth and position. Every block adds to the stream.',
    save: {name: 'residual-stream', figure: grid, rows: () =>
      [['step', 'depth', 'position', 'token', 'norm'], ...rows(({norm}, i) => [norm[i]])]},
  }, grid, ends);
  element.tools.prepend(bound(checkbox({label: 'logarithmic', title: 'Color by the logarithm of the norm',
    checked: isLog(), onInput: on => state.set({log: on ? 1 : null})}), 'log', isLog, signal));
  state.on(['log'], rest.repaint, signal);
  return {element, ...rest};
}
