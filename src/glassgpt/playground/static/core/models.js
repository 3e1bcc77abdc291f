// The served models, opened ones, and their tokens.
import {get, post} from './api.js';
import {count} from './format.js';

let catalog = null;

// The server's models and runs. `reload` asks again: a run in training has new checkpoints.
export async function loadCatalog(reload = false) {
  if (!catalog || reload) catalog = await get('/api/catalog');
  return catalog;
}

// The entry of that name, or the first for an empty name; undefined if it does not exist.
export const findEntry = ({entries}, name) => (name ? entries.find(entry => entry.name === name) : entries[0]);

// Open a model. Returns its catalog entry, `info` (the answer of /api/model), and `request(more)`, which makes the body
// of a request about it. step: a number, 'best', or '' for the newest.
export async function openModel(entry, step, signal) {
  const number = step === 'best' ? entry.best : step === '' || step === null ? null : Number(step);
  const info = await post('/api/model', {model: entry.id, step: number}, signal);
  // The step that was opened, so that all answers are about one checkpoint even while the run trains.
  const base = {model: entry.id, step: info.step};
  return {entry, info, request: more => ({...base, ...more})};
}

// A text's tokens: ids, pieces (display forms), partial (part of a character), and bytes in hexadecimal.
export const encode = (opened, text, signal) => post('/api/tokens', opened.request({text}), signal);

// The display forms of all tokens, by id.
export const vocabulary = async (opened, signal) =>
  (await post('/api/vocabulary', opened.request({}), signal)).pieces;

// The options of a menu of checkpoints.
export const checkpointOptions = ({steps, best}) => [['', 'newest'], ...best === null ? []
  : [['best', `best (${best})`]], ...[...steps].reverse().map(step => [step, `step ${step}`])];

export const modelLabel = ({name, step}) => (step === null ? name : `${name} at step ${count(step)}`);
