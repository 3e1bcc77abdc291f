// One parameter as a picture with its spectrum, and the norms of all parameters and their gradients.
import {attempt, bound, button, card, category, choice, count, encode, exportButtons, facts, h, largest, legend, post,
  segmented, short, state, sum} from '../core/index.js';
import {axis, barLegend, barList, chart, line, matrix} from '../widgets/index.js';

const CELLS = 256, PICTURE_HEIGHT = 440;
const NORMS = [{name: 'weights', color: 'accent'}, {name: 'gradient', color: 'warm'}];
const DEFAULT_PARAMETER = 'blocks.0.attention.qkv.weight';

export function parameterCard({opened, info, signal}) {
  const all = info.weights.map(({name}) => name);
  const name = () => state.option('parameter', all, all.includes(DEFAULT_PARAMETER) ? DEFAULT_PARAMETER : all[0]);
  const problem = h('div'), place = h('div'), spectrum = h('div');
  let picture = null, stage = new AbortController();
  function update() {
    stage.abort();
    stage = new AbortController();
    const until = AbortSignal.any([signal, stage.signal]);
    return attempt(problem, until, async () => {
      const found = await post('/api/weight', opened.request({name: name(), size: CELLS}), until);
      picture = pictureOf(found, name(), until);
      place.replaceChildren(picture, picture.selection, h('div', {test: 'weight-facts'}, facts([
        ['shape', found.shape.join(' × ')], ['Frobenius norm', short(found.norm)], ['mean', short(found.mean)],
        ['standard deviation', short(found.std)], ['largest magnitude', short(found.largest)],
        ['strongest color', `±${short(largest(found.picture.map(Math.abs)))}`]])));
      const measure = () => attempt(problem, until, async () => {
        const {singular_values: values} = await post('/api/spectrum', opened.request({name: name()}), until);
        spectrum.replaceChildren(spectrumOf(values, found.norm, until));
      });
      spectrum.replaceChildren(...found.shape.length === 2 ? [button('Singular values', measure, {test: 'spectrum'})]
        : []);
    });
  }
  state.on(['parameter'], update, signal);
  update();
  return card('Parameter', {
    about: 'Blue: negative, orange: positive. In a large matrix, a cell is the mean of several weights.',
    save: {name: 'weights', figure: () => picture, rows: () => picture.rows()},
  }, bound(choice({label: 'parameter', value: name(), onInput: value => state.set({parameter: value}),
    options: info.weights.map(({name: full, shape}) => [full, `${full} (${shape.join(' × ')})`])}), 'parameter', name,
    signal),
  problem, place, spectrum);
}

function pictureOf({picture, shape}, name, signal) {
  const [rows, cols] = picture.shape, [height, width] = shape.length > 1 ? shape : [1, shape[0]];
  const range = (i, n, size) => {
    const [from, to] = [Math.floor(i * size / n), Math.ceil((i + 1) * size / n) - 1];
    return from === to ? String(from) : `${from} to ${to}`;
  };
  const describe = (r, c) => [`row ${range(r, rows, height)}, column ${range(c, cols, width)}`,
    short(picture[r * cols + c])];
  const selection = h('p.soft', {role: 'status'});
  return Object.assign(matrix({rows, cols, values: picture, scale: 'signed', cell: 26,
    cellY: Math.min(26, PICTURE_HEIGHT / rows), signal, label: `Picture of ${name}`, test: 'weight', describe,
    onSelect: (r, c) => { selection.textContent = describe(r, c).join(': '); }}), {selection});
}

// A chart of descending singular values, and what they say about the matrix.
function spectrumOf(values, norm, signal) {
  const total = sum(values), nats = sum(values.map(x => (x > 0 ? -x / total * Math.log(x / total) : 0)));
  const drawing = chart({label: 'Singular values', height: 220, signal,
    traces: () => [{...line('singular value', Array.from(values, (_, i) => i + 1), [...values], 0, {mode: 'lines'})}],
    layout: () => ({xaxis: axis('number'), yaxis: axis('singular value', {type: 'log'})})});
  return h('section', {}, h('div.row', {}, h('h3', {}, 'Singular values'),
    exportButtons({name: 'singular-values', figure: drawing, rows: drawing.rows})), drawing,
  h('div', {test: 'spectrum-facts'}, facts([
    ['spectral norm', short(values[0])],
    ['effective rank (Roy and Vetterli, 2007)', `${Math.exp(nats).toFixed(1)} of ${values.length}`],
    ['stable rank, ‖W‖² / σ₁²', (norm ** 2 / values[0] ** 2).toFixed(1)],
  ])));
}

const MEASURES = {
  weight_norm: ['norm of the weights', part => part.weight_norm],
  gradient_norm: ['norm of the gradient', part => part.gradient_norm],
  ratio: ['gradient / weights', part => part.gradient_norm / part.weight_norm],
};

// The norms of all parameters, and of their gradients for the loss of the text.
export function normsCard({opened, info, signal}) {
  const problem = h('div'), place = h('div'), start = button('Measure all parameters', measure, {test: 'gradients'});
  let parts = [], shown = 'weight_norm';
  const byLayer = () => {
    const groups = new Map();
    for (const part of parts) {
      const [, layer, name] = /^blocks\.(\d+)\.(.+)$/.exec(part.name) ?? [];
      if (name) groups.set(name, [...groups.get(name) ?? [], [Number(layer), MEASURES[shown][1](part)]]);
    }
    return [...groups].map(([name, points], i) =>
      line(name, points.map(([x]) => x), points.map(([, y]) => y), i, {dash: i < 8 ? 'solid' : 'dot'}));
  };
  const drawing = chart({label: 'Norms by layer', signal, traces: byLayer, layout: () => ({
    xaxis: axis('layer', {dtick: info.config.n_layer > 16 ? 4 : 1}), yaxis: axis(MEASURES[shown][0], {type: 'log'})})});
  async function measure() {
    start.disabled = true;
    await attempt(problem, signal, async () => {
      const {ids} = await encode(opened, state.text('text') || info.default_text, signal);
      const found = await post('/api/gradients', opened.request({ids}), signal);
      parts = found.parts;
      showAll(found.loss, ids.length);
    });
    start.disabled = false;
  }
  function showAll(loss, tokens) {
    const list = barList({label: 'All parameters', series: NORMS, ownScales: true, test: 'gradient-bars'});
    list.classList.add('long-names');
    list.show(parts.map(({name, weight_norm: weight, gradient_norm: gradient}) =>
      ({label: name, values: [weight, gradient], texts: [short(weight), short(gradient)], title: name})));
    place.replaceChildren(
      h('p', {test: 'gradient-loss'}, `Loss over the ${count(tokens)} tokens of the text: ${loss.toFixed(4)} nats.`),
      segmented({label: 'Shown by layer', value: shown,
        options: Object.entries(MEASURES).map(([value, [name]]) => [value, name]), onInput(value) {
          shown = value;
          drawing.redraw();
        }}), drawing,
      legend(byLayer().map(({name, line: {dash}}, i) => [dash === 'solid' ? name : `${name} (dotted)`,
        () => category(i)]), signal),
      h('h3', {}, 'All parameters'), barLegend(NORMS, signal),
      h('p.about', {}, 'Each color is relative to its own largest value.'), h('div.scrolls', {}, list));
    element.tools.replaceChildren(exportButtons({name: 'norms', figure: drawing, rows: () => [
      ['parameter', 'norm of the weights', 'norm of the gradient'],
      ...parts.map(part => [part.name, part.weight_norm, part.gradient_norm])]}));
    drawing.redraw();
  }
  const element = card('Weight and gradient norms', {
    about: 'The Frobenius norm of each parameter, and of its gradient for the text.'}, start, problem, place);
  return element;
}
