"""Exercises of lesson 3, batches."""

import torch

from glassgpt.learn.exercises import Answer, exercise, expect, expect_close


@exercise
def count_windows(N: int, T: int) -> int:
    """Return how many windows of T + 1 tokens a text of N tokens has.

    They begin at the tokens 0, T, 2T, ... and must be complete. N is at least 1.
    """
    return (N - 1) // T


@count_windows.check
def _(answer: Answer) -> None:
    result = answer(8, 4)
    expect(
        result != 2,
        "8 tokens have one window of 5: the second, from 4 to 8, lacks its last target",
    )
    expect_close(result, 1, "windows of T = 4 in 8 tokens")
    result = answer(13, 4)
    expect(
        result != 2,
        "13 tokens have the windows 0-4, 4-8 and 8-12: they share their end tokens",
    )
    expect_close(result, 3, "windows of T = 4 in 13 tokens")
    expect_close(answer(4, 4), 0, "windows of T = 4 in 4 tokens")
    expect_close(answer(1001, 10), 100, "windows of T = 10 in 1001 tokens")


@exercise
def inputs_and_targets(ids: torch.Tensor, T: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut a text into windows; return their inputs and targets, each of shape (n, T).

    `ids` (N,) has the n T + 1 tokens of n windows, which begin at 0, T, 2T, ...
    """
    return ids[:-1].reshape(-1, T), ids[1:].reshape(-1, T)


@inputs_and_targets.check
def _(answer: Answer) -> None:
    ids = torch.arange(13) + 50
    result = answer(ids, 4)
    is_pair = isinstance(result, tuple) and len(result) == 2
    expect(is_pair, "return two tensors: inputs, targets")
    inputs, targets = result
    for name, values in (("inputs", inputs), ("targets", targets)):
        shape = getattr(values, "shape", None)
        expect(
            shape == (3, 4), f"expected {name} of shape (3, 4) for T = 4, not {shape}"
        )
    expect_close(inputs, ids[:-1].reshape(3, 4), "the inputs of the tokens 50 to 62")
    expect(
        not torch.equal(targets, inputs),
        "the targets are the inputs; a model would only learn to copy. Shift by one",
    )
    expect(
        not torch.equal(targets, inputs.roll(-1, 1)),
        "the last target of each window is its own first token, not the next window's",
    )
    expect(
        not torch.equal(targets[:, 1:], inputs[:, :-1]),
        "the targets are shifted in the wrong direction: they come before the inputs",
    )
    expect_close(targets, ids[1:].reshape(3, 4), "the targets of the tokens 50 to 62")


@exercise
def windows_of_rank(step: int, B: int, rank: int, W: int) -> list[int]:
    """Return the numbers of the windows that a rank reads in a step.

    The run reads the windows 0, 1, 2, ... in this order, B in each step. W ranks share
    each step's windows evenly; W divides B. Steps and ranks count from 0.
    """
    rows = B // W
    first = step * B + rank * rows
    return list(range(first, first + rows))


@windows_of_rank.check
def _(answer: Answer) -> None:
    def read(step: int, B: int, W: int) -> list[list[int]]:
        return [sorted(map(int, answer(step, B, rank, W))) for rank in range(W)]

    expect(
        read(0, 4, 1) == [[0, 1, 2, 3]],
        f"a single rank reads all: [0, 1, 2, 3] in step 0, not {read(0, 4, 1)[0]}",
    )
    for step in (0, 1, 3):
        lists = read(step, 8, 4)
        where = f"step {step}, B = 8, W = 4"
        expect(
            not all(own == lists[0] for own in lists),
            f"{where}: all ranks read {lists[0]}; 4 ranks then do the work of one",
        )
        expect(
            {len(own) for own in lists} != {8},
            f"{where}: each rank reads 8 windows, but B counts those of all ranks",
        )
        for rank, own in enumerate(lists):
            expect(
                len(own) == 2, f"{where}: rank {rank} reads {len(own)} windows, not 2"
            )
            for other in range(rank):
                both = sorted(set(own) & set(lists[other]))
                expect(not both, f"{where}: ranks {other} and {rank} both read {both}")
        every = sorted(number for own in lists for number in own)
        expect(
            every == list(range(8 * step, 8 * step + 8)),
            f"{where}: together the ranks read {every}, and the batch has "
            f"{8 * step} to {8 * step + 7}, whatever W is",
        )
