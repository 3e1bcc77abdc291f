// Many points on a plane, moved and zoomed by wheel and drag, by two fingers, and by keys.
import {css, tip} from '../core/index.js';
import {figure, pointIn} from './figure.js';

const NEAR = 14;  // pixels within which a point is hit
const MAX_LABELS = 40, CLICK_PIXELS = 5;

// describe(i): the lines of a point's tooltip; name(i): its label; onSelect(i). The element's `show(changes)` takes x,
// y, groups (a number per point), color(group), isPath (whether lines connect the points), marked (points to label),
// and selected (a point or null). New x and y show all points; a selected point out of sight moves to the middle.
export function pointMap({title, describe, name, onSelect, test, signal}) {
  let m = {x: [], y: [], groups: [], color: () => css('accent'), isPath: false, marked: [], selected: null};
  let order = [];  // by group, so that the color changes rarely
  let view = {x: 0, y: 0, scale: 1}, home = null;  // the point in the middle, and pixels per unit
  let size = {width: 1, height: 1}, isWaiting = false;
  const toX = x => size.width / 2 + (x - view.x) * view.scale, toY = y => size.height / 2 - (y - view.y) * view.scale;
  const isInside = (x, y) => x > -4 && x < size.width + 4 && y > -4 && y < size.height + 4;
  const isInSight = i => isInside(toX(m.x[i]), toY(m.y[i]));
  const canvas = figure({label: `${title}. Arrow keys move, + and − zoom, 0 shows all.`, test, signal, paint,
    size: width => Math.round(Math.min(560, Math.max(300, 0.72 * width)))});
  canvas.classList.add('map');
  canvas.tabIndex = 0;
  function paint(p, width, height) {
    size = {width, height};
    if (!home) fit();
    p.rect(0, 0, width, height, css('card'));
    p.line(0, toY(0), width, toY(0), css('line'));
    p.line(toX(0), 0, toX(0), height, css('line'));
    const dot = Math.min(6, Math.max(1.5, 60 / Math.sqrt(m.x.length + 1) * Math.sqrt(view.scale / home.scale)));
    let group = null, fill = '';
    for (const i of order) {
      const x = toX(m.x[i]), y = toY(m.y[i]);
      if (!isInside(x, y)) continue;
      if (m.groups[i] !== group) fill = m.color(group = m.groups[i]);
      if (m.isPath && i) p.line(toX(m.x[i - 1]), toY(m.y[i - 1]), x, y, fill, 1.5);
      p.rect(x - dot / 2, y - dot / 2, dot, dot, fill);
    }
    paintLabels(p);
    p.frame(0.5, 0.5, width - 1, height - 1, css('line'));
  }
  // Mark points, and write a name at each unless it would cover another.
  function paintLabels(p) {
    const boxes = [], marked = m.marked.filter(isInSight);
    const label = (i, fill, bold) => {
      const text = name(i), box = {x: toX(m.x[i]) + 6, y: toY(m.y[i]) - 7, width: 7 * text.length};
      const covers = other => Math.abs(other.y - box.y) < 12 && box.x < other.x + other.width && other.x < box.x
        + box.width;
      if (boxes.length >= MAX_LABELS || boxes.some(covers)) return;
      boxes.push(box);
      p.text(box.x, box.y, text, {size: 11, mono: true, fill, bold});
    };
    for (const i of marked) p.dot(toX(m.x[i]), toY(m.y[i]), 3.5, css('ink'));
    if (m.selected !== null) {
      p.dot(toX(m.x[m.selected]), toY(m.y[m.selected]), 4.5, css('warm'));
      label(m.selected, css('warm'), true);
    }
    for (const i of marked) label(i, css('ink'), false);
  }
  function fit() {
    const range = values => values.reduce(([low, high], x) => [Math.min(low, x), Math.max(high, x)],
      [Infinity, -Infinity]);
    const [left, right] = range(m.x), [bottom, top] = range(m.y);
    const scale = 0.92 * Math.min(size.width / (right - left || 1), size.height / (top - bottom || 1));
    home = view = {x: (left + right) / 2, y: (bottom + top) / 2, scale};
  }
  function redraw() {
    if (isWaiting) return;
    isWaiting = true;
    requestAnimationFrame(() => {
      isWaiting = false;
      if (!signal?.aborted) canvas.figure.redraw();
    });
  }
  // Zoom, with the point at (px, py) fixed.
  function zoom(factor, px = size.width / 2, py = size.height / 2) {
    const scale = Math.min(400, Math.max(0.3, factor * view.scale / home.scale)) * home.scale;
    const [dx, dy] = [px - size.width / 2, size.height / 2 - py], change = 1 / view.scale - 1 / scale;
    view = {x: view.x + dx * change, y: view.y + dy * change, scale};
    redraw();
  }
  function move(dx, dy) {
    view = {...view, x: view.x - dx / view.scale, y: view.y + dy / view.scale};
    redraw();
  }
  function showAll() {
    home = null;
    redraw();
  }
  function nearest(px, py) {
    let best = null, least = NEAR ** 2;
    for (let i = 0; i < m.x.length; i++) {
      const distance = (toX(m.x[i]) - px) ** 2 + (toY(m.y[i]) - py) ** 2;
      if (distance < least) [best, least] = [i, distance];
    }
    return best;
  }
  const pointers = new Map();  // by id: where a finger or the pressed mouse is
  let travelled = 0;
  function drag(id, before, now) {
    const other = [...pointers].find(([each]) => each !== id)?.[1];
    travelled += Math.hypot(now[0] - before[0], now[1] - before[1]);
    pointers.set(id, now);
    const share = other ? 0.5 : 1;
    if (other) {
      const apart = ([x, y]) => Math.hypot(x - other[0], y - other[1]) || 1;
      zoom(apart(now) / apart(before), (now[0] + other[0]) / 2, (now[1] + other[1]) / 2);
    }
    move(share * (now[0] - before[0]), share * (now[1] - before[1]));
  }
  const keys = {ArrowLeft: () => move(40, 0), ArrowRight: () => move(-40, 0), ArrowUp: () => move(0, 40),
    ArrowDown: () => move(0, -40), '+': () => zoom(1.4), '=': () => zoom(1.4), '-': () => zoom(1 / 1.4), 0: showAll};
  const handlers = {
    wheel(event) {
      event.preventDefault();
      zoom(Math.exp(-event.deltaY / (event.deltaMode ? 15 : 400)), ...pointIn(canvas, event));
    },
    pointerdown(event) {
      canvas.setPointerCapture(event.pointerId);
      pointers.set(event.pointerId, pointIn(canvas, event));
      if (pointers.size === 1) travelled = 0;
      tip(null);
    },
    pointermove(event) {
      const now = pointIn(canvas, event), before = pointers.get(event.pointerId);
      if (before) return drag(event.pointerId, before, now);
      const over = nearest(...now);
      canvas.style.cursor = over === null ? 'grab' : 'pointer';
      tip(over === null ? null : describe(over), event.clientX, event.clientY);
    },
    pointerup(event) {
      const over = pointers.size === 1 && travelled < CLICK_PIXELS ? nearest(...pointIn(canvas, event)) : null;
      pointers.delete(event.pointerId);
      if (over !== null) onSelect(over);
    },
    pointercancel: event => pointers.delete(event.pointerId), pointerleave: () => tip(null), keydown(event) {
      if (!keys[event.key]) return;
      event.preventDefault();
      keys[event.key]();
    },
  };
  for (const [type, handler] of Object.entries(handlers)) canvas.addEventListener(type, handler, {passive: false});
  signal?.addEventListener('abort', () => tip(null));
  return Object.assign(canvas, {showAll, show(changes) {
    m = {...m, ...changes};
    if (changes.x) home = null;
    else if ('selected' in changes && home && m.selected !== null && !isInSight(m.selected)) {
      view = {...view, x: m.x[m.selected], y: m.y[m.selected]};
    }
    if (changes.groups || changes.x) {
      order = Uint32Array.from(m.x, (_, i) => i).sort((a, b) => m.groups[a] - m.groups[b] || a - b);
    }
    redraw();
  }});
}
