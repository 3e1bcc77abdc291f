// A cache of promises, bounded by the bytes of their values.

const DEFAULT_BYTES = 1000;  // of a value that does not state its size

// Keeps promises by key, and drops the least recently used ones when their values exceed `maxBytes` together.
export class PromiseCache {
  #entries = new Map();  // in the order of last use; the bytes of a pending entry are 0
  #bytes = 0;
  constructor(maxBytes) { this.maxBytes = maxBytes; }
  // The bytes of all values that have arrived and are still kept.
  get bytes() { return this.#bytes; }
  // Return the kept promise of `key`, or keep and return `load()`. A rejected promise is not kept.
  get(key, load) {
    const entry = this.#entries.get(key) ?? this.#start(key, load);
    this.#entries.delete(key);
    this.#entries.set(key, entry);
    return entry.promise;
  }
  clear() {
    this.#entries.clear();
    this.#bytes = 0;
  }
  #start(key, load) {
    const entry = {bytes: 0, promise: load()};
    const isKept = () => this.#entries.get(key) === entry;
    entry.promise.then(value => {
      if (!isKept()) return;
      entry.bytes = value.bytes ?? DEFAULT_BYTES;
      this.#bytes += entry.bytes;
      this.#evict(entry);
    }, () => isKept() && this.#entries.delete(key));
    return entry;
  }
  #evict(newest) {
    for (const [key, entry] of this.#entries) {
      if (this.#bytes <= this.maxBytes) return;
      if (entry === newest || !entry.bytes) continue;
      this.#entries.delete(key);
      this.#bytes -= entry.bytes;
    }
  }
}
