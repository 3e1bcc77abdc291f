// The models on offer, opened ones, and their tokens.

import {askOnly, get, post} from './api.js';

let all = null;

/** What the server offers; asked anew with `again`, since a run that trains has new checkpoints. */
export async function offers(again = false) {
  if (!all || again) all = await get('/api/offers');
  askOnly(all.start);
  return all;
}

/** The offer of that name, the first where none is named; nothing where it is not there. */
export const offerNamed = (offered, name) => (name ? offered.offers.find(offer => offer.name === name) : offered.offers[0]);

/**
 * Open a model: its offer, what `/api/model` says of it (`info`), and `question(more)`, which makes the body of a question about it.
 * step: a number, 'best', or '' for the newest.
 */
export async function open(offer, step, signal) {
  const asked = step === 'best' ? offer.best : step === '' || step === null ? null : Number(step);
  const info = await post('/api/model', {model: offer.id, step: asked}, signal);
  // The step that was opened, so that all answers are of one model even while the run goes on.
  const base = {model: offer.id, step: info.step};
  return {offer, info, question: more => ({...base, ...more})};
}

/** A text's tokens: ids, pieces as they are shown, whether each is only a part of a character, and the bytes in hexadecimal. */
export const encode = (opened, text, signal) => post('/api/tokens', opened.question({text}), signal);

/** All tokens of a model's vocabulary as they are shown, by id. */
export const vocabulary = async (opened, signal) => (await post('/api/vocabulary', opened.question({}), signal)).pieces;
