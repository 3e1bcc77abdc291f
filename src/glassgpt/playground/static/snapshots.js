// Probe snapshots of a run: what its model made of fixed prompts at a step.

import {get} from './api.js';

const MOST_BYTES = 48e6;

/** The snapshots of a run, kept as far as there is room. */
export function snapshotsOf(model) {
  const kept = new Map();  // in the order of their last use: a promise each
  let bytes = 0;

  return {
    load(step) {
      const found = kept.get(step);
      if (found) {
        kept.delete(step);
        kept.set(step, found);
        return found;
      }
      const asked = get('/api/snapshot', {model, step});
      kept.set(step, asked);
      asked.then(snapshot => {
        bytes += snapshot.bytes;
        for (const [oldest, other] of kept) {
          if (bytes <= MOST_BYTES || oldest === step) break;
          kept.delete(oldest);
          other.then(({bytes: freed}) => { bytes -= freed; }, () => {});
        }
      }, () => kept.delete(step));
      return asked;
    },
    /** Forget all: the run was cut back, and may write others of the same steps. */
    clear() {
      kept.clear();
      bytes = 0;
    },
  };
}

/** What a snapshot holds of one of its prompts. */
export function promptOf(snapshot, prompt) {
  const part = name => snapshot[`${name}.${prompt}`];
  const attention = part('attention');
  return {
    ...snapshot.prompts[prompt], step: snapshot.step, layers: attention.shape[0], heads: attention.shape[1], attention,
    lensIds: part('lens_ids'), lensP: part('lens_p'), nextRank: part('next_rank'), surprisal: part('surprisal'),
  };
}
