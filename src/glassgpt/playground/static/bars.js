// Bars side by side, in one lane or several over the same things, with a tooltip and a bar that the arrow keys move.

import {css, named} from './colors.js';
import {figure} from './paint.js';
import {pickable, stepped} from './picking.js';
import {short} from './ui.js';

// Pixels for the values at the left, and between two lanes.
const AXIS = 46, BETWEEN = 32;

/** Colours by sign, those of a matrix of signs: blue below 0, orange above. */
export const signed = values => i => named(values[i] < 0 ? 0 : 1);

/**
 * lanes: [{title, values, color(i), range}], each as long as the others; without a range from the least value or 0 to the largest or 0.
 * labels: of the bars, written where there is room. hidden(i): no value at all, drawn as ground. describe(i): lines of a tooltip.
 * onPick(i), picked: the chosen bar. height: of a lane in pixels. Returns the canvas; its `show(changes)` repaints with other settings.
 */
export function bars(given) {
  let b = {labels: null, hidden: null, describe: null, onPick: null, picked: null, height: 90, ...given};
  let step = 1;
  const count = () => b.lanes[0].values.length;
  const bottomOf = () => b.lanes.length * (b.height + BETWEEN) - BETWEEN + 20;
  const labelSize = () => Math.min(12, step);
  const labelRoom = () => Math.min(110, 0.62 * labelSize() * Math.max(...b.labels.map(label => [...label].length)));
  const foot = () => (b.labels && step >= 9 ? 12 + labelRoom() : 6);

  function paint(p, width) {
    step = (width - AXIS) / count();
    b.lanes.forEach((lane, n) => paintLane(p, lane, n * (b.height + BETWEEN), width));
    const bottom = bottomOf();
    if (foot() > 6) {
      for (let i = 0; i < count(); i++) {
        p.text(AXIS + (i + 0.5) * step, bottom + 5, b.labels[i], {turn: -90, align: 'end', size: labelSize(), mono: true, most: labelRoom() + 1,
          fill: css(i === b.picked ? 'accent' : 'soft'), bold: i === b.picked});
      }
    }
    if (b.picked !== null) p.frame(AXIS + b.picked * step, 20, Math.max(2, step), bottom - 20, css('warm'), 1.5);
  }

  function paintLane(p, {title, values, color = () => named(0), range}, top, width) {
    const [low, high] = range ?? [Math.min(0, ...values), Math.max(0, ...values)];
    const y = value => top + 20 + b.height * (1 - (value - low) / (high - low || 1));
    p.text(AXIS, top + 10, title, {fill: css('soft'), size: 12, most: width - AXIS});
    const [gap, ground] = [step > 5 ? 1 : 0, css('ground')];
    for (let i = 0; i < values.length; i++) {
      const x = AXIS + i * step;
      if (b.hidden?.(i)) p.rect(x, top + 20, step, b.height, ground);
      else p.rect(x, Math.min(y(values[i]), y(0)), Math.max(0.5, step - gap), Math.abs(y(values[i]) - y(0)), color(i));
    }
    p.line(AXIS, y(0), width, y(0), css('line'));
    for (const value of [low, 0, high]) {
      const isCrowded = value !== 0 && Math.abs(y(value) - y(0)) < 12;
      if (!isCrowded) p.text(AXIS - 5, y(value), short(value), {align: 'end', size: 11, fill: css('soft')});
    }
  }

  const canvas = figure({label: b.label, signal: b.signal, paint, size(width) {
    step = (width - AXIS) / count();
    return bottomOf() + foot();
  }});

  function under(event) {
    const i = Math.floor((event.clientX - canvas.getBoundingClientRect().left - AXIS) / step);
    return i >= 0 && i < count() ? i : null;
  }

  pickable(canvas, {
    under,
    lines: i => b.describe?.(i) ?? null,
    onPick: b.onPick && (i => {
      canvas.show({picked: i});
      b.onPick(i);
    }),
    moved: key => (key === 'ArrowUp' || key === 'ArrowDown' ? undefined : stepped(key, [0, b.picked ?? 0], 1, count())?.[1]),
    signal: b.signal,
  });

  return Object.assign(canvas, {
    show(changes) {
      b = {...b, ...changes};
      canvas.figure.redraw();
      return canvas;
    },
  });
}
