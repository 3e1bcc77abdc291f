"""Exercises of lesson 4, attention from averages."""

import math

import torch

from glassgpt.learn.exercises import (
    Answer,
    exercise,
    expect,
    expect_close,
    expect_none_of,
)


def _draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@exercise
def window_average(x: torch.Tensor, window: int) -> torch.Tensor:
    """Return, for each row of x (T, C), the mean of the last `window` rows: (T, C).

    The row itself is the last of them. If there are fewer than `window` rows, average
    those that there are: row 0 stays as it is. `window` is at least 1 and may exceed T.
    """
    ones = torch.ones(len(x), len(x))
    near = ones.tril() - ones.tril(diagonal=-window)
    return near / near.sum(dim=1, keepdim=True) @ x


@window_average.check
def _(answer: Answer) -> None:
    x = _draw(0, 6, 3)
    result, right = answer(x, 2), window_average(x, 2)
    expect(result is not None, "it returns nothing; is a return missing?")
    halves = right.clone()
    halves[0] /= 2
    mistakes = {
        "`window` has no effect: each row averages all rows before it": (
            window_average(x, 6)
        ),
        "one row too many: the row itself is one of the `window` rows": (
            window_average(x, 3)
        ),
        "row t averages rows t and t + 1; it must not see the future": (
            window_average(x.flip(0), 2).flip(0)
        ),
        "row 0 has one row to average, not 2: divide by the rows that there are": (
            halves
        ),
    }
    expect_none_of(result, mistakes)
    is_nan = isinstance(result, torch.Tensor) and result.isnan().any()
    expect(
        not is_nan,
        "a row is the mean of no rows: x[-1:1] starts at the last row; use max(0, ...)",
    )
    expect_close(result, right, "the averages with a window of 2")
    expect_close(answer(x, 9), window_average(x, 9), "the averages of 6 rows, window 9")
    expect_close(answer(x, 1), x, "a window of 1, in which each row is alone")


@exercise
def attention_weights(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Return the causal attention weights (H, T, T) of q and k (H, T, D).

    Each of the H heads attends on its own. Row t of its weights (T, T) belongs to query
    t. `x.transpose(1, 2)` exchanges the last two dimensions of x (H, T, D).
    """
    T, D = q.shape[1:]
    scores = q @ k.transpose(1, 2) / math.sqrt(D)
    future = torch.ones(T, T, dtype=torch.bool).triu(diagonal=1)
    return scores.masked_fill(future, -math.inf).softmax(dim=-1)


@attention_weights.check
def _(answer: Answer) -> None:
    q, k = _draw(0, 2, 5, 16), _draw(1, 2, 5, 16)
    scores = q @ k.transpose(1, 2) / 4
    past = torch.ones(5, 5, dtype=torch.bool).tril()
    masked = scores.masked_fill(~past, -math.inf)
    itself = scores.masked_fill(~past.tril(diagonal=-1), -math.inf)
    mistakes = {
        "the first token gives weight to later tokens; mask them before the softmax": (
            scores.softmax(dim=-1)
        ),
        "the mask is applied after the softmax: the rows no longer sum to 1": (
            scores.softmax(dim=-1) * past
        ),
        "the mask hides each token from itself; row 0 then has nothing to look at": (
            itself.softmax(dim=-1)
        ),
        "softmax over the queries: each row has to sum to 1, not each column": (
            masked.softmax(dim=1)
        ),
        "softmax over the heads: each row of each head has to sum to 1": (
            masked.softmax(dim=0)
        ),
        "the scores are not divided by √D": attention_weights(4 * q, k),
        "the scores are divided by D, not √D": attention_weights(q / 4, k),
        "D is the width of one head, not of all H heads together": (
            attention_weights(q / 2**0.5, k)
        ),
        "queries and keys are exchanged: row t belongs to query t": (
            attention_weights(k, q)
        ),
    }
    result = answer(q, k)
    expect_none_of(result, mistakes)
    expect_close(result, attention_weights(q, k), "the weights")


@exercise
def variance_of_scores(D: int, sigma: float) -> float:
    """Return the variance of the score q·k / √D.

    The D numbers of q have variance sigma², those of k variance 1. All have mean 0
    and are independent.
    """
    return sigma**2


@variance_of_scores.check
def _(answer: Answer) -> None:
    mistakes = {
        "that is the variance of q·k, without the division by √D": 64 * 9.0,
        "a divisor of √D divides the variance by D, not by √D": 8 * 9.0,
        "the division by √D cancels the D: the sum has D terms": 9 / 64,
        "the variance grows with sigma², not with sigma": 3.0,
        "`sigma` has no effect: each product has the variance sigma² · 1": 1.0,
    }
    result = answer(64, 3.0)
    expect_none_of(result, mistakes)
    expect_close(result, 9.0, "the variance for D = 64 and sigma = 3")
    expect_close(answer(16, 0.5), 0.25, "the variance for D = 16 and sigma = 0.5")
