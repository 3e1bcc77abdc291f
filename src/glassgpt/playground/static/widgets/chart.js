// Charts by Plotly, whose script comes from the installed Python package.
import {category, css, h, notice, onTheme, unreachable} from '../core/index.js';

const isTouch = matchMedia('(pointer: coarse)').matches;
let loading = null;

// Plotly, loaded when first needed (5 MB). After a failure the next chart tries again.
function plotly() {
  loading ??= new Promise((resolve, reject) => document.head.append(h('script', {
    src: '/static/plotly.js', onload: () => resolve(window.Plotly), onerror: () => reject(unreachable())})));
  loading.catch(() => { loading = null; });
  return loading;
}

// Escape a text: Plotly reads some tags as markup. Names of traces are escaped in `chart`.
export const plain = text => text.replaceAll('&', '&amp;').replaceAll('<', '&lt;');

// A trace in the color of the i-th category.
export const line = (name, x, y, i, {dash = 'solid', width = 2, mode = 'lines+markers', symbol, ...more} = {}) =>
  ({name, x, y, mode, line: {color: category(i), dash, width}, marker: {color: category(i), size: 5, symbol}, ...more});

// Layout for a vertical dotted line, with a text at its top.
export const verticalLine = (x, text = '', color = category(7)) => ({type: 'line', x0: x, x1: x, y0: 0, y1: 1,
  yref: 'paper', line: {color, width: 1, dash: 'dot'}, label: {text, textposition: 'end', textangle: 0, xanchor: 'left',
    yanchor: 'top', font: {size: 10, color}}});

// An axis with a title.
export const axis = (title, more = {}) => ({title: {text: title}, gridcolor: css('line'), linecolor: css('line'),
  zerolinecolor: css('line'), automargin: true, exponentformat: 'power', ...more});

// A chart. traces(): Plotly's traces; layout(): its layout, merged into the common one. The element's `redraw()` shows
// what these give now, once the chart is in sight.
export function chart({traces, layout = () => ({}), height = 260, signal, label, test}) {
  const element = h('div.chart', {role: 'img', 'aria-label': label, style: {height: `${height}px`}, test});
  const data = () => traces().map(trace => ({type: 'scatter', ...trace, name: plain(trace.name ?? '')}));
  const fullLayout = () => ({...commonLayout(), ...layout(), margin: {l: 48, r: 10, t: 12, b: 38, ...layout().margin}});
  let drawn = Promise.resolve(), isInSight = false, isStale = true;
  async function draw() {
    if (signal?.aborted || !isInSight || !isStale) return;
    isStale = false;
    try {
      const Plotly = await plotly();
      if (signal?.aborted || !element.isConnected) return;
      if (element.querySelector('.notice')) element.replaceChildren();
      await Plotly.react(element, data(), fullLayout(), {
        responsive: true, displaylogo: false, displayModeBar: isTouch ? false : 'hover', doubleClick: 'reset',
        modeBarButtonsToRemove: ['select2d', 'lasso2d', 'autoScale2d', 'toImage'],
        showSendToCloud: false, showEditInChartStudio: false, plotlyServerURL: '',
      });
    } catch (error) {
      element.replaceChildren(notice(error.message, 'error'));
    }
  }
  function redraw() {
    isStale = true;
    return drawn = drawn.then(draw);
  }
  const observer = new IntersectionObserver(([{isIntersecting}]) => {
    isInSight = isIntersecting;
    if (isInSight) drawn = drawn.then(draw);
  }, {rootMargin: '200px'});
  observer.observe(element);
  onTheme(redraw, signal);
  signal?.addEventListener('abort', () => {
    observer.disconnect();
    loading?.then(Plotly => Plotly.purge(element), () => {});
  });
  async function picture(format) {
    const {width, height: tall} = element.getBoundingClientRect();
    if (!width) return null;
    const options = {format, width, height: tall, scale: format === 'png' ? 2 : 1};
    const address = await (await plotly()).toImage({data: data(), layout: fullLayout()}, options);
    const content = address.slice(address.indexOf(',') + 1);
    if (format === 'svg') return decodeURIComponent(content);
    return new Blob([Uint8Array.from(atob(content), c => c.charCodeAt(0))], {type: 'image/png'});
  }
  return Object.assign(element, {
    redraw, figure: {png: () => picture('png'), svg: () => picture('svg')},
    rows: () => [['series', 'x', 'y'], ...traces().flatMap(t => Array.from(t.x, (x, i) => [t.name ?? '', x, t.y[i]]))],
  });
}

function commonLayout() {
  return {
    autosize: true, paper_bgcolor: 'rgba(0,0,0,0)', plot_bgcolor: 'rgba(0,0,0,0)', showlegend: false,
    font: {color: css('soft'), family: 'system-ui, sans-serif', size: 12}, dragmode: isTouch ? false : 'zoom',
    legend: {orientation: 'h', x: 1, xanchor: 'right', y: 1, yanchor: 'bottom'},
    modebar: {bgcolor: 'rgba(0,0,0,0)', color: css('soft'), activecolor: css('ink')},
    hoverlabel: {namelength: -1, bgcolor: css('card'), bordercolor: css('line'), font: {color: css('ink')}},
  };
}
