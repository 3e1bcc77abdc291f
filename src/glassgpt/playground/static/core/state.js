// The page's state, kept in the address after "#": a link restores it, and it never reaches a server's log.

const values = new Map(new URLSearchParams(location.hash.slice(1)));
const listeners = new Set();
// The text of a key.
export const text = (key, fallback = '') => values.get(key) ?? fallback;

// The number of a key.
export function number(key, fallback = null) {
  const value = values.get(key);
  return value === undefined || value === '' || !Number.isFinite(Number(value)) ? fallback : Number(value);
}

// The value of a key if it is one of `options`.
export const option = (key, options, fallback = options[0]) => (options.includes(text(key)) ? text(key) : fallback);
// The number of a key as an index: rounded, and clamped to 0 ... size - 1.
export const index = (key, size, fallback = 0) => Math.max(0, Math.min(size - 1, Math.round(number(key, fallback))));

// Set keys (null, undefined and '' remove one) and notify listeners. `push`: Back undoes it.
export function set(changes, {push = false} = {}) {
  const changed = [];
  for (const [key, value] of Object.entries(changes)) {
    const before = values.get(key);
    if (value === null || value === undefined || value === '') values.delete(key);
    else values.set(key, String(value));
    if (values.get(key) !== before) changed.push(key);
  }
  if (!changed.length) return;
  history[push ? 'pushState' : 'replaceState'](null, '', `#${new URLSearchParams([...values])}`);
  notify(changed);
}

// Call `listener(changed keys)` whenever one of `keys` changes, until `signal` aborts.
export function on(keys, listener, signal) {
  const entry = {keys, listener};
  listeners.add(entry);
  signal?.addEventListener('abort', () => listeners.delete(entry));
}

// Remove the access token from the address, and return it or null.
export function takeToken() {
  const token = values.get('token') ?? null;
  values.delete('token');
  if (token !== null) history.replaceState(null, '', `#${new URLSearchParams([...values])}`);
  return token;
}

function notify(changed) {
  for (const {keys, listener} of [...listeners]) {
    if (changed.some(key => keys.includes(key))) listener(changed);
  }
}

// Back, Forward, or a link pasted into the address bar.
addEventListener('hashchange', readAddress);
addEventListener('popstate', readAddress);

function readAddress() {
  const now = new Map(new URLSearchParams(location.hash.slice(1)));
  const changed = [...new Set([...values.keys(), ...now.keys()])].filter(key => values.get(key) !== now.get(key));
  values.clear();
  for (const [key, value] of now) values.set(key, value);
  if (changed.length) notify(changed);
}
