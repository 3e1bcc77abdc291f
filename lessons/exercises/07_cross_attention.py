"""Exercises of lesson 7, cross-attention."""

import math

import torch

from glassgpt.learn.exercises import Answer, exercise, expect, expect_close


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

    Source b of the batch has lengths[b] words, then padding up to S. True means that
    the word is visible, to every target word.
    """
    return (torch.arange(S) < lengths[:, None])[:, None]


@source_mask.check
def _(answer: Answer) -> None:
    lengths = torch.tensor([2, 4, 1])
    result, right = answer(lengths, 4), source_mask(lengths, 4)
    _expect_shape(result, (3, 1, 4))
    expect(result.dtype == torch.bool, f"a mask is bool, not {result.dtype}")
    expect(not torch.equal(result, ~right), "True must mean visible, not hidden")
    one_more = source_mask(lengths + 1, 4)
    expect(
        not torch.equal(result, one_more),
        "one word too many is visible: the last word is at place length - 1",
    )
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

    The three matrices are (C, D). Nothing is masked.
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
    }
    for reason, mistake in mistakes.items():
        same = isinstance(result, torch.Tensor) and result.shape == mistake.shape
        expect(not (same and torch.allclose(result, mistake, atol=1e-5)), reason)
    expect_close(result, right(x, memory, W_q, W_k, W_v), "the output")


@exercise
def prefix_mask(S: int, T: int) -> torch.Tensor:
    """Return the bool mask (S + T, S + T) of a decoder-only model with a source.

    The text is S source tokens, then T target tokens. Source tokens see the whole
    source, as in an encoder, and nothing else. Target tokens see the source and, of the
    target, themselves and earlier tokens (a prefix LM: Raffel et al., 2020).
    """
    mask = torch.ones(S + T, S + T, dtype=torch.bool).tril()
    mask[:, :S] = True
    return mask


@prefix_mask.check
def _(answer: Answer) -> None:
    result, right = answer(3, 2), prefix_mask(3, 2)
    _expect_shape(result, (5, 5))
    expect(result.dtype == torch.bool, f"a mask is bool, not {result.dtype}")
    expect(not result[:3, 3:].any(), "source tokens see the target")
    expect(
        result[3:, :3].all(), "target tokens do not see all of the source before them"
    )
    expect(result[:3, :3].all(), "the source is still causal: its tokens see all of it")
    expect(not result[3, 4], "target tokens see later target tokens")
    expect(result[3, 3] and result[4, 4], "target tokens do not see themselves")
    expect_close(result.long(), right.long(), "the mask of S = 3 and T = 2")
    expect_close(answer(1, 4).long(), prefix_mask(1, 4).long(), "S = 1 and T = 4")
