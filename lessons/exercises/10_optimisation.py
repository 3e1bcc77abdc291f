"""Exercises of lesson 10, optimisation."""

import math

import torch

from glassgpt.learn.exercises import Answer, exercise, expect, expect_close


@exercise
def clip_gradients(gradients: list[torch.Tensor], limit: float) -> list[torch.Tensor]:
    """Return the gradients, clipped to a global length of at most `limit`.

    The tensors have any shapes. Their global length is that of one vector with all
    their numbers. If it is at most `limit`, the gradients stay as they are.
    """
    length = math.sqrt(sum(g.square().sum().item() for g in gradients))
    return [g * min(1.0, limit / max(length, 1e-12)) for g in gradients]


@clip_gradients.check
def _(answer: Answer) -> None:
    gradients = [torch.tensor([[3.0, 0.0]]), torch.tensor([4.0])]  # global length 5
    result = answer([g.clone() for g in gradients], 2.5)
    expect(isinstance(result, list) and len(result) == 2, "expected a list of two")
    flat = torch.cat([torch.as_tensor(g).float().flatten() for g in result])
    for wrong, reason in (
        ([2.5, 0.0, 2.5], "each part has its own limit: this changes the direction"),
        ([15 / 14, 0.0, 10 / 7], "the tensors' lengths are added: 7, but it is 5"),
        ([0.3, 0.0, 0.4], "it divides by the square of the length, without the root"),
        ([0.6, 0.0, 0.8], "the clipped length is 1, not the limit"),
    ):
        close = len(flat) == 3 and torch.allclose(flat, torch.tensor(wrong), atol=1e-5)
        expect(not close, reason)
    expect_close(result[0], gradients[0] / 2, "the first tensor, at half its length")
    expect_close(result[1], gradients[1] / 2, "the second tensor, at half its length")
    short = answer([g.clone() for g in gradients], 10.0)
    expect(
        torch.allclose(short[1], gradients[1]),
        "gradients shorter than the limit must stay as they are, not grow",
    )
    zeros = answer([torch.zeros(2)], 1.0)
    expect_close(zeros[0], torch.zeros(2), "gradients that are all 0")


@exercise
def combined_gradient(gradients: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the gradient (N,) of the mean loss over the targets of all micro-batches.

    Row i of `gradients` (k, N) is the gradient of the mean loss of micro-batch i. Row i
    of `mask` (k, n) is True for its targets that have a loss: the mean is over these. A
    micro-batch without any has a gradient of 0.
    """
    counts = mask.sum(dim=1).to(gradients)
    return counts / counts.sum() @ gradients


@combined_gradient.check
def _(answer: Answer) -> None:
    gradients = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    mask = torch.tensor([[True] * 4, [True, False, False, False], [False] * 4])
    result = answer(gradients, mask)
    expect(
        getattr(result, "shape", None) == (2,),
        f"expected shape (2,), not {getattr(result, 'shape', None)}",
    )
    for wrong, reason in (
        ([1 / 3, 1 / 3], "it divides by the number of micro-batches"),
        ([1 / 2, 1 / 2], "each micro-batch with loss counts the same, not each target"),
        ([4.0, 1.0], "it is the gradient of the sum of the losses, not of the mean"),
        ([4 / 12, 1 / 12], "it divides by all targets, also by those without loss"),
        ([1.0, 1.0], "the gradients are only added"),
    ):
        expect(not torch.allclose(result, torch.tensor(wrong), atol=1e-5), reason)
    expect_close(result, torch.tensor([0.8, 0.2]), "4, 1 and 0 targets")


@exercise
def uncorrected_move(t: int, beta1: float, beta2: float) -> float:
    """Return the move at update t = 1, 2, ... of an Adam without its corrections.

    It uses m and v as they are, not divided by 1 - beta^t. All gradients were the same
    positive number. The move is in learning rates, and epsilon is 0.
    """
    return (1 - beta1**t) / math.sqrt(1 - beta2**t)


@uncorrected_move.check
def _(answer: Answer) -> None:
    result = answer(2, 0.9, 0.999)
    expect(isinstance(result, int | float), f"expected a number, not {result!r}")
    m, v = 1 - 0.9**2, 1 - 0.999**2
    for value, reason in (
        (1.0, "this is the move with the corrections"),
        (m / v, "the root of v is missing"),
        (math.sqrt(v) / m, "m and the root of v have changed places"),
        (0.1 / math.sqrt(0.001), "this is the move at update 1, for each t"),
        (0.9**2 / math.sqrt(0.999**2), "beta^t is the share that m and v lack"),
    ):
        expect(not math.isclose(result, value, rel_tol=1e-6), reason)
    expect_close(result, m / math.sqrt(v), "the move at t = 2, for 0.9 and 0.999")
    expect_close(answer(1, 0.9, 0.95), 0.1 / math.sqrt(0.05), "t = 1, for 0.9 and 0.95")
    expect_close(answer(5000, 0.9, 0.95), 1.0, "the move after a long time")
