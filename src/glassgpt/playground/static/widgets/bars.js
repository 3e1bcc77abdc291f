// Vertical bars, in one lane or several over the same categories, with a tooltip and a bar that the arrow keys move.
import {category, css, short} from '../core/index.js';
import {figure, selectable} from './figure.js';

const AXIS = 46, GAP = 32, HEAD = 20;  // pixels for the values at the left, between lanes, and for a lane's title

// lanes: [{title, values, color(i), range}], all of one length; the default range includes 0. labels: of the bars,
// shown if there is room. hidden(i): no value, shown as background. describe(i): the lines of a tooltip. onSelect(i),
// selected. height: of a lane in pixels. The canvas' `show(changes)` repaints with other settings.
export function bars(settings) {
  let b = {labels: null, selected: null, height: 90, ...settings};
  let step = 1;
  const count = () => b.lanes[0].values.length;
  const bottom = () => b.lanes.length * (b.height + GAP) - GAP + HEAD;
  const labelRoom = () => (!b.labels || step < 9 ? 0
    : Math.min(110, 0.62 * Math.min(12, step) * Math.max(...b.labels.map(label => [...label].length))));
  function paint(p, width) {
    step = (width - AXIS) / count();
    b.lanes.forEach((lane, n) => paintLane(p, lane, n * (b.height + GAP), width));
    const room = labelRoom();
    for (let i = 0; room && i < count(); i++) {
      p.text(AXIS + (i + 0.5) * step, bottom() + 5, b.labels[i], {turn: -90, align: 'end', size: Math.min(12, step),
        mono: true, room: room + 1, fill: css(i === b.selected ? 'accent' : 'soft'), bold: i === b.selected});
    }
    if (b.selected !== null) {
      p.frame(AXIS + b.selected * step, HEAD, Math.max(2, step), bottom() - HEAD, css('warm'), 1.5);
    }
  }
  function paintLane(p, {title, values, color = () => category(0), range}, top, width) {
    const [low, high] = range ?? [Math.min(0, ...values), Math.max(0, ...values)];
    const y = value => top + HEAD + b.height * (1 - (value - low) / (high - low || 1));
    p.text(AXIS, top + 10, title, {fill: css('soft'), room: width - AXIS});
    const gap = step > 5 ? 1 : 0, ground = css('ground');
    for (let i = 0; i < values.length; i++) {
      const x = AXIS + i * step, top0 = Math.min(y(values[i]), y(0));
      if (b.hidden?.(i)) p.rect(x, top + HEAD, step, b.height, ground);
      else p.rect(x, top0, Math.max(0.5, step - gap), Math.abs(y(values[i]) - y(0)), color(i));
    }
    p.line(AXIS, y(0), width, y(0), css('line'));
    for (const value of [low, 0, high]) {
      const isCrowded = value !== 0 && Math.abs(y(value) - y(0)) < 12;
      if (!isCrowded) p.text(AXIS - 5, y(value), short(value), {align: 'end', size: 11, fill: css('soft')});
    }
  }
  const canvas = figure({label: b.label, test: b.test, signal: b.signal, paint, size(width) {
    step = (width - AXIS) / count();
    return bottom() + (labelRoom() ? labelRoom() + 12 : 6);
  }});
  selectable(canvas, {
    signal: b.signal, grid: () => ({rows: 1, cols: count(), selected: [0, b.selected ?? 0]}),
    cellAt: x => [0, (x - AXIS) / step], lines: (_, i) => b.describe?.(i), onSelect: b.onSelect && ((_, i) => {
      canvas.show({selected: i});
      b.onSelect(i);
    }),
  });
  return Object.assign(canvas, {show(changes) {
    b = {...b, ...changes};
    canvas.figure.redraw();
  }});
}
