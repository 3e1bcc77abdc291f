// Questions to the server: JSON in, JSON or packed arrays out. What was answered once is kept.

const KEPT_BYTES = 64e6;
const TYPES = {float32: Float32Array, int32: Int32Array, uint8: Uint8Array, uint16: Uint16Array};
const kept = new Map();  // in the order of their last use
let keptBytes = 0;
let waiting = 0;
let start = null;  // of the server that the page was loaded from: the numbers of its offers mean something to that one alone

/** What the server refuses, in its own words. */
export class Refused extends Error {}

/** Why nothing comes of a question where no server is. */
export const unreachable = () => new Refused('The server does not answer: is `glassgpt play` still running?');

/** Ask that start of the server from now on: another one refuses, and the page is loaded anew. */
export const askOnly = known => { start = known; };

/** The answer to GET `path?parameters`, never kept. */
export const get = (path, parameters = {}, signal) => ask(`${path}?${new URLSearchParams(parameters)}`, {signal});

/** The answer to a question. It is shared and kept: to be read, not changed. */
export function post(path, question, signal) {
  const key = `${path} ${JSON.stringify(question)}`;
  const found = kept.get(key);
  if (found) {
    kept.delete(key);
    kept.set(key, found);
    return abortable(found.answer, signal);
  }
  const entry = {bytes: 0, answer: null};
  // Without the caller's signal: who else waits for the same answer shall get it.
  entry.answer = ask(path, asked(question)).then(answer => {
    entry.bytes = answer.bytes ?? 1000;
    keptBytes += entry.bytes;
    for (const [oldest, {bytes}] of kept) {
      if (keptBytes <= KEPT_BYTES || oldest === key) break;
      kept.delete(oldest);
      keptBytes -= bytes;
    }
    return answer;
  });
  entry.answer.catch(() => kept.delete(key));
  kept.set(key, entry);
  return abortable(entry.answer, signal);
}

/** `work` as often as it is asked for, one run after the other: what is asked while it runs becomes one more run, not many. */
export function latest(work) {
  let running = null, again = false;
  return () => {
    again = true;
    running ??= (async () => {
      try {
        while (again) {
          again = false;
          await work();
        }
      } finally {
        running = null;
      }
    })();
    return running;
  };
}

/** The objects of an answer that comes line by line. */
export async function* lines(path, question, signal) {
  busy(1);
  try {
    const response = await fetch(path, addressed({...asked(question), signal}));
    if (!response.ok) throw await refusal(response);
    let rest = '';
    for await (const part of chunks(response.body.pipeThrough(new TextDecoderStream()).getReader())) {
      const whole = (rest + part).split('\n');
      rest = whole.pop();
      for (const line of whole) {
        const value = JSON.parse(line);
        if (value.error) throw new Refused(value.error);
        yield value;
      }
    }
  } finally {
    busy(-1);
  }
}

/** Call `listeners[event](data)` for the server's events about a run, until `signal` aborts. The browser reconnects by itself. */
export function follow(path, listeners, signal) {
  const source = new EventSource(path);
  for (const [name, listener] of Object.entries(listeners)) {
    source.addEventListener(name, event => listener(JSON.parse(event.data)));
  }
  signal.addEventListener('abort', () => source.close());
  return source;
}

const asked = question => ({method: 'POST', headers: {'content-type': 'application/json'}, body: JSON.stringify(question)});

async function* chunks(reader) {
  try {
    for (;;) {
      const {done, value} = await reader.read();
      if (done) return;
      yield value;
    }
  } finally {
    reader.cancel().catch(() => {});  // it was aborted: who reads has been told
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

async function ask(address, options, tries = 5) {
  busy(1);
  try {
    for (;;) {
      let response;
      try {
        response = await fetch(address, addressed(options));
      } catch (error) {
        if (error.name === 'AbortError') throw error;
        throw unreachable();
      }
      if (response.status === 429 && --tries) {
        await new Promise(resolve => setTimeout(resolve, 500));
        continue;
      }
      if (!response.ok) throw await refusal(response);
      const isPacked = response.headers.get('content-type').startsWith('application/octet-stream');
      return isPacked ? unpack(await response.arrayBuffer()) : await response.json();
    }
  } finally {
    busy(-1);
  }
}

const addressed = options => (start === null ? options : {...options, headers: {...options.headers, 'x-glassgpt-start': start}});

async function refusal(response) {
  if (response.status === 401) location.reload();  // the server was restarted: login.js asks for its token
  try {
    return new Refused((await response.json()).error);
  } catch {
    return new Refused(`The server answered ${response.status} ${response.statusText}`);
  }
}

/** A packed answer: its plain values, and each array as a typed one with its `shape`. */
function unpack(buffer) {
  const size = new DataView(buffer).getUint32(0, true);
  const {arrays, ...plain} = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, size)));
  const start = Math.ceil((4 + size) / 8) * 8;
  for (const [name, {dtype, shape, offset}] of Object.entries(arrays)) {
    const values = new TYPES[dtype](buffer, start + offset, shape.reduce((a, b) => a * b, 1));
    plain[name] = Object.assign(values, {shape});
  }
  Object.defineProperty(plain, 'bytes', {value: buffer.byteLength});
  return plain;
}

function busy(change) {
  waiting += change;
  document.getElementById('busy').hidden = waiting === 0;
}
