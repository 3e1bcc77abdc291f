"""Lesson 11: its functions against PyTorch, without training."""

import math

import pytest
import torch

from glassgpt.learn.catalog import find_lesson
from lesson_harness import load

LESSON = load(find_lesson("11").path)
INFINITY = torch.tensor(math.inf)


def all_numbers(dtype: torch.dtype) -> torch.Tensor:
    """Return all numbers of a 16-bit type except NaN, in order, as float32."""
    values = torch.arange(-(2**15), 2**15).short().view(dtype).float()
    return values[~values.isnan()].sort().values


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_and_their_neighbours_round_as_in_pytorch(dtype: torch.dtype) -> None:
    numbers = all_numbers(dtype)
    finite = numbers[numbers.isfinite()].double()
    halves = ((finite[1:] + finite[:-1]) / 2).float()
    overflowing = finite[-1:] * (1 + torch.finfo(dtype).eps / 4)  # where infinity begins
    halves = torch.cat([halves, overflowing.float(), -overflowing.float()])
    x = torch.cat([numbers, halves, halves.nextafter(INFINITY), halves.nextafter(-INFINITY)])
    shape = LESSON.FORMATS[str(dtype).removeprefix("torch.")]
    assert torch.equal(LESSON.to_bits(x, *shape).short(), x.to(dtype).view(torch.int16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_patterns_mean_what_they_mean_in_pytorch(dtype: torch.dtype) -> None:
    patterns = torch.arange(2**16)
    expected = patterns.short().view(dtype).double()
    shape = LESSON.FORMATS[str(dtype).removeprefix("torch.")]
    result = torch.tensor([LESSON.value_of(p, *shape) for p in patterns.tolist()], dtype=torch.float64)
    assert torch.equal(result.nan_to_num(nan=7.0), expected.nan_to_num(nan=7.0))


def test_what_the_text_says() -> None:
    weights = all_numbers(torch.bfloat16)
    weights = weights[weights.isfinite() & (weights.abs() > 1e-30)]
    for share in (-0.999 * 2**-9, 0.999 * 2**-9):  # updates below 2^-9 of a weight are lost, larger ones not always
        assert torch.equal((weights * (1 + share)).bfloat16().float(), weights)
    assert torch.tensor([2**-25, 1.01 * 2**-25]).half().tolist() == [0, 2**-24]
    scaler = torch.amp.GradScaler("cpu")
    assert (scaler.get_scale(), scaler.get_growth_interval()) == (2**16, 2000)
    assert (scaler.get_backoff_factor(), scaler.get_growth_factor()) == (0.5, 2)


def test_float32_stays_itself() -> None:
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (10_000,), generator=generator).int()
    x = bits.view(torch.float32)
    assert torch.equal(LESSON.to_bits(x, 8, 23)[~x.isnan()], bits[~x.isnan()])
    values = [LESSON.value_of(p, 8, 23) for p in bits.tolist()]
    assert torch.equal(torch.tensor(values).nan_to_num(nan=7.0), x.nan_to_num(nan=7.0))
