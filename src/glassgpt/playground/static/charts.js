// Charts by plotly, whose script is that of the installed Python package.

import {unreachable} from './api.js';
import {css, onTheme} from './colors.js';
import {h, notice} from './ui.js';

const SCRIPT = '/static/plotly.js';
const finger = matchMedia('(pointer: coarse)').matches;
let loading = null;

/** Plotly, loaded when first needed: 5 MB. */
function plotly() {
  loading ??= load().catch(error => {
    loading = null;  // the next drawing tries again
    throw error;
  });
  return loading;
}

async function load() {
  // Its bundle adds a style sheet for maps, unless an element of that id is there: no chart here needs it, and the page's policy
  // forbids it.
  const source = await (await fetch(SCRIPT)).text();
  for (const [, id] of source.matchAll(/getElementById\("([0-9a-f]{64})"\)/g)) document.head.append(h('meta', {id}));
  // Its other rules go into a sheet of the page's own instead of an element of theirs, which the policy forbids as well.
  const rules = new CSSStyleSheet();
  document.adoptedStyleSheets.push(rules);
  document.head.append(Object.assign(h('meta', {id: 'plotly.js-style-global'}), {sheet: rules}));
  await new Promise((resolve, reject) => document.head.append(h('script', {src: SCRIPT, onload: resolve, onerror: reject})));
  return window.Plotly;
}

/** A text from outside for a name or a label: plotly takes some tags for markup, even ones that would need a style of their own. */
export const plain = text => text.replaceAll('&', '&amp;').replaceAll('<', '&lt;');

/**
 * A chart. traces(): plotly's traces, made anew when the theme changes; layout(): changes of the common layout, `height` in pixels.
 * The element's `redraw()` shows what `traces` gives now; `figure` and `rows()` are for exports.
 */
export function chart({traces, layout = () => ({}), height = 260, signal, label}) {
  const element = h('div.chart', {role: 'img', 'aria-label': label, style: {height: `${height}px`}});
  let drawn = Promise.resolve();

  async function draw() {
    const Plotly = await plotly().catch(() => null);
    if (signal?.aborted || !element.isConnected) return;
    if (!Plotly) return void element.replaceChildren(notice(unreachable().message, 'error'));
    if (element.querySelector('.notice')) element.replaceChildren();
    await Plotly.react(element, traces(), merged(common(), layout()), {
      responsive: true, displaylogo: false, displayModeBar: finger ? false : 'hover', doubleClick: 'reset',
      modeBarButtonsToRemove: ['select2d', 'lasso2d', 'autoScale2d', 'toImage'],
      showSendToCloud: false, showEditInChartStudio: false, plotlyServerURL: '',
    });
  }

  const redraw = () => (drawn = drawn.then(draw));
  onTheme(redraw, signal);
  signal?.addEventListener('abort', () => loading?.then(Plotly => Plotly.purge(element), () => {}));
  queueMicrotask(redraw);

  async function picture(format) {
    const Plotly = await plotly();
    const {width, height: tall} = element.getBoundingClientRect();
    const address = await Plotly.toImage(element, {format, width, height: tall, scale: format === 'png' ? 2 : 1});
    const coded = address.slice(address.indexOf(',') + 1);
    return format === 'svg' ? decodeURIComponent(coded) : new Blob([Uint8Array.from(atob(coded), c => c.charCodeAt(0))], {type: 'image/png'});
  }

  return Object.assign(element, {
    redraw,
    drawn: () => drawn,
    figure: {png: () => picture('png'), svg: () => picture('svg')},
    rows: () => [['series', 'x', 'y'], ...traces().flatMap(t => Array.from(t.x, (x, i) => [t.name ?? '', x, t.y[i]]))],
  });
}

function common() {
  const axis = {gridcolor: css('line'), linecolor: css('line'), zerolinecolor: css('line'), automargin: true,
    exponentformat: 'e'};  // 10 with a raised exponent would be a style attribute
  return {
    autosize: true, margin: {l: 48, r: 10, t: 12, b: 38}, paper_bgcolor: 'rgba(0,0,0,0)', plot_bgcolor: 'rgba(0,0,0,0)',
    font: {color: css('soft'), family: 'system-ui, sans-serif', size: 12}, showlegend: false,
    legend: {orientation: 'h', x: 1, xanchor: 'right', y: 1, yanchor: 'bottom'},
    modebar: {bgcolor: 'rgba(0,0,0,0)', color: css('soft'), activecolor: css('ink')},
    hoverlabel: {namelength: -1, bgcolor: css('card'), bordercolor: css('line'), font: {color: css('ink')}},
    dragmode: finger ? false : 'zoom', xaxis: axis, yaxis: axis,
  };
}

function merged(base, changes) {
  const both = {...base};
  for (const [key, value] of Object.entries(changes)) {
    const deeper = value && typeof value === 'object' && !Array.isArray(value) && typeof base[key] === 'object';
    both[key] = deeper ? merged(base[key], value) : value;
  }
  return both;
}
