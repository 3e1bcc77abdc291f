"""Wrong answers to the exercises of lesson 7, each with a different mistake."""

import math

import torch
from torch import Tensor


def _attend(q: Tensor, k: Tensor, v: Tensor, divisor: float, dim: int = 1) -> Tensor:
    return (q @ k.T / divisor).softmax(dim=dim) @ v


def _causal(x: Tensor, memory: Tensor, W_q: Tensor, W_k: Tensor, W_v: Tensor) -> Tensor:
    scores = (x @ W_q) @ (memory @ W_k).T / math.sqrt(W_q.shape[1])
    past = torch.ones(len(x), len(memory)).tril().bool()
    return scores.masked_fill(~past, -math.inf).softmax(dim=1) @ (memory @ W_v)


def _all(S: int, T: int) -> Tensor:
    return torch.ones(S + T, S + T, dtype=torch.bool)


def _blocks(S: int, T: int) -> Tensor:
    mask = _all(S, T).tril()
    mask[:S, :S] = True
    mask[S:, :S] = False
    return mask


def _target_sees_all(S: int, T: int) -> Tensor:
    mask = _all(S, T)
    mask[:S, S:] = False
    return mask


WRONG = {
    "source_mask": [
        lambda lengths, S: torch.arange(S) < lengths[:, None],
        lambda lengths, S: (torch.arange(S) <= lengths[:, None])[:, None],
        lambda lengths, S: (torch.arange(S) >= lengths[:, None])[:, None],
        lambda lengths, S: (torch.arange(S) < lengths[:, None])[:, None].float(),
        lambda lengths, S: (torch.arange(S) < lengths.max()).expand(len(lengths), 1, S),
        lambda lengths, S: (torch.arange(int(lengths.max())) < lengths[:, None])[:, None],
    ],
    "cross_attention": [
        lambda x, m, W_q, W_k, W_v: _attend(m @ W_q, x @ W_k, x @ W_v, W_q.shape[1] ** 0.5),
        lambda x, m, W_q, W_k, W_v: _attend(x @ W_q, x @ W_k, x @ W_v, W_q.shape[1] ** 0.5),
        lambda x, m, W_q, W_k, W_v: _attend(x @ W_q, m @ W_k, m @ W_v, 1.0),
        lambda x, m, W_q, W_k, W_v: _attend(x @ W_q, m @ W_k, m @ W_v, x.shape[1] ** 0.5),
        lambda x, m, W_q, W_k, W_v: _attend(x @ W_q, m @ W_k, m @ W_v, W_q.shape[1] ** 0.5, dim=0),
        lambda x, m, W_q, W_k, W_v: _attend(x @ W_q, m @ W_v, m @ W_k, W_q.shape[1] ** 0.5),
        _causal,
    ],
    "prefix_mask": [
        lambda S, T: _all(S, T).tril(),
        _all,
        _blocks,
        _target_sees_all,
        lambda S, T: _target_sees_all(S, T).T,
        lambda S, T: _all(S, T)[:T, :S],
    ],
}
