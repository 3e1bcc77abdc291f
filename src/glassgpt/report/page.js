const charts = JSON.parse(document.getElementById('charts').textContent);
const plots = [...document.querySelectorAll('figure > div')];
const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const finger = matchMedia('(pointer: coarse)').matches;
const COLORS = 7;
const SYMBOLS = ['circle', 'square', 'diamond', 'triangle-up', 'x', 'star', 'cross'];
const DASHES = ['solid', 'dash', 'dot', 'dashdot'];

const hidden = new Set();  // runs, by number
let axis = 'x';
const farthest = key => Math.max(1e-9, ...charts.flatMap(chart => chart.traces.map(t => t[key]?.at(-1) ?? 0)));

const UNITS = [[1, 's'], [60, 'min'], [3600, 'h'], [86400, 'days']];
function xAxis() {
  if (axis === 'x') return {title: 'step', divisor: 1, format: ',d'};
  if (axis === 'tokens') return {title: 'tokens seen', divisor: 1, format: '~s'};
  const [divisor, unit] = UNITS.findLast(([seconds]) => farthest('seconds') >= 2 * seconds) ?? UNITS[0];
  return {title: `time in training steps (${unit})`, divisor, format: '~g'};
}

function trace(t, isReference) {
  const {name, style, y} = t, {divisor} = xAxis();
  const places = isReference ? [0, farthest(axis)] : t[axis];
  const number = t.color ?? (style === 'points' ? 1 : 0);
  const color = css(isReference ? '--soft' : `--c${number % COLORS}`);
  const dots = style === 'points' || (!isReference && y.length < 30);  // a line through one point cannot be seen
  const dash = isReference ? 'dot' : DASHES[Math.floor(number / COLORS) % DASHES.length];
  return {
    // Plotly reads some tags as markup, and a run is named after its directory.
    name: name.replaceAll('&', '&amp;').replaceAll('<', '&lt;'), x: divisor === 1 ? places : places.map(x => x === null ? null : x / divisor), y, type: 'scatter',
    mode: dots ? 'lines+markers' : 'lines', opacity: style === 'faint' ? 0.45 : 1,
    line: {color, width: style === 'faint' ? 1 : 1.8, dash},
    marker: {color, size: y.length > 40 ? 4 : 6, symbol: t.color === null || isReference ? 'circle' : SYMBOLS[number % COLORS]}, cliponaxis: false,
  };
}

// Ticks at 1, 2, 5 if a log axis spans less than two decades, otherwise at powers of ten: plotly's own labels overlap.
// An axis that spans less than a factor of 8 is linear: it would have hardly one such tick.
function logAxis(chart) {
  const values = chart.traces.flatMap(t => t.y).filter(y => y > 0);
  const [low, high] = values.reduce(([a, b], y) => [Math.min(a, y), Math.max(b, y)], [Infinity, 0]);
  return high / low < 8 ? {} : {type: 'log', dtick: high / low < 100 ? 'D2' : 1};
}

// The names of reference lines, at the left and the right in turn, since some lines are close together.
function labels(chart) {
  const lines = chart.traces.filter(t => t.style === 'reference').sort((a, b) => a.y[0] - b.y[0]);
  return lines.map(({name, y}, i) => ({text: name, xref: 'paper', x: i % 2, xanchor: i % 2 ? 'right' : 'left', y: y[0], yanchor: 'bottom',
    yshift: -2, showarrow: false, font: {size: 11}}));
}

function layout(chart, names) {
  const style = {gridcolor: css('--line'), linecolor: css('--line'), zeroline: false, automargin: true};
  const {title, divisor, format} = xAxis(), end = farthest(axis) / divisor;
  return {
    autosize: true, margin: {l: 48, r: 8, t: 36, b: 36}, paper_bgcolor: 'rgba(0,0,0,0)', plot_bgcolor: css('--card'),
    font: {color: css('--soft'), family: 'system-ui, sans-serif', size: 12},
    showlegend: names > 2 && names <= MOST_INSIDE, annotations: labels(chart), modebar: {bgcolor: 'rgba(0,0,0,0)', color: css('--soft'), activecolor: css('--ink')},
    legend: {orientation: 'h', x: 1, xanchor: 'right', y: 1, yanchor: 'top'},
    hovermode: 'x unified', hoverlabel: {namelength: -1, bgcolor: css('--card'), bordercolor: css('--line'), font: {color: css('--ink')}},
    dragmode: finger ? false : 'zoom',  // a finger scrolls the page
    xaxis: {...style, spikecolor: css('--soft'), spikethickness: 1, title: {text: title, standoff: 6}, tickformat: format,
      range: [-0.01 * end, 1.01 * end]},
    yaxis: {...style, ...(chart.log ? logAxis(chart) : {}), tickformat: chart.format, hoverformat: chart.format},
  };
}

const compares = document.querySelector('.run') !== null;
const config = {responsive: true, doubleClick: 'reset', displaylogo: false, displayModeBar: finger ? false : 'hover',
  modeBarButtonsToRemove: ['select2d', 'lasso2d', 'autoScale2d'],
  showSendToCloud: false, showEditInChartStudio: false, plotlyServerURL: ''};

function drawChart(chart, plot) {
  const traces = chart.traces.map(t => {
    const isReference = t.style === 'reference';
    return {...trace(t, isReference), showlegend: !isReference, visible: !(compares && hidden.has(t.color))};
  });
  // A comparison has the names of its runs above all charts.
  const names = compares ? [] : chart.traces.filter(t => t.style !== 'reference');
  if (names.length > MOST_INSIDE && plot.nextSibling === null) plot.after(legendOf(names));
  return Plotly.react(plot, traces, layout(chart, names.length), config);
}

const MOST_INSIDE = 3;  // names in a legend inside the plot; a longer legend is below it, so that it hides no lines
function legendOf(traces) {
  const list = document.createElement('ul');
  list.className = 'legend';
  for (const {name, color} of traces) {
    const item = document.createElement('li'), swatch = document.createElement('span');
    swatch.className = 'swatch';
    swatch.style.setProperty('--own', `var(--c${color % COLORS})`);
    item.append(swatch, name);
    list.append(item);
  }
  return list;
}
const draw = () => Promise.all(charts.map((chart, i) => drawChart(chart, plots[i])));

let linking = false;  // zooming one chart zooms the others, whose events must not do the same again
function link(plot) {
  plot.on('plotly_relayout', async event => {
    const change = Object.fromEntries(Object.entries(event).filter(([key]) => /^xaxis.(range|autorange)/.test(key)));
    if (linking || !Object.keys(change).length) return;
    linking = true;
    await Promise.all(plots.filter(other => other !== plot).map(other => Plotly.relayout(other, change)));
    linking = false;
  });
}

draw().then(() => plots.forEach(link));
matchMedia('(prefers-color-scheme: dark)').addEventListener('change', draw);
for (const choice of document.querySelectorAll('input[name=axis]')) {
  if (choice.checked) axis = choice.value;  // the browser may restore an earlier choice
  choice.addEventListener('change', () => { axis = choice.value; draw(); });
}
for (const button of document.querySelectorAll('.run')) {
  button.addEventListener('click', () => {
    const run = Number(button.dataset.run), shown = hidden.delete(run);
    if (!shown) hidden.add(run);
    button.setAttribute('aria-pressed', String(shown));
    draw();
  });
}
