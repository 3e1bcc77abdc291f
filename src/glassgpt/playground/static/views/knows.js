// What it knows: maps of its tables, nearest neighbours, and its weights.

import {latest, post} from '../api.js';
import {barList} from '../barlist.js';
import {named, onTheme, shade} from '../colors.js';
import {exportable} from '../export.js';
import {vocabulary} from '../models.js';
import {pointMap} from '../pointmap.js';
import * as state from '../state.js';
import {card, choice, h, legend, notice, short} from '../ui.js';
import {normsCard, weightCard} from '../weights.js';

const AXES = [['01', '1 and 2'], ['02', '1 and 3'], ['12', '2 and 3']];
const SHADES = 32;
const NEIGHBOURS = 12;
const MOST_MARKED = 2000;
const KINDS = [
  ['part of a character', /<[0-9a-f]{2}>/], ['white space', /^[␣⏎→␍]+$/], ['a space and more', /^␣/], ['letters', /^[\p{L}\p{M}]+$/u],
  ['digits', /^\p{N}+$/u], ['signs and mixed', /^/],
];

export default async function show(page, {signal, opened, info}) {
  const names = await vocabulary(opened, signal);
  const table = () => (info.tables.includes(state.text('table')) ? state.text('table') : info.tables[0]);
  const nameOf = i => (table() === 'positions' ? String(i) : names[i]);
  const picked = size => {
    const usual = table() === 'positions' ? 0 : Math.max(0, names.indexOf('␣the'), names.indexOf('e'));
    return Math.min(size - 1, Math.max(0, Math.round(state.number('tok', usual))));
  };
  const pick = i => state.set({tok: i}, {push: true});

  const map = mapCard({info, names, table, nameOf, pick, signal});
  const near = nearCard({nameOf, pick});
  page.append(map.card, near.card, weightCard({opened, info, signal}), normsCard({opened, info, signal}));

  // One after the other: a slow answer for what was chosen before must not come over what is chosen now.
  const look = latest(async () => {
    try {
      const found = await post('/api/map', opened.question({table: table()}), signal);
      const id = picked(found.points.shape[0]);
      const k = Math.min(NEIGHBOURS, found.points.shape[0] - 1);
      const neighbours = await post('/api/near', opened.question({table: table(), id, k}), signal);
      if (signal.aborted) return;
      map.show(found, id, neighbours.ids);
      near.show(id, neighbours);
    } catch (error) {
      if (!signal.aborted) near.fail(error.message);
    }
  });

  state.on(['table', 'tok', 'axes', 'colour'], look, signal);
  onTheme(look, signal);
  await look();
}

// --- the map -------------------------------------------------------------------------------------------------------------

function mapCard({info, names, table, nameOf, pick, signal}) {
  const it = card('The map', 'The rows of a table on two of its three first principal components, those along which they vary most. Wheel, '
    + 'drag or two fingers, or the arrow keys, + and −; choose a point for its neighbours.');
  const map = pointMap({title: 'Map of the table', signal, name: nameOf, onPick: pick, describe: i => [nameOf(i), table() === 'positions'
    ? `position ${i}` : `id ${i}`, `${[0, 1, 2].map(axis => short(found.points[3 * i + axis])).join(' · ')}`]});
  map.dataset.test = 'map';
  const colours = h('div');
  const shares = h('p.about', {'data-test': 'explained'});
  const kinds = Uint8Array.from(names, name => KINDS.findIndex(([, pattern]) => pattern.test(name)));
  const colour = () => (state.text('colour') === 'id' ? 'id' : 'kind');
  const axes = () => (AXES.some(([value]) => value === state.text('axes')) ? state.text('axes') : '01');
  let found = null;
  let shown = '';

  const search = h('input', {type: 'text', placeholder: 'find a token', 'aria-label': 'Find a token on the map', 'data-test': 'map-find',
    oninput: mark, onkeydown(event) {
      if (event.key === 'Enter' && matches().length) pick(matches()[0]);
    }});
  const count = h('span.soft', {role: 'status'});
  let near = [];
  it.body.append(h('div.row', {},
    choice({label: 'table', value: table(), options: info.tables.map(name => [name, name]),
      onInput: name => state.set({table: name, tok: null})}),
    choice({label: 'components', value: axes(), options: AXES, onInput: value => state.set({axes: value === '01' ? null : value})}),
    choice({label: 'colour', value: colour(), options: [['kind', 'kind of token'], ['id', 'id']],
      onInput: value => state.set({colour: value === 'kind' ? null : value})}),
    search, count, h('button.small', {type: 'button', onclick: () => map.all(), title: 'Show all (0)'}, 'all')), map, shares, colours);
  exportable(it, {name: 'map', canvas: map, rows: () => [['id', 'token', 'first', 'second', 'third'],
    ...Array.from({length: found.points.shape[0]}, (_, i) => [i, nameOf(i), ...found.points.subarray(3 * i, 3 * i + 3)])]});

  /** The tokens that are searched for: a whole one first. */
  function matches() {
    const wanted = search.value.replaceAll(' ', '␣').toLowerCase();
    if (!wanted || table() === 'positions') return [];
    const hits = [];
    names.forEach((name, i) => {
      const low = name.toLowerCase();
      if (low.includes(wanted)) (low === wanted ? hits.unshift(i) : hits.push(i));
    });
    return hits;
  }

  function mark() {
    const hits = matches();
    count.textContent = search.value ? `${hits.length.toLocaleString('en')} found` : '';
    map.show({marked: search.value ? hits.slice(0, MOST_MARKED) : near});
  }

  function coloured(size) {
    const byKind = colour() === 'kind' && table() !== 'positions';
    const counts = KINDS.map((_, i) => kinds.reduce((n, kind) => n + (kind === i), 0));
    colours.replaceChildren(byKind
      ? legend(KINDS.map(([name], i) => [`${name} (${counts[i].toLocaleString('en')})`, named(i)]).filter((_, i) => counts[i]))
      : h('p.about', {}, 'from 0 ', ...Array.from({length: 8}, (_, i) =>
        h('span.swatch', {style: {background: shade('sizes', 0.3 + 0.1 * i)}})), ` to ${size - 1}`));
    return byKind ? {groups: kinds, color: named}
      : {groups: Uint8Array.from({length: size}, (_, i) => i * SHADES / size), color: group => shade('sizes', 0.3 + 0.7 * group / SHADES)};
  }

  return {card: it, show(now, id, neighbours) {
    found = now;
    near = neighbours;
    const [a, b] = [...axes()].map(Number);
    const size = found.points.shape[0];
    const wanted = `${table()} ${axes()}`;
    const column = axis => Float32Array.from({length: size}, (_, i) => found.points[3 * i + axis]);
    map.show({...(wanted === shown ? {} : {x: column(a), y: column(b)}), ...coloured(size), isPath: table() === 'positions', picked: id});
    shown = wanted;
    mark();
    const share = axis => `${(100 * found.explained[axis]).toFixed(1)} %`;
    shares.textContent = `To the right component ${a + 1} with ${share(a)} of the variance, upwards component ${b + 1} with ${share(b)}.`;
  }};
}

// --- nearest neighbours --------------------------------------------------------------------------------------------------

function nearCard({nameOf, pick}) {
  const it = card('Nearest neighbours', 'The rows of the table that point the most alike: cosine = a · b / (‖a‖ ‖b‖). Choose one to go on '
    + 'from it.');
  const list = barList({label: 'Nearest neighbours', series: [{name: 'cosine', color: 'accent'}], onPick: row => pick(row.id), most: () => 1});
  list.dataset.test = 'near-bars';
  const title = h('h3', {'data-test': 'near-of'});
  const problem = h('div');
  it.body.append(problem, title, list);
  exportable(it, {name: 'neighbours', canvas: list, rows: () => [['', 'cosine'], ...list.rows().slice(1)]});
  return {
    card: it,
    fail: message => problem.replaceChildren(notice(message, 'error')),
    show(id, {ids, cosines}) {
      problem.replaceChildren();
      title.textContent = `${nameOf(id)} (${id})`;
      list.show(ids.map((other, i) => (
        {id: other, label: nameOf(other), values: [cosines[i]], texts: [cosines[i].toFixed(3)], title: `id ${other}`})));
    },
  };
}
