import {argmax, droppedTokens, entropy, jensenShannon, klDivergence, randomShare, ranked, samplingDistribution, softmax, sum,
  tokenAt} from './core/sampling.js';
import {equal, fixture, near, test} from './harness.js';

test('the sampling distribution equals that of glassgpt.generation', async () => {
  for (const {logits, settings, expected} of await fixture('sampling.json')) {
    const actual = samplingDistribution(Float32Array.from(logits), settings), name = JSON.stringify(settings);
    near(actual, expected, 1e-6, name);
    equal([...actual].map(p => p > 0), expected.map(p => p > 0), name);
  }
});

test('excluded tokens have probability 0, and the others sum to 1', () => {
  const p = samplingDistribution([1, 2, 3, 4], {temperature: 1, topK: 2}, {without: new Set([3])});
  equal([...p].map(x => x > 0), [false, true, true, false]);
  near(sum(p), 1, 1e-12);
});

test('entropy and divergences equal those of PyTorch', async () => {
  const {p, q, entropy: bits, kl} = await fixture('divergence.json');
  near(entropy(softmax(p)), bits, 1e-9);
  near(klDivergence(p, q), kl, 1e-9);
  near(jensenShannon(softmax(p), softmax(p)), 0, 1e-12);
  near(jensenShannon([1, 0], [0, 1]), 1, 1e-12);
});

test('tokens are dropped as generation drops them', async () => {
  for (const [length, context, dropped] of await fixture('window_start.json')) {
    equal(droppedTokens(length, context), dropped, `${length} of ${context}`);
  }
});

test('a share selects the token at which the cumulative probability exceeds it', () => {
  const p = [0, 0.25, 0.5, 0, 0.25];
  equal([0, 0.24, 0.25, 0.74, 0.76, 1].map(share => tokenAt(p, share)), [1, 1, 2, 2, 4, 4]);
});

test('random shares are reproducible, distinct and uniform', () => {
  const shares = Array.from({length: 2000}, (_, i) => randomShare(7, i, 0));
  equal(randomShare(7, 3, 0), shares[3]);
  equal(new Set(shares).size, 2000);
  near(sum(shares) / 2000, 0.5, 0.02);
});

test('ranks put ties in the order of ids', () => equal([...ranked([1, 3, 3, 2])], [1, 2, 3, 0]));
test('argmax is the first of the largest', () => equal(argmax([1, 3, 3]), 1));
