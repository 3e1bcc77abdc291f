// The page's frame: which model, which text, which view.

import {Refused, unreachable} from './api.js';
import {isDark, setTheme} from './colors.js';
import {encode, offerNamed, offers, open} from './models.js';
import * as state from './state.js';
import {choice, h, notice} from './ui.js';

// id: of the file in views/. needs: what a view shows: a 'text' in a model, a 'model', or a 'run' that may have no model yet.
const VIEWS = [
  {id: 'text', title: 'Text', needs: 'text'},
  {id: 'heads', title: 'Heads', needs: 'text'},
  {id: 'mind', title: 'What it thinks', needs: 'text'},
  {id: 'whatif', title: 'What if', needs: 'text'},
  {id: 'write', title: 'What it writes', needs: 'text', takesAnyLength: true},
  {id: 'knows', title: 'What it knows', needs: 'model'},
  {id: 'learned', title: 'How it learned', needs: 'run'},
  {id: 'compare', title: 'Compare', needs: 'text'},
];
const KEYS = [
  ['1 … 8', 'a view'], ['/', 'the text'], ['m', 'the model'], ['t', 'dark or light'], ['← → ↑ ↓', 'the next token, cell or tab'],
  ['Home, End', 'the first and the last token'], ['?', 'these keys'],
];
const root = document.getElementById('view');
let current = new AbortController();

const viewNow = () => VIEWS.find(({id}) => id === state.text('view')) ?? VIEWS[0];

async function render() {
  current.abort();
  current = new AbortController();
  const {signal} = current;
  const view = viewNow();
  delete document.body.dataset.ready;
  document.title = `${view.title} · glassgpt`;
  for (const tab of document.getElementById('views').children) {
    const isIt = tab.dataset.view === view.id;
    tab.setAttribute('aria-current', isIt ? 'page' : 'false');
    if (isIt) tab.scrollIntoView({block: 'nearest', inline: 'nearest'});
  }
  document.getElementById('prompt').hidden = view.needs !== 'text';
  const waiting = setTimeout(() => root.replaceChildren(h('p.notice', {role: 'status'}, 'Computing…')), 250);
  try {
    const [{default: show}, context] = await Promise.all([codeOf(view), contextOf(view, signal)]);
    if (signal.aborted) return;
    clearTimeout(waiting);
    const page = h('div.cards');
    root.replaceChildren(page);
    await show(page, context);
    if (!signal.aborted) document.body.dataset.ready = view.id;
  } catch (error) {
    if (signal.aborted) return;
    root.replaceChildren(notice(error.message, 'error'));
    document.body.dataset.ready = 'error';
    if (!(error instanceof Refused)) throw error;
  } finally {
    clearTimeout(waiting);
  }
}

/** The view's module. That it cannot be fetched is known by the browsers' words alone. */
const codeOf = ({id}) => import(`./views/${id}.js`).catch(error => {
  throw /dynamically imported|Importing a module/.test(error.message) ? unreachable() : error;
});

/** What a view is given: the offer, the opened model, the text's tokens, and a signal that aborts when it is left. */
async function contextOf(view, signal) {
  // B is chosen from the checkpoints that there are now: a run that trains has dropped some since the page was loaded.
  const offered = await offers(view.id === 'compare');
  const offer = await offerOf(offered, state.text('model'));
  const context = {signal, offered, offer, limits: offered.limits};
  if (view.needs === 'run') return context;
  const opened = await open(offer, state.text('step'), signal);
  Object.assign(context, {opened, info: opened.info});
  if (view.needs !== 'text') return context;
  const text = state.text('text') || opened.info.default_text;
  showText(text);
  showCount(null);
  const found = await encode(opened, text, signal);
  showCount(found.ids.length);
  const most = opened.info.most_tokens;
  if (found.ids.length > most && !view.takesAnyLength) {
    throw new Refused(`The text has ${found.ids.length.toLocaleString('en')} tokens, and ${most.toLocaleString('en')} is the most that can be `
      + 'looked at at once in this model: shorten it.');
  }
  return Object.assign(context, {text}, found);
}

/** The offer of that name. Raises `Refused` where it is gone, which may be so since the page was loaded. */
async function offerOf(offered, name) {
  let now = offered, offer = offerNamed(now, name);
  if (!offer) offer = offerNamed(now = await offers(true), name);
  showModels(now, offer ?? {name, kind: 'gone', steps: [], best: null});
  if (!offer) throw new Refused(name ? `${name} is not there (any more): choose another model above.` : 'There is no run and no model to show (any more).');
  return offer;
}

// --- the model -----------------------------------------------------------------------------------------------------------

function showModels(offered, offer) {
  const steps = [['', 'newest'], ...(offer.best === null ? [] : [['best', `best (${offer.best})`]]),
    ...[...offer.steps].reverse().map(step => [step, `step ${step}`])];
  const shown = JSON.stringify([offered.offers.map(o => [o.name, o.state]), offer.name, steps, state.text('step')]);
  const place = document.getElementById('models');
  if (place.dataset.shown === shown) return;
  place.dataset.shown = shown;
  const model = choice({
    label: 'Model', hideLabel: true, value: offer.name,
    options: [...offer.kind === 'gone' ? [[offer.name, offer.name ? `${offer.name} (gone)` : 'nothing']] : [],
      ...offered.offers.map(o => [o.name, o.state === 'running' ? `${o.name} (training)` : o.name])],
    onInput: name => state.set({model: name, step: null}, {push: true}),
  });
  model.select.id = 'model';
  model.select.addEventListener('pointerdown', refreshOffers);
  place.replaceChildren(model);
  if (offer.kind === 'run') {
    place.append(choice({label: 'Checkpoint', hideLabel: true, options: steps, value: state.text('step'),
      onInput: step => state.set({step}, {push: true})}));
  }
}

async function refreshOffers() {
  const offered = await offers(true), offer = offerNamed(offered, state.text('model'));
  if (offer) showModels(offered, offer);
}

// --- the text ------------------------------------------------------------------------------------------------------------

const area = h('textarea', {id: 'text', rows: 2, spellcheck: false, 'aria-label': 'Text that the model reads', oninput: () => soon()});
const count = h('span.count', {'aria-live': 'polite'});
document.getElementById('prompt').append(area, count);
let timer = 0;

function soon() {
  clearTimeout(timer);
  timer = setTimeout(() => state.set({text: area.value, token: null}), 500);
}

function showText(text) {
  if (document.activeElement !== area) area.value = text;  // not under the hands of who is typing
  area.style.height = 'auto';
  area.style.height = `${Math.min(area.scrollHeight + 2, 180)}px`;
}

const showCount = tokens => { count.textContent = tokens === null ? '' : `${tokens.toLocaleString('en')} token${tokens === 1 ? '' : 's'}`; };

// --- the frame -----------------------------------------------------------------------------------------------------------

function buildFrame() {
  document.getElementById('views').append(...VIEWS.map(({id, title}, i) =>
    h('button', {type: 'button', 'data-view': id, title: `${title} (${i + 1})`, onclick: () => go(id)}, title)));
  document.getElementById('views').addEventListener('keydown', event => {
    const tabs = [...event.currentTarget.children];
    const to = tabs[tabs.indexOf(document.activeElement) + ({ArrowLeft: -1, ArrowRight: 1}[event.key] ?? NaN)];
    to?.focus();
  });
  document.getElementById('tools').append(
    h('button.small', {type: 'button', title: 'Dark or light (t)', 'aria-label': 'Dark or light', onclick: turn}, '◐'),
    h('button.small', {type: 'button', title: 'Keys (?)', 'aria-label': 'Keys', onclick: () => keys.showModal()}, '?'));
  document.body.append(keys);
}

const keys = h('dialog.keys', {'aria-label': 'Keys', onclick: () => keys.close()},
  h('h2', {}, 'Keys'), h('dl.facts', {}, KEYS.map(([key, what]) => h('div', {}, h('dt', {}, h('kbd', {}, key)), h('dd', {}, what)))));

const go = id => state.set({view: id}, {push: true});

function turn() {
  const theme = isDark() ? 'light' : 'dark';
  setTheme(theme);
  state.set({theme});
}

addEventListener('keydown', event => {
  const isTyping = event.target.closest('input:not([type=range]):not([type=checkbox]), textarea, select, dialog');
  if (isTyping) {
    if (event.key === 'Escape') event.target.blur();
    return;
  }
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const view = VIEWS[Number(event.key) - 1];
  const action = view ? () => go(view.id) : {
    '/': () => area.focus(), m: () => document.getElementById('model')?.focus(), t: turn, '?': () => keys.showModal(),
  }[event.key];
  if (!action) return;
  event.preventDefault();
  action();
});

setTheme(state.text('theme') || null);
state.on(['theme'], () => setTheme(state.text('theme') || null));
state.on(['view', 'model', 'step', 'text'], render);
buildFrame();
render();
