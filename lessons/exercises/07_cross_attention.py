"""Exercises of lesson 7, cross-attention."""

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


def _expect_shape(result: object, shape: tuple[int, ...]) -> None:
    found = (
        tuple(result.shape)
        if isinstance(result, torch.Tensor)
        else type(result).__name__
    )
    expect(found == shape, f"expected shape {shape}, not {found}")


@exercise
def source_mask(lengths: torch.Tensor, S: int) -> torch.Tensor:
    """Return the mask of padding for cross-attention, (B, 1, S), bool.

    lengths (B,) are integers from 1 to S: source b has lengths[b] words, then padding
    up to S. True means that the word is visible, to every target word.
    """
    return (torch.arange(S) < lengths[:, None])[:, None]


@source_mask.check
def _(answer: Answer) -> None:
    lengths = torch.tensor([2, 4, 1])
    result, right = answer(lengths, 5), source_mask(lengths, 5)
    _expect_shape(result, (3, 1, 5))  # more than the longest source: S may exceed it
    expect(result.dtype == torch.bool, f"a mask is bool, not {result.dtype}")
    mistakes = {
        "True must mean visible, not hidden": ~right,
        "one word too many is visible: the last word is at position length - 1": (
            source_mask(lengths + 1, 5)
        ),
        "one word too few is visible: positions count from 0": (
            source_mask(lengths - 1, 5)
        ),
        "each source has its own length": source_mask(lengths * 0 + 4, 5),
    }
    expect_none_of(result, mistakes)
    expect_close(result.long(), right.long(), "the mask of lengths 2, 4 and 1")


@exercise
def cross_attention(
    x: torch.Tensor,
    memory: torch.Tensor,
    W_q: torch.Tensor,
    W_k: torch.Tensor,
    W_v: torch.Tensor,
) -> torch.Tensor:
    """Return cross-attention (T, D) of one head from x (T, C) to memory (S, C).

    The three matrices are (C, D). Nothing is masked; there is no batch, no norm and no
    output matrix.
    """
    q, k, v = x @ W_q, memory @ W_k, memory @ W_v
    return (q @ k.T / math.sqrt(q.shape[1])).softmax(dim=1) @ v


@cross_attention.check
def _(answer: Answer) -> None:
    x, memory = _draw(0, 4, 9), _draw(1, 6, 9)
    W_q, W_k, W_v = _draw(2, 3, 9, 16) / 3
    result, right = answer(x, memory, W_q, W_k, W_v), cross_attention
    scores = (x @ W_q) @ (memory @ W_k).T
    v = memory @ W_v
    mistakes = {
        "queries come from x, keys and values from memory": right(
            memory, x, W_q, W_k, W_v
        ),
        "this is self-attention: it never uses the memory": right(x, x, W_q, W_k, W_v),
        "the scores are not divided by √D": scores.softmax(dim=1) @ v,
        "the divisor is √D, with D the columns of W_q, not √C": (
            (scores / 3).softmax(dim=1) @ v
        ),
        "softmax over the wrong dimension: each target word's weights sum to 1": (
            (scores / 4).softmax(dim=0) @ v
        ),
        "there is no causal mask: the whole source is known": (
            (scores / 4).masked_fill(~torch.ones(4, 6).tril().bool(), -math.inf)
        ).softmax(dim=1)
        @ v,
        "keys and values have different matrices": right(x, memory, W_q, W_k, W_k),
        "W_k and W_v are exchanged: W_k is for the scores, W_v for the average": (
            right(x, memory, W_q, W_v, W_k)
        ),
    }
    expect_none_of(result, mistakes)
    expect_close(result, right(x, memory, W_q, W_k, W_v), "the output")


@exercise
def prefix_mask(S: int, T: int) -> torch.Tensor:
    """Return the bool mask (S + T, S + T) of a decoder-only model with a source.

    Row i, column j is True if token i sees token j. The text is S source tokens, then T
    target tokens. Source tokens see the whole source, as in an encoder, and nothing
    else. Target tokens see the source and, of the target, themselves and earlier tokens
    (a prefix LM: Raffel et al., 2020).
    """
    mask = torch.ones(S + T, S + T, dtype=torch.bool).tril()
    mask[:, :S] = True
    return mask


@prefix_mask.check
def _(answer: Answer) -> None:
    result, right = answer(3, 2), prefix_mask(3, 2)
    _expect_shape(result, (5, 5))
    expect(result.dtype == torch.bool, f"a mask is bool, not {result.dtype}")
    mistakes = {
        "True must mean visible, not hidden": ~right,
        "rows and columns are exchanged: row i is for the token that looks": right.T,
        "every token sees every token: the target must not see its future": (
            torch.ones_like(right)
        ),
    }
    expect_none_of(result, mistakes)
    expect(not result[:3, 3:].any(), "source tokens see the target")
    expect(
        result[3:, :3].all(), "target tokens do not see all of the source before them"
    )
    expect(result[:3, :3].all(), "the source is still causal: its tokens see all of it")
    expect(not result[3, 4], "target tokens see later target tokens")
    expect(result[3, 3] and result[4, 4], "target tokens do not see themselves")
    expect_close(result.long(), right.long(), "the mask of S = 3 and T = 2")
    expect_close(answer(1, 4).long(), prefix_mask(1, 4).long(), "S = 1 and T = 4")
