// Model: the whole model as one picture, drawn from its config, with what one token passes through in it.
import {announce, attempt, bar, bound, button, card, count, droppedTokens, exact, exportableElement, h, latest,
  MAX_LINK_TOKENS, norm, parsePaths, percent,
  post, randomShare, ranked, samplingDistribution, shade, short, slider, softmax, state, table, tagOf, tokenAt,
  vocabulary} from '../core/index.js';
import {tokenStrip, vectorPicture} from '../widgets/index.js';
import {seed, settings} from './generated_text.js';
import {cacheStage} from './kv_cache.js';
import {layersColumn, NORMS} from './model_layers.js';
import {stage} from './model_stage.js';

const TOP = 5, FLOW_MS = 2400;  // of the animation, from the token to its probabilities
const POSITIONS = {
  learned: 'Adds the learned vector of this position.',
  sinusoidal: 'Multiplies by √width and adds sines and cosines of this position.',
  rope: 'Adds nothing here: each layer rotates its queries and keys by their positions.', none: 'Adds nothing.',
};

export default async function show(page, context) {
  const {signal, opened, info, ids: prompt, pieces} = context, {config} = info;
  const names = await vocabulary(opened, signal), tag = tagOf(`${info.name} ${info.step}`, prompt);
  let now = null, tokens = null, shownIds = '', isFlowing = false, stop = new AbortController();  // ends the pictures of an earlier token
  // The text with what was generated, the same as in the view Generation. A full context drops its older half.
  function text() {
    const paths = parsePaths(state.text('paths'), tag, info.vocab_size);
    const all = [...prompt.map((id, i) => [id, pieces[i]]), ...paths.current.map(({id}) => [id, names[id]])];
    const shown = all.slice(droppedTokens(all.length, info.most_tokens));
    return {paths, ids: shown.map(([id]) => id), pieces: shown.map(([, piece]) => piece),
      dropped: all.length - shown.length};
  }
  // The token that is sampled after the text's last one, as in the view Generation.
  const sampled = ({ids, dropped}, logits) => tokenAt(samplingDistribution(logits, settings(info.vocab_size)),
    randomShare(seed(), dropped + ids.length, 0));
  const problem = h('div'), strip = h('div.model-tokens'), picture = h('div.model', {test: 'model'});
  const next = button('Next token', sampleNext, {kind: 'button.main', test: 'next-token',
    title: 'Sample the next token, and follow it through the model'});
  const back = button('Back', () => {
    const {paths} = text();
    paths.back();
    state.set({paths: paths.toText(tag), position: null});
  }, {title: 'Take back the last generated token', test: 'take-back'});
  const layer = bound(slider({label: 'open layer', min: 0, max: config.n_layer - 1,
    value: state.index('layer', config.n_layer), onInput: i => state.set({layer: i})}), 'layer',
  () => state.index('layer', config.n_layer), signal);
  const element = card('Model', {
    wide: true, about: `How this model predicts the token after the selected one. All numbers are of this token. `
      + `Select a part to open its view. Blue: negative, orange: positive.`,
    save: {name: 'model', figure: Object.assign(picture, {figure: exportableElement(picture)}), rows: () => rowsOf(now)},
  }, h('div.row', {}, next, back, config.n_layer > 1 && layer), problem, strip, picture);
  page.append(element);
  const update = latest(() => attempt(problem, signal, async () => {
    const shown = text(), {ids} = shown, T = ids.length;
    const place = {position: state.index('position', T, T - 1), layer: state.index('layer', config.n_layer)};
    const [found, {logits}] = await Promise.all([
      post('/api/flow', opened.request({ids, ...place}), signal),
      post('/api/next', opened.request({ids, position: place.position}), signal)]);
    stop.abort();
    stop = new AbortController();
    now = {...shown, ...place, found, logits, p: softmax(logits), order: ranked(logits), names, info,
      chosen: ids[place.position + 1] ?? sampled(shown, logits), signal: AbortSignal.any([signal, stop.signal])};
    const generated = shown.paths.current.length;
    back.disabled = !generated;
    next.disabled = generated >= MAX_LINK_TOKENS;
    showTokens();
    const isLayerFocused = document.activeElement?.dataset.layer !== undefined;
    picture.replaceChildren(column('Input', inputColumn(now)), column('Layers', layersColumn(now)),
      column('Output', outputColumn(now)), cacheStage(now));
    if (isLayerFocused) picture.querySelector(`[data-layer="${place.layer}"]`).focus();
    flow();
  }));
  // The tokens of the same text stay, with the focus.
  function showTokens() {
    const {ids, position} = now;
    if (String(ids) !== shownIds) {
      shownIds = String(ids);
      tokens = tokenStrip({pieces: now.pieces, signal, onSelect: i => state.set({position: i}), label: 'Tokens',
        hint: i => `id ${ids[i]} · position ${i}`});
      strip.replaceChildren(tokens);
    }
    tokens.select(position);
  }
  // After "Next token", the parts light up from the token to its probabilities.
  function flow() {
    const parts = [...picture.querySelectorAll('.stage, button.layer-row')];
    parts.forEach((part, i) => { part.style.animationDelay = `${Math.round(FLOW_MS * i / parts.length)}ms`; });
    picture.classList.toggle('flow', isFlowing);
    isFlowing = false;
  }
  async function sampleNext() {
    await attempt(problem, signal, async () => {
      const shown = text(), {ids, paths} = shown;
      const {logits} = await post('/api/next', opened.request({ids, position: ids.length - 1}), signal);
      const id = sampled(shown, logits), p = softmax(logits)[id];
      announce(`${names[id]}, ${percent(p)}`);
      paths.append({id, p});
      isFlowing = true;
      state.set({paths: paths.toText(tag), position: null});
    });
  }
  state.on(['layer', 'position', 'paths', 'temperature', 'top_k', 'top_p', 'min_p', 'seed'], update, signal);
  await update();
}

function inputColumn({info, ids, pieces, position, found, signal}) {
  const {config} = info, id = ids[position];
  const picture = (label, values) => vectorPicture({label, values, signal, columns: 48});
  return [
    stage('Token', {link: {view: 'text', position}}, h('p.big.mono', {}, pieces[position]),
      h('p.about', {}, `position ${count(position)}, counted from 0`)),
    stage('Token id', {}, h('p.big', {test: 'flow-id'}, count(id)),
      h('p.about', {}, `of ${count(config.vocab_size)} in the vocabulary`)),
    stage('Embedding', {link: {view: 'weights', table: 'embedding', row: id}, value: ['embedding-norm',
      norm(found.embedding)]}, picture('embedding', found.embedding),
    h('p.about', {}, `row ${count(id)} of a matrix of ${count(config.vocab_size)} × ${count(config.n_embd)}`)),
    stage('Positions', {link: info.tables.includes('positions') ? {view: 'weights', table: 'positions', row: position}
      : null, value: ['first-norm', norm(found.first)]},
    h('p.about', {}, POSITIONS[config.position] + (config.embedding_norm ? ` Then ${NORMS[config.norm]}.` : '')),
    picture('start of the residual stream', found.first)),
  ];
}

function outputColumn({info, names, found, logits, p, order, chosen, ids, position, signal}) {
  const {config} = info;
  const rows = [...order.subarray(0, TOP)].map(id => [id === chosen ? h('strong', {}, names[id]) : names[id],
    exact('top-logit', logits[id], short(logits[id])), bar(p[id], shade('magnitude', 0.75)),
    exact('top-p', p[id], percent(p[id]))]);
  return [
    stage(`Final ${NORMS[config.norm]}`, {value: ['final-norm', norm(found.ln_final)],
      link: {view: 'lens', position, depth: config.n_layer}},
    vectorPicture({label: 'after the final norm', values: found.ln_final, signal, columns: 48})),
    stage('Head', {link: {view: 'weights', table: config.tied_head ? 'embedding' : 'head', row: chosen}},
      h('p.about', {}, `${count(config.n_embd)} numbers → ${count(info.vocab_size)} logits, by `
        + (config.tied_head ? 'the embedding’s matrix (tied)' : 'a matrix of its own (not tied)')
        + (config.logit_softcap ? `, squashed to ±${short(config.logit_softcap)}` : ''))),
    stage('Logits and probabilities', {link: {view: 'generation'}},
      table(['token', 'logit', '', 'probability'], rows, 'flow-top')),
    stage(position === ids.length - 1 ? 'Sampled token' : 'Next token of the text', {link: {view: 'generation'},
      value: ['chosen-p', p[chosen], percent(p[chosen])]}, h('p.big.mono', {test: 'chosen'}, names[chosen])),
  ];
}

const column = (name, parts) => h('div.model-column', {role: 'group', 'aria-label': name}, parts,
  name !== 'Input' && h('span.arrow.from-side', {'aria-hidden': 'true'}, '→'));

// The numbers of the picture, one per row.
function rowsOf({found, position, ids, info, logits, p}) {
  const columns = ['attention adds', 'feed-forward adds', 'residual stream before', 'residual stream after'];
  const parts = ['embedding', 'first', 'resid_pre', 'attn_out', 'mlp_post', 'mlp_out', 'resid_post', 'ln_final'];
  return [['part', 'index', 'value'], ['position', '', position], ['id', '', ids[position]],
    ...columns.flatMap((name, c) => Array.from({length: info.config.n_layer}, (_, i) =>
      [`norm: ${name}`, i, found.norms[i * columns.length + c]])),
    ...parts.flatMap(name => Array.from(found[name], (x, i) => [name, i, x])),
    ...Array.from(logits, (x, i) => ['logit', i, x]), ...Array.from(p, (x, i) => ['probability', i, x])];
}
