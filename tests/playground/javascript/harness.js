// Runs the same tests in node and in a browser. test_javascript.py copies `core/` and the fixtures next to this file.

const isNode = typeof process !== 'undefined';
const node = isNode ? await import('node:test') : null;

/** The name and the error message (or null) of each test that ran in a browser. */
export const results = [];
let previous = Promise.resolve();
/** Returns a promise that resolves when all tests declared so far have run. */
export const finished = () => previous;

export function test(name, run) {
  if (isNode) return node.test(name, run);
  previous = previous.then(run).then(() => results.push([name, null]), error => results.push([name, error.message]));
}

/** Returns the JSON of a fixture that test_javascript.py wrote. */
export async function fixture(name) {
  const address = new URL(name, import.meta.url);
  if (!isNode) return (await fetch(address)).json();
  return JSON.parse(await (await import('node:fs/promises')).readFile(address));
}

export function equal(actual, expected, message = '') {
  const [a, b] = [actual, expected].map(value => JSON.stringify(value));
  if (a !== b) throw new Error(`${message} ${a} is not ${b}`);
}

/** Throws if two numbers or arrays of numbers differ by more than a relative and absolute tolerance. */
export function near(actual, expected, tolerance, message = '') {
  const [a, b] = [actual, expected].map(value => (typeof value === 'number' ? [value] : [...value]));
  equal(a.length, b.length, `${message} length`);
  a.forEach((x, i) => {
    if (!(Math.abs(x - b[i]) <= tolerance * (1 + Math.abs(b[i])))) throw new Error(`${message} [${i}]: ${x} is not ${b[i]}`);
  });
}
