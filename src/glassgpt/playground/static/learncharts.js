// The charts of a run's training, along steps, tokens or time.

import {chart} from './charts.js';
import {named} from './colors.js';
import {exportable} from './export.js';
import {card, h, notice, segmented} from './ui.js';

const PARTS = {embedding: 'token embedding', positions: 'position embedding', attention: 'attention', feed_forward: 'feed-forward',
  norms: 'normalisations', head: 'output head'};
const EACH_MS = 1000;  // between two drawings
const AXIS_NAMES = [['step', 'steps'], ['tokens', 'tokens'], ['time', 'time']];
const UNITS = [[3600, 'hours'], [60, 'minutes'], [1, 'seconds']];

/**
 * The charts: their `cards`. records(): the run's records now. axis(), onAxis(axis): along what they are drawn. marked(): the step that is
 * marked, or null. whyNoShare(): why a run has no share of the peak. `changed()` draws them anew, at most once a second; `now()` at once.
 */
export function learnCharts({records, axis, onAxis, marked, whyNoShare, signal}) {
  const all = SPECS.map(spec => oneChart({spec, records, axis, marked, whyNoShare, signal}));
  all[0].element.tools.prepend(segmented({label: 'Along', options: AXIS_NAMES, value: axis(), onInput: onAxis}));
  let timer = 0;
  const now = () => {
    clearTimeout(timer);
    timer = 0;
    all.forEach(one => one.draw());
  };
  signal.addEventListener('abort', () => clearTimeout(timer));
  const cards = isIt => all.filter(({spec}) => isIt(spec)).map(({element}) => element);
  return {
    cards: [...cards(spec => spec.wide), h('div.small-cards', {}, cards(spec => !spec.wide && !spec.byPart)), ...cards(spec => spec.byPart)],
    now, changed: () => { timer ||= setTimeout(now, EACH_MS); },
  };
}

function oneChart({spec, records, axis, marked, whyNoShare, signal}) {
  const element = card(spec.title, spec.about ?? '');
  if (spec.wide) element.classList.add('wide');
  element.dataset.test = `chart-${spec.id}`;
  const absent = h('div');
  const drawn = chart({
    label: spec.title, signal, height: spec.wide || spec.byPart ? 340 : 230,
    traces: () => scaled(spec.traces(records(), axis()), unitOf(records(), axis())[0]),
    layout: () => ({
      ...layoutOf(spec, axis(), unitOf(records(), axis())[1]),
      shapes: marked() === null ? [] : [markOf(records().placeOf(marked(), axis()) / unitOf(records(), axis())[0], spec.wide ? `step ${marked()}` : '')],
    }),
  });
  element.body.append(absent, drawn);
  exportable(element, {name: spec.id, png: () => drawn.figure.png(), svg: () => drawn.figure.svg(), rows: () => drawn.rows()});

  // What is out of sight is drawn when it comes into sight: a chart takes its time, and there are many.
  let isSeen = true, isOld = false;
  const observer = new IntersectionObserver(([{isIntersecting}]) => {
    isSeen = isIntersecting;
    if (isSeen && isOld) draw();
  }, {rootMargin: '200px'});
  observer.observe(element);
  signal.addEventListener('abort', () => observer.disconnect());

  function draw() {
    const isThere = spec.isThere(records());
    const wasHidden = drawn.hidden;
    drawn.hidden = !isThere;
    element.hidden = !isThere && !spec.whyNot;
    absent.replaceChildren(...isThere || !spec.whyNot ? [] : [notice(spec.whyNot(records(), whyNoShare))]);
    isOld = isThere && !isSeen && !wasHidden;
    if (isThere && !isOld) drawn.redraw();
  }

  return {spec, element, draw};
}

/** What the x axis counts in: [how many of the records' units, its name]. */
function unitOf(records, axis) {
  if (axis !== 'time') return [1, {step: 'step', tokens: 'tokens seen'}[axis]];
  const most = records.places('time').at(-1) ?? 0;
  const [seconds, name] = UNITS.find(([size]) => most >= 3 * size) ?? UNITS.at(-1);
  return [seconds, `${name} in training steps`];
}

const scaled = (traces, unit) => (unit === 1 ? traces : traces.map(trace => ({...trace, x: trace.x.map(x => x / unit)})));

const markOf = (x, text) => ({type: 'line', x0: x, x1: x, y0: 0, y1: 1, yref: 'paper', line: {color: named(7), width: 1, dash: 'dot'},
  label: {text, textposition: 'end', textangle: 0, xanchor: 'left', yanchor: 'top', font: {size: 10, color: named(7)}}});

function layoutOf(spec, axis, title) {
  return {
    uirevision: axis,  // who has zoomed in stays there while points are added
    showlegend: Boolean(spec.legend), hovermode: 'x unified', margin: {t: spec.legend ? 24 : 14},
    legend: spec.byPart ? {x: 0, xanchor: 'left', y: -0.3, yanchor: 'top'} : {},
    xaxis: {title: {text: title}, rangemode: 'tozero', tickformat: {step: ',', tokens: '~s', time: '~g'}[axis], hoverformat: axis === 'time' ? '.4~g' : ','},
    yaxis: {type: spec.log ? 'log' : 'linear', dtick: spec.log ? 'D2' : undefined, tickformat: spec.format,
      hoverformat: spec.hover ?? spec.format, ticksuffix: spec.suffix,
      rangemode: spec.zero ? 'tozero' : 'normal'},
  };
}

// --- what each shows -------------------------------------------------------------------------------------------------------

const line = (name, x, y, color, more = {}) => ({name, x, y, mode: 'lines', line: {color: named(color), width: 2}, ...more});
// Each evaluation is a point, unless they are so many that points hide the line.
const points = (name, {x, y}, color) => ({name, x, y, mode: x.length > 60 ? 'lines' : 'lines+markers',
  line: {color: named(color), width: 1.5}, marker: {color: named(color), size: 5}});

/** A noisy column: each step, faint, and its mean. */
function noisy(records, axis, column) {
  const x = records.places(axis);
  return [line('each step', x, records.columns[column], 0, {opacity: 0.35, line: {color: named(0), width: 1}}),
    line(`mean of ${records.window.toLocaleString('en')} steps`, x, records.smoothed(column), 0)];
}

const plain = (name, column, color = 0) => (records, axis) => [line(name, records.places(axis), records.columns[column], color)];
const has = column => records => records.has(column);

const byPart = key => ({
  byPart: true, legend: true, log: true, format: '.3~g',
  isThere: records => records.partsOf(key).length > 0,
  traces: (records, axis) => records.partsOf(key).map((part, i) =>
    points(PARTS[part] ?? part, records.evaluated(record => record[key]?.[part], axis), i)),
});

const SPECS = [
  {id: 'loss', title: 'Loss', wide: true, legend: true, format: '.4~g', hover: '.4f',
    about: 'Cross-entropy in nats a token: −ln of the probability given to the token that came, on average.',
    isThere: has('loss'), whyNot: () => 'No training step yet.',
    traces: (records, axis) => [...noisy(records, axis, 'loss'), points('validation', records.evaluated(r => r.val_loss, axis), 1)]},
  {id: 'learning-rate', title: 'Learning rate', format: '.3~g', zero: true, isThere: has('lr'), traces: plain('learning rate', 'lr')},
  {id: 'gradient-norm', title: 'Gradient norm', about: '‖g‖ over all parameters, before clipping.', format: '.3~g', log: true, legend: true,
    isThere: has('grad_norm'), traces: (records, axis) => noisy(records, axis, 'grad_norm')},
  {id: 'tokens-per-second', title: 'Tokens a second', format: '.3~s', hover: ',.0f', zero: true, legend: true,
    isThere: has('tokens_per_second'), traces: (records, axis) => noisy(records, axis, 'tokens_per_second')},
  {id: 'memory', title: 'Memory', about: 'On a GPU the most that was allocated, else what the process holds.', format: '.4~s', suffix: 'B', zero: true,
    isThere: has('memory_bytes'), traces: plain('memory', 'memory_bytes')},
  {id: 'peak-share', title: 'Use of the device', about: 'Floating-point operations that the model needs, as a share of the most that the device can do: MFU.',
    format: '.3~%', zero: true, isThere: has('peak_share'), traces: plain('share of the peak', 'peak_share'),
    whyNot: (records, why) => (records.size ? why() : 'No training step yet.')},
  {id: 'hellaswag', title: 'HellaSwag', about: 'Share of right endings, by the probability a token.', format: '.1~%',
    isThere: records => records.evaluated(r => r.hellaswag_acc_norm, 'step').y.length > 0,
    traces: (records, axis) => [points('HellaSwag, normalised', records.evaluated(r => r.hellaswag_acc_norm, axis), 2)]},
  {id: 'weight-norms', title: 'Weight norms by part', about: '‖W‖ over all of a part’s parameters, at the evaluations.', ...byPart('weight_norms')},
  {id: 'gradient-norms', title: 'Gradient norms by part', about: '‖g‖ over all of a part’s parameters, before clipping, at the evaluations.', ...byPart('grad_norms')},
];
