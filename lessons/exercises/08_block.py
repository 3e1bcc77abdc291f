"""Exercises of lesson 8, the block."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from glassgpt.learn.exercises import Answer, exercise, expect, expect_close


@exercise
def swiglu_width(n_embd: int, multiple: int) -> int:
    """Return the inner width F of a SwiGLU block for a model of width n_embd.

    Its three matrices have at least as many weights as the two matrices of a block with
    4 · n_embd inner numbers. F is the smallest such multiple of `multiple`.
    """
    least = -(-8 * n_embd // 3)  # rounded up
    return -(-least // multiple) * multiple


@swiglu_width.check
def _(answer: Answer) -> None:
    result = answer(768, 256)
    mistakes = {
        3072: "3 matrices of width 4C have half as many weights again",
        4096: "divide the width by 3, not by 2: 3CF = 8C²",
        512: "2/3 applies to the inner width 4C, not to C",
        2304: "8/3 · 768 = 2,048 is already a multiple of 256: do not add one",
        1024: "start from 4C, not from 2C: two matrices have 2 · C · 4C weights",
    }
    expect(result not in mistakes, mistakes.get(result, ""))
    expect_close(result, 2048, "n_embd = 768, where 8/3 · 768 is 2,048 exactly")
    result = answer(64, 8)
    expect(result != 168, "8/3 · 64 is 170.7: round up, 168 has fewer weights")
    expect(result % 8 == 0, f"{result} is not a multiple of 8")
    expect_close(result, 176, "n_embd = 64, multiple = 8")
    expect_close(answer(96, 8), 256, "n_embd = 96, multiple = 8")
    expect_close(answer(100, 1), 267, "n_embd = 100, multiple = 1")


class _Part(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@exercise
def pre_norm_block(
    x: torch.Tensor,
    norm_1: torch.nn.Module,
    attention: torch.nn.Module,
    norm_2: torch.nn.Module,
    feed_forward: torch.nn.Module,
) -> torch.Tensor:
    """Return what a block of this lesson makes of the stream x (T, C).

    The parts map (T, C) to (T, C): the norm before attention, attention, the norm
    before the feed-forward part, and the feed-forward part. Call them as functions.
    """
    x = x + attention(norm_1(x))
    x = x + feed_forward(norm_2(x))
    return x


@pre_norm_block.check
def _(answer: Answer) -> None:
    x = torch.tensor([[1.0, 2.0], [3.0, 5.0]])

    n1, n2 = _Part(lambda x: x / 2 + 1), _Part(lambda x: x / 4 - 1)
    attention, feed_forward = _Part(lambda x: x.cumsum(dim=0)), _Part(lambda x: x * x)
    result = answer(x.clone(), n1, attention, n2, feed_forward)
    mid = x + attention(n1(x))
    bare = attention(n1(x))
    post = n1(x + attention(x))
    from_norm = n1(x) + attention(n1(x))
    mistakes = {
        "nothing is added to the stream: x + ... twice": feed_forward(n2(bare)),
        "the sum after the feed-forward part is missing": feed_forward(n2(mid)),
        "the sum after attention is missing": bare + feed_forward(n2(bare)),
        "the norms come after the sums; they belong before each part": n2(
            post + feed_forward(post)
        ),
        "each part reads the stream through its norm; yours are missing": (
            x + attention(x) + feed_forward(x + attention(x))
        ),
        "the result is added to norm(x): the stream itself must stay unchanged": (
            from_norm + feed_forward(n2(from_norm))
        ),
        "the result is added to norm(x): add to the stream itself": (
            n2(from_norm) + feed_forward(n2(from_norm))
        ),
        "the feed-forward part must read the stream after attention": (
            mid + feed_forward(n2(x))
        ),
        "the two norms are different functions, in this order: norm_1, norm_2": (
            mid + feed_forward(n1(mid))
        ),
        "the two norms have changed places": (
            x + attention(n2(x)) + feed_forward(n1(x + attention(n2(x))))
        ),
        "the second sum starts from the old x, without attention": (
            x + feed_forward(n2(mid))
        ),
    }
    for reason, mistake in mistakes.items():
        same = isinstance(result, Tensor) and result.shape == mistake.shape
        expect(not (same and torch.allclose(result, mistake)), reason)
    expect_close(result, mid + feed_forward(n2(mid)), "the stream after the block")


@exercise
def relu_squared_write(
    n_embd: int, n_inner: int, sigma: float, sigma_w: float
) -> float:
    """Return the variance that a feed-forward part with ReLU² writes to the stream.

    It reads a vector with mean square 1. Weights are random with mean 0: the first
    matrix has standard deviation sigma, the second sigma_w. For a normal number z with
    variance s², the mean of z⁴ is 3s⁴.
    """
    s = math.sqrt(n_embd) * sigma
    mean_square = 3 * s**4 / 2  # of max(0, z)²: half of all z are positive
    return n_inner * mean_square * sigma_w**2


@relu_squared_write.check
def _(answer: Answer) -> None:
    n_embd, n_inner, sigma, sigma_w = 256, 1000, 0.05, 0.03
    s_2 = n_embd * sigma**2  # 0.64
    right = n_inner * 1.5 * s_2**2 * sigma_w**2
    result = float(answer(n_embd, n_inner, sigma, sigma_w))
    mistakes = {
        right * 2: "negative z give 0: only half of the z count",
        right / 3: "the mean of z⁴ is 3s⁴, not s⁴",
        right / 3 * 2: "the mean square of ReLU² is a mean of z⁴, half of 3s⁴",
        n_inner * s_2 / 2 * sigma_w**2: "this is ReLU: the square of ReLU² is z⁴",
        n_inner * 1.25 * s_2**2 * sigma_w**2: (
            "the second product needs the mean square of ReLU²(z), not its variance: "
            "its mean is not 0"
        ),
        right / sigma_w: "variances multiply with sigma_w², not with sigma_w",
        right / n_inner: "sum over all n_inner inner numbers",
        right / n_inner * n_embd: "the second product sums over n_inner numbers",
        right**0.5: "this is the standard deviation; the variance is its square",
        right / n_embd**2: "z sums over n_embd numbers: s² = n_embd · sigma²",
        right / n_embd: "z⁴ needs s⁴, so n_embd appears squared",
    }
    for mistake, reason in mistakes.items():
        expect(abs(result / mistake - 1) > 1e-4, reason)
    expect_close(result, right, "256 numbers, 1,000 inner ones, 0.05 and 0.03")
    expect_close(answer(4, 2, 0.5, 1.0), 3.0, "4 numbers, 2 inner ones, 0.5 and 1")
