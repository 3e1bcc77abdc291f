"""Wrong answers to the exercises of lesson 11, each with a different mistake."""

import math

import torch
from torch import Tensor


def _gap(x: float, n_f: int) -> float:
    return 2.0 ** (math.floor(math.log2(x)) - n_f)


def _halves_down(x: float, n_f: int) -> float:
    return math.ceil(x / _gap(x, n_f) - 0.5) * _gap(x, n_f)


def _skips_one_value(weight: Tensor, gradient: Tensor, lr: float, S: float) -> tuple[Tensor, float]:
    finite = gradient.isfinite()
    update = torch.where(finite, gradient.float() / S, 0.0)
    return weight - lr * update, S if finite.all() else S / 2


def _misses_nan(weight: Tensor, gradient: Tensor, lr: float, S: float) -> tuple[Tensor, float]:
    return (weight, S / 2) if gradient.isinf().any() else (weight - lr * gradient.float() / S, S)


def _divides_in_float16(weight: Tensor, gradient: Tensor, lr: float, S: float) -> tuple[Tensor, float]:
    return (weight - lr * (gradient / S).float(), S) if gradient.isfinite().all() else (weight, S / 2)


WRONG = {
    "gap_above": [
        lambda x, n_f: 2.0**-n_f,
        lambda x, n_f: x * 2.0**-n_f,
        lambda x, n_f: 2.0 ** (math.ceil(math.log2(x)) - n_f),
        lambda x, n_f: _gap(x, n_f) / 2,
    ],
    "nearest": [
        lambda x, n_f: round(x * 2**n_f) / 2**n_f,
        lambda x, n_f: math.floor(x / _gap(x, n_f)) * _gap(x, n_f),
        lambda x, n_f: math.floor(x / _gap(x, n_f) + 0.5) * _gap(x, n_f),
        _halves_down,
    ],
    "scaled_update": [
        lambda weight, gradient, lr, S: (weight - lr * gradient.float(), S),
        lambda weight, gradient, lr, S: (weight - lr * gradient.float() / S, S),
        _skips_one_value,
        _misses_nan,
        _divides_in_float16,
        lambda weight, gradient, lr, S: (weight - lr * gradient.float() / S, S / 2),
    ],
}
