// What is looked at, kept in the address behind "#": a link restores it, and nothing of it reaches a server's log.

const values = new Map(new URLSearchParams(location.hash.slice(1)));
const listeners = new Set();

/** The text of a key, or the fallback. */
export const text = (key, fallback = '') => values.get(key) ?? fallback;

/** The number of a key, or the fallback where there is none. */
export function number(key, fallback = null) {
  const value = values.get(key);
  return value === undefined || value === '' || !Number.isFinite(Number(value)) ? fallback : Number(value);
}

/** Set keys (null or undefined removes one) and tell who listens. `push` makes a step that the browser's Back undoes. */
export function set(changes, {push = false} = {}) {
  const changed = [];
  for (const [key, value] of Object.entries(changes)) {
    const before = values.get(key);
    if (value === null || value === undefined || value === '') values.delete(key);
    else values.set(key, String(value));
    if (values.get(key) !== before) changed.push(key);
  }
  if (!changed.length) return;
  const address = `#${new URLSearchParams([...values])}`;
  if (push) history.pushState(null, '', address);
  else history.replaceState(null, '', address);
  tell(changed);
}

/** Call `listener(changed keys)` whenever one of `keys` changes, until `signal` aborts. */
export function on(keys, listener, signal) {
  const entry = {keys, listener};
  listeners.add(entry);
  signal?.addEventListener('abort', () => listeners.delete(entry));
}

function tell(changed) {
  for (const {keys, listener} of [...listeners]) {
    if (changed.some(key => keys.includes(key))) listener(changed);
  }
}

// Back, Forward, or a link pasted into the address.
addEventListener('hashchange', follow);
addEventListener('popstate', follow);

function follow() {
  const now = new Map(new URLSearchParams(location.hash.slice(1)));
  const changed = [...new Set([...values.keys(), ...now.keys()])].filter(key => values.get(key) !== now.get(key));
  values.clear();
  for (const [key, value] of now) values.set(key, value);
  if (changed.length) tell(changed);
}
