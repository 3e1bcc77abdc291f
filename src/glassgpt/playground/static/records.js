// What a run has written of its training, as columns that grow while it goes on.

const SMOOTHED = ['loss', 'grad_norm', 'tokens_per_second'];
// The axes along which training is drawn, and the columns of their places.
export const AXES = {step: 'step', tokens: 'tokens_seen', time: 'time'};

/** Training and evaluations of a run: those of a history, and what is added to it. */
export class Records {
  constructor({training, evaluations}) {
    this.columns = training;
    this.evaluations = evaluations;
    this.known = training.step.length;  // rows of the history: of a long run, some of its steps, with means taken over all
    this.isThinned = this.known > 0 && this.known <= training.step.at(-1) - training.step[0];
  }

  get size() {
    return this.columns.step.length;
  }

  /** How many rows were added to the history. */
  get added() {
    return this.size - this.known;
  }

  /** The newest value of a column. */
  last(name) {
    return this.columns[name].at(-1) ?? null;
  }

  /** Add what comes behind; a record may come twice, and counts once. */
  add({training, evaluations}) {
    for (const record of training) {
      if (record.step <= (this.last('step') ?? -1)) continue;
      for (const name of Object.keys(this.columns)) this.columns[name].push(number(record[name]));
      this.columns.time[this.size - 1] = (this.columns.time[this.size - 2] ?? 0) + (number(record.seconds) ?? 0);
    }
    for (const record of evaluations) {
      if (record.step > (this.evaluations.at(-1)?.step ?? -1)) this.evaluations.push(record);
    }
  }

  /** The places of the training rows on an axis: a key of `AXES`. */
  places(axis) {
    return this.columns[AXES[axis]];
  }

  /** The place of a step on an axis; between two rows, in proportion. */
  placeOf(step, axis) {
    if (axis === 'step') return step;
    const {step: steps} = this.columns, places = this.places(axis);
    const after = firstNotBelow(steps, step);
    if (after === this.size) return places.at(-1) ?? 0;
    const [from, low] = after ? [steps[after - 1], places[after - 1]] : [0, 0];
    return low + (places[after] - low) * (step - from) / (steps[after] - from || 1);
  }

  /** How many steps a smoothed curve takes the mean of, as in a report: a fiftieth of all, and an odd number. */
  get window() {
    const steps = this.size ? this.last('step') - this.columns.step[0] + 1 : 0;
    return 2 * Math.max(1, Math.floor(steps / 50)) + 1;
  }

  /** A column smoothed as in a report: its centred mean, whose window shrinks at the start on both sides, and at the end on one. */
  smoothed(name) {
    if (!SMOOTHED.includes(name)) throw new Error(`${name} has no mean`);
    const {step: steps, [name]: values, [`${name}_mean`]: means} = this.columns;
    const known = this.isThinned ? this.known : 0;
    // Rows that stand for several steps count as their mean, so often.
    const value = i => (i < known ? means[i] : values[i]);
    const weight = i => (value(i) === null ? 0 : i ? steps[i] - steps[i - 1] : 1);
    const sums = [0], weights = [0];
    for (let i = 0; i < this.size; i++) {
      sums.push(sums[i] + weight(i) * (value(i) ?? 0));
      weights.push(weights[i] + weight(i));
    }
    const half = (this.window - 1) / 2;
    let low = 0, high = 0;
    return steps.map((step, i) => {
      const reach = Math.min(half, step - steps[0]);
      while (steps[low] < step - reach) low++;
      while (high < this.size && steps[high] <= step + reach) high++;
      if (i < known) return means[i];
      return values[i] === null ? null : (sums[high] - sums[low]) / (weights[high] - weights[low]);
    });
  }

  /** Whether any training row has a number in a column. */
  has(name) {
    return this.columns[name].some(value => value !== null);
  }

  /** The evaluations that have `read(record)`, as [place, value] pairs of arrays. */
  evaluated(read, axis) {
    const found = this.evaluations.filter(record => number(read(record)) !== null);
    return {x: found.map(({step}) => this.placeOf(step, axis)), y: found.map(read)};
  }

  /** The names within a dictionary of the evaluations, such as `weight_norms`. */
  partsOf(key) {
    return [...new Set(this.evaluations.flatMap(record => Object.keys(record[key] ?? {})))];
  }

  /** Seconds that the steps left take at the pace of the last ones; null where there is no pace yet. */
  secondsLeft(steps, over = 50) {
    const seconds = this.columns.seconds.slice(-over).filter(value => value !== null);
    return seconds.length ? Math.max(0, steps - this.last('step')) * seconds.reduce((a, b) => a + b, 0) / seconds.length : null;
  }
}

const number = value => (typeof value === 'number' && Number.isFinite(value) ? value : null);

/** The first place in a rising row of numbers whose value is not below `value`. */
function firstNotBelow(numbers, value) {
  let low = 0, high = numbers.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (numbers[middle] < value) low = middle + 1;
    else high = middle;
  }
  return low;
}
