"""Exercises of lesson 4, attention from averages."""

import math

import torch

from glassgpt.learn.exercises import Answer, exercise, expect, expect_close


def _draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@exercise
def window_average(x: torch.Tensor, window: int) -> torch.Tensor:
    """Return for each row of x (T, C) the mean of this row and the rows before it.

    It averages at most `window` rows, with the row itself. Row 0 has no rows before it:
    its mean is itself.
    """
    ones = torch.ones(len(x), len(x))
    near = ones.tril() - ones.tril(diagonal=-window)
    return near / near.sum(dim=1, keepdim=True) @ x


@window_average.check
def _(answer: Answer) -> None:
    x = _draw(6, 3)
    result = answer(x, 2)
    expect(result is not None, "it returns nothing; is a return missing?")
    expect_close(result[0], x[0], "row 0, which has no rows before it")
    if torch.allclose(result[1:5], (x[1:5] + x[2:6]) / 2, atol=1e-5):
        expect(False, "row t averages rows t and t + 1; it must not see the future")
    expect_close(result[5], (x[4] + x[5]) / 2, "row 5 with a window of 2")
    expect_close(answer(x, 6)[5], x.mean(dim=0), "row 5 with a window of 6")
    expect_close(answer(x, 1), x, "a window of 1, in which each row is alone")


@exercise
def attention_weights(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Return the causal attention weights (H, T, T) of q and k (H, T, D).

    Each of the H heads attends on its own.
    """
    T, D = q.shape[1:]
    scores = q @ k.transpose(1, 2) / math.sqrt(D)
    future = torch.ones(T, T, dtype=torch.bool).triu(diagonal=1)
    return scores.masked_fill(future, -math.inf).softmax(dim=-1)


@attention_weights.check
def _(answer: Answer) -> None:
    q, k = 3 * _draw(2, 5, 16), _draw(3, 5, 16)[:2]
    result = answer(q, k)
    expect(
        getattr(result, "shape", None) == (2, 5, 5),
        f"expected shape (2, 5, 5), not {getattr(result, 'shape', None)}",
    )
    expect(
        result[:, 0, 1:].abs().max() < 1e-6,
        "the first token gives weight to later tokens; mask them before softmax",
    )
    expect_close(result.sum(dim=-1), torch.ones(2, 5), "the sum of each row of weights")
    expected = attention_weights(q, k)
    for factor, reason in (
        (16**0.5, "the scores are not divided by √D"),
        (16**-0.5, "the scores are divided by D, not √D"),
    ):
        expect(
            not torch.allclose(result, attention_weights(q * factor, k), atol=1e-5),
            reason,
        )
    expect_close(result, expected, "the weights")


@exercise
def variance_of_scores(D: int, sigma: float) -> float:
    """Return the variance of the score q·k / √D.

    The D numbers of q have variance sigma², those of k variance 1. All have mean 0
    and are independent.
    """
    return sigma**2


@variance_of_scores.check
def _(answer: Answer) -> None:
    expect_close(answer(64, 1.0), 1.0, "the variance for sigma = 1")
    expect(
        not math.isclose(answer(64, 3.0), 3.0),
        "the variance grows with sigma², not with sigma",
    )
    expect_close(answer(64, 3.0), 9.0, "the variance for D = 64 and sigma = 3")
    expect_close(answer(16, 0.5), 0.25, "the variance for D = 16 and sigma = 0.5")
