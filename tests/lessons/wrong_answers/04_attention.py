"""Wrong answers to the exercises of lesson 4, each with a different mistake."""

import math

import torch
from torch import Tensor


def _softmax_of(q: Tensor, k: Tensor, divisor: float, mask: bool = True, dim: int = -1) -> Tensor:
    T = q.shape[1]
    scores = q @ k.transpose(1, 2) / divisor
    future = torch.ones(T, T, dtype=torch.bool).triu(diagonal=1)
    return (scores.masked_fill(future, -math.inf) if mask else scores).softmax(dim=dim)


def _centred(x: Tensor, window: int) -> Tensor:
    return torch.stack([x[t : t + window].mean(dim=0) for t in range(len(x))])


WRONG = {
    "window_average": [
        lambda x, window: x.mean(dim=0, keepdim=True).expand_as(x),
        lambda x, window: torch.stack([x[: t + 1].mean(dim=0) for t in range(len(x))]),
        _centred,
        lambda x, window: torch.stack([x[max(0, t - window) : t + 1].mean(dim=0) for t in range(len(x))]),
        lambda x, window: torch.stack([x[max(0, t - window + 1) : t + 1].sum(dim=0) / window for t in range(len(x))]),
        lambda x, window: torch.stack([x[t - window + 1 : t + 1].mean(dim=0) for t in range(len(x))]),
    ],
    "attention_weights": [
        lambda q, k: _softmax_of(q, k, 1.0),
        lambda q, k: _softmax_of(q, k, q.shape[-1]),
        lambda q, k: _softmax_of(q, k, q.shape[-1] ** 0.5, mask=False),
        lambda q, k: _softmax_of(q, k, q.shape[-1] ** 0.5, dim=-2),
        lambda q, k: _softmax_of(q, k, q.shape[-1] ** 0.5, dim=0),
        lambda q, k: _softmax_of(q, k, (len(q) * q.shape[-1]) ** 0.5),
        lambda q, k: _softmax_of(q, k, q.shape[-1] ** 0.5, mask=False).tril(),
        lambda q, k: _softmax_of(k, q, q.shape[-1] ** 0.5),
        lambda q, k: _softmax_of(q, k, q.shape[-1] ** 0.5)[0],
    ],
    "variance_of_scores": [
        lambda D, sigma: sigma,
        lambda D, sigma: D * sigma**2,
        lambda D, sigma: sigma**2 / D,
        lambda D, sigma: D**0.5 * sigma**2,
        lambda D, sigma: 1.0,
    ],
}
