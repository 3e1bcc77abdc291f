// A run's history, and then what it goes on to write.

import {follow, get, latest} from './api.js';

// Rows that are added before the history is loaded anew, thinned: so that a chart never has many more than the history gives.
const MOST_ADDED = 1500;

/**
 * Load a run's history and follow it until `signal` aborts. heard.loaded(history): all of it, at first and whenever the run was cut back
 * or grew much; heard[event](data): what is new: metrics, samples, snapshots, checkpoints, status; heard.connected(isOpen, why).
 * added(): how many rows were added to the last history.
 */
export async function followRun(model, {loaded, connected, added, ...heard}, signal) {
  let waiting = null;  // what came while the history was asked for

  async function load() {
    waiting = [];
    try {
      const history = await get('/api/history', {model}, signal);
      loaded(history);
      return history;
    } finally {
      const came = waiting;
      waiting = null;
      came.forEach(([name, data]) => take(name, data));
    }
  }

  const again = latest(async () => {
    try {
      await load();
    } catch (error) {
      if (!signal.aborted) connected(false, error.message);
    }
  });

  function take(name, data) {
    if (name === 'reset') return void again();
    if (waiting) return void waiting.push([name, data]);
    heard[name](data);
    if (name === 'metrics' && added() > MOST_ADDED) again();
  }

  const {cursor} = await load();
  const events = ['metrics', 'samples', 'snapshots', 'checkpoints', 'status', 'reset'];
  const listeners = Object.fromEntries(events.map(name => [name, data => take(name, data)]));
  const source = follow(`/api/events?${new URLSearchParams({model, after: cursor})}`, listeners, signal);
  source.addEventListener('open', async () => {
    try {
      await get('/api/offers', {}, signal);  // which a server that was started anew refuses
      connected(true);
    } catch (error) {
      if (!signal.aborted) connected(false, error.message);
    }
  });
  source.addEventListener('error', () => connected(false));
}
