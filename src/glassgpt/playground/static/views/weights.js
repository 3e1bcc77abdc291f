// Weights: maps of the embedding tables, nearest neighbours, parameters, and gradients.
import {attempt, bound, button, card, category, choice, count, findTokens, h, latest, legend, onTheme, post, shade,
  short, state, vocabulary} from '../core/index.js';
import {barList, pointMap} from '../widgets/index.js';
import {normsCard, parameterCard} from './parameters.js';

const COMPONENTS = [['01', '1 and 2'], ['02', '1 and 3'], ['12', '2 and 3']];
const SHADES = 32, NEIGHBOURS = 12, MAX_MARKED = 2000;
const TOKEN_TYPES = [
  ['part of a character', /<[0-9a-f]{2}>/], ['white space', /^[␣⏎→␍]+$/], ['space and text', /^␣/],
  ['letters', /^[\p{L}\p{M}]+$/u], ['digits', /^\p{N}+$/u], ['punctuation and mixed', /^/],
];

export default async function show(page, {signal, opened, info}) {
  const names = await vocabulary(opened, signal);
  const table = () => state.option('table', info.tables);
  const nameOf = i => (table() === 'positions' ? String(i) : names[i]);
  const defaultRow = () => (table() === 'positions' ? 0 : Math.max(0, names.indexOf('␣the'), names.indexOf('e')));
  const select = row => state.set({row}, {push: true});
  const map = mapCard({info, names, table, nameOf, select, signal}), near = nearCard({nameOf, select});
  page.append(map.element, near.element, parameterCard({opened, info, signal}), normsCard({opened, info, signal}));
  // One request after the other: a slow answer for an earlier selection must not replace a later one.
  const update = latest(() => attempt(near.problem, signal, async () => {
    const found = await post('/api/map', opened.request({table: table()}), signal);
    const size = found.points.shape[0], id = state.index('row', size, defaultRow());
    const request = opened.request({table: table(), id, k: Math.min(NEIGHBOURS, size - 1)});
    const neighbours = await post('/api/near', request, signal);
    map.show(found, id, neighbours.ids);
    near.show(id, neighbours);
  }));
  state.on(['table', 'row', 'components', 'color'], update, signal);
  onTheme(update, signal);
  await update();
}

function mapCard({info, names, table, nameOf, select, signal}) {
  const types = Uint8Array.from(names, name => TOKEN_TYPES.findIndex(([, pattern]) => pattern.test(name)));
  const color = () => state.option('color', ['type', 'id']);
  const components = () => state.option('components', COMPONENTS.map(([value]) => value));
  const colors = h('div'), shares = h('p.about', {test: 'explained'}), summary = h('span.soft', {role: 'status'});
  let points = null, shown = '', neighbours = [];
  const coordinates = i => points.subarray(3 * i, 3 * i + 3);
  const map = pointMap({title: 'Map of the table', signal, name: nameOf, onSelect: select, test: 'map',
    describe: i => [nameOf(i), `${table() === 'positions' ? 'position' : 'id'} ${i}`,
      Array.from(coordinates(i), short).join(' · ')]});
  const search = h('input', {type: 'text', placeholder: 'find a token', 'aria-label': 'Find a token on the map',
    test: 'map-find', oninput: mark, onkeydown(event) {
      if (event.key === 'Enter' && matches().length) select(matches()[0]);
    }});
  const menu = (label, key, options, read) => bound(choice({label, value: read(), options,
    onInput: value => state.set({[key]: value, ...key === 'table' && {row: null}})}), key, read, signal);
  const element = card('Embedding map', {
    about: 'The rows of a table by two principal components. Drag to move, scroll or pinch to zoom, click to select.',
    save: {name: 'map', figure: map, rows: () => [['id', 'token', 'first', 'second', 'third'],
      ...Array.from({length: points.shape[0]}, (_, i) => [i, nameOf(i), ...coordinates(i)])]},
  }, h('div.row', {}, menu('table', 'table', info.tables.map(name => [name, name]), table),
    menu('components', 'components', COMPONENTS, components),
    menu('color', 'color', [['type', 'type of token'], ['id', 'id']], color), search, summary,
    button('all', map.showAll, {kind: 'button.small', title: 'Show all (0)'})), map, shares, colors);
  const matches = () => (table() === 'positions' ? [] : findTokens(names, search.value));
  function mark() {
    const found = matches();
    summary.textContent = search.value ? `${count(found.length)} found` : '';
    map.show({marked: search.value ? found.slice(0, MAX_MARKED) : neighbours});
  }
  // The points' groups and their colors.
  function colored(size) {
    if (color() === 'type' && table() !== 'positions') {
      const counts = TOKEN_TYPES.map((_, i) => types.reduce((n, type) => n + (type === i), 0));
      colors.replaceChildren(legend(TOKEN_TYPES.map(([name], i) => [`${name} (${count(counts[i])})`, () => category(i)])
        .filter((_, i) => counts[i]), signal));
      return {groups: types, color: category};
    }
    const at = share => shade('magnitude', 0.3 + 0.7 * share);
    colors.replaceChildren(h('p.about', {}, 'id 0 ', Array.from({length: 8}, (_, i) =>
      h('span.swatch', {style: {background: at(i / 8)}})), ` to ${size - 1}`));
    return {groups: Uint8Array.from({length: size}, (_, i) => i * SHADES / size), color: group => at(group / SHADES)};
  }
  return {element, show(found, id, ids) {
    points = found.points;
    neighbours = ids;
    const [a, b] = [...components()].map(Number), size = points.shape[0], wanted = `${table()} ${components()}`;
    const column = i => Float32Array.from({length: size}, (_, row) => points[3 * row + i]);
    map.show({...wanted !== shown && {x: column(a), y: column(b)}, ...colored(size), isPath: table() === 'positions',
      selected: id});
    shown = wanted;
    mark();
    const share = i => `component ${i + 1}, ${(100 * found.explained[i]).toFixed(1)} % of the variance`;
    shares.textContent = `Horizontal: ${share(a)}. Vertical: ${share(b)}.`;
  }};
}

function nearCard({nameOf, select}) {
  const list = barList({label: 'Nearest neighbours', series: [{name: 'cosine', color: 'accent'}],
    onSelect: row => select(row.id), full: () => 1, test: 'near-bars'});
  const title = h('h3', {test: 'near-of'}), problem = h('div');
  const element = card('Nearest neighbours', {
    about: 'The rows of the table with the largest cosine similarity, a · b / (‖a‖ ‖b‖).',
    save: {name: 'neighbours', figure: list, rows: () => [['', 'cosine'], ...list.rows().slice(1)]},
  }, problem, title, list);
  return {element, problem, show(id, {ids, cosines}) {
    title.textContent = `${nameOf(id)} (${id})`;
    list.show(ids.map((other, i) => (
      {id: other, label: nameOf(other), values: [cosines[i]], texts: [cosines[i].toFixed(3)], title: `id ${other}`})));
  }};
}
