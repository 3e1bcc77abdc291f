// A run's training records as columns that grow while it trains.

// The axes of the training charts, and the column of each.
export const AXES = {step: 'step', tokens: 'tokens_seen', time: 'time'};

// The records of a history (/api/history), and of the events that follow.
export class Records {
  constructor({training, evaluations}) {
    this.columns = training;
    this.evaluations = evaluations;
    this.loaded = training.step.length;  // rows of the history: a subset of the steps if the run is long
    this.isThinned = this.loaded > 0 && this.loaded <= training.step.at(-1) - training.step[0];
  }
  get size() { return this.columns.step.length; }
  // How many rows were added to the history.
  get added() { return this.size - this.loaded; }
  // The newest value of a column.
  last(name) { return this.columns[name].at(-1) ?? null; }
  // Add new records. A record that comes twice counts once.
  add({training, evaluations}) {
    for (const record of training) {
      if (record.step <= (this.last('step') ?? -1)) continue;
      for (const name of Object.keys(this.columns)) this.columns[name].push(finite(record[name]));
      this.columns.time[this.size - 1] = (this.columns.time[this.size - 2] ?? 0) + (finite(record.seconds) ?? 0);
    }
    for (const record of evaluations) {
      if (record.step > (this.evaluations.at(-1)?.step ?? -1)) this.evaluations.push(record);
    }
  }
  // The training rows' places on an axis.
  places(axis) { return this.columns[AXES[axis]]; }
  // The place of a step on an axis, interpolated between two rows.
  placeOf(step, axis) {
    if (axis === 'step') return step;
    const {step: steps} = this.columns, places = this.places(axis), after = steps.findIndex(each => each >= step);
    if (after < 0) return places.at(-1) ?? 0;
    const [from, low] = after ? [steps[after - 1], places[after - 1]] : [0, 0];
    return low + (places[after] - low) * (step - from) / (steps[after] - from || 1);
  }
  // The window of a moving average in steps, as in a report: a fiftieth of all steps, and an odd number.
  get window() {
    const steps = this.size ? this.last('step') - this.columns.step[0] + 1 : 0;
    return 2 * Math.max(1, Math.floor(steps / 50)) + 1;
  }
  // A column's centered moving average, as in a report: the window shrinks at the start on both sides, at the end on
  // one. The rows of a history come with their average from the server, which has all steps.
  smoothed(name) {
    const {step: steps, [name]: values, [`${name}_mean`]: means} = this.columns, half = (this.window - 1) / 2;
    let low = 0, high = 0;
    return values.map((value, i) => {
      const reach = Math.min(half, steps[i] - steps[0]);
      while (steps[low] < steps[i] - reach) low++;
      while (steps[high] <= steps[i] + reach) high++;
      if (i < this.loaded && (this.isThinned || !this.added)) return means[i];
      const known = values.slice(low, high).filter(x => x !== null);
      return value === null ? null : known.reduce((a, b) => a + b, 0) / known.length;
    });
  }
  // Whether any training row has a number in a column.
  has(name) { return this.columns[name].some(value => value !== null); }
  // The evaluations for which `read(record)` is a number, as arrays x and y.
  evaluated(read, axis) {
    const records = this.evaluations.filter(record => finite(read(record)) !== null);
    return {x: records.map(({step}) => this.placeOf(step, axis)), y: records.map(read)};
  }
  // The keys of a dictionary in the evaluations, such as `weight_norms`.
  groupsOf(key) {
    return [...new Set(this.evaluations.flatMap(record => Object.keys(record[key] ?? {})))];
  }
  // The evaluation with the lowest validation loss, or null.
  get best() {
    return this.evaluations.filter(({val_loss: loss}) => finite(loss) !== null)
      .reduce((best, each) => (best === null || each.val_loss < best.val_loss ? each : best), null);
  }
  // Seconds until `steps`, at the rate of the last ones; null if there is no rate yet.
  secondsLeft(steps, over = 50) {
    const seconds = this.columns.seconds.slice(-over).filter(value => value !== null);
    if (!seconds.length) return null;
    return Math.max(0, steps - this.last('step')) * seconds.reduce((a, b) => a + b, 0) / seconds.length;
  }
}

const finite = value => (typeof value === 'number' && Number.isFinite(value) ? value : null);
