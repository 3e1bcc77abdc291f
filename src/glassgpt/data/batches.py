"""Batches as a pure function of the step: no loader has a state that could be lost, and no draw depends on another.

Shapes: `N` tokens in a text, `T` context length, `B` sequences per batch. A window has T + 1 tokens: T inputs and,
shifted by one, T targets. The last token of a window is the first of the next, so each token between is predicted once.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from glassgpt.data.dataset import Ids, TokenStream
from glassgpt.utils.errors import UserError
from glassgpt.utils.rng import seed_for

Order = Literal["shuffled", "sequential", "random"]


class Windows:
    """The windows of one text in training order: window number s is a function of (seed, s) alone.

    An epoch has n = (N - T) // T adjacent windows, which tile the text from an offset in [0, T). Each epoch draws its
    own offset, so that over the epochs a token occurs at every position of the context. (A text of T + 1 to 2T - 1
    tokens gives one window.) Orders: `shuffled` takes each window once per epoch, in a keyed permutation; `sequential`
    takes them in the text's order at offset 0 in every epoch; `random` draws each window's start, as nanoGPT does.
    Raises `UserError` for a text of fewer than T + 1 tokens.
    """

    def __init__(self, stream: TokenStream, context_length: int, seed: int, order: Order = "shuffled") -> None:
        if len(stream) < context_length + 1:
            needed = f"a context of {context_length:,} needs at least {context_length + 1:,}"
            advice = "give more text, or a smaller model.context_length"
            raise UserError(f"the {stream.name} has {len(stream):,} tokens, and {needed};\n{advice}")
        self.per_epoch = max(1, (len(stream) - context_length) // context_length)
        """n: windows per epoch, in any order."""
        self._stream, self._context_length, self._seed, self._order = stream, context_length, seed, order

    def at(self, numbers: Ids) -> Ids:
        """Return the windows (B, T + 1) of these numbers (B,), which must not decrease."""
        return self._stream.windows(self._starts(numbers), self._context_length + 1)

    def _starts(self, numbers: Ids) -> Ids:
        """The first token (B,) of each window."""
        if self._order == "random":
            return drawn(numbers, len(self._stream) - self._context_length, seed_for(self._seed, "batch"))
        epochs, positions = np.divmod(numbers, self.per_epoch)
        if self._order == "sequential":
            return positions * self._context_length
        starts = np.empty_like(positions)
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):  # a batch may cross two epochs, or many short ones
            windows = shuffled(positions[epochs == epoch], self.per_epoch, seed_for(self._seed, "batch", epoch))
            generator = np.random.default_rng(seed_for(self._seed, "offset", epoch))
            room = len(self._stream) - self.per_epoch * self._context_length  # for the offset, after the last window
            offset = int(generator.integers(min(self._context_length, room)))
            starts[epochs == epoch] = offset + windows * self._context_length
        return starts


# Sequences after which a mixture's shares are exact; weights are rounded to multiples of 1 / MIXTURE_PERIOD.
MIXTURE_PERIOD = 4096


class Batches:
    """`batch_at(step)` draws the whole global batch from the seed and the step. There is no other state to save.

    Each of several texts gets its share of the sequences, evenly spread: up to less than two sequences in every range.
    Raises `UserError` as `Windows` does, and for a weight that is too small for one sequence per period.
    """

    def __init__(
        self,
        streams: Sequence[TokenStream],
        context_length: int,
        batch_size: int,
        seed: int,
        order: Order = "shuffled",
        weights: Sequence[float] = (1.0,),
    ) -> None:
        seeds = [seed] if len(streams) == 1 else [seed_for(seed, "mixture", i) for i in range(len(streams))]
        texts = zip(streams, seeds, strict=True)
        self._windows = [Windows(stream, context_length, own, order) for stream, own in texts]
        self._batch_size, self._context_length = batch_size, context_length
        self._text, self._rank = spread(weights)
        self.windows_per_epoch = sum(windows.per_epoch for windows in self._windows)
        """Of all texts together."""

    def batch_at(self, step: int, rows: slice = slice(None)) -> Ids:
        """Return the windows (B, T + 1) of a step, counted from 0, or only these rows: no other window is read."""
        sequences = (step * self._batch_size + np.arange(self._batch_size, dtype=np.int64))[rows]
        periods, places = np.divmod(sequences, len(self._text))
        texts = self._text[places]
        batch = np.empty((len(sequences), self._context_length + 1), dtype=np.int64)
        for number, windows in enumerate(self._windows):
            own = texts == number
            if own.any():
                numbers = periods[own] * int((self._text == number).sum()) + self._rank[places[own]]
                batch[own] = windows.at(numbers)
        return batch


def spread(weights: Sequence[float]) -> tuple[Ids, Ids]:
    """A period of a mixture: the text (P,) of each sequence, and the number of earlier sequences of that text (P,).

    Each text has its share of the P = `MIXTURE_PERIOD` sequences (1 for a single text) and, up to less than one, of the
    first n for every n: the chairman assignment of Tijdeman (1980). Raises `UserError` for less than one sequence.
    """
    if len(weights) == 1:
        return np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64)
    shares = np.array(weights, dtype=np.float64) / sum(weights) * MIXTURE_PERIOD
    counts = np.floor(shares).astype(np.int64)
    largest_remainders = np.argsort(counts - shares, kind="stable")[: MIXTURE_PERIOD - counts.sum()]
    counts[largest_remainders] += 1
    if (counts == 0).any():
        least = f"at least one sequence in {MIXTURE_PERIOD}"
        raise UserError(f"each text of data.mixture needs {least}: raise its weight, or remove it")
    texts, ranks = np.empty(MIXTURE_PERIOD, dtype=np.int64), np.empty(MIXTURE_PERIOD, dtype=np.int64)
    assigned = np.zeros(len(counts), dtype=np.int64)
    # In units of 1 / (2 (k - 1) P), all integers: what a text lacks, and the latest position of its next sequence.
    unit = 2 * (len(counts) - 1)
    for n in range(MIXTURE_PERIOD):
        lacking = unit * (counts * (n + 1) - assigned * MIXTURE_PERIOD)
        deadline = ((unit * assigned + unit - 1) * MIXTURE_PERIOD) / counts
        chosen = int(np.where(lacking >= MIXTURE_PERIOD, deadline, np.inf).argmin())
        texts[n], ranks[n] = chosen, assigned[chosen]
        assigned[chosen] += 1
    return texts, ranks


_ROUNDS = 8


def shuffled(positions: Ids, n: int, key: int) -> Ids:
    """Evaluate the permutation of 0 to n - 1 with this `key` at these positions (any shape).

    A Feistel network permutes the numbers with an even number of bits. It is applied again while the result is n or
    more ("cycle walking"; Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002), under 4 times on average.
    Nothing is stored: a permutation of the windows of 10B tokens would take 1.25 GB.
    """
    # At least 64 numbers: with 16, the 24 permutations of 4 are measurably uneven (chi-square, 12,000 keys).
    half_bits = max(3, ((n - 1).bit_length() + 1) // 2)
    keys = np.random.SeedSequence(key).generate_state(_ROUNDS, np.uint64).astype(np.uint64)
    values = _feistel(positions.astype(np.uint64), half_bits, keys)
    while (outside := values >= n).any():
        values[outside] = _feistel(values[outside], half_bits, keys)
    return values.astype(np.int64)


def _feistel(values: npt.NDArray[np.uint64], half_bits: int, keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """A bijection of the numbers of 2 x half_bits bits: each round mixes one half into the other, reversibly."""
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> shift, values & mask
    for key in keys:
        left, right = right, left ^ (_mixed(right ^ key) & mask)
    return (left << shift) | right


def _mixed(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finalizer of SplitMix64 (Steele et al., 2014): every bit of the result depends on every bit of the value."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def drawn(numbers: Ids, n: int, key: int) -> Ids:
    """For each number (any shape), draw from 0 to n - 1 (up to the bias of 2^64 mod n): that element of SplitMix64."""
    state = np.uint64(key) + (numbers.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    return (_mixed(state) % np.uint64(n)).astype(np.int64)
