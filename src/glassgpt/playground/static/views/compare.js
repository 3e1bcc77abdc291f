// Compare: two checkpoints of a run, or two models, on the same text.
import {alignTokens, attempt, bitsOf, card, checkpointOptions, choice, count, encode, findEntry, h, loadCatalog,
  modelLabel, notice, openModel, post, ramp, RequestError, short, state, sum, table,
  vocabulary} from '../core/index.js';
import {SURPRISAL_ENDS, surprisalStrip, tokenStrip} from '../widgets/index.js';
import {columns, headsCard, predictionCards} from './compare_cards.js';

const MAX_DIFFERENCE = 6;  // bits at which colors are strongest

export default async function show(page, {signal, catalog, entry, opened, info, text, ids, pieces, partial, bytes}) {
  const chooser = h('div.row'), control = card('Models', {
    about: 'A is the model selected at the top of the page, B is selected here. Both read the text above.'}, chooser);
  const show = (...cards) => page.replaceChildren(control, ...cards);
  let stage = new AbortController();
  async function showPair() {
    stage.abort();
    stage = new AbortController();
    const until = AbortSignal.any([signal, stage.signal]), problem = h('div.problem');
    const isShown = await attempt(problem, until, async () => {
      const second = await openOther(until);
      const sides = [['A', opened, {ids, pieces, partial, bytes}], ['B', second, await encode(second, text, until)]];
      const pair = await Promise.all(sides.map(([mark, model, tokens]) => loadSide(mark, model, tokens, until)));
      if (!until.aborted) await showCards(show, pair, text, until);
    });
    if (!isShown && !until.aborted) show(problem);
  }
  // Open B. If the page selected it and the run has deleted it since, select again from what exists now.
  async function openOther(until) {
    const first = showChoice(catalog);
    try {
      return await openModel(first.entry, first.step, until);
    } catch (error) {
      if (!(error instanceof RequestError) || state.text('other_step')) throw error;
      const now = showChoice(await loadCatalog(true));
      return openModel(now.entry, now.step, until);
    }
  }
  function showChoice(listed) {
    const other = defaultOther(listed, findEntry(listed, entry.name) ?? entry, info.step);
    const model = choice({label: 'B', value: other.entry.name, options: listed.entries.map(({name}) => [name, name]),
      test: 'other-model',
      onInput: name => state.set({other: name, other_step: null, other_layer: null, other_head: null}, {push: true})});
    const checkpoint = other.entry.kind === 'run' && choice({label: 'checkpoint', value: other.step, test: 'other-step',
      options: checkpointOptions(other.entry),
      onInput: step => state.set({other: other.entry.name, other_step: step}, {push: true})});
    chooser.replaceChildren(h('span', {test: 'side-a'}, `A · ${modelLabel(info)}`), model, checkpoint || '');
    show(notice('Computing…'));
    return other;
  }
  signal.addEventListener('abort', () => stage.abort());
  state.on(['other', 'other_step'], showPair, signal);
  await showPair();
}

// B of the address; otherwise another checkpoint of the same run; otherwise the next model.
function defaultOther(catalog, entry, step) {
  const wanted = state.text('other') && findEntry(catalog, state.text('other'));
  if (wanted) return {entry: wanted, step: state.text('other_step')};
  const others = entry.steps.filter(each => each !== step);
  const own = entry.state === 'running' ? others.at(-1) : others[0];  // a run in training deletes the first next
  if (own !== undefined) return {entry, step: state.text('other_step') || String(own)};
  const {entries} = catalog;
  return {entry: entries[(entries.indexOf(entry) + 1) % entries.length], step: state.text('other_step')};
}

// Everything about one side: its tokens, predictions and attention.
async function loadSide(mark, opened, tokens, signal) {
  const body = opened.request({ids: tokens.ids});
  const [predictions, picture, names] = await Promise.all([
    post('/api/predictions', body, signal), post('/api/attention', body, signal), vocabulary(opened, signal)]);
  return {mark, label: modelLabel(opened.info), opened, info: opened.info, tokens, surprisal: predictions.surprisal,
    picture, names};
}

async function showCards(show, pair, text, signal) {
  const aligned = alignTokens(pair[0].tokens, pair[1].tokens, text);
  // The segments of the text that are tokens of both, with the bits of each side.
  const segments = aligned?.map(segment => ({
    ...segment, bits: [bitsOf(pair[0].surprisal, segment.a), bitsOf(pair[1].surprisal, segment.b)]})) ?? null;
  const selected = () => selectedSegment(segments);
  const surprisal = surprisalCard(pair, segments, {selected, signal});
  const predictions = predictionCards(pair, segments, {selected, signal}), heads = headsCard(pair, signal);
  show(totalsCard(pair, segments), surprisal.element, ...predictions.cards, heads.element, settingsCard(pair));
  const update = () => {
    surprisal.update();
    return predictions.update();
  };
  state.on(['position'], update, signal);
  state.on(['layer', 'head', 'other_layer', 'other_head'], heads.update, signal);
  await Promise.all([update(), heads.update()]);
}

const difference = ({bits: [a, b]}) => b - a;

// The segment of the address, otherwise the one with the largest difference.
function selectedSegment(segments) {
  const position = state.number('position');
  const at = position === null ? -1 : segments.findIndex(({a}) => position >= a[0] && position < a[1]);
  if (at >= 0) return at;
  const size = segment => Math.abs(difference(segment)) || 0;
  return segments.reduce((best, segment, i) => (size(segment) > size(segments[best]) ? i : best), 0);
}

function totalsCard(pair, segments) {
  const common = (segments ?? []).filter(segment => !Number.isNaN(difference(segment)));
  const bytes = sum(common.map(segment => segment.bytes));
  const numbers = pair.map((side, k) => {
    const own = [...side.surprisal].filter(bits => !Number.isNaN(bits));
    return {tokens: side.tokens.ids.length, bits: sum(own), predicted: own.length,
      common: sum(common.map(({bits}) => bits[k]))};
  });
  const ratio = (bits, n) => (n ? (bits / n).toFixed(3) : '–');
  const rows = [
    ['tokens', ...numbers.map(({tokens}) => count(tokens))],
    ['bits', ...numbers.map(({bits}) => bits.toFixed(2))],
    ['bits per token', ...numbers.map(({bits, predicted}) => ratio(bits, predicted))],
    ...segments ? [['bits of the text that both predicted', ...numbers.map(each => each.common.toFixed(2))],
      ['its bits per byte', ...numbers.map(each => ratio(each.common, bytes))]] : [],
  ];
  const shown = table(['', 'A', 'B'], rows, 'totals');
  shown.classList.add('worded');
  return card('Totals', {about: 'Sums of the surprisal in bits. Lower is better.',
    save: {name: 'totals', rows: () => [['', ...pair.map(({label}) => label)], ...rows]}}, shown,
  !segments && notice('The two tokenizers read this text as different bytes, so its parts cannot be compared.'));
}

function surprisalCard(pair, segments, {selected, signal}) {
  const select = i => state.set({position: segments[i].a[0]});
  const pieceOf = ({a}) => pair[0].tokens.pieces.slice(...a).join('');
  const isIn = (i, [from, to]) => i >= from && i < to;
  const strips = pair.map(({label, surprisal, tokens}, k) => surprisalStrip({...tokens, surprisal}, {
    label: `Surprisal under ${label}`, test: `strip-${'ab'[k]}`, signal,
    onSelect: i => segments && select(segments.findIndex(each => isIn(i, each['ab'[k]]))),
  }));
  const differences = segments && tokenStrip({
    pieces: segments.map(pieceOf), label: 'Difference of surprisal', scale: 'signed', onSelect: select,
    test: 'difference', signal,
    share: i => (Number.isNaN(difference(segments[i])) ? null : 0.5 + difference(segments[i]) / (2 * MAX_DIFFERENCE)),
    hint: i => `${pieceOf(segments[i])} · A ${short(segments[i].bits[0])}, B ${short(segments[i].bits[1])} bits`,
  });
  const element = card('Surprisal', {
    wide: true, about: 'Color: surprisal. Difference: orange if B needs more bits, blue if fewer.',
    save: segments && {name: 'difference', figure: differences,
      rows: () => [['segment', 'bytes', 'bits under A', 'bits under B', 'B - A'],
      ...segments.map(each => [pieceOf(each), each.bytes, ...each.bits, difference(each)])]},
  }, columns(pair, strips), h('p.about', {}, ramp('magnitude', ...SURPRISAL_ENDS, signal)),
  differences && [h('h3', {}, 'Difference, B − A'), differences, h('p.about', {},
    ramp('signed', `B ${MAX_DIFFERENCE} bits better`, `B ${MAX_DIFFERENCE} bits worse`, signal))]);
  return {element, update() {
    if (!segments?.length) return;
    const at = segments[selected()];
    differences.select(selected());
    strips.forEach((strip, k) => strip.press(i => isIn(i, at['ab'[k]])));
  }};
}

function settingsCard(pair) {
  const [a, b] = pair.map(({info}) => ({
    ...info.config, parameters: info.parameters, tokenizer: info.tokenizer, 'key/value heads': info.kv_heads,
    'head width': info.head_width, 'inner width': info.inner_width, step: info.step,
    windows: info.windows.every(each => each === null) ? null : info.windows.map(each => each ?? '∞').join(' ')}));
  const keys = [...new Set([...Object.keys(a), ...Object.keys(b)])];
  const text = value => (typeof value === 'number' ? value.toLocaleString('en', {maximumFractionDigits: 8})
    : String(value ?? 'none'));
  const rows = keys.map(key => [key, text(a[key]), text(b[key])]).filter(([, x, y]) => x !== y);
  return card('Settings', {about: 'The settings in which the two models differ.', test: 'settings',
    save: {name: 'settings', rows: () => [['setting', ...pair.map(({label}) => label)], ...rows]}},
  rows.length ? table(['', 'A', 'B'], rows) : notice('All settings are the same.'),
  h('p.about', {}, `${keys.length - rows.length} settings are the same in both.`));
}
