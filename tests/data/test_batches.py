"""Batches as a pure function of the step, mixtures of texts, and evaluation that predicts each token once."""

import itertools
from typing import get_args

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from glassgpt.data.batches import MIXTURE_PERIOD, Batches, Order, drawn, shuffled, spread
from glassgpt.data.dataset import TokenStream
from glassgpt.utils.errors import UserError

keys = st.integers(0, 2**63 - 1)


def counting(tokens: int) -> TokenStream:
    """Return a stream whose token at position i is i, so the first token of a window is the window's start."""
    return TokenStream([np.arange(tokens, dtype="<u4")])


def starts(batches: Batches, sequences: int, batch_size: int) -> list[int]:
    """Return the start positions of the first `sequences` windows, read in batches of `batch_size`."""
    steps = -(-sequences // batch_size)
    return [int(window[0]) for step in range(steps) for window in batches.batch_at(step)][:sequences]


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 3000), key=keys)
def test_the_shuffle_is_a_permutation(n: int, key: int) -> None:
    assert np.array_equal(np.sort(shuffled(np.arange(n), n, key)), np.arange(n))


@pytest.mark.parametrize("n", [2**k + d for k in (6, 8, 16) for d in (-1, 0, 1)])
def test_the_shuffle_is_a_permutation_around_powers_of_two(n: int) -> None:
    assert np.array_equal(np.sort(shuffled(np.arange(n), n, 7)), np.arange(n))


def test_the_shuffle_of_a_corpus_too_large_to_store_has_no_repeats() -> None:
    n = 10**10 // 64
    windows = shuffled(np.arange(n - 100_000, n), n, 7)
    assert len(np.unique(windows)) == 100_000
    assert 0 <= windows.min() <= windows.max() < n


@pytest.mark.slow
def test_every_permutation_is_equally_likely() -> None:
    # 24 permutations of 4, 1,200 keys: chi-square with 23 degrees of freedom, which exceeds 66 once in 200,000.
    counts = dict.fromkeys(itertools.permutations(range(4)), 0)
    for key in range(1200):
        counts[tuple(shuffled(np.arange(4), 4, key).tolist())] += 1
    assert sum((count - 50) ** 2 / 50 for count in counts.values()) < 66


def test_the_shuffled_order_is_uncorrelated_with_the_original_order() -> None:
    # A fair shuffle's correlations have standard deviation 1/sqrt(n); 5 deviations are exceeded once in 1.7 million.
    n = 20_011
    for key in range(5):
        windows = shuffled(np.arange(n), n, key).astype(float)
        for pair in (
            (windows, np.arange(n)),
            (windows[1:], windows[:-1]),
            (windows[: n // 2], windows[n // 2 : n // 2 * 2]),
        ):
            assert abs(np.corrcoef(*pair)[0, 1]) < 5 / np.sqrt(n)


def test_the_shuffle_is_the_same_in_every_version() -> None:
    """Checkpoints store only the step, so a changed permutation would give resumed runs different batches."""
    assert shuffled(np.arange(10), 10, 1337).tolist() == [5, 2, 0, 8, 7, 3, 1, 9, 4, 6]
    assert Batches([counting(1000)], 16, 4, seed=1337).batch_at(20)[:, 0].tolist() == [846, 46, 254, 14]


@settings(max_examples=40, deadline=None)
@given(tokens=st.integers(2, 400), context=st.integers(1, 40), batch_size=st.integers(1, 9), seed=st.integers(0, 99))
def test_each_epoch_covers_the_text_once_in_a_different_order(
    tokens: int, context: int, batch_size: int, seed: int
) -> None:
    context = min(context, tokens - 1)
    batches = Batches([counting(tokens)], context, batch_size, seed)
    n = batches.windows_per_epoch
    assert n == max(1, (tokens - context) // context)
    drawn = starts(batches, 3 * n, batch_size)  # batches straddle the epochs
    for epoch in range(3):
        tiles = sorted(drawn[epoch * n : (epoch + 1) * n])
        assert tiles == list(range(tiles[0], tiles[0] + n * context, context))
        assert 0 <= tiles[0] < context


def test_a_window_holds_consecutive_tokens_of_the_text() -> None:
    window = Batches([counting(1000)], 16, 4, seed=0).batch_at(5)
    assert window.shape == (4, 17)
    assert window.dtype == np.int64
    assert (np.diff(window, axis=1) == 1).all()


def test_offsets_differ_between_epochs_and_seeds_and_take_nearly_every_value() -> None:
    offsets = [[Batches([counting(40)], 16, 1, seed).batch_at(epoch)[0, 0] for epoch in range(100)] for seed in (0, 1)]
    assert offsets[0] != offsets[1]
    # 100 draws miss a given one of 16 values with probability 1.6e-3, so a list very rarely misses two.
    assert len(set(offsets[0])) >= 15
    assert len(set(offsets[1])) >= 15


@pytest.mark.parametrize("order", ["shuffled", "sequential", "random"])
def test_a_batch_depends_only_on_the_step(order: Order) -> None:
    steps = [7, 0, 31, 7, 3, 31]
    reused = Batches([counting(500)], 8, 6, 1337, order)
    for step in steps:
        fresh = Batches([TokenStream(np.array_split(np.arange(500), 7))], 8, 6, 1337, order)
        assert np.array_equal(reused.batch_at(step), fresh.batch_at(step))


@pytest.mark.parametrize("order", ["shuffled", "sequential", "random"])
def test_the_sequence_of_windows_does_not_depend_on_the_batch_size(order: Order) -> None:
    expected = starts(Batches([counting(500)], 8, 1, 3, order), 120, 1)
    for batch_size in (2, 7, 100):
        assert starts(Batches([counting(500)], 8, batch_size, 3, order), 120, batch_size) == expected


def test_sequential_windows_restart_at_the_beginning_of_the_text() -> None:
    batches = Batches([counting(35)], 8, 2, seed=5, order="sequential")
    assert starts(batches, 7, 2) == [0, 8, 16, 0, 8, 16, 0]


def test_random_windows_start_uniformly_at_every_possible_position() -> None:
    # 20 possible starts, 4,000 draws: chi-square with 19 degrees of freedom, which exceeds 60 once in 250,000.
    drawn = starts(Batches([counting(28)], 8, 40, seed=1, order="random"), 4000, 40)
    counts = np.bincount(drawn)
    assert len(counts) == 20
    assert ((counts - 200.0) ** 2 / 200).sum() < 60


def test_draws_equal_splitmix64() -> None:
    """The expected values are SplitMix64's outputs for seed 1234567, as its Java and C implementations give them."""
    n = 2**62
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert drawn(np.arange(5), n, 1234567).tolist() == [value % n for value in expected]


# Mixtures


@settings(max_examples=60, deadline=None)
@given(weights=st.lists(st.floats(0.5, 10), min_size=1, max_size=60))
@example(weights=[0.5] + [0.01] * 50)
@example(weights=[0.5] + [0.05] * 10)
def test_every_range_of_a_mixture_has_the_shares_given_by_the_weights(weights: list[float]) -> None:
    """In any range, a text's count is less than two sequences from its share, rounded to 1/`MIXTURE_PERIOD`."""
    texts, ranks = spread(weights)
    period = len(texts)
    counts = np.bincount(texts, minlength=len(weights))
    assert np.abs(counts / period - np.array(weights) / sum(weights)).max() < 1 / MIXTURE_PERIOD
    for number in range(len(weights)):
        excess = np.cumsum([0, *(texts == number)]) - np.arange(period + 1) * counts[number] / period
        assert excess.max() - excess.min() < 2  # so for any range, also across the end of a period
        assert np.abs(excess).max() < 1
        assert ranks[texts == number].tolist() == list(range(int(counts[number])))


def test_the_order_of_a_text_in_a_mixture_does_not_depend_on_the_other_texts() -> None:
    """Each window of a text comes once per epoch, and replacing another text does not change the order."""
    one, two, three = counting(805), TokenStream([np.arange(1000, 1405)]), TokenStream([np.arange(2000, 2085)])
    batches = Batches([one, two, three], 8, 7, seed=3, weights=[3, 2, 1])
    assert batches.windows_per_epoch == 99 + 49 + 9
    windows = np.concatenate([batches.batch_at(step) for step in range(60)])
    assert (np.diff(windows, axis=1) == 1).all()
    drawn_from = windows[:, 0] // 1000
    assert np.abs(np.bincount(drawn_from) - np.array([210, 140, 70])).max() <= 2
    first_epoch = windows[drawn_from == 1][:49, 0]
    assert sorted(first_epoch) == list(range(min(first_epoch), min(first_epoch) + 49 * 8, 8))
    again = Batches([one, two, TokenStream([np.arange(3000, 3500)])], 8, 7, seed=3, weights=[3, 2, 1])
    assert np.array_equal(again.batch_at(5)[:, 0] // 1000 == 1, batches.batch_at(5)[:, 0] // 1000 == 1)
    assert np.array_equal(again.batch_at(5)[drawn_from[35:42] == 1], batches.batch_at(5)[drawn_from[35:42] == 1])


def test_two_copies_of_a_text_in_a_mixture_are_read_in_different_orders() -> None:
    windows = Batches([counting(8005), counting(8005)], 8, 200, seed=0, weights=[1, 1]).batch_at(0)[:, 0]
    texts, _ = spread([1, 1])
    assert windows[texts[:200] == 0].tolist() != windows[texts[:200] == 1].tolist()


def test_a_weight_below_one_sequence_per_period_is_refused() -> None:
    with pytest.raises(UserError, match="at least one sequence in 4096"):
        Batches([counting(100), counting(100)], 8, 4, 0, weights=[1, 1e-6])


def test_a_text_shorter_than_a_window_is_refused_and_one_as_long_is_used() -> None:
    with pytest.raises(
        UserError, match=r"has 8 tokens.* at least 9;\ngive more text, or a smaller model.context_length"
    ):
        Batches([counting(8)], 8, 2, 0)
    for order in get_args(Order):
        assert Batches([counting(9)], 8, 2, 0, order).batch_at(3).tolist() == [list(range(9))] * 2


@given(sizes=st.lists(st.integers(0, 20), min_size=1, max_size=6), data=st.data())
def test_a_read_may_span_several_shards(sizes: list[int], data: st.DataObject) -> None:
    ends = np.cumsum(sizes)
    stream = TokenStream([np.arange(end - size, end, dtype="<u2") for size, end in zip(sizes, ends, strict=True)])
    start = data.draw(st.integers(0, len(stream)))
    length = data.draw(st.integers(0, len(stream) - start))
    assert stream.read(start, length).tolist() == list(range(start, start + length))
    with pytest.raises(IndexError):
        stream.read(start, len(stream) - start + 1)


@given(
    tokens=st.integers(2, 200),
    context=st.integers(1, 50),
    batch_size=st.integers(1, 9),
    limit=st.none() | st.integers(1, 250),
)
def test_evaluation_predicts_every_token_but_the_first_once(
    tokens: int, context: int, batch_size: int, limit: int | None
) -> None:
    batches = list(counting(tokens).evaluation_batches(context, batch_size, limit))
    predicted = [int(token) for _, _, targets in batches for token in targets.ravel()]
    assert predicted == list(range(1, min(tokens, (limit or tokens) + 1)))
    for first, inputs, targets in batches:
        assert first == targets[0, 0]
        assert np.array_equal(inputs, targets - 1)
        assert inputs.dtype == targets.dtype == np.int64
        assert len(inputs) <= batch_size
    assert all(inputs.shape[1] == context for _, inputs, _ in batches[:-1])


@given(
    tokens=st.integers(2, 200), context=st.integers(1, 50), batch_size=st.integers(1, 9), world_size=st.integers(1, 5)
)
def test_ranks_share_the_batches_of_an_evaluation(tokens: int, context: int, batch_size: int, world_size: int) -> None:
    """Exactly one rank gets each batch of the single-process case, also with more ranks than batches."""
    single = list(counting(tokens).evaluation_batches(context, batch_size))
    shares = [
        list(counting(tokens).evaluation_batches(context, batch_size, None, rank, world_size))
        for rank in range(world_size)
    ]
    assert sorted(first for share in shares for first, _, _ in share) == [first for first, _, _ in single]
    shapes = {first: targets.shape for first, _, targets in single}
    assert all(targets.shape == shapes[first] for share in shares for first, _, targets in share)


def test_evaluation_of_one_token_is_refused() -> None:
    with pytest.raises(UserError, match="1 tokens"):
        list(counting(1).evaluation_batches(8, 4))
