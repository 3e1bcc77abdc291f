// Requests to the server: JSON in, JSON or packed arrays out. Answers are cached.
import {PromiseCache} from './cache.js';

const TYPES = {float32: Float32Array, int32: Int32Array, uint8: Uint8Array, uint16: Uint16Array};
const RETRIES = 5, RETRY_MS = 500;
const cache = new PromiseCache(64e6);
let running = 0;
let wasAccepted = false;  // whether the server has accepted a request of this page

// A request that failed; the message is for the user.
export class RequestError extends Error {}

// The server needs the access token.
export class LoginError extends RequestError {}

export const unreachable = () => new RequestError('The server does not answer. Is `glassgpt play` still running?');
// Exchange the access token for a cookie.
export const login = token => send('/api/login', asJson({token}));
// GET `path?parameters`, not cached.
export const get = (path, parameters = {}, signal) => send(`${path}?${new URLSearchParams(parameters)}`, {signal});

// POST a JSON body. The answer is cached and shared: do not change it.
export function post(path, body, signal) {
  // Without the caller's signal: others may wait for the same answer.
  return abortable(cache.get(`${path} ${JSON.stringify(body)}`, () => send(path, asJson(body))), signal);
}

// Yield the objects of an answer of JSON lines.
export async function* lines(path, body, signal) {
  setBusy(1);
  try {
    const response = await fetch(path, {...asJson(body), signal});
    if (!response.ok) throw await errorOf(response);
    let rest = '';
    for await (const part of chunks(response.body.pipeThrough(new TextDecoderStream()).getReader())) {
      const complete = (rest + part).split('\n');
      rest = complete.pop();
      for (const value of complete.map(line => JSON.parse(line))) {
        if (value.error) throw new RequestError(value.error);
        yield value;
      }
    }
  } finally {
    setBusy(-1);
  }
}

// Return a function that runs `work`, one run at a time. Calls during a run lead to one further run.
export function latest(work) {
  let current = null, isRequested = false;
  return () => {
    isRequested = true;
    current ??= (async () => {
      try {
        while (isRequested) {
          isRequested = false;
          await work();
        }
      } finally {
        current = null;
      }
    })();
    return current;
  };
}

const asJson = body => (
  {method: 'POST', headers: {'content-type': 'application/json'}, body: JSON.stringify(body)});

async function* chunks(reader) {
  try {
    for (;;) {
      const {done, value} = await reader.read();
      if (done) return;
      yield value;
    }
  } finally {
    reader.cancel().catch(() => {});  // an aborted stream: the reader already has the error
  }
}

function abortable(promise, signal) {
  if (!signal) return promise;
  return new Promise((resolve, reject) => {
    if (signal.aborted) return reject(signal.reason);
    signal.addEventListener('abort', () => reject(signal.reason), {once: true});
    promise.then(resolve, reject);
  });
}

async function send(address, options, retries = RETRIES) {
  setBusy(1);
  try {
    for (;; retries--) {
      const response = await fetch(address, options).catch(error => {
        throw error.name === 'AbortError' ? error : unreachable();
      });
      if (response.status === 429 && retries > 1) {
        await new Promise(resolve => setTimeout(resolve, RETRY_MS));
        continue;
      }
      if (!response.ok) throw await errorOf(response);
      wasAccepted = true;
      if (response.status === 204) return null;
      const isPacked = response.headers.get('content-type').startsWith('application/octet-stream');
      return isPacked ? unpack(await response.arrayBuffer()) : await response.json();
    }
  } finally {
    setBusy(-1);
  }
}

async function errorOf(response) {
  const type = response.status === 401 ? LoginError : RequestError;
  if (type === LoginError && wasAccepted) location.reload();  // the server was restarted: ask for its token
  try {
    return new type((await response.json()).error);
  } catch {
    return new type(`The server answered ${response.status} ${response.statusText}`);
  }
}

// Read a packed answer: plain values, and each array as a typed array with its `shape`.
export function unpack(buffer) {
  const size = new DataView(buffer).getUint32(0, true);
  const {arrays, ...result} = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, size)));
  const start = Math.ceil((4 + size) / 8) * 8;
  for (const [name, {dtype, shape, offset}] of Object.entries(arrays)) {
    const array = new TYPES[dtype](buffer, start + offset, shape.reduce((a, b) => a * b, 1));
    result[name] = Object.assign(array, {shape});
  }
  Object.defineProperty(result, 'bytes', {value: buffer.byteLength});
  return result;
}

function setBusy(change) {
  running += change;
  document.getElementById('busy').hidden = running === 0;
}
