// Many points on a plane, moved and zoomed: by wheel and drag, by two fingers, and by keys.

import {css} from './colors.js';
import {figure} from './paint.js';
import {tip} from './ui.js';

const NEAR = 14;  // pixels within which a point is meant
const MOST_LABELS = 40;

/**
 * describe(i): lines of a point's tooltip; name(i): its label; onPick(i): it was chosen.
 *
 * The element's `show(changes)` takes: x and y (arrays of coordinates), groups (a number for each point), color(group), isPath (whether
 * they are joined in their order), marked (numbers of points to mark and name), picked (one of them, or null). New x and y fit the
 * whole; a picked point that is out of sight moves into the middle.
 */
export function pointMap({title, describe, name, onPick, signal}) {
  let m = {x: [], y: [], groups: [], color: () => css('accent'), isPath: false, marked: [], picked: null};
  let order = [];  // by group, so that colours change seldom
  let view = {x: 0, y: 0, scale: 1};  // what is in the middle, and pixels for one unit
  let home = null;
  let size = {width: 1, height: 1};
  let waits = false;

  const toX = x => size.width / 2 + (x - view.x) * view.scale;
  const toY = y => size.height / 2 - (y - view.y) * view.scale;
  const isIn = i => toX(m.x[i]) > -4 && toX(m.x[i]) < size.width + 4 && toY(m.y[i]) > -4 && toY(m.y[i]) < size.height + 4;

  const canvas = figure({label: `${title}. Arrow keys move, + and − zoom, 0 shows all.`, signal, paint,
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
      if (!isIn(i)) continue;
      if (m.groups[i] !== group) fill = m.color(group = m.groups[i]);
      if (m.isPath && i) p.line(toX(m.x[i - 1]), toY(m.y[i - 1]), toX(m.x[i]), toY(m.y[i]), fill, 1.5);
      p.rect(toX(m.x[i]) - dot / 2, toY(m.y[i]) - dot / 2, dot, dot, fill);
    }
    const boxes = [];
    for (const i of m.marked) if (isIn(i)) p.dot(toX(m.x[i]), toY(m.y[i]), 3.5, css('ink'));
    if (m.picked !== null) {
      p.dot(toX(m.x[m.picked]), toY(m.y[m.picked]), 4.5, css('warm'));
      label(p, m.picked, css('warm'), boxes);
    }
    for (const i of m.marked) if (isIn(i) && boxes.length < MOST_LABELS) label(p, i, css('ink'), boxes);
    p.frame(0.5, 0.5, width - 1, height - 1, css('line'));
  }

  /** A point's name beside it, unless it would lie on one that is there. */
  function label(p, i, fill, boxes) {
    const text = name(i);
    const box = {x: toX(m.x[i]) + 6, y: toY(m.y[i]) - 7, width: 7 * text.length};
    if (boxes.some(other => Math.abs(other.y - box.y) < 12 && box.x < other.x + other.width && other.x < box.x + box.width)) return;
    boxes.push(box);
    p.text(box.x, box.y, text, {size: 11, mono: true, fill, bold: fill === css('warm')});
  }

  function fit() {
    const [left, right] = range(m.x), [low, high] = range(m.y);
    const scale = 0.92 * Math.min(size.width / (right - left || 1), size.height / (high - low || 1));
    home = view = {x: (left + right) / 2, y: (low + high) / 2, scale};
  }

  function redraw() {
    if (waits) return;
    waits = true;
    requestAnimationFrame(() => {
      waits = false;
      if (!signal?.aborted) canvas.figure.redraw();
    });
  }

  /** Zoom, with the point under (px, py) where it is. */
  function zoom(factor, px = size.width / 2, py = size.height / 2) {
    const scale = Math.min(400, Math.max(0.3, factor * view.scale / home.scale)) * home.scale;
    const [dx, dy] = [px - size.width / 2, size.height / 2 - py];
    view = {x: view.x + dx / view.scale - dx / scale, y: view.y + dy / view.scale - dy / scale, scale};
    redraw();
  }

  function move(dx, dy) {
    view = {...view, x: view.x - dx / view.scale, y: view.y + dy / view.scale};
    redraw();
  }

  function nearest(px, py) {
    let found = null, least = NEAR ** 2;
    for (let i = 0; i < m.x.length; i++) {
      const distance = (toX(m.x[i]) - px) ** 2 + (toY(m.y[i]) - py) ** 2;
      if (distance < least) [found, least] = [i, distance];
    }
    return found;
  }

  const fingers = new Map();
  let travelled = 0;
  const place = event => {
    const box = canvas.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  };

  canvas.addEventListener('wheel', event => {
    event.preventDefault();
    zoom(Math.exp(-event.deltaY / (event.deltaMode ? 15 : 400)), ...place(event));
  }, {passive: false});
  canvas.addEventListener('pointerdown', event => {
    canvas.setPointerCapture(event.pointerId);
    fingers.set(event.pointerId, place(event));
    if (fingers.size === 1) travelled = 0;
    tip(null);
  });
  canvas.addEventListener('pointermove', event => {
    const now = place(event);
    const before = fingers.get(event.pointerId);
    if (!before) {
      const over = nearest(...now);
      canvas.style.cursor = over === null ? 'grab' : 'pointer';
      tip(over === null ? null : describe(over), event.clientX, event.clientY);
      return;
    }
    const other = [...fingers].find(([id]) => id !== event.pointerId)?.[1];
    travelled += Math.hypot(now[0] - before[0], now[1] - before[1]);
    fingers.set(event.pointerId, now);
    if (other) {
      const apart = at => Math.hypot(at[0] - other[0], at[1] - other[1]) || 1;
      zoom(apart(now) / apart(before), (now[0] + other[0]) / 2, (now[1] + other[1]) / 2);
    }
    const share = other ? 0.5 : 1;
    move(share * (now[0] - before[0]), share * (now[1] - before[1]));
  });
  canvas.addEventListener('pointerup', event => {
    const over = fingers.size === 1 && travelled < 5 ? nearest(...place(event)) : null;
    fingers.delete(event.pointerId);
    if (over !== null) onPick(over);
  });
  canvas.addEventListener('pointercancel', event => fingers.delete(event.pointerId));
  canvas.addEventListener('pointerleave', () => tip(null));
  signal?.addEventListener('abort', () => tip(null));
  canvas.addEventListener('keydown', event => {
    const action = {ArrowLeft: () => move(40, 0), ArrowRight: () => move(-40, 0), ArrowUp: () => move(0, 40), ArrowDown: () => move(0, -40),
      '+': () => zoom(1.4), '=': () => zoom(1.4), '-': () => zoom(1 / 1.4), 0: all}[event.key];
    if (!action) return;
    event.preventDefault();
    action();
  });

  function all() {
    home = null;
    redraw();
  }

  return Object.assign(canvas, {all, zoom, show(changes) {
    m = {...m, ...changes};
    if (changes.x) home = null;
    else if ('picked' in changes && home && m.picked !== null && !isIn(m.picked)) view = {...view, x: m.x[m.picked], y: m.y[m.picked]};
    if (changes.groups || changes.x) order = Uint32Array.from(m.x, (_, i) => i).sort((a, b) => m.groups[a] - m.groups[b] || a - b);
    redraw();
  }});
}

function range(values) {
  let least = Infinity, most = -Infinity;
  for (const value of values) {
    if (value < least) least = value;
    if (value > most) most = value;
  }
  return [least, most];
}
