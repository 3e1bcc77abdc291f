"""Exercises of lesson 11, numbers."""

import math

import torch

from glassgpt.learn.exercises import Answer, exercise, expect, expect_close


@exercise
def gap_above(x: float, n_f: int) -> float:
    """Return the distance from x to the next larger number with n_f fraction bits.

    x > 0 is a number of the format itself. The exponent has no limits.
    """
    power = math.frexp(x)[1] - 1  # x is between 2^power and twice as much
    return 2.0 ** (power - n_f)


@gap_above.check
def _(answer: Answer) -> None:
    result = answer(1.0, 7)
    expect_close(result, 2.0**-7, "the gap above 1 with 7 fraction bits")
    result = answer(6.0, 7)
    for value, reason in (
        (2.0**-7, "the gap is the same at 1 and at 6, but it grows with the exponent"),
        (6 * 2.0**-7, "the gap grows with x; it must be the same from 4 to 8"),
        (2.0**-4, "6 = 1.5 * 2^2: the exponent is 2, not 3"),
    ):
        expect(result != value, f"above 6 with 7 fraction bits: {reason}")
    expect_close(result, 2.0**-5, "the gap above 6 with 7 fraction bits")
    expect_close(answer(256.0, 7), 2.0, "the gap above 256 with 7 fraction bits")
    small = answer(0.125, 10) * 2**13
    expect_close(small, 1.0, "2^13 times the gap above 0.125 with 10 fraction bits")


@exercise
def nearest(x: float, n_f: int) -> float:
    """Return the number with n_f fraction bits that is nearest to x > 0.

    Halves go to the even neighbour, whose last bit is 0. The exponent has no limits.
    """
    gap = 2.0 ** (math.frexp(x)[1] - 1 - n_f)
    return round(x / gap) * gap  # Python's round takes the even one of two


@nearest.check
def _(answer: Answer) -> None:
    expect_close(answer(6.0, 7), 6.0, "6, which needs no rounding")
    result = answer(259.5, 7)
    expect(
        result != 259.5,
        "259.5 stays 259.5: with 7 fraction bits, numbers from 256 to 512 are 2 apart",
    )
    expect(result != 258.0, "259.5 becomes 258: round to the nearest, do not cut off")
    expect_close(result, 260.0, "259.5 with 7 fraction bits")
    expect(
        answer(257.0, 7) != 258.0,
        "257 is halfway between 256 = 128 * 2 and 258 = 129 * 2: take the even 128",
    )
    expect_close(answer(257.0, 7), 256.0, "257 with 7 fraction bits")
    expect(
        answer(259.0, 7) != 258.0,
        "259 is halfway between 258 = 129 * 2 and 260 = 130 * 2: take the even 130",
    )
    expect_close(answer(259.0, 7), 260.0, "259 with 7 fraction bits")
    expect_close(answer(511.5, 7), 512.0, "511.5 with 7 fraction bits")
    expect_close(answer(2.0**-20 / 3, 7) * 2**20, 0.333984375, "2^20 times 2^-20 / 3")


@exercise
def scaled_update(
    weight: torch.Tensor, gradient: torch.Tensor, lr: float, S: float
) -> tuple[torch.Tensor, float]:
    """Make an update with loss scaling; return the new weight and the next scale.

    `weight` is float32. `gradient` is float16 and comes from a loss multiplied by S.
    The update subtracts lr times the gradient of the loss without S. If a value of the
    gradient is infinite or NaN, the weight stays and the scale is halved.
    """
    if not gradient.isfinite().all():
        return weight, S / 2
    return weight - lr * gradient.float() / S, S


@scaled_update.check
def _(answer: Answer) -> None:
    weight = torch.tensor([1.0, 2.0])

    def after(values: list[float], lr: float, S: float) -> tuple[torch.Tensor, float]:
        gradient = torch.tensor(values, dtype=torch.float16)
        result = answer(weight.clone(), gradient, lr, S)
        is_pair = isinstance(result, tuple) and len(result) == 2
        expect(is_pair, "return two things: the weight, the scale")
        new, S = result
        is_float32 = getattr(new, "dtype", None) == torch.float32
        expect(is_float32, "the new weight must be a float32 tensor")
        return new, S

    new, S = after([8.0, 16.0], 0.5, 4.0)
    expect(
        not torch.equal(new, weight - 0.5 * torch.tensor([8.0, 16.0])),
        "the gradient is still multiplied by S; divide it by S",
    )
    expect_close(new, torch.tensor([0.0, 0.0]), "the weight for S = 4")
    expect(S == 4.0, f"without overflow, the scale stays 4, not {S}")
    for name, value in (("infinite", math.inf), ("NaN", math.nan)):
        new, S = after([8.0, value], 0.5, 4.0)
        expect(
            bool(new.isfinite().all()), f"a gradient is {name}, and the weight as well"
        )
        expect(
            torch.equal(new, weight),
            f"one value is {name}: skip the update of all values, not only of this one",
        )
        expect(S == 2.0, f"one value is {name}: the scale becomes 2, not {S}")
    new, _ = after([2.0**-10, 1.0], 2.0**20, 2.0**16)
    expect(
        new[0] != weight[0],
        "2^-10 / 2^16 is 0 in float16: convert the gradient to float32 before dividing",
    )
    expect_close(new, weight - torch.tensor([2.0**-6, 16.0]), "the weight for S = 2^16")
