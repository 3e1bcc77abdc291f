// Training: the records of a run, finished or in progress, and its snapshots step by step.
import {attempt, bar, button, card, choice, count, duration, exact, facts, get, h, latest, notice, openModel,
  PromiseCache, Records, short, state, vocabulary} from '../core/index.js';
import {scrubber} from '../widgets/index.js';
import {headScoresCard, scoresOverSteps} from './head_scores.js';
import {snapshotCards} from './snapshot_cards.js';
import {trainingCharts} from './training_charts.js';

const MAX_ADDED_ROWS = 1500;  // before the history is loaded again, so that charts stay small
const SNAPSHOT_BYTES = 48e6;
const RESUME = 'resume it with `glassgpt train --resume`';
const withAdvice = name => (['stopped', 'interrupted', 'preempted'].includes(name) ? `${name}; ${RESUME}` : name);

export default async function show(page, {entry, catalog, signal}) {
  if (entry.kind !== 'run') return void page.append(notARun(entry, catalog));
  const run = {history: null, records: null};
  const overview = runCard(), steps = stepCards(run, entry, signal);
  const charts = trainingCharts({records: () => run.records, environment: () => run.history.environment,
    marked: steps.marked, signal});
  await followRun(entry.id, signal, {
    loaded(history) {
      const isFirst = run.history === null;
      Object.assign(run, {history, records: new Records(history)});
      overview.show(run);
      if (isFirst) return;
      steps.reset();
      charts.update();
    },
    metrics(records) {
      run.records.add(records);
      charts.update();
      return run.records.added > MAX_ADDED_ROWS;
    },
    samples(sections) {
      const last = run.history.samples.at(-1)?.step ?? -1;
      run.history.samples.push(...sections.filter(({step}) => step > last));
    },
    snapshots(list) { run.history.snapshots = list; }, checkpoints(list) { run.history.checkpoints = list; },
    status(status) { run.history.status = status; }, changed(name) {
      overview.show(run);
      if (name === 'samples' || name === 'snapshots') steps.grow();
    },
    connected: overview.connected,
  });
  if (signal.aborted) return;
  page.append(overview.element, ...charts.cards, ...steps.cards);
  charts.draw();
  state.on(['axis', 'at'], charts.draw, signal);
  await steps.start();
}

// Load a run's history, and follow its events until `signal` aborts. handlers: loaded(history), also when the run was
// reset or grew much; one per event, which returns true to load the history again; changed(event); connected().
async function followRun(model, signal, {loaded, changed, connected, ...handlers}) {
  let waiting = null;  // events that arrive while the history loads
  async function load() {
    waiting = [];
    try {
      const history = await get('/api/history', {model}, signal);
      loaded(history);
      return history;
    } finally {
      const events = waiting;
      waiting = null;
      events.forEach(([name, data]) => handle(name, data));
    }
  }
  const failed = error => signal.aborted || connected(false, error.message);
  const reload = latest(() => load().catch(failed));
  function handle(name, data) {
    if (name === 'reset') return void reload();
    if (waiting) return void waiting.push([name, data]);
    if (handlers[name](data)) reload();
    changed(name);
  }
  const {cursor} = await load();
  const source = new EventSource(`/api/events?${new URLSearchParams({model, after: cursor})}`);
  signal.addEventListener('abort', () => source.close());
  for (const name of [...Object.keys(handlers), 'reset']) {
    source.addEventListener(name, event => handle(name, JSON.parse(event.data)));
  }
  source.addEventListener('open', () => connected(true));
  source.addEventListener('error', () => {
    connected(false);
    // The browser does not reconnect if the server refused: a restarted one needs its new token.
    if (source.readyState === EventSource.CLOSED) get('/api/catalog', {}, signal).catch(failed);
  });
}

// For a model that is not a run: which of the served ones are.
function notARun(entry, {entries}) {
  const runs = entries.filter(({kind}) => kind === 'run').map(({name}) =>
    button(name, () => state.set({model: name, step: null}, {push: true})));
  return h('div.notice', {role: 'status', test: 'no-run'}, `${entry.name} is a model, not a run: it has no history. `,
    runs.length ? 'Runs: ' : 'No run is served; create one with `glassgpt train`.', h('div.row', {}, runs));
}

function runCard() {
  const lost = h('div', {role: 'status', test: 'connection'}), place = h('div');
  let wasLost = false;
  return {
    element: card('Run', {wide: true}, lost, place),
    connected(isOpen, reason = 'Connection lost; reconnecting. Is `glassgpt play` still running?') {
      if (isOpen && !wasLost) return;
      wasLost = !isOpen;
      lost.replaceChildren(isOpen ? h('p.about', {}, 'Connected again.') : notice(reason, 'error'));
    },
    show: run => place.replaceChildren(...runFacts(run)),
  };
}

function runFacts({history: {status, environment, checkpoints}, records}) {
  const step = records.last('step') ?? records.evaluations.at(-1)?.step ?? 0, {best} = records, {steps = null} = status;
  const left = status.state === 'running' && steps !== null ? records.secondsLeft(steps) : null;
  const loss = records.last('loss');
  return [
    h('div.row', {},
      h('strong', {test: 'run-state', 'data-state': status.state ?? ''}, withAdvice(status.state) ?? '–'),
      h('span', {test: 'run-step', 'data-step': step},
        `step ${count(step)}${steps === null ? '' : ` of ${count(steps)}`}`),
      left !== null && h('span', {}, `about ${duration(left)} left`)),
    ...steps === null ? [] : [bar(step / steps, 'var(--accent)')],
    ...status.error ? [notice(status.error, 'error')] : [],
    h('div.split.run-facts', {}, facts([
      ['last training loss', loss === null ? '–' : loss.toFixed(4)],
      ['best validation loss', best ? `${best.val_loss.toFixed(4)}, step ${count(best.step)}` : '–'],
      ['its bits per byte', best?.val_bits_per_byte ? best.val_bits_per_byte.toFixed(4) : '–'],
    ]), facts([
      ['tokens seen', exact('tokens-seen', records.last('tokens_seen') ?? 0, count(records.last('tokens_seen') ?? 0))],
      ['time in training steps', duration(records.last('time') ?? 0)],
      ['checkpoints', checkpoints.length ? checkpoints.slice(-4).map(count).join(', ') : 'none yet'],
    ]), facts([
      ['parameters', short(environment.parameters)],
      ['device', [environment.device, environment.precision].filter(Boolean).join(', ') || '–'],
      ['processes', status.processes ?? environment.processes ?? '–'],
    ])),
  ];
}

// The steps that have a snapshot or samples, and the cards of the selected one.
function stepCards(run, entry, signal) {
  const snapshots = new PromiseCache(SNAPSHOT_BYTES);
  const load = step => snapshots.get(step, () => get('/api/snapshot', {model: entry.id, step}));
  const model = {info: null, names: null}, problem = h('div', {test: 'snapshot-problem'}), tools = h('div.row');
  let steps = [], current = Promise.resolve();
  const range = scrubber({signal, steps: () => steps, shown: () => current});
  const control = card('Snapshots', {wide: true, about: 'The model of each evaluation on fixed prompts.'}, range, tools,
    problem);
  control.classList.add('sticky');
  const samples = samplesCard({all: () => run.history.samples, signal});
  const marked = () => (state.number('at') === null ? null : range.step());
  const scores = headScoresCard({signal}), ofPrompt = snapshotCards({model, signal});
  const overSteps = scoresOverSteps({load, steps: () => run.history.snapshots, marked, signal});
  const elements = [...ofPrompt, scores, overSteps].map(({element}) => element);
  const hide = isHidden => elements.forEach(element => { element.hidden = isHidden; });
  const present = latest(async () => {
    range.update();
    const step = range.step(), shot = run.history.snapshots.findLast(each => each <= step) ?? null;
    samples.show(step);
    hide(shot === null);
    if (shot === null) return void problem.replaceChildren(notice(whyNoSnapshot(run.history)));
    const isShown = await attempt(problem, signal, async () => {
      const snapshot = await load(shot);
      if (signal.aborted) return;
      showPrompts(snapshot);
      const prompt = promptOf(snapshot, promptIndex(snapshot));
      ofPrompt.forEach(part => part.show(prompt));
      scores.show(snapshot);
      const all = run.history.snapshots, i = all.indexOf(shot);
      for (const near of [all[i + 1], all[i - 1]]) if (near !== undefined) load(near).catch(() => {});
    });
    hide(!isShown);  // the cards of another step would stand under the error
    if (isShown && shot !== step) problem.replaceChildren(notice(`Step ${step} has no snapshot: this is ${shot}.`));
  });
  const showStep = () => (current = present());
  const promptIndex = ({prompts}) => state.index('prompt', prompts.length);
  function showPrompts(snapshot) {
    const {prompts} = snapshot;
    tools.replaceChildren(...prompts.length < 2 ? [] : [choice({label: 'Prompt', value: promptIndex(snapshot),
      onInput: value => state.set({prompt: value}),
      options: prompts.map(({pieces}, i) => [i, pieces.join('').slice(0, 60)])})]);
  }
  // The vocabulary, windows and shared heads come from a checkpoint: without one, tokens are shown by their ids.
  async function loadModel() {
    if (!run.history.checkpoints.length || model.info) return;
    try {
      const opened = await openModel(entry, '', signal);
      Object.assign(model, {info: opened.info, names: await vocabulary(opened, signal)});
      await showStep();
    } catch {
      // The checkpoint was removed or is being written: try again with the next.
    }
  }
  async function grow() {
    const {snapshots: list, samples: sections} = run.history;
    steps = [...new Set([...list, ...sections.map(({step}) => step)])].sort((a, b) => a - b);
    await showStep();
    overSteps.update();
    await loadModel();
  }
  state.on(['at', 'prompt'], () => {
    showStep();
    overSteps.redraw();
  }, signal);
  return {cards: [control, ...elements, samples.element], marked, start: grow, grow, reset() {
    snapshots.clear();
    overSteps.clear();
    grow();
  }};
}

// One prompt of a snapshot.
function promptOf(snapshot, prompt) {
  const part = name => snapshot[`${name}.${prompt}`], attention = part('attention');
  return {...snapshot.prompts[prompt], step: snapshot.step, layers: attention.shape[0], heads: attention.shape[1],
    attention, topIds: part('lens_ids'), topP: part('lens_p'), nextRank: part('next_rank'),
    surprisal: part('surprisal')};
}

function whyNoSnapshot({snapshots, status}) {
  if (snapshots.length) return 'The first snapshot is of a later step.';
  return status.state === 'running' ? 'No snapshot yet: each evaluation writes one, unless probe.tokens is 0.'
    : 'This run has no snapshots: it was written by an older version, or with probe.tokens = 0.';
}

// What the run generated at a step next to another. all(): [{step, texts}], increasing.
function samplesCard({all, signal}) {
  const place = h('div'), tools = h('div.row');
  let step = null;
  const element = card('Samples', {
    wide: true, about: 'The text that the model generated at the selected step, next to another step.',
    save: {name: 'samples', rows: () => [['step', 'sample', 'text'],
      ...all().flatMap(each => each.texts.map((text, i) => [each.step, i + 1, text]))]},
  }, tools, place);
  function draw() {
    if (!all().length) return void place.replaceChildren(notice('No samples yet.'));
    const left = all().find(each => each.step === state.number('compare_step')) ?? all()[0];
    const right = all().findLast(each => each.step <= (step ?? Infinity)) ?? all()[0];
    const text = (section, i, test) => h('div', {}, h('h3', {}, `Step ${count(section.step)}, sample ${i + 1}`),
      h('pre.sample', {test, 'data-step': section.step}, section.texts[i] ?? ''));
    place.replaceChildren(...Array.from({length: Math.max(left.texts.length, right.texts.length)}, (_, i) =>
      h('div.split', {}, text(left, i, 'sample-compared'), text(right, i, 'sample'))));
    if (tools.contains(document.activeElement)) return;  // do not close an open menu
    tools.replaceChildren(choice({label: 'Compare with', value: left.step,
      onInput: value => state.set({compare_step: value}),
      options: all().map(each => [each.step, `step ${count(each.step)}`])}));
  }
  state.on(['compare_step'], draw, signal);
  return {element, show(now) {
    step = now;
    draw();
  }};
}
