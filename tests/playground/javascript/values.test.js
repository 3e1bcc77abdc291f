import {attentionRow, isAnyVisible, isVisible, kvHeadOf, rotaryAngles, scoreAtDistance} from './core/attention.js';
import {editRequest, editText, parseEdits} from './core/edits.js';
import {csv, duration, percent, precise, shellQuoted, short, tokenCount} from './core/format.js';
import {parsePaths, Paths} from './core/paths.js';
import {Records} from './core/records.js';
import {alignTokens, bitsOf, findTokens} from './core/tokens.js';
import {equal, fixture, near, test} from './harness.js';

test('visible keys are those of the model’s attention spans', async () => {
  for (const {span, visible} of await fixture('spans.json')) {
    visible.forEach((row, t) => row.forEach((expected, s) => equal(isVisible(span, t, s), expected, `${t} ${s}`)));
    for (const [t, tEnd, s, sEnd] of [[0, 3, 4, 6], [4, 6, 0, 2], [5, 8, 1, 2], [6, 8, 2, 7]]) {
      const any = visible.slice(t, tEnd).some(row => row.slice(s, sEnd).some(Boolean));
      equal(isAnyVisible(span, t, tEnd, s, sEnd), any, `block ${t} ${s}`);
    }
  }
});

test('a masked row has weights that sum to 1 over the visible keys', () => {
  const vectors = {rot_q: Object.assign([1, 0, 0, 2, 1, 1], {shape: [3, 2]}), rot_k: Object.assign([1, 0, 2, 1, 0, 3], {shape: [3, 2]}),
    scale: 0.5};
  const row = attentionRow({vectors, span: {window: 2, globals: 0}, t: 2});
  near(row.scores, [0.5, 1.5, 1.5], 1e-12);
  near(row.weights, [0, 0.5, 0.5], 1e-12);
});

test('rotating both vectors changes a score by their distance only', () => {
  const angles = rotaryAngles(4, 10000), q = [1, 2, 3, 4], k = [2, 0, 1, 1];
  const rotate = (x, position) => [0, 1, 2, 3].map(d => {
    const j = d % 2, [cos, sin] = [Math.cos(position * angles[j]), Math.sin(position * angles[j])];
    return d < 2 ? x[j] * cos - x[j + 2] * sin : x[j + 2] * cos + x[j] * sin;
  });
  const rotated = rotate(k, 5), expected = rotate(q, 12).reduce((total, x, d) => total + x * rotated[d], 0);
  near(scoreAtDistance({vectors: {q_norm: q, k_norm: k, scale: 1}, t: 0, s: 0}, 7, angles), expected, 1e-12);
});

test('query heads share key/value heads in groups', () => {
  equal([0, 1, 2, 3].map(head => kvHeadOf({config: {n_head: 4}, kv_heads: 2}, head)), [0, 0, 1, 1]);
  equal([kvHeadOf({config: {n_head: 4}, kv_heads: 4}, 1), kvHeadOf(null, 1)], [null, null]);
});

test('edits are parsed, sent and described', () => {
  const shape = {layers: 2, heads: 4, tokens: 9};
  equal([...parseEdits('h1.3,h2.0,a1@8,a1@9,p8,p9,r0,h1,a1.1,x', shape)], ['h1.3', 'a1@8', 'p8', 'r0']);
  equal(editRequest('h1.3@2', 'mean'), {kind: 'head', layer: 1, head: 3, position: 2, by: 'mean'});
  equal(editText('r1@2'), 'residual stream after layer 1 at token 2');
});

test('numbers are formatted', () => {
  equal([0, 1234.5, 0.012345, 1e-5, -2e7, NaN].map(short), ['0', '1,235', '0.0123', '1.0e−5', '−2.0e7', '–']);
  equal([0, 0.1234567, 1e-5].map(precise), ['0', '0.123457', '1.000e−5']);
  equal([1, 0.5, 0.05, 0.00001, null].map(percent), ['100 %', '50.0 %', '5.00 %', '1e−3 %', '–']);
  equal([5, 65, 3661].map(duration), ['5 s', '1:05 min', '1:01:01 h']);
  equal([tokenCount(1), tokenCount(2000)], ['1 token', '2,000 tokens']);
});

test('texts are quoted for a shell and for a spreadsheet', () => {
  equal(shellQuoted('it\'s $5'), '\'it\'\\\'\'s $5\'');
  equal(csv([['a,b', '=1+1', 'say "x"', NaN, 0.1]]), '"a,b",\'=1+1,"say ""x""",,0.1\r\n');
});

test('paths survive a link, and those of another model are ignored', () => {
  const paths = new Paths();
  for (const id of [40, 41]) paths.append({id, p: 0.5});
  paths.branch(1);
  paths.append({id: 7, p: 0.5});
  const text = paths.toText('tag');
  equal(parsePaths(text, 'tag', 50).paths.map(path => path.map(({id}) => id)), [[40, 7], [40, 41]]);
  equal(parsePaths(text, 'other', 50).paths, [[]]);
  equal(parsePaths(text, 'tag', 41).paths, [[]]);
});

test('a rejected token is excluded only at the position where it was rejected', () => {
  const paths = new Paths([[{id: 1, p: 1}, {id: 2, p: 1}]]);
  paths.reject(9);
  equal([...paths.rejected], [2]);
  paths.back();
  equal([...paths.rejected], []);
});

test('repeated records count once, time adds up, and averages are centered', () => {
  const training = {step: [1, 2, 3], loss: [3, 2, 4], loss_mean: [2.5, 3, 3], seconds: [1, 1, 1], time: [1, 2, 3]};
  const records = new Records({training, evaluations: [{step: 2, val_loss: 5}]});
  equal(records.smoothed('loss'), [2.5, 3, 3]);
  records.add({training: [{step: 3, loss: 9, seconds: 9}, {step: 4, loss: 6, seconds: 2}],
    evaluations: [{step: 2, val_loss: 1}, {step: 4, val_loss: 4}]});
  equal([records.added, records.columns.time, records.best.step], [1, [1, 2, 3, 5], 4]);
  equal(records.smoothed('loss'), [3, 3, 4, 5]);
  equal([records.placeOf(4, 'time'), records.secondsLeft(6)], [5, 2.5]);
});

test('tokens of two tokenizers are aligned where a token starts in both', () => {
  const hex = text => [...text].map(c => c.charCodeAt(0).toString(16)).join('');
  const cut = (...pieces) => ({ids: pieces.map((_, i) => i), pieces, bytes: pieces.map(hex)});
  const [a, b] = [cut('ab', 'c', 'de'), cut('a', 'bc', 'd', 'e')];
  equal(alignTokens(a, b, 'abcde').map(({a: x, b: y, bytes}) => [x, y, bytes]), [[[0, 2], [0, 2], 3], [[2, 3], [2, 4], 2]]);
  equal(alignTokens(a, cut('x'), 'abcde'), null);
  equal(bitsOf([NaN, 1, 2], [1, 3]), 3);
});

test('tokens are found ignoring case, exact matches first', () => {
  equal(findTokens(['bathe', '␣The', 'the', 'a'], 'the'), [1, 2, 0]);
  equal(findTokens(['a b', 'a␣b'], 'A b'), [1]);
});
