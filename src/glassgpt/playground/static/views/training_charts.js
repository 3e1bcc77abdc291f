// The charts of a run's training over steps, tokens or time.
import {AXES, bound, card, count, h, notice, segmented, state} from '../core/index.js';
import {axis as chartAxis, chart, line, verticalLine} from '../widgets/index.js';

const GROUPS = {__proto__: null, embedding: 'token embedding', positions: 'position embedding', attention: 'attention',
  feed_forward: 'feed-forward', norms: 'normalisation', head: 'output head'};
const UPDATE_MS = 1000;
const TIME_UNITS = [[3600, 'hours'], [60, 'minutes'], [1, 'seconds']];
const MAX_MARKERS = 60;  // of evaluations: more markers than this would hide the line

const axisName = () => state.option('axis', Object.keys(AXES));

// The charts: their `cards`. records(), environment(): of the run. marked(): a step to mark, or null. `update()` draws
// them at most once per second, `draw()` at once.
export function trainingCharts({records, environment, marked, signal}) {
  const charts = SPECS.map(spec => specChart({spec, records, environment, marked, signal}));
  charts[0].element.tools.prepend(bound(segmented({label: 'Axis', options: Object.keys(AXES).map(name => [name, name]),
    value: axisName(), onInput: value => state.set({axis: value === 'step' ? null : value})}), 'axis', axisName,
    signal));
  let timer = 0;
  const draw = () => {
    clearTimeout(timer);
    timer = 0;
    charts.forEach(each => each.draw());
  };
  signal.addEventListener('abort', () => clearTimeout(timer));
  const cards = condition => charts.filter(({spec}) => condition(spec)).map(({element}) => element);
  return {
    cards: [...cards(spec => spec.wide), h('div.small-cards', {}, cards(spec => !spec.wide && !spec.tall)),
      ...cards(spec => spec.tall)],
    draw, update: () => { timer ||= setTimeout(draw, UPDATE_MS); },
  };
}

function specChart({spec, records, environment, marked, signal}) {
  const absent = h('div');
  const drawing = chart({
    label: spec.title, signal, height: spec.wide || spec.tall ? 340 : 230,
    traces: () => spec.traces(records(), axisName()).map(trace => ({...trace, x: trace.x.map(x => x / unit()[0])})),
    layout: () => ({
      uirevision: axisName(),  // keeps a zoom while points are added
      showlegend: Boolean(spec.legend), hovermode: 'x unified', margin: {t: spec.legend ? 24 : 14},
      ...spec.tall && {legend: {orientation: 'h', x: 0, y: -0.3, yanchor: 'top'}},
      shapes: marked() === null ? []
        : [verticalLine(records().placeOf(marked(), axisName()) / unit()[0], spec.wide ? `step ${marked()}` : '')],
      xaxis: chartAxis(unit()[1], {rangemode: 'tozero', hoverformat: axisName() === 'time' ? '.4~g' : ',',
        tickformat: {step: ',', tokens: '~s', time: '~g'}[axisName()]}),
      yaxis: chartAxis('', {type: spec.log ? 'log' : 'linear', dtick: spec.log && 'D2', tickformat: spec.format,
        hoverformat: spec.hover ?? spec.format, ticksuffix: spec.suffix, rangemode: spec.zero ? 'tozero' : 'normal'}),
    }),
  });
  const element = card(spec.title, {about: spec.about, wide: spec.wide, test: `chart-${spec.id}`,
    save: {name: spec.id, figure: drawing, rows: drawing.rows}}, absent, drawing);
  // How many of the records' units the axis counts in, and its name.
  function unit() {
    if (axisName() !== 'time') return [1, {step: 'step', tokens: 'tokens seen'}[axisName()]];
    const last = records().places('time').at(-1) ?? 0;
    const [seconds, name] = TIME_UNITS.find(([size]) => last >= 3 * size) ?? TIME_UNITS.at(-1);
    return [seconds, `${name} in training steps`];
  }
  return {spec, element, draw() {
    const exists = spec.exists(records());
    drawing.hidden = !exists;
    element.hidden = !exists && !spec.absent;
    absent.replaceChildren(...exists || !spec.absent ? [] : [notice(spec.absent(records(), environment()))]);
    if (exists) drawing.redraw();
  }};
}

const column = (name, key) => ({exists: records => records.has(key),
  traces: (records, axis) => [line(name, records.places(axis), records.columns[key], 0, {mode: 'lines'})]});
const noisyColumn = key => ({legend: true, exists: records => records.has(key), traces: (records, axis) => {
  const x = records.places(axis);
  return [line('each step', x, records.columns[key], 0, {mode: 'lines', opacity: 0.35, width: 1}),
    line(`mean of ${count(records.window)} steps`, x, records.smoothed(key), 0, {mode: 'lines'})];
}});
const evaluations = (name, {x, y}, i) => line(name, x, y, i, {width: 1.5, mode: x.length > MAX_MARKERS ? 'lines'
  : 'lines+markers'});
const groups = key => ({
  tall: true, legend: true, log: true, format: '.3~g', exists: records => records.groupsOf(key).length > 0,
  traces: (records, axis) => records.groupsOf(key).map((group, i) =>
    evaluations(GROUPS[group] ?? group, records.evaluated(record => record[key]?.[group], axis), i)),
});
const noSteps = () => 'No training step yet.';
const noUtilization = (records, {device, precision}) => (records.size
  ? `Not recorded: the peak of the device${device ? ` (${device})` : ''} in ${precision ?? 'its precision'} is `
  + 'unknown. It is measured on a CPU, and taken from the data sheet of common GPUs.' : noSteps());
const loss = noisyColumn('loss');

const SPECS = [
  {id: 'loss', title: 'Loss', wide: true, format: '.4~g', hover: '.4f', absent: noSteps, ...loss,
    about: 'Cross-entropy in nats per token: the mean of −ln p(actual token).',
    traces: (records, axis) => [...loss.traces(records, axis),
      evaluations('validation', records.evaluated(r => r.val_loss, axis), 1)]},
  {id: 'learning-rate', title: 'Learning rate', format: '.3~g', zero: true, ...column('learning rate', 'lr')},
  {id: 'gradient-norm', title: 'Gradient norm', about: '‖g‖ over all parameters, before clipping.', format: '.3~g',
    log: true, ...noisyColumn('grad_norm')},
  {id: 'tokens-per-second', title: 'Tokens per second', format: '.3~s', hover: ',.0f', zero: true,
    ...noisyColumn('tokens_per_second')},
  {id: 'memory', title: 'Memory', about: 'On a GPU the peak allocation, otherwise the memory of the process.',
    format: '.4~s', suffix: 'B', zero: true, ...column('memory', 'memory_bytes')},
  {id: 'peak-share', title: 'Model FLOPs utilization', about: 'As a share of the device’s peak.',
    format: '.3~%', zero: true, absent: noUtilization, ...column('share of the peak', 'peak_share')},
  {id: 'hellaswag', title: 'HellaSwag', about: 'Accuracy, by the probability per token of each ending.', format: '.1~%',
    exists: records => records.evaluated(r => r.hellaswag_acc_norm, 'step').y.length > 0,
    traces: (records, axis) => [evaluations('accuracy', records.evaluated(r => r.hellaswag_acc_norm, axis), 2)]},
  {id: 'weight-norms', title: 'Weight norms by parameter group', about: '‖W‖ of each group, at the evaluations.',
    ...groups('weight_norms')},
  {id: 'gradient-norms', title: 'Gradient norms by parameter group', ...groups('grad_norms'),
    about: '‖g‖ of each group, before clipping, at the evaluations.'},
];
