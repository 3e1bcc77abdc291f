"""Wrong answers to the exercises of lesson 15, each with a different mistake."""

import math
from typing import Any

import torch
from torch import Tensor


def _causal(scores: Tensor) -> Tensor:
    future = torch.ones_like(scores, dtype=torch.bool).triu(diagonal=1)
    return scores.masked_fill(future, -math.inf).softmax(dim=-1)


def _first_win(logits: Tensor, token: int) -> Any:
    return next((depth for depth, row in enumerate(logits) if row.argmax() == token), None)


def _first_win_if_last(logits: Tensor, token: int) -> Any:
    return _first_win(logits, token) if logits[-1].argmax() == token else None


def _from_one(logits: Tensor, token: int) -> Any:
    return next((d for d in range(1, len(logits)) if (logits[d:].argmax(dim=1) == token).all()), None)


def _from_end(logits: Tensor, token: int) -> Any:
    wins = (logits.argmax(dim=1) == token).tolist()
    return wins[::-1].index(False) - 1 if wins[-1] and not all(wins) else None


def _matches(ids: Tensor, keys: Tensor) -> Tensor:
    return (ids[:, None] == keys[None, :]).float()


def _shifted(ids: Tensor) -> Tensor:
    return 20 * torch.nn.functional.pad(_matches(ids, ids[:-1]), (1, 0))


WRONG = {
    "settled_depth": [_first_win, _first_win_if_last, _from_one, _from_end],
    "head_contributions": [
        lambda z, out, direction: out @ z.flatten() @ direction,
        lambda z, out, direction: (z * (out @ direction).view_as(z)).sum(dim=-1),
        lambda z, out, direction: (z * (direction @ out).view(z.shape[1], -1).T).sum(dim=-1),
        lambda z, out, direction: (out @ z.flatten()).view_as(z).sum(dim=-1),
        lambda z, out, direction: z * (direction @ out).view_as(z),
        lambda z, out, direction: (out @ z.flatten() @ direction).expand(len(z)),
    ],
    "induction_weights": [
        lambda ids, strength: _causal(strength * _matches(ids, ids)),
        lambda ids, strength: _causal(strength * _matches(ids, ids.roll(1))),
        lambda ids, strength: _causal(strength * _matches(ids, ids.roll(-1))),
        lambda ids, strength: _causal(strength * _matches(ids, torch.nn.functional.pad(ids[:-1], (1, 0)))),
        lambda ids, strength: _shifted(ids).div(20).mul(strength).softmax(dim=-1),
        lambda ids, strength: _causal(_shifted(ids)),
    ],
}
