// What if: parts of the model switched off, tokens hidden, values taken from a second text, and what comes of it.

import {post} from '../api.js';
import {barList, key, together} from '../barlist.js';
import {onTheme} from '../colors.js';
import {editFor, editsOf, told} from '../edits.js';
import {exportable} from '../export.js';
import {vocabulary} from '../models.js';
import {patching} from '../patching.js';
import {divergence, entropy, ranked, softmax} from '../sampling.js';
import * as state from '../state.js';
import {sweep} from '../sweep.js';
import {switches} from '../switches.js';
import {card, facts, h, notice, percent, segmented, short, tokenStrip} from '../ui.js';

const LIKELIEST = 10;
const MOVED = 8;
// Bits of change at which a token's colour is at its strongest.
const MOST_CHANGE = 4;
const SERIES = [{name: 'before', color: 'accent'}, {name: 'after', color: 'warm'}];

export default async function show(page, context) {
  const {signal, opened, info, ids, pieces} = context;
  const names = await vocabulary(opened, signal);
  const shape = {layers: info.config.n_layer, heads: info.config.n_head, tokens: ids.length};
  const off = () => editsOf(state.text('off'), shape);
  const by = () => (state.text('by') === 'mean' ? 'mean' : 'zero');
  const position = () => Math.min(state.number('token', ids.length - 1), ids.length - 1);
  const patch = patching({...context, names, shape, position});

  /** The body of a question about the changed model. */
  function changed(more) {
    const patches = patch.edits();
    const edits = [...[...off()].map(code => editFor(code, by())), ...patches];
    return opened.question({ids, ...more, ...(edits.length ? {edits} : {}), ...(patches.length ? {source: patch.source()} : {})});
  }

  const controls = switchesCard({shape, pieces, partial: context.partial, off, by});
  const next = nextCard(names);
  const moved = movedCard(names);
  const surprise = surprisalCard({pieces, partial: context.partial, ids, position});
  const heads = headsCard({opened, ids, names, shape, position, off, by, signal});
  page.append(controls.card, next.card, h('div.stack', {}, moved.card, heads), surprise.card, patch.card);
  let turn = 0;

  async function look() {
    const mine = ++turn;
    controls.show();
    const at = {position: position()};
    try {
      const [before, after, plain, other] = await Promise.all([
        post('/api/next', opened.question({ids, ...at}), signal), post('/api/next', changed(at), signal),
        post('/api/predictions', opened.question({ids}), signal), post('/api/predictions', changed(), signal)]);
      if (mine !== turn || signal.aborted) return;
      controls.fail(null);
      const effect = effectOf(before.logits, after.logits);
      next.show(effect, `after «${pieces[at.position]}», token ${at.position}`);
      moved.show(effect);
      surprise.show(plain.surprisal, other.surprisal);
    } catch (error) {
      if (!signal.aborted && mine === turn) controls.fail(error.message);
    }
  }

  state.on(['off', 'by', 'patch', 'token'], look, signal);
  onTheme(look, signal);
  await patch.begin(look);
  await look();
}

function effectOf(before, after) {
  const [p, q] = [softmax(before), softmax(after)];
  return {before, after, p, q, ranks: ranked(before), then: ranked(after), bits: divergence(before, after)};
}

// --- what is switched off ------------------------------------------------------------------------------------------------

function switchesCard({shape, pieces, partial, off, by}) {
  const it = card('Switch off', 'What a switched-off part writes into the residual stream is replaced by zero, or by its mean over the '
    + 'text’s positions. A block is its attention and its feed-forward together.');
  it.classList.add('wide');
  const columns = [
    ...Array.from({length: shape.heads}, (_, i) => ({code: layer => `h${layer}.${i}`, name: `head ${i}`, short: String(i)})),
    {code: layer => `a${layer}`, name: 'attention', short: 'att'}, {code: layer => `f${layer}`, name: 'feed-forward', short: 'ff'},
    {code: layer => `b${layer}`, name: 'block', short: 'all'},
  ];
  const toggle = code => {
    const now = off();
    if (!now.delete(code)) now.add(code);
    state.set({off: [...now].join(',')});
  };
  const grid = switches({rows: Array.from({length: shape.layers}, (_, i) => `layer ${i}`), columns, isOff: code => off().has(code),
    onToggle: toggle, label: 'Heads and blocks, by layer'});
  grid.dataset.test = 'switches';
  const strip = tokenStrip({pieces, partial, pickOnMove: false, label: 'Tokens to hide', onPick: i => toggle(`p${i}`),
    hint: i => `Hide «${pieces[i]}» from all later tokens`});
  strip.classList.add('tall');
  strip.dataset.test = 'hide';
  const words = h('p', {role: 'status', 'data-test': 'off'});
  const problem = h('div');
  const reset = h('button', {type: 'button', onclick: () => state.set({off: null, patch: null}), 'data-test': 'reset'}, 'Reset');
  it.body.append(h('div.row', {}, segmented({label: 'Replaced by', options: [['zero', 'by zero'], ['mean', 'by the mean']], value: by(),
    onInput: value => state.set({by: value === 'zero' ? null : value})}), reset), h('div.split', {}, grid,
  h('div', {}, h('p.about', {}, 'Hide a token from all later ones: none of them can attend to it.'), strip)), words, problem);
  return {
    card: it,
    fail: message => problem.replaceChildren(...(message ? [notice(message, 'error')] : [])),
    show() {
      const now = off();
      grid.show();
      strip.press(i => now.has(`p${i}`));
      words.textContent = now.size ? `Off: ${[...now].map(told).join(', ')}.` : 'Nothing is switched off.';
    },
  };
}

// --- the next token ------------------------------------------------------------------------------------------------------

function nextCard(names) {
  const it = card('The next token', 'Its likeliest before and after: softmax of the logits over the whole vocabulary.');
  let effect = null;
  // One scale for both lists: the two are to be compared.
  const most = () => Math.max(effect.p[effect.ranks[0]], effect.q[effect.then[0]]);
  const lists = ['Likeliest before', 'Likeliest after'].map(label => barList({label, series: SERIES, most}));
  lists.forEach((one, i) => { one.dataset.test = i ? 'after-bars' : 'before-bars'; });
  const where = h('span.soft');
  const numbers = h('div', {'data-test': 'effect'});
  it.body.append(h('div.row', {}, key(SERIES), where), numbers, ...lists.flatMap(list => [h('h3', {}, list.ariaLabel), list]));
  exportable(it, {name: 'what-if', canvas: together(lists), rows: () => [['id', 'token', 'logit before', 'logit after', 'before', 'after'],
    ...Array.from(effect.ranks, id => [id, names[id], effect.before[id], effect.after[id], effect.p[id], effect.q[id]])]});
  return {card: it, show(now, words) {
    effect = now;
    const {p, q, ranks, then} = effect;
    const row = id => ({id, label: names[id], values: [p[id], q[id]], texts: [percent(p[id]), percent(q[id])], title: `id ${id}`});
    where.textContent = words;
    [ranks, then].forEach((order, i) => lists[i].show(Array.from(order.subarray(0, LIKELIEST), row)));
    numbers.replaceChildren(facts([
      ['Kullback–Leibler divergence', h('span', {'data-test': 'kl'}, `${short(effect.bits)} bits`)],
      ['entropy', `${entropy(p).toFixed(3)} → ${entropy(q).toFixed(3)} bits`],
      ['likeliest', `${names[ranks[0]]} → ${names[then[0]]}`],
    ]));
  }};
}

function movedCard(names) {
  const it = card('What moved most', 'Change of each token, after − before. A constant added to all logits changes no probability.');
  const kinds = {
    probability: {change: ({p, q}, id) => q[id] - p[id], text: x => `${x < 0 ? '−' : '+'}${percent(Math.abs(x))}`},
    logit: {change: ({before, after}, id) => after[id] - before[id], text: x => (x > 0 ? `+${short(x)}` : short(x))},
  };
  const list = barList({label: 'Tokens that moved most', series: [{name: 'change', color: 'accent'}], signed: true});
  list.dataset.test = 'moved-bars';
  const shown = h('div');
  let kind = 'probability';
  let effect = null;
  it.body.append(segmented({label: 'Change of', value: kind, options: [['probability', 'probability'], ['logit', 'logit']],
    onInput(value) { kind = value; draw(); }}), shown, list);
  exportable(it, {name: 'moved', canvas: list, rows: () => [['id', 'token', 'logit', 'probability'],
    ...Array.from(effect.ranks, id => [id, names[id], kinds.logit.change(effect, id), kinds.probability.change(effect, id)])]});

  function draw() {
    const {change, text} = kinds[kind];
    const changes = Float64Array.from(effect.p, (_, id) => change(effect, id));
    const order = ranked(changes);
    const up = Array.from(order.subarray(0, MOVED)).filter(id => changes[id] > 0);
    const down = Array.from(order.subarray(-MOVED)).filter(id => changes[id] < 0);
    shown.replaceChildren(...(up.length + down.length ? [] : [notice('Nothing moved.')]));
    const {before, after, p, q} = effect;
    list.show([...up, ...down].map(id => ({label: names[id], values: [changes[id]], texts: [text(changes[id])],
      title: `id ${id}: ${percent(p[id])} → ${percent(q[id])}, logit ${short(before[id])} → ${short(after[id])}`})));
  }
  return {card: it, show(now) { effect = now; draw(); }};
}

// --- the whole text ------------------------------------------------------------------------------------------------------

function surprisalCard({pieces, partial, ids, position}) {
  const it = card('The whole text', `Change of each token’s surprisal, −log₂ of its probability: orange where the changed model is more `
    + `surprised, blue where less, strongest at ${MOST_CHANGE} bits. Choose a token to see what is expected after it.`);
  it.classList.add('wide');
  let before = null, after = null;
  const strip = tokenStrip({pieces, partial, kind: 'signs', marked: position(), onPick: i => state.set({token: i}),
    hint: i => (before && i ? `${pieces[i]} · ${before[i].toFixed(2)} → ${after[i].toFixed(2)} bits` : pieces[i])});
  strip.classList.add('tall');
  strip.dataset.test = 'change';
  const total = h('div', {'data-test': 'bits'});
  it.body.append(strip, total);
  exportable(it, {name: 'surprisal', rows: () => [['place', 'id', 'token', 'bits before', 'bits after'],
    ...ids.map((id, i) => [i, id, pieces[i], i ? before[i] : '', i ? after[i] : ''])]});
  const sum = values => values.slice(1).reduce((a, b) => a + b, 0);
  return {card: it, show(plain, other) {
    [before, after] = [plain, other];
    strip.tint(i => (i && Math.abs(after[i] - before[i]) > 1e-6 ? 0.5 + (after[i] - before[i]) / (2 * MOST_CHANGE) : null));
    strip.mark(position());
    const [was, is] = [sum(before), sum(after)];
    const change = `${is < was ? '−' : '+'}${Math.abs(is - was).toFixed(2)}`;
    total.replaceChildren(facts([['the whole text', `${was.toFixed(2)} → ${is.toFixed(2)} bits (${change})`]]));
  }};
}

// --- which head matters --------------------------------------------------------------------------------------------------

function headsCard({opened, ids, names, shape, position, off, by, signal}) {
  const it = card('Which head matters', 'Each head switched off alone, one after the other: the divergence of the next token’s '
    + 'distribution, and the change of the likeliest token’s logit.');
  const told = h('p.about', {role: 'status'});
  let plain = null;
  const view = sweep({
    name: 'heads-sweep', button: 'Measure all heads', signal, height: 22,
    rows: Array.from({length: shape.layers}, (_, i) => `layer ${i}`), cols: Array.from({length: shape.heads}, (_, i) => String(i)),
    views: [{name: 'bits', text: 'divergence in bits', kind: 'sizes'}, {name: 'logit', text: 'change of the logit', kind: 'signs'}],
    describe: (layer, head) => `layer ${layer}, head ${head}`,
    action: ['Switch it off', (layer, head) => state.set({off: [...new Set([...off(), `h${layer}.${head}`])].join(',')})],
    begin: async stopped => { plain = (await post('/api/next', opened.question({ids, position: position()}), stopped)).logits; },
    async ask(layer, head, stopped) {
      const edits = [editFor(`h${layer}.${head}`, by())];
      const {logits} = await post('/api/next', opened.question({ids, position: position(), edits}), stopped);
      const likeliest = ranked(plain)[0];
      told.textContent = `The likeliest token is «${names[likeliest]}».`;
      return {bits: divergence(plain, logits), logit: logits[likeliest] - plain[likeliest]};
    },
  });
  state.on(['token', 'by'], () => view.clear(), signal);
  it.body.append(view, told);
  exportable(it, {name: 'heads', canvas: view, rows: view.rows});
  return it;
}
