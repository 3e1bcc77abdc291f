"""Wrong answers to the exercises of lesson 2, each with a different mistake."""

import torch
from torch import Tensor


def _assigned(ids: Tensor, upstream: Tensor, V: int) -> Tensor:
    gradient = torch.zeros(V, upstream.shape[1])
    for i, row in zip(ids.tolist(), upstream, strict=True):
        gradient[i] = row
    return gradient


def _added(ids: Tensor, upstream: Tensor, V: int) -> Tensor:
    return torch.zeros(V, upstream.shape[1]).index_add(0, ids, upstream)


def _halves(x: Tensor, positions: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=1)
    angles = positions[:, None] * 10000 ** (-torch.arange(0, x.shape[1], 2) / x.shape[1])
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], dim=1)


def _neighbours(x: Tensor, positions: Tensor, step: int = 2, sign: int = 1, joined: bool = True) -> Tensor:
    D = x.shape[1]
    angles = positions[:, None] * 10000 ** (-torch.arange(0, step * D // 2, step) / D)
    a, b, cos, sin = x[:, ::2], x[:, 1::2], angles.cos(), sign * angles.sin()
    parts = [a * cos - b * sin, b * cos + a * sin]
    return torch.stack(parts, dim=2).flatten(1) if joined else torch.cat(parts, dim=1)


def _no_minus(x: Tensor, positions: Tensor) -> Tensor:
    angles = positions[:, None] * 10000 ** (-torch.arange(0, x.shape[1], 2) / x.shape[1])
    a, b = x[:, ::2], x[:, 1::2]
    return torch.stack([a * angles.cos() + b * angles.sin(), b * angles.cos() + a * angles.sin()], dim=2).flatten(1)


WRONG = {
    "count_input_weights": [
        lambda V, C, context, position: V * C,
        lambda V, C, context, position: V * C + context,
        lambda V, C, context, position: (V + context) * C,
        lambda V, C, context, position: V * C + (context * C if position != "rope" else 0),
        lambda V, C, context, position: V + C + context,
    ],
    "gradient_of_embedding": [
        _assigned,
        lambda ids, upstream, V: _added(ids, upstream, V) / ids.bincount(minlength=V).clamp(min=1)[:, None],
        lambda ids, upstream, V: _added(ids, upstream, len(ids)),
        lambda ids, upstream, V: upstream.sum(dim=0).expand(V, -1),
        lambda ids, upstream, V: torch.nn.functional.one_hot(ids, V).float(),
    ],
    "rotate_neighbours": [
        _halves,
        lambda x, positions: _neighbours(x, positions, sign=-1),
        lambda x, positions: _neighbours(x, positions, step=1),
        lambda x, positions: _neighbours(x, torch.arange(len(x))),
        lambda x, positions: _neighbours(x, positions, joined=False),
        _no_minus,
    ],
}
