"""Exercises of lesson 5, masks."""

import torch

from glassgpt.learn.exercises import Answer, exercise, expect, expect_close


@exercise
def visible_pairs(T: int, W: int) -> int:
    """Return how many pairs of a query and a key a causal window mask allows.

    The text has T tokens. The window has W tokens, with the token itself, and may be
    longer than the text.
    """
    return sum(min(t + 1, W) for t in range(T))


@visible_pairs.check
def _(answer: Answer) -> None:
    result = answer(10, 3)
    mistakes = {
        30: "the first tokens have fewer than W tokens to see",
        17: "each token sees itself too: W counts it",
        34: "the window has W tokens with the token itself, not W earlier ones",
        55: "this counts all earlier tokens, not those in the window",
        44: "the mask is causal: the window does not reach to later tokens",
    }
    expect(result not in mistakes, mistakes.get(result, ""))
    expect_close(result, 27, "the pairs for T = 10 and W = 3")
    expect_close(answer(7, 1), 7, "the pairs for a window of 1: each token sees itself")
    expect_close(answer(4, 9), 10, "the pairs for W = 9, longer than the text of T = 4")


@exercise
def document_mask(is_end: torch.Tensor) -> torch.Tensor:
    """Return a causal mask (T, T) for documents that are packed into one text.

    `is_end` (T,) is True at the last token of each document; the last document may be
    cut off. A token sees itself and earlier tokens of its own document only.
    """
    document = is_end.long().cumsum(dim=0) - is_end.long()
    return (document[:, None] == document).tril()


@document_mask.check
def _(answer: Answer) -> None:
    is_end = torch.tensor([0, 0, 1, 1, 0, 0]).bool()  # documents of 3, 1 and 2 tokens
    result, right = answer(is_end), document_mask(is_end)
    expect(isinstance(result, torch.Tensor), "it must return a tensor")
    expect(result.shape == (6, 6), f"expected shape (6, 6), not {tuple(result.shape)}")
    expect(result.dtype == torch.bool, f"a mask is bool, not {result.dtype}")
    expect(result.diagonal().all(), "some token does not see itself: softmax gives NaN")
    later = is_end.long().cumsum(dim=0)
    mistakes = (
        (right | right.T, "the mask is not causal: tokens see later tokens"),
        (torch.ones(6, 6).tril().bool(), "tokens see earlier documents"),
        (
            (later[:, None] == later).tril(),
            "the last token of a document belongs to it, not to the next document",
        ),
        (right.T, "rows and columns are exchanged: row t is the query"),
    )
    for mistake, reason in mistakes:
        expect(not torch.equal(result, mistake), reason)
    expect_close(result.long(), right.long(), "the mask of documents of 3, 1, 2 tokens")
    none = torch.zeros(3).bool()
    expect_close(answer(none).long(), document_mask(none).long(), "one document")


@exercise
def oldest_reached(T: int, windows: list[int | None]) -> int:
    """Return the oldest token on which the last of T tokens can depend.

    The model has one layer for each entry of `windows`: the layer's causal window,
    which counts the token itself, or None for a layer that sees all earlier tokens.
    """
    if None in windows:
        return 0
    return max(0, T - 1 - sum(window - 1 for window in windows if window is not None))


@oldest_reached.check
def _(answer: Answer) -> None:
    result = answer(100, [8, 8, 4])
    mistakes = {
        79: "each layer reaches W - 1 tokens back, not W",
        80: "the last token is T - 1, not T, and each layer reaches W - 1 back",
        83: "the last of T tokens is token T - 1",
        92: "information passes through all layers, not only the widest",
        17: "this is the number of tokens back, not the oldest token",
    }
    expect(result not in mistakes, mistakes.get(result, ""))
    expect_close(result, 82, "the oldest token for T = 100 and windows 8, 8, 4")
    expect_close(answer(10, [8, 8]), 0, "the oldest token cannot be negative")
    expect_close(answer(50, [4, None, 4]), 0, "the oldest token with a full layer")
    expect_close(answer(50, [1, 1]), 49, "windows of 1, where tokens are alone")
