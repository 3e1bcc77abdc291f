// Feed-forward: the neurons of one layer at a token, what one of them writes, and the texts that activate it most.
import {attempt, bar, bound, button, card, count, exact, h, largest, latest, lines, post, ramp, ranked, short,
  signColor, slider, state, table, tokenCount, vocabulary} from '../core/index.js';
import {tokenStrip, vectorPicture} from '../widgets/index.js';

const LISTED = 12, WRITTEN = 10;
const GATED = [['pre', 'before SiLU'], ['gate', 'gate: after SiLU'], ['pre_linear', 'value it gates'],
  ['post', 'their product']];
const PLAIN = [['pre', 'before'], ['post', 'after']];

export default async function show(page, {signal, opened, info, ids, pieces}) {
  const names = await vocabulary(opened, signal), {config} = info;
  const columns = config.activation === 'swiglu' ? GATED : PLAIN;
  const layer = () => state.index('layer', config.n_layer);
  const position = () => state.index('position', ids.length, ids.length - 1);
  let now = null, stop = new AbortController();  // ends the pictures of an earlier selection
  const problem = h('div');
  const layers = bound(slider({label: 'layer', min: 0, max: config.n_layer - 1, value: layer(),
    onInput: i => state.set({layer: i, neuron: null})}), 'layer', layer, signal);
  const list = neuronsCard({config, info, columns, layers: config.n_layer > 1 && layers});
  const tokens = tokensCard({ids, pieces}), written = writtenCard(), search = textsCard({opened, ids, signal});
  page.append(problem, list.element, tokens.element, written.element, search.element);
  const update = latest(() => attempt(problem, signal, async () => {
    const place = {ids, position: position(), layer: layer()};
    const found = await post('/api/neurons', opened.request(place), signal);
    const order = ranked(found.post.map(Math.abs));
    const neuron = state.index('neuron', info.inner_width, order[0]);
    const one = await post('/api/neuron', opened.request({...place, neuron, k: WRITTEN}), signal);
    stop.abort();
    stop = new AbortController();
    now = {...place, neuron, found, order, one, names, piece: pieces[place.position],
      signal: AbortSignal.any([signal, stop.signal])};
    [list, tokens, written, search].forEach(each => each.show(now));
  }));
  state.on(['layer', 'position', 'neuron'], update, signal);
  await update();
}

// The neurons of the layer at one token.
function neuronsCard({config, info, columns, layers}) {
  const lead = h('p', {test: 'neurons-lead'}), body = h('div'), about = h('p.about');
  const isGated = columns === GATED, activation = isGated ? 'SiLU' : config.activation.replace('_', ' ');
  let now = null;
  const element = card('Neurons', {
    wide: true, about: 'A feed-forward block is a list of neurons. Each reads the token’s residual stream and adds its '
      + 'value times its output vector to it.',
    save: {name: 'neurons', rows: () => [['neuron', ...columns.map(([, name]) => name), 'norm added'],
      ...Array.from(now.found.post, (x, i) => [i, ...columns.map(([key]) => now.found[key][i]), added(i)])]},
  }, h('div.row', {}, layers), lead, body, about);
  const added = i => Math.abs(now.found.post[i]) * now.found.norms[i];
  return {element, show(shown) {
    now = shown;
    const {found, order, neuron, signal, piece, position, layer} = now;
    const rows = [...new Set([...order.subarray(0, LISTED), neuron])], most = Math.abs(found.post[order[0]]);
    const active = found.post.reduce((sum, x) => sum + (x > 0), 0);
    lead.replaceChildren('At ', h('strong.mono', {}, piece), ` (position ${position}), `,
      exact('active', active, count(active)), ` of ${count(info.inner_width)} neurons of layer ${layer} are above 0. `,
      'The strongest:');
    const pick = i => h('button.small', {type: 'button', onclick: () => state.set({neuron: i}, {push: true}),
      'aria-pressed': String(i === neuron), 'aria-label': `neuron ${i}`, 'data-neuron': i}, i);
    const cells = i => [...columns.map(([key]) => exact(`neuron-${key}`, found[key][i], short(found[key][i]))),
      bar(Math.abs(found.post[i]) / most, signColor(found.post[i])), exact('neuron-added', added(i), short(added(i)))];
    const picture = vectorPicture({label: 'all neurons', values: found.post, signal, columns: 128,
      describe: i => [`neuron ${i}`, ...columns.map(([key, name]) => `${name}: ${short(found[key][i])}`)]});
    const focused = body.contains(document.activeElement) ? document.activeElement.dataset.neuron : null;
    body.replaceChildren(
      table(['neuron', ...columns.map(([, name]) => name), '', 'norm added'], rows.map(i => [pick(i), ...cells(i)]),
        'neurons-table'),
      h('p.about', {}, `All ${count(info.inner_width)} neurons, ${columns.at(-1)[1]}: `,
        ...ramp('signed', `−${short(most)}`, short(most), signal)), picture);
    body.querySelector(`[data-neuron="${focused}"]`)?.focus();
    about.textContent = (isGated ? 'SwiGLU: a neuron has a gate, SiLU of one product with the stream, and a second '
      + 'product, which the gate multiplies. ' : `Before and after the activation ${activation}. `)
      + 'Sorted by magnitude. Norm added: |value| × norm of the output vector.';
  }};
}

// One neuron at all tokens of the text.
function tokensCard({ids, pieces}) {
  const strip = h('div'), scale = h('p.about'), title = h('h3');
  let now = null;
  const element = card('Neuron by token', {
    wide: true, about: 'The neuron’s value after the activation at each token of the text. Select a token.',
    save: {name: 'neuron-by-token', figure: () => strip.firstChild, rows: () => [['position', 'id', 'token', 'value'],
      ...Array.from(now.one.values, (x, i) => [i, ids[i], pieces[i], x])]},
  }, title, strip, scale);
  return {element, show(shown) {
    now = shown;
    const {one: {values}, layer, neuron, position, signal} = now, most = largest(values.map(Math.abs));
    title.textContent = `Layer ${layer}, neuron ${neuron}`;
    const hadFocus = strip.contains(document.activeElement);
    strip.replaceChildren(tokenStrip({pieces, signal, scale: 'signed', selected: position, test: 'neuron-tokens',
      selectOnMove: false, share: i => (1 + values[i] / (most || 1)) / 2, hint: i => `${pieces[i]}: ${short(values[i])}`,
      onSelect: i => state.set({position: i, neuron})}));
    if (hadFocus) strip.querySelector('[aria-pressed="true"]').focus();
    scale.replaceChildren(...ramp('signed', `−${short(most)}`, short(most), signal));
  }};
}

// The tokens whose logits a neuron raises and lowers.
function writtenCard() {
  const lead = h('p'), body = h('div.split');
  let now = null;
  const sides = () => [['top', 'Raises most'], ['bottom', 'Lowers most']];
  const element = card('What the neuron writes', {
    wide: true, about: 'The direct effect of its output vector on the logits, per unit of its value: head @ norm(w). '
      + 'The final norm has the scale of this token. What later layers make of it, and any soft-cap, are not included.',
    save: {name: 'neuron-writes', rows: () => [['side', 'id', 'token', 'per unit', 'here'], ...sides().flatMap(([key]) =>
      Array.from(now.one[key], (x, i) => [key, now.one[`${key}_ids`][i], now.names[now.one[`${key}_ids`][i]], x,
        x * now.found.post[now.neuron]]))]},
  }, lead, body);
  return {element, show(shown) {
    now = shown;
    const {one, names, found, neuron, layer, piece} = now, value = found.post[neuron];
    const most = Math.max(...one.top.map(Math.abs), ...one.bottom.map(Math.abs));
    lead.replaceChildren(`Layer ${layer}, neuron ${neuron} has the value `, exact('neuron-value', value, short(value)),
      ' at ', h('strong.mono', {}, piece), value < 0 ? '. It is negative here, so raised and lowered change places in '
        + 'the last column.' : '. The last column is per unit × value.');
    body.replaceChildren(...sides().map(([key, title]) => h('div', {}, h('h3', {}, title),
      table(['token', 'per unit', '', 'here'], Array.from(one[key], (x, i) => [names[one[`${key}_ids`][i]],
        exact(`${key}-unit`, x, short(x)), bar(Math.abs(x) / most, signColor(x)),
        exact(`${key}-here`, x * value, short(x * value))]), `neuron-${key}`))));
  }};
}

// The texts with the largest values. state's `search` is on if the search was started and not stopped.
function textsCard({opened, ids, signal}) {
  const status = h('p', {test: 'search-status', role: 'status'}), problem = h('div');
  const list = h('ol.texts', {test: 'neuron-texts'});
  const toggle = button('', () => state.set({search: isOn() ? null : 'on'}), {test: 'search'});
  const isOn = () => state.text('search') === 'on';
  let now = null, found = null, running = new AbortController();
  const element = card('Texts that activate it most', {
    wide: true, about: 'The windows of the run’s validation split in which the neuron’s value is largest, and the '
      + 'token that has it. The first token of a window does not count.',
    save: {name: 'neuron-texts', rows: () => [['value', 'text', 'token'],
      ...(found?.texts ?? []).map(({value, pieces, at}) => [value, pieces.join(''), pieces[at]])]},
  }, h('div.row', {}, toggle, status), problem, list);
  function showTexts() {
    const {source, searched, total, window, texts} = found;
    status.textContent = `${source ? `Searched ${count(searched)} of ${tokenCount(total)} of the ${source}, in windows of `
      + `${count(window)}.` : `This model has no validation split here: searched the text above, ${tokenCount(total)}.`}`;
    list.replaceChildren(...texts.map(({value, pieces, at}) => h('li', {}, exact('text-value', value, short(value)),
      h('span.mono', {}, pieces.slice(0, at).join(''), h('mark', {}, pieces[at]), pieces.slice(at + 1).join('')))));
  }
  function showButton() {
    toggle.hidden = found !== null && found.searched >= found.total;
    toggle.textContent = isOn() ? 'Stop' : found ? 'Continue' : 'Search';
  }
  // Start or stop the search for the current neuron.
  async function run() {
    running.abort();
    running = new AbortController();
    const mine = AbortSignal.any([signal, running.signal]);
    showButton();
    if (!isOn()) return;
    await attempt(problem, mine, async () => {
      const {layer, neuron} = now;
      for await (found of lines('/api/neuron_texts', opened.request({ids, layer, neuron}), mine)) {
        if (mine.aborted) return;
        showTexts();
        showButton();
      }
    });
  }
  state.on(['search'], run, signal);
  signal.addEventListener('abort', () => running.abort());
  return {element, show(shown) {
    const isSame = now && now.layer === shown.layer && now.neuron === shown.neuron;
    now = shown;
    if (isSame) return;
    found = null;
    list.replaceChildren();
    status.textContent = 'A search takes seconds, with a large model minutes. Its result is kept, for all neurons of the model.';
    run();
  }};
}
