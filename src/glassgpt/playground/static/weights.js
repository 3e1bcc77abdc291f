// Weights as pictures, spectra, and norms beside those of a text's gradients.

import {post} from './api.js';
import {barList, key} from './barlist.js';
import {chart} from './charts.js';
import {css, named, onTheme} from './colors.js';
import {exportable} from './export.js';
import {matrix} from './matrix.js';
import {encode} from './models.js';
import * as state from './state.js';
import {card, choice, facts, h, legend, notice, segmented, short} from './ui.js';

const CELLS = 256;
const TALL = 440;
const NORMS = [{name: 'weights', color: 'accent'}, {name: 'gradient', color: 'warm'}];

/** One parameter: its picture, its numbers, and its singular values when asked. */
export function weightCard({opened, info, signal}) {
  const it = card('Weights', 'Blue below zero, orange above; where the matrix is larger than the picture, a cell is the mean of its part.');
  const name = () => (info.weights.some(one => one.name === state.text('weight')) ? state.text('weight') : usual(info.weights));
  const place = h('div');
  const spectrum = h('div');
  let picture = null;
  it.body.append(choice({label: 'parameter', value: name(), onInput: value => state.set({weight: value}),
    options: info.weights.map(one => [one.name, `${one.name} (${one.shape.join(' × ')})`])}), place, spectrum);
  exportable(it, {name: 'weights', png: () => picture.figure.png(), svg: async () => picture.figure.svg(), rows: () => picture.rows()});
  let stage = new AbortController();

  async function look() {
    stage.abort();
    stage = new AbortController();
    const until = AbortSignal.any([signal, stage.signal]);
    try {
      const found = await post('/api/weight', opened.question({name: name(), size: CELLS}), until);
      picture = pictureOf(found, name(), until);
      place.replaceChildren(picture, picture.chosen, h('div', {'data-test': 'weight-facts'}, facts([
        ['shape', found.shape.join(' × ')], ['Frobenius norm', short(found.norm)], ['mean', short(found.mean)],
        ['standard deviation', short(found.std)], ['largest', short(found.largest)],
        ['strongest colour', `±${short(found.picture.reduce((most, x) => Math.max(most, Math.abs(x)), 0))}`]])));
      const isMatrix = found.shape.length === 2;
      const button = h('button', {type: 'button', 'data-test': 'spectrum', onclick: () => measure(found.norm, until)}, 'Singular values');
      spectrum.replaceChildren(...(isMatrix ? [button] : []));
    } catch (error) {
      if (!until.aborted) place.replaceChildren(notice(error.message, 'error'));
    }
  }

  async function measure(norm, until) {
    try {
      const {singular_values: values} = await post('/api/spectrum', opened.question({name: name()}), until);
      spectrum.replaceChildren(...spectrumOf(values, norm, until));
    } catch (error) {
      if (!until.aborted) spectrum.replaceChildren(notice(error.message, 'error'));
    }
  }

  state.on(['weight'], look, signal);
  look();
  return it;
}

const usual = weights => (weights.find(one => one.name === 'blocks.0.attention.qkv.weight') ?? weights[0]).name;

function pictureOf({picture, shape}, name, signal) {
  const [rows, cols] = picture.shape;
  const [height, width] = shape.length > 1 ? shape : [1, shape[0]];
  const part = (i, n, whole) => {
    const [from, to] = [Math.floor(i * whole / n), Math.ceil((i + 1) * whole / n) - 1];
    return from === to ? String(from) : `${from} to ${to}`;
  };
  const words = (r, c) => [`row ${part(r, rows, height)}, column ${part(c, cols, width)}`, short(picture[r * cols + c])];
  const chosen = h('p.soft', {role: 'status'});
  const it = matrix({rows, cols, values: picture, kind: 'signs', cell: 26, cellY: Math.min(26, TALL / rows), signal,
    label: `Picture of ${name}`, describe: words, onPick: (r, c) => { chosen.textContent = words(r, c).join(': '); }});
  it.dataset.test = 'weight';
  return Object.assign(it, {chosen});
}

/** Of singular values, descending: a chart, and what they say of the matrix. */
function spectrumOf(values, norm, signal) {
  const total = values.reduce((a, b) => a + b, 0);
  const bits = values.reduce((sum, value) => (value > 0 ? sum - value / total * Math.log(value / total) : sum), 0);
  const drawing = chart({label: 'Singular values', height: 220, signal, traces: () => [{
    name: 'singular value', type: 'scatter', mode: 'lines', x: Array.from(values, (_, i) => i + 1), y: Array.from(values),
    line: {color: css('accent')}}],
  layout: () => ({xaxis: {title: {text: 'number'}}, yaxis: {type: 'log', title: {text: 'singular value'}}})});
  const box = h('section', {});
  const tools = h('div.row', {}, h('h3', {}, 'Singular values'));
  exportable({tools}, {name: 'singular-values', canvas: drawing, rows: () => drawing.rows()});
  box.append(tools, drawing, h('div', {'data-test': 'spectrum-facts'}, facts([
    ['spectral norm', short(values[0])],
    ['effective rank, exp of the entropy of σ / Σσ (Roy and Vetterli, 2007)', `${Math.exp(bits).toFixed(1)} of ${values.length}`],
    ['stable rank, ‖W‖² / σ₁²', (norm ** 2 / values[0] ** 2).toFixed(1)],
  ])));
  return [box];
}

const MEASURES = {
  weight_norm: ['norm of the weights', part => part.weight_norm], gradient_norm: ['norm of the gradient', part => part.gradient_norm],
  ratio: ['gradient / weights', part => part.gradient_norm / part.weight_norm],
};

/** All parameters at a glance: norms by layer, beside those of the gradient of a text's loss. */
export function normsCard({opened, info, signal}) {
  const it = card('Norms and gradients', 'Frobenius norm of each parameter, and of its gradient for the loss of the text: how hard the '
    + 'text pulls at it.');
  const place = h('div');
  const button = h('button', {type: 'button', onclick: measure, 'data-test': 'gradients'}, 'Measure all parameters');
  let parts = [];
  let measureNow = 'weight_norm';
  it.body.append(button, place);

  const lines = () => {
    const byPart = new Map();
    for (const part of parts) {
      const [, layer, what] = /^blocks\.(\d+)\.(.+)$/.exec(part.name) ?? [];
      if (what) byPart.set(what, [...byPart.get(what) ?? [], [Number(layer), MEASURES[measureNow][1](part)]]);
    }
    return [...byPart].map(([name, points], i) => ({
      name, type: 'scatter', mode: 'lines+markers', x: points.map(([x]) => x), y: points.map(([, y]) => y),
      line: {color: named(i), dash: i < 8 ? 'solid' : 'dot'},
    }));
  };

  async function measure() {
    button.disabled = true;
    place.replaceChildren();
    try {
      const {ids} = await encode(opened, state.text('text') || info.default_text, signal);
      const found = await post('/api/gradients', opened.question({ids}), signal);
      parts = found.parts;
      showAll(found.loss, ids.length);
    } catch (error) {
      if (!signal.aborted) place.replaceChildren(notice(error.message, 'error'));
    }
    button.disabled = false;
  }

  function showAll(loss, tokens) {
    const drawing = chart({label: 'Norms by layer', signal, traces: lines, layout: () => ({
      xaxis: {title: {text: 'layer'}, dtick: info.config.n_layer > 16 ? 4 : 1},
      yaxis: {type: 'log', title: {text: MEASURES[measureNow][0]}}})});
    const names = h('div');
    const nameOf = ({name, line}) => (line.dash === 'solid' ? name : `${name} (dotted)`);
    const showNames = () => names.replaceChildren(legend(lines().map(one => [nameOf(one), one.line.color])));
    onTheme(showNames, signal);
    showNames();
    const list = barList({label: 'All parameters', series: NORMS, ownScales: true});
    list.dataset.test = 'gradient-bars';
    list.classList.add('long-names');
    list.show(parts.map(part => ({label: part.name, values: [part.weight_norm, part.gradient_norm],
      texts: [short(part.weight_norm), short(part.gradient_norm)], title: part.name})));
    place.replaceChildren(
      h('p', {'data-test': 'gradient-loss'}, `Loss of the text’s ${tokens.toLocaleString('en')} tokens: ${loss.toFixed(4)} nats.`),
      segmented({label: 'Shown by layer', value: measureNow, options: Object.entries(MEASURES).map(([value, [name]]) => [value, name]),
        onInput(value) { measureNow = value; drawing.redraw(); }}),
      drawing, names, h('h3', {}, 'All parameters'), key(NORMS),
      h('p.about', {}, 'Each colour against its own largest.'), h('div.scrolls', {}, list));
    it.tools.replaceChildren();
    exportable(it, {name: 'norms', canvas: drawing, rows: () => [['parameter', 'norm of the weights', 'norm of the gradient'],
      ...parts.map(part => [part.name, part.weight_norm, part.gradient_norm])]});
  }

  return it;
}
