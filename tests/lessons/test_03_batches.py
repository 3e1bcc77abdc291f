"""Lesson 3's functions against the library."""

import numpy as np
import pytest

from glassgpt.data.batches import Batches, shuffled
from glassgpt.data.dataset import TokenStream
from glassgpt.learn.catalog import find_lesson
from lesson_harness import load

LESSON = load(find_lesson("3").path)


@pytest.mark.parametrize("n", [1, 2, 5, 64, 100, 1000])
def test_permutation_equals_the_library(n: int) -> None:
    ours = [LESSON.permute(place, n, key=n) for place in range(n)]
    assert ours == shuffled(np.arange(n), n, key=n).tolist()
    assert sorted(ours) == list(range(n))


@pytest.mark.parametrize(("N", "T", "B"), [(100, 7, 3), (1000, 64, 8), (130, 64, 5)])
def test_batches_equal_the_library(N: int, T: int, B: int) -> None:
    text = np.random.default_rng(N).integers(1000, size=N)
    library = Batches([TokenStream([text])], T, B, seed=5)
    for step in (0, 1, 2, 17):
        np.testing.assert_array_equal(LESSON.batch_at(step, text, T, B, seed=5), library.batch_at(step))
