"""Lesson 13: its ring without processes, and its memory against the exercise's formula."""

import numpy as np
import pytest

from glassgpt.learn.catalog import find_lesson
from lesson_harness import load

LESSON = load(find_lesson("13").path)


@pytest.mark.parametrize("W", [1, 2, 3, 5, 8])
def test_ring_sums_all_ranks_in_the_fewest_steps(W: int) -> None:
    assert np.array_equal(LESSON.summed_ranks(2 * (W - 1), W), np.full((W, W), W))
    half = LESSON.summed_ranks(W - 1, W)
    assert [(half == W).sum(axis=axis).tolist() for axis in (0, 1)] == [[1 if W > 1 else W] * W] * 2


@pytest.mark.parametrize("W", [2, 3, 8])
def test_a_rank_receives_the_chunk_that_its_neighbour_sends(W: int) -> None:
    for step in range(2 * (W - 1)):
        for rank in range(W):
            assert LESSON.ring_plan(step, (rank + 1) % W, W)[1] == LESSON.ring_plan(step, rank, W)[0]


def test_memory_of_the_stages() -> None:
    of_exercise = find_lesson("13").exercises()["bytes_per_parameter"]
    sizes = list(LESSON.gigabytes(8).values())
    assert np.allclose(np.array(sizes) / sizes[0], [of_exercise(stage, 8) / 16 for stage in range(4)])
