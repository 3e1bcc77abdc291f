// Two references side by side, on the same text: two checkpoints of a run, or two models.

import {post, Refused} from '../api.js';
import {comparedBits, differenceOf, expectedCards, headsCard, settingsCard, surprisalCard, totalsCard} from '../comparecards.js';
import {encode, offerNamed, offers, open, vocabulary} from '../models.js';
import {segmentsOf} from '../segments.js';
import * as state from '../state.js';
import {card, choice, h, notice} from '../ui.js';

export default async function show(page, {signal, offered, offer, opened, info, text, ids, pieces, partial, bytes}) {
  const chooser = h('div.row');
  const control = card('Compared', 'A is the model chosen at the top of the page; B is chosen here. Both read the text above.', chooser);
  const place = (...cards) => page.replaceChildren(control, ...cards);
  let stage = new AbortController();

  async function showPair() {
    stage.abort();
    stage = new AbortController();
    const mine = AbortSignal.any([signal, stage.signal]);
    try {
      const second = await openOther(mine);
      const cut = await encode(second, text, mine);
      const first = await sideOf('A', opened, {ids, pieces, partial, bytes}, mine);
      const pair = [first, await sideOf('B', second, cut, mine)];
      if (!mine.aborted) await showCards(place, pair, text, mine);
    } catch (error) {
      if (!mine.aborted) place(notice(`B: ${error.message}`, 'error'));
    }
  }

  /** B, opened. Where it was the page that chose it, and the run has dropped it since it was listed, of what there is now. */
  async function openOther(signal) {
    const first = showChoice(offered);
    try {
      return await open(first.offer, first.step, signal);
    } catch (error) {
      if (!(error instanceof Refused) || state.text('otherstep')) throw error;
      const now = showChoice(await offers(true));
      return open(now.offer, now.step, signal);
    }
  }

  function showChoice(listed) {
    const other = otherChoice(listed, offerNamed(listed, offer.name) ?? offer, info.step);
    chooser.replaceChildren(h('span', {'data-test': 'side-a'}, `A · ${labelOf(info)}`), ...chooserOf(listed, other));
    place(notice('Computing…'));
    return other;
  }

  signal.addEventListener('abort', () => stage.abort());
  state.on(['other', 'otherstep'], showPair, signal);
  await showPair();
}

/** B of the address; else another checkpoint of the same run, the first, or the last if it trains; else the next of what is offered. */
function otherChoice({offers}, offer, step) {
  const wanted = state.text('other');
  if (wanted && offers.some(({name}) => name === wanted)) return {offer: offerNamed({offers}, wanted), step: state.text('otherstep')};
  const others = offer.steps.filter(each => each !== step);
  const own = offer.state === 'running' ? others.at(-1) : others[0];  // the first is what a run drops next
  if (own !== undefined) return {offer, step: state.text('otherstep') || String(own)};
  const next = offers[(offers.indexOf(offer) + 1) % offers.length];
  return {offer: next, step: state.text('otherstep')};
}

function chooserOf({offers}, {offer, step}) {
  const model = choice({label: 'B', value: offer.name, options: offers.map(({name}) => [name, name]),
    onInput: name => state.set({other: name, otherstep: null, layer2: null, head2: null}, {push: true})});
  model.select.dataset.test = 'other-model';
  if (offer.kind !== 'run') return [model];
  const steps = [['', 'newest'], ...(offer.best === null ? [] : [['best', `best (${offer.best})`]]),
    ...[...offer.steps].reverse().map(each => [each, `step ${each}`])];
  const checkpoint = choice({label: 'Checkpoint of B', hideLabel: true, options: steps, value: step,
    onInput: value => state.set({other: offer.name, otherstep: value}, {push: true})});
  checkpoint.select.dataset.test = 'other-step';
  return [model, checkpoint];
}

const labelOf = ({name, step}) => (step === null ? name : `${name} at step ${step.toLocaleString('en')}`);

/** All that is asked of a side at once. */
async function sideOf(mark, opened, cut, signal) {
  const question = opened.question({ids: cut.ids});
  const [seen, heads, names] = await Promise.all([
    post('/api/predictions', question, signal), post('/api/attention', question, signal), vocabulary(opened, signal)]);
  return {mark, label: labelOf(opened.info), opened, info: opened.info, cut, seen, heads, names};
}

async function showCards(place, pair, text, signal) {
  const segments = segmentsOf(pair[0].cut, pair[1].cut, text);
  const compared = segments && comparedBits(pair, segments);
  const chosen = () => chosenOf(compared);
  const onPick = i => state.set({token: compared[i].a[0]});
  const surprisal = surprisalCard(pair, compared, {chosen, onPick, signal});
  const expected = expectedCards(pair, compared, {chosen, signal});
  const heads = headsCard(pair, {signal});
  place(totalsCard(pair, compared), surprisal.element, ...expected.cards, heads.element, settingsCard(pair));
  const mark = () => {
    surprisal.mark();
    return expected.show();
  };
  state.on(['token'], mark, signal);
  state.on(['layer', 'head', 'layer2', 'head2'], heads.show, signal);
  await Promise.all([mark(), heads.show()]);
}

/** The stretch of the token in the address, else the one on which the two differ most. */
function chosenOf(compared) {
  const token = state.number('token');
  const at = token === null ? -1 : compared.findIndex(({a}) => token >= a[0] && token < a[1]);
  if (at >= 0) return at;
  const size = each => (Number.isNaN(differenceOf(each)) ? -1 : Math.abs(differenceOf(each)));
  return compared.reduce((most, each, i) => (size(each) > size(compared[most]) ? i : most), 0);
}
