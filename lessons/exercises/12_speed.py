"""Exercises of lesson 12, speed."""

import math

import torch

from glassgpt.learn.exercises import Answer, exercise, expect, expect_close


@exercise
def least_seconds(flops: float, moved: float, peak: float, bandwidth: float) -> float:
    """Return the least time in seconds of a computation.

    It does `flops` operations and moves `moved` bytes. The processor does `peak`
    operations and moves `bandwidth` bytes per second, both at the same time.
    """
    return max(flops / peak, moved / bandwidth)


@least_seconds.check
def _(answer: Answer) -> None:
    result = answer(6.0, 8.0, 2.0, 4.0)  # 3 s of arithmetic, 2 s of traffic
    expect_close(answer(0.0, 8.0, 2.0, 4.0), 2.0, "a copy, without any arithmetic")
    for value, reason in (
        (5.0, "both times are added, but they pass at the same time"),
        (2.0, "the shorter time counts, but the longer one must pass as well"),
    ):
        expect(result != value, reason)
    expect_close(result, 3.0, "3 s of arithmetic and 2 s of traffic")
    expect_close(answer(2.0, 20.0, 2.0, 4.0), 5.0, "1 s of arithmetic, 5 s of traffic")


@exercise
def product_intensity(M: int, K: int, N: int, size: int) -> float:
    """Return the FLOPs per byte of the product (M, K) @ (K, N).

    A number has `size` bytes. Each input is read once, the result is written once. A
    multiplication and an addition are two FLOPs.
    """
    return 2 * M * K * N / (size * (M * K + K * N + M * N))


@product_intensity.check
def _(answer: Answer) -> None:
    M, K, N, size = 8, 32, 16, 2
    result, flops, numbers = answer(M, K, N, size), 2 * M * K * N, M * K + K * N + M * N
    expect(isinstance(result, int | float), f"expected a number, not {result!r}")
    for value, reason in (
        (flops / numbers, "it counts FLOPs per number, not per byte"),
        (flops / 2 / (size * numbers), "each product is added: two FLOPs, not one"),
        (flops / (size * (M * K + K * N)), "the result is written to memory as well"),
        (flops / (size * K * N), "the tokens and the result are moved as well"),
        (size * numbers / flops, "it is bytes per FLOP, upside down"),
    ):
        expect(not math.isclose(result, value), reason)
    expect_close(result, flops / (size * numbers), "the intensity")
    expect_close(answer(1, 64, 64, 4), 8192 / 16896, "one token, in float32")


@exercise
def merge_parts(
    m: torch.Tensor, d: torch.Tensor, out: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Merge the attention of one query over P separate parts of the keys.

    Part p has the largest score m[p], the sum d[p] of exp(score - m[p]), and the
    finished output out[p] (D,) of its own softmax: m and d are (P,), out is (P, D).
    Return the same three for all keys together: scalars m and d, and the output (D,).
    """
    largest = m.max()
    share = d * (m - largest).exp()
    return largest, share.sum(), share @ out / share.sum()


@merge_parts.check
def _(answer: Answer) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = 3 * torch.randn(3, 4, generator=generator)
    v = torch.randn(3, 4, 2, generator=generator)
    m = scores.amax(dim=1)
    d = (scores - m[:, None]).exp().sum(dim=1)
    out = torch.einsum("ps,psd->pd", scores.softmax(dim=1), v)
    result = answer(m, d, out)
    expect(isinstance(result, tuple) and len(result) == 3, "expected m, d and output")
    for weights, reason in (
        (torch.ones(3), "all parts count the same; weight them by their sums"),
        (d, "the sums d have different maxima; bring them to one maximum first"),
        (m.exp(), "each part counts by its maximum only; the sum d is missing"),
    ):
        wrong = weights @ out / weights.sum()
        expect(
            getattr(result[2], "shape", None) != wrong.shape
            or not torch.allclose(result[2], wrong, atol=1e-5),
            reason,
        )
    everything = scores.flatten()
    expect_close(result[2], everything.softmax(dim=0) @ v.flatten(0, 1), "the output")
    expect_close(result[0], everything.max().item(), "m, the largest score")
    total = (everything - everything.max()).exp().sum().item()
    expect_close(result[1], total, "d, the sum for the new maximum")
    moved = answer(m + 1000, d, out)[2]
    expect(torch.isfinite(moved).all(), "large scores overflow; subtract the maximum")
