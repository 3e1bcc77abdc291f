// Interventions: ablate components, hide tokens, patch activations from a second text, and see what changes.
import {attempt, bound, button, card, editRequest, editText, entropy, exportableElement, facts, h, headNames,
  klDivergence, layerNames, notice, onTheme, parseEdits, percent, post, ranked, segmented, short, softmax, state, sum,
  vocabulary} from '../core/index.js';
import {barLegend, barList, sweep, switchGrid, tokenStrip} from '../widgets/index.js';
import {patchingCard} from './patching.js';

const TOP = 10, CHANGED = 8;
const MAX_CHANGE = 4;  // bits of change at which a token's color is strongest
const SERIES = [{name: 'before', color: 'accent'}, {name: 'after', color: 'warm'}];
const ablateBy = () => state.option('by', ['zero', 'mean']);

export default async function show(page, context) {
  const {signal, opened, info, ids, pieces} = context;
  const names = await vocabulary(opened, signal);
  const shape = {layers: info.config.n_layer, heads: info.config.n_head, tokens: ids.length};
  const ablated = () => parseEdits(state.text('ablate'), shape);
  const position = () => state.index('position', ids.length, ids.length - 1);
  const view = {...context, names, shape, ablated, position};
  const patching = patchingCard(view);
  const ablation = ablationCard(view), next = nextCard(view), changes = changesCard(view),
    surprisal = surprisalCard(view);
  page.append(ablation.element, next.element, h('div.stack', {}, changes.element, importanceCard(view)),
    surprisal.element, patching.element);
  let turn = 0;
  // The body of a request about the changed model.
  function edited(more) {
    const patches = patching.edits();
    const edits = [...Array.from(ablated(), code => editRequest(code, ablateBy())), ...patches];
    return opened.request({ids, ...more, ...edits.length && {edits}, ...patches.length && {source: patching.source()}});
  }
  async function update() {
    const mine = ++turn, at = {position: position()};
    ablation.show();
    await attempt(ablation.problem, signal, async () => {
      const answers = await Promise.all([
        post('/api/next', opened.request({ids, ...at}), signal), post('/api/next', edited(at), signal),
        post('/api/predictions', opened.request({ids}), signal), post('/api/predictions', edited(), signal)]);
      if (mine !== turn) return;
      const [before, after] = answers.map(({logits}) => logits), [p, q] = [softmax(before), softmax(after)];
      const effect = {before, after, p, q, order: ranked(before), orderAfter: ranked(after),
        bits: klDivergence(before, after)};
      next.show(effect, `after «${pieces[at.position]}», token ${at.position}`);
      changes.show(effect);
      surprisal.show(answers[2].surprisal, answers[3].surprisal);
    });
  }
  state.on(['ablate', 'by', 'patch', 'position'], update, signal);
  onTheme(update, signal);
  await patching.start(update);
  await update();
}

function ablationCard({shape, pieces, partial, ablated, signal}) {
  const columns = [
    ...headNames(shape.heads).map(i => ({code: layer => `h${layer}.${i}`, name: `head ${i}`, short: i})),
    {code: layer => `a${layer}`, name: 'attention', short: 'att'},
    {code: layer => `f${layer}`, name: 'feed-forward', short: 'ff'},
    {code: layer => `b${layer}`, name: 'block', short: 'all'},
  ];
  const toggle = code => {
    const now = ablated();
    if (!now.delete(code)) now.add(code);
    state.set({ablate: [...now].join(',')});
  };
  const grid = switchGrid({rows: layerNames(shape.layers), columns, onToggle: toggle,
    isOn: code => ablated().has(code), label: 'Components by layer', test: 'switches'});
  const strip = tokenStrip({pieces, partial, selectOnMove: false, label: 'Tokens to hide',
    onSelect: i => toggle(`p${i}`), hint: i => `Hide «${pieces[i]}» from all later tokens`, test: 'hide', signal});
  const summary = h('p', {role: 'status', test: 'ablated'}), problem = h('div');
  const element = card('Ablation', {
    wide: true, about: 'Replace what a component writes to the residual stream by zero, or by its mean over the text.',
  }, h('div.row', {},
    bound(segmented({label: 'Replace by', options: [['zero', 'by zero'], ['mean', 'by the mean']], value: ablateBy(),
      onInput: value => state.set({by: value === 'zero' ? null : value})}), 'by', ablateBy, signal),
    button('Reset', () => state.set({ablate: null, patch: null}), {test: 'reset'})),
  h('div.split', {}, grid, h('div', {}, h('p.about', {}, 'Hide a token: no later token can attend to it.'), strip)),
  summary, problem);
  return {element, problem, show() {
    const now = ablated();
    grid.show();
    strip.press(i => now.has(`p${i}`));
    summary.textContent = now.size ? `Ablated: ${[...now].map(editText).join(', ')}.` : 'Nothing is ablated.';
  }};
}

function nextCard({names, signal}) {
  let effect = null;
  // One scale for both lists, so that they can be compared.
  const full = () => Math.max(effect.p[effect.order[0]], effect.q[effect.orderAfter[0]]);
  const lists = ['before', 'after'].map(when => barList({label: `Top tokens ${when}`, series: SERIES, full,
    test: `${when}-bars`}));
  const where = h('span.soft'), numbers = h('div', {test: 'effect'});
  const both = h('div', {}, lists.map(list => [h('h3', {}, list.ariaLabel), list]));
  const element = card('Next token', {
    about: 'The top tokens before and after: softmax of the logits over the whole vocabulary.',
    save: {name: 'next-token', figure: () => ({figure: exportableElement(both)}), rows: () => [
      ['id', 'token', 'logit before', 'logit after', 'before', 'after'], ...Array.from(effect?.order ?? [], id =>
        [id, names[id], effect.before[id], effect.after[id], effect.p[id], effect.q[id]])]},
  }, h('div.row', {}, barLegend(SERIES, signal), where), numbers, both);
  return {element, show(now, text) {
    effect = now;
    const {p, q, order, orderAfter, bits} = effect;
    const row = id => ({label: names[id], values: [p[id], q[id]], texts: [percent(p[id]), percent(q[id])],
      title: `id ${id}`});
    where.textContent = text;
    [order, orderAfter].forEach((ids, i) => lists[i].show(Array.from(ids.subarray(0, TOP), row)));
    numbers.replaceChildren(facts([
      ['Kullback–Leibler divergence', h('span', {test: 'kl'}, `${short(bits)} bits`)],
      ['entropy', `${entropy(p).toFixed(3)} → ${entropy(q).toFixed(3)} bits`],
      ['top token', `${names[order[0]]} → ${names[orderAfter[0]]}`],
    ]));
  }};
}

function changesCard({names}) {
  const measures = {
    probability: {change: ({p, q}, id) => q[id] - p[id], text: x => `${x < 0 ? '−' : '+'}${percent(Math.abs(x))}`},
    logit: {change: ({before, after}, id) => after[id] - before[id], text: x => (x > 0 ? `+${short(x)}` : short(x))},
  };
  let measure = 'probability', effect = null;
  const list = barList({label: 'Tokens that changed most', series: [{name: 'change', color: 'accent'}], signed: true,
    test: 'change-bars'});
  const problem = h('div');
  const element = card('Largest changes', {
    about: 'The change of each token, after − before. A constant added to all logits changes no probability.',
    save: {name: 'changes', figure: list, rows: () => [
      ['id', 'token', 'logit', 'probability'], ...Array.from(effect?.order ?? [], id =>
        [id, names[id], measures.logit.change(effect, id), measures.probability.change(effect, id)])]},
  }, segmented({label: 'Change of', value: measure, options: Object.keys(measures).map(name => [name, name]),
    onInput: draw}), problem, list);

  function draw(value = measure) {
    measure = value;
    const {change, text} = measures[measure], {before, after, p, q} = effect;
    const changes = Float64Array.from(p, (_, id) => change(effect, id)), order = ranked(changes);
    const up = Array.from(order.subarray(0, CHANGED)).filter(id => changes[id] > 0);
    const down = Array.from(order.subarray(-CHANGED)).filter(id => changes[id] < 0);
    problem.replaceChildren(...up.length + down.length ? [] : [notice('Nothing changed.')]);
    list.show([...up, ...down].map(id => ({label: names[id], values: [changes[id]], texts: [text(changes[id])],
      title: `id ${id}: ${percent(p[id])} → ${percent(q[id])}, logit ${short(before[id])} → ${short(after[id])}`})));
  }
  return {element, show(now) {
    effect = now;
    draw();
  }};
}

function surprisalCard({pieces, partial, ids, position, signal}) {
  let before = null, after = null;
  const strip = tokenStrip({pieces, partial, scale: 'signed', selected: position(),
    onSelect: i => state.set({position: i}), signal,
    hint: i => (before && i ? `${pieces[i]} · ${before[i].toFixed(2)} → ${after[i].toFixed(2)} bits` : pieces[i]),
    test: 'change'});
  const summary = h('div', {test: 'bits'});
  const element = card('Surprisal change', {
    wide: true, about: `Orange: the changed model is more surprised, blue: less, strongest at ${MAX_CHANGE} bits.`,
    save: {name: 'surprisal', figure: () => before && strip, rows: () => [
      ['position', 'id', 'token', 'bits before', 'bits after'], ...(before ? ids : []).map((id, i) =>
        [i, id, pieces[i], i ? before[i] : '', i ? after[i] : ''])]},
  }, strip, summary);
  return {element, show(...surprisals) {
    [before, after] = surprisals;
    strip.tint(i => (i && Math.abs(after[i] - before[i]) > 1e-6 ? 0.5 + (after[i] - before[i]) / (2 * MAX_CHANGE)
      : null));
    strip.select(position());
    const [was, is] = surprisals.map(bits => sum(bits.slice(1))), sign = is < was ? '−' : '+';
    summary.replaceChildren(facts([
      ['whole text', `${was.toFixed(2)} → ${is.toFixed(2)} bits (${sign}${Math.abs(is - was).toFixed(2)})`]]));
  }};
}

function importanceCard({opened, ids, names, shape, position, ablated, signal}) {
  const about = h('p.about', {role: 'status'});
  let logits = null, top = 0;
  const request = (more, stopped) => post('/api/next', opened.request({ids, position: position(), ...more}), stopped);
  const view = sweep({
    test: 'heads-sweep', title: 'Measure all heads', signal,
    rows: layerNames(shape.layers), cols: headNames(shape.heads),
    measures: [['bits', 'divergence in bits', 'magnitude'], ['logit', 'logit change', 'signed']],
    describe: (layer, head) => `layer ${layer}, head ${head}`,
    action: ['Ablate it', (layer, head) => state.set({ablate: [...ablated().add(`h${layer}.${head}`)].join(',')})],
    async prepare(stopped) {
      logits = (await request({}, stopped)).logits;
      top = ranked(logits)[0];
      about.textContent = `The top token is «${names[top]}».`;
    },
    async measure(layer, head, stopped) {
      const after = (await request({edits: [editRequest(`h${layer}.${head}`, ablateBy())]}, stopped)).logits;
      return {bits: klDivergence(logits, after), logit: after[top] - logits[top]};
    },
  });
  state.on(['position', 'by'], view.clear, signal);
  return card('Head importance', {
    about: 'Each head ablated alone: divergence of the next token’s distribution, and change of the top logit.',
    save: {name: 'heads', figure: view, rows: view.rows},
  }, view, about);
}
