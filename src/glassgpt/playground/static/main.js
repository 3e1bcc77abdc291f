// The page's frame: which model, which text, which view.
import {button, checkpointOptions, choice, count, encode, findEntry, h, isDark, loadCatalog, login, LoginError, notice,
  openModel, RequestError, setTheme, state, tokenCount, unreachable} from './core/index.js';

// id: the file in views/. needs: a 'text' in a model, a 'model', or a 'run', which may have no model yet.
const VIEWS = [
  {id: 'model', title: 'Model', needs: 'text'},
  {id: 'text', title: 'Text', needs: 'text'},
  {id: 'heads', title: 'Attention heads', needs: 'text'},
  {id: 'neurons', title: 'Feed-forward', needs: 'text'},
  {id: 'lens', title: 'Logit lens', needs: 'text'},
  {id: 'interventions', title: 'Interventions', needs: 'text'},
  {id: 'generation', title: 'Generation', needs: 'text', anyLength: true},
  {id: 'weights', title: 'Weights', needs: 'model'},
  {id: 'training', title: 'Training', needs: 'run'},
  {id: 'compare', title: 'Compare', needs: 'text'},
];
const KEYS = [
  ['1 … 9, 0', 'a view'], ['/', 'the text'], ['m', 'the model'], ['t', 'dark or light'],
  ['← → ↑ ↓', 'the next token, cell or tab'], ['Home, End', 'the first and the last token'], ['?', 'these keys'],
];
const TYPING_MS = 500, WAITING_MS = 250;
const place = id => document.getElementById(id);
const root = place('view');
let current = new AbortController();

async function render() {
  current.abort();
  current = new AbortController();
  const {signal} = current, view = VIEWS.find(({id}) => id === state.text('view')) ?? VIEWS[0];
  delete document.body.dataset.ready;
  document.title = `${view.title} · glassgpt`;
  for (const tab of place('views').children) {
    tab.setAttribute('aria-current', tab.dataset.view === view.id ? 'page' : 'false');
    if (tab.dataset.view === view.id) tab.scrollIntoView({block: 'nearest', inline: 'nearest'});
  }
  place('prompt').hidden = view.needs !== 'text';
  const waiting = setTimeout(() => root.replaceChildren(notice('Computing…')), WAITING_MS);
  try {
    const token = state.takeToken();
    if (token !== null) await login(token);
    const [{default: show}, context] = await Promise.all([loadView(view), contextOf(view, signal)]);
    if (signal.aborted) return;
    clearTimeout(waiting);
    const page = h('div.cards');
    root.replaceChildren(page);
    await show(page, context);
    if (!signal.aborted) document.body.dataset.ready = view.id;
  } catch (error) {
    if (signal.aborted) return;
    if (error instanceof LoginError) place('prompt').hidden = true;
    root.replaceChildren(error instanceof LoginError ? loginForm(error.message) : notice(error.message, 'error'));
    document.body.dataset.ready = error instanceof LoginError ? 'login' : 'error';
    if (!(error instanceof RequestError)) throw error;
  } finally {
    clearTimeout(waiting);
  }
}

// Import the view's module. Browsers report a failed download only in the error's text.
const loadView = ({id}) => import(`./views/${id}.js`).catch(error => {
  throw /dynamically imported|Importing a module/.test(error.message) ? unreachable() : error;
});

// What a view gets: the catalog, the entry, the opened model, the text's tokens, and a signal that aborts at its end.
async function contextOf(view, signal) {
  // B is chosen from the checkpoints that exist now: a run in training deletes some.
  let catalog = await loadCatalog(view.id === 'compare'), entry = findEntry(catalog, state.text('model'));
  if (!entry) {
    catalog = await loadCatalog(true);
    entry = findEntry(catalog, state.text('model'));
  }
  showModels(catalog, entry ?? {name: state.text('model'), kind: 'missing', steps: [], best: null});
  if (!entry) throw new RequestError(state.text('model') ? `${state.text('model')} is not served: choose another model `
    + `above.` : 'No run and no model is served.');
  const context = {signal, catalog, entry, limits: catalog.limits};
  if (view.needs === 'run') return context;
  const opened = await openModel(entry, state.text('step'), signal), {info} = opened;
  Object.assign(context, {opened, info});
  if (view.needs !== 'text') return context;
  const text = state.text('text') || info.default_text;
  area.placeholder = info.default_text;
  showText(text);
  tokens.textContent = '';
  const encoded = await encode(opened, text, signal), length = encoded.ids.length;
  tokens.textContent = tokenCount(length);
  if (length > info.most_tokens && !view.anyLength) {
    throw new RequestError(`The text has ${tokenCount(length)}, but this view shows at most `
      + `${count(info.most_tokens)}: shorten it.`);
  }
  return Object.assign(context, {text}, encoded);
}

// Ask for the access token. What was typed stays if the view is drawn again meanwhile.
let typed = '';
function loginForm(message) {
  const field = h('input', {type: 'password', 'aria-label': 'Access token', autocomplete: 'off', spellcheck: false,
    test: 'token', value: typed, oninput: () => { typed = field.value; }});
  const send = () => {
    // The address that `glassgpt play` prints works, too.
    const token = field.value.trim().replace(/^.*[#&?]token=/, '');
    login(token).then(() => location.reload(), error => root.replaceChildren(loginForm(error.message)));
  };
  field.addEventListener('keydown', event => event.key === 'Enter' && send());
  return h('div.notice', {role: 'alert', test: 'login'}, message,
    h('p', {}, 'Or enter that address or its token here:'), h('div.row', {}, field, button('Log in', send)));
}

function showModels(catalog, entry) {
  const shown = JSON.stringify([catalog.entries.map(o => [o.name, o.state]), entry.name, entry.steps, entry.best,
    state.text('step')]);
  if (place('models').dataset.shown === shown) return;
  place('models').dataset.shown = shown;
  const model = choice({
    label: 'Model', value: entry.name, onInput: name => state.set({model: name, step: null}, {push: true}),
    options: [...entry.kind === 'missing' ? [[entry.name, entry.name ? `${entry.name} (missing)` : 'none']] : [],
      ...catalog.entries.map(o => [o.name, o.state === 'running' ? `${o.name} (training)` : o.name])],
  });
  model.querySelector('label').htmlFor = model.select.id = 'model';
  model.select.addEventListener('pointerdown', async () => {
    const now = await loadCatalog(true), same = findEntry(now, state.text('model'));
    if (same) showModels(now, same);
  });
  const checkpoint = entry.kind === 'run' && choice({label: 'Checkpoint', value: state.text('step'),
    options: checkpointOptions(entry), onInput: step => state.set({step}, {push: true})});
  place('models').replaceChildren(model, checkpoint || '');
}

const area = h('textarea', {id: 'text', rows: 2, spellcheck: false, 'aria-label': 'Text that the model reads',
  oninput: readText, onblur: () => area.value || showText(shownText)});
const tokens = h('span.count', {'aria-live': 'polite'});
let timer = 0, shownText = '';
function readText() {
  clearTimeout(timer);
  timer = setTimeout(() => state.set({text: area.value, position: null}), TYPING_MS);
}

function showText(text) {
  shownText = text;
  if (document.activeElement !== area) area.value = text;  // do not change what the user is typing
  area.style.height = 'auto';
  area.style.height = `${Math.min(area.scrollHeight + 2, 180)}px`;
}

const keys = h('dialog.keys', {'aria-label': 'Keys', onclick: () => keys.close()},
  h('h2', {}, 'Keys'),
  h('dl.facts', {}, KEYS.map(([key, what]) => h('div', {}, h('dt', {}, h('kbd', {}, key)), h('dd', {}, what)))));
const open = id => state.set({view: id}, {push: true});
const switchTheme = () => state.set({theme: isDark() ? 'light' : 'dark'});
const applyTheme = () => setTheme(state.text('theme') || null);

place('prompt').append(area, tokens);
place('views').append(...VIEWS.map(({id, title}, i) => button(title, () => open(id),
  {'data-view': id, title: `${title} (${(i + 1) % 10})`})));
place('views').addEventListener('keydown', event => {
  const tabs = [...event.currentTarget.children];
  tabs[tabs.indexOf(document.activeElement) + ({ArrowLeft: -1, ArrowRight: 1}[event.key] ?? NaN)]?.focus();
});
place('tools').append(
  button('◐', switchTheme, {kind: 'button.small', title: 'Dark or light (t)', 'aria-label': 'Dark or light'}),
  button('?', () => keys.showModal(), {kind: 'button.small', title: 'Keys (?)', 'aria-label': 'Keys'}));
document.body.append(keys);

addEventListener('keydown', event => {
  if (event.target.closest('input:not([type=range]):not([type=checkbox]), textarea, select, dialog')) {
    if (event.key === 'Escape') event.target.blur();
    return;
  }
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const view = VIEWS['1234567890'.split('').indexOf(event.key)];
  const action = view ? () => open(view.id)
    : {'/': () => area.focus(), m: () => place('model')?.focus(), t: switchTheme,
      '?': () => keys.showModal()}[event.key];
  if (!action) return;
  event.preventDefault();
  action();
});

state.on(['theme'], applyTheme);
state.on(['view', 'model', 'step', 'text', 'token'], render);
applyTheme();
render();
