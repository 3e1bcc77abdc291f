// How it learned: a run's training, finished or still going on, and what its model made of fixed prompts meanwhile.

import {latest} from '../api.js';
import {followRun} from '../following.js';
import {kindsCard, kindsOverSteps} from '../kindcards.js';
import {learnCharts} from '../learncharts.js';
import {open, vocabulary} from '../models.js';
import {AXES, Records} from '../records.js';
import {runCard} from '../runcard.js';
import {samplesCard} from '../samplescard.js';
import {scrubber} from '../scrubber.js';
import {attentionCard, depthCard, surprisalCard} from '../snapshotcards.js';
import {promptOf, snapshotsOf} from '../snapshots.js';
import * as state from '../state.js';
import {card, choice, h, notice} from '../ui.js';

export default async function show(page, {offer, offered, signal}) {
  if (offer.kind !== 'run') return void page.append(notRun(offer, offered));
  const run = {history: null, records: null, steps: []};
  const axis = () => (state.text('axis') in AXES ? state.text('axis') : 'step');
  const about = runCard();
  const charts = learnCharts({
    records: () => run.records, axis, onAxis: value => state.set({axis: value === 'step' ? null : value}), signal,
    marked: () => through.marked(), whyNoShare: () => whyNoShare(run.history.environment),
  });
  const through = stepThrough(run, offer, signal);
  const follower = {
    loaded(history) {
      const isFirst = run.history === null;
      Object.assign(run, {history, records: new Records(history)});
      about.show(run);
      if (isFirst) return;
      through.reloaded();
      charts.changed();
    },
    metrics(found) {
      run.records.add(found);
      about.show(run);
      charts.changed();
    },
    samples(sections) {
      const seen = run.history.samples.at(-1)?.step ?? -1;
      run.history.samples.push(...sections.filter(({step}) => step > seen));
      through.grown();
    },
    snapshots(steps) {
      run.history.snapshots = steps;
      through.grown();
    },
    checkpoints(steps) {
      run.history.checkpoints = steps;
      about.show(run);
    },
    status(status) {
      run.history.status = status;
      about.show(run);
    },
    connected: (isOpen, why) => about.connected(isOpen, why),
    added: () => run.records.added,
  };
  await followRun(offer.id, follower, signal);
  if (signal.aborted) return;
  page.append(about.element, ...charts.cards, ...through.cards);
  charts.now();
  state.on(['axis', 'at'], charts.now, signal);
  await through.begin();
}

/** For a model that is no run: which of what is offered is one. */
function notRun(offer, {offers}) {
  const runs = offers.filter(({kind}) => kind === 'run');
  return h('div.notice', {role: 'status', 'data-test': 'no-run'}, `${offer.name} is a model, not a run: nothing was kept of how it learned. `,
    runs.length ? 'These are runs: ' : 'Of what is offered, nothing is a run: `glassgpt train` makes one.',
    h('div.row', {}, runs.map(({name}) => h('button', {type: 'button', onclick: () => state.set({model: name, step: null}, {push: true})}, name))));
}

function whyNoShare({device, precision}) {
  return `No share was recorded: the most that the device${device ? ` (${device})` : ''} can do in ${precision ?? 'its precision'} is not known. `
    + 'It is measured on a CPU, and of a GPU taken from the data sheet where it is a common one.';
}

// --- step by step --------------------------------------------------------------------------------------------------------

/** The steps that have a snapshot or samples, and the cards of the chosen one. */
function stepThrough(run, offer, signal) {
  const shots = snapshotsOf(offer.id);
  const model = {info: null, names: null};
  const known = () => model.info, names = () => model.names;
  const problem = h('div', {'data-test': 'snapshot-problem'}), tools = h('div.row');
  let current = Promise.resolve();

  const bar = scrubber({signal, steps: () => run.steps, chosen: () => state.number('at'), onChoose: step => state.set({at: step}), shown: () => current});
  const control = card('Step by step', 'What the model of each evaluation made of fixed prompts, and wrote.');
  control.classList.add('wide', 'sticky');
  control.body.append(bar, tools, problem);
  const whole = [kindsCard({signal})];
  const ofPrompt = [attentionCard({known, signal}), depthCard({known, names, signal}), surprisalCard({signal})];
  const samples = samplesCard({all: () => run.history.samples, signal});
  const marked = () => (state.number('at') === null ? null : bar.step());
  const overSteps = kindsOverSteps({load: shots.load, steps: () => run.history.snapshots, marked, signal});
  const ofSnapshot = [...ofPrompt, ...whole, overSteps].map(({element}) => element);

  const present = latest(async () => {
    bar.update();
    const step = bar.step();
    samples.show(step);
    const shot = run.history.snapshots.findLast(each => each <= step) ?? null;
    for (const element of ofSnapshot) element.hidden = shot === null;
    if (shot === null) return void problem.replaceChildren(notice(noSnapshots(run.history)));
    try {
      const snapshot = await shots.load(shot);
      if (signal.aborted) return;
      problem.replaceChildren(...shot === step ? [] : [notice(`There is no snapshot of step ${step}: this is that of step ${shot}.`)]);
      showPrompts(snapshot);
      const prompt = promptOf(snapshot, promptOfAddress(snapshot));
      ofPrompt.forEach(part => part.show(prompt));
      whole.forEach(part => part.show(snapshot));
      preload(shot);
    } catch (error) {
      if (!signal.aborted) problem.replaceChildren(notice(error.message, 'error'));
    }
  });
  const showStep = () => (current = present());

  function preload(step) {
    const all = run.history.snapshots, i = all.indexOf(step);
    for (const near of [all[i + 1], all[i - 1]]) if (near !== undefined) shots.load(near).catch(() => {});
  }

  const promptOfAddress = ({prompts}) => Math.max(0, Math.min(prompts.length - 1, Math.round(state.number('prompt', 0))));

  function showPrompts(snapshot) {
    const {prompts} = snapshot;
    if (prompts.length < 2) return tools.replaceChildren();
    if (tools.dataset.shown === String(promptOfAddress(snapshot))) return;
    tools.dataset.shown = promptOfAddress(snapshot);
    tools.replaceChildren(choice({label: 'Prompt', value: promptOfAddress(snapshot), onInput: value => state.set({prompt: value}),
      options: prompts.map(({pieces}, i) => [i, pieces.join('').slice(0, 60)])}));
  }

  function gather() {
    const {snapshots, samples: sections} = run.history;
    run.steps = [...new Set([...snapshots, ...sections.map(({step}) => step)])].sort((a, b) => a - b);
  }

  /** The vocabulary, windows and shared heads are the checkpoints': without one, tokens of the lens are shown by their ids. */
  async function learnNames() {
    if (!run.history.checkpoints.length || model.info) return;
    try {
      const opened = await open(offer, '', signal);
      Object.assign(model, {info: opened.info, names: await vocabulary(opened, signal)});
      await showStep();
    } catch {
      // As without a checkpoint: one that was removed meanwhile, or is still being written, comes again with the next.
    }
  }

  state.on(['at', 'prompt'], () => {
    showStep();
    overSteps.mark();
  }, signal);
  return {
    cards: [control, ...ofSnapshot, samples.element],
    marked,
    async begin() {
      gather();
      await showStep();
      overSteps.update();
      await learnNames();
    },
    grown() {
      gather();
      showStep();
      overSteps.update();
      learnNames();
    },
    reloaded() {
      shots.clear();
      overSteps.clear();
      this.grown();
    },
  };
}

function noSnapshots({snapshots, status}) {
  if (snapshots.length) return 'The first snapshot is of a later step.';
  return status.state === 'running' ? 'No snapshot yet: one comes with each evaluation, unless probe.tokens is 0.'
    : 'This run has no probe snapshots: it is older than these, or has probe.tokens = 0.';
}
