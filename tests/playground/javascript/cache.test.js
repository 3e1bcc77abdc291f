import {PromiseCache} from './core/cache.js';
import {equal, test} from './harness.js';

/** Returns a promise, its `resolve` and `reject`, a `load` that returns the promise, and the number of loads. */
function source() {
  const result = {loads: 0};
  result.promise = new Promise((resolve, reject) => Object.assign(result, {resolve, reject}));
  result.load = () => {
    result.loads++;
    return result.promise;
  };
  return result;
}

const settled = () => new Promise(resolve => setTimeout(resolve));

test('a value is loaded once, and its bytes count once', async () => {
  const cache = new PromiseCache(100), a = source();
  cache.get('a', a.load);
  equal(cache.get('a', a.load) === a.promise, true);
  equal(cache.bytes, 0);
  a.resolve({bytes: 60});
  await settled();
  equal([a.loads, cache.bytes], [1, 60]);
});

test('pending entries are not dropped: their bytes would count forever', async () => {
  const cache = new PromiseCache(100), pending = source(), large = source();
  cache.get('pending', pending.load);
  cache.get('large', large.load);
  large.resolve({bytes: 150});
  await settled();
  cache.get('pending', pending.load);
  equal([pending.loads, cache.bytes], [1, 150]);
  pending.resolve({bytes: 20});
  await settled();
  equal(cache.bytes, 20, 'the large one was dropped, and its bytes were subtracted');
  cache.get('large', large.load);
  equal(large.loads, 2);
});

test('the least recently used value is dropped first', async () => {
  const cache = new PromiseCache(100), sources = {a: source(), b: source(), c: source()};
  for (const name of ['a', 'b']) {
    cache.get(name, sources[name].load);
    sources[name].resolve({bytes: 40});
  }
  await settled();
  cache.get('a', sources.a.load);
  cache.get('c', sources.c.load);
  sources.c.resolve({bytes: 40});
  await settled();
  for (const name of ['c', 'a', 'b']) cache.get(name, sources[name].load);
  equal(Object.values(sources).map(({loads}) => loads), [1, 2, 1]);
});

test('bytes of a cleared entry do not count', async () => {
  const cache = new PromiseCache(100), a = source();
  cache.get('a', a.load);
  cache.clear();
  a.resolve({bytes: 60});
  await settled();
  equal(cache.bytes, 0);
});

test('a failed load is tried again', async () => {
  const cache = new PromiseCache(100), a = source();
  const promise = cache.get('a', a.load);
  a.reject(new Error('no'));
  await promise.catch(() => {});
  await settled();
  cache.get('a', a.load);
  equal([a.loads, cache.bytes], [2, 0]);
});
