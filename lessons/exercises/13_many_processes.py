"""Exercises of lesson 13, many processes."""

import math

import torch

from glassgpt.learn.exercises import Answer, exercise, expect, expect_close


@exercise
def numbers_sent(N: int, W: int) -> float:
    """Return how many numbers each of W ranks sends in a ring all-reduce.

    The tensor has N numbers, and W divides N.
    """
    return 2 * (W - 1) / W * N


@numbers_sent.check
def _(answer: Answer) -> None:
    expect_close(answer(120, 1), 0, "one rank alone, which sends nothing")
    result = answer(120, 4)
    for value, reason in (
        (90.0, "this is the reduce-scatter only; the all-gather sends as much"),
        (360.0, "a rank sends one chunk of N / W numbers in a step, not all N"),
        (720.0, "this is the sum over all ranks and steps, with whole tensors"),
    ):
        expect(result != value, reason)
    expect_close(result, 180.0, "120 numbers and 4 ranks")
    expect_close(answer(120, 3), 160.0, "120 numbers and 3 ranks")


@exercise
def bytes_per_parameter(stage: int, W: int) -> float:
    """Return the bytes that each of W ranks holds per parameter of the model.

    Stage 0 is data parallel; stages 1, 2 and 3 are those of ZeRO. All numbers are
    float32, and AdamW keeps two moments. Do not count activations.
    """
    parts = [4, 4, 8]  # weight, gradient, moments: the last ones are sharded first
    return sum(parts[: 3 - stage]) + sum(parts[3 - stage :]) / W


@bytes_per_parameter.check
def _(answer: Answer) -> None:
    expect_close(answer(0, 8), 16.0, "data parallel, where each rank holds everything")
    expect_close(answer(3, 8), 2.0, "stage 3 with 8 ranks, where all is sharded")
    expect(answer(1, 8) != 12.5, "stage 1 shards the moments; the weights come last")
    expect_close(answer(1, 8), 9.0, "stage 1 with 8 ranks")
    expect(answer(2, 4) != 10.0, "stage 2 divides the gradients as well as the moments")
    expect(answer(2, 4) != 13.0, "stage 2 still divides the moments, as stage 1 does")
    expect_close(answer(2, 4), 7.0, "stage 2 with 4 ranks")


@exercise
def mean_over_ranks(gradients: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Return the gradient (N,) of the mean loss over all rows of all ranks.

    gradients (W, N): rank r computed gradients[r] from the mean loss over its own
    rows[r] rows. The ranks have different numbers of rows (W,), some maybe 0.
    """
    return rows.to(gradients.dtype) @ gradients / rows.sum()


@mean_over_ranks.check
def _(answer: Answer) -> None:
    gradients, rows = torch.tensor([[1.0, 4.0], [3.0, 0.0]]), torch.tensor([1, 3])
    result = answer(gradients, rows)
    shape = getattr(result, "shape", None)
    expect(shape == (2,), f"expected a tensor of shape (2,), not {shape}")
    for wrong, reason in (
        (gradients.mean(dim=0), "a mean of means: ranks with few rows count too much"),
        (rows.float() @ gradients, "it is a sum over rows; divide by all rows"),
        (rows.float() @ gradients / 2, "divide by the number of rows, not of ranks"),
    ):
        expect(not torch.allclose(result, wrong), reason)
    expect_close(result, torch.tensor([2.5, 1.0]), "ranks with 1 and 3 rows")
    empty = answer(gradients, torch.tensor([0, 2]))
    is_finite = all(math.isfinite(value) for value in empty.tolist())
    expect(is_finite, "a rank without rows makes the result infinite or NaN")
    expect_close(empty, gradients[1], "ranks with 0 and 2 rows")
