"""Exercises of lesson 6, heads."""

import torch

from glassgpt.learn.exercises import Answer, exercise, expect, expect_close


@exercise
def cache_bytes(
    n_layer: int, n_head: int, n_kv_head: int, head_dim: int, tokens: int, width: int
) -> int:
    """Return the bytes of a KV cache for one text of this many tokens.

    `width` is the number of bytes per number: 4 for float32, 2 for bfloat16.
    """
    return 2 * n_layer * n_kv_head * head_dim * tokens * width


@cache_bytes.check
def _(answer: Answer) -> None:
    right = 2 * 80 * 8 * 128 * 8192 * 2  # Llama 3 70B
    result = answer(80, 64, 8, 128, 8192, 2)
    mistakes = {
        right // 2: "a factor of 2 is missing: keys and values, `width` bytes a number",
        right * 8: "it holds n_kv_head heads; query heads are not kept",
        right // 80: "each layer has its own keys and values",
        right // 8192: "this is the size for one token",
        right // 2 // 2: "count keys and values, and `width` bytes per number",
        right * 8 // 2: "count keys and values, and only n_kv_head heads",
        right * 8192: "keys and values grow with the tokens, not with their square",
    }
    expect(result not in mistakes, mistakes.get(result, ""))
    expect_close(
        result, right, "80 layers, 8 of 64 heads of 128, 8,192 tokens, 2 bytes"
    )
    expect_close(
        answer(1, 4, 1, 2, 3, 4), 48, "one layer, a head of 2, 3 tokens, 4 bytes"
    )


@exercise
def split_heads(x: torch.Tensor, H: int) -> torch.Tensor:
    """Return x (B, T, C) as heads (B, H, T, D), with D = C / H.

    Head h gets the numbers from h·D to (h + 1)·D of each token.
    """
    B, T, C = x.shape
    return x.view(B, T, H, C // H).transpose(1, 2)


@split_heads.check
def _(answer: Answer) -> None:
    x = torch.arange(2 * 3 * 8.0).view(2, 3, 8)
    result, right = answer(x, 4), split_heads(x, 4)
    found = tuple(result.shape) if hasattr(result, "shape") else result
    expect(found != (2, 3, 4, 2), "heads come before tokens: (B, H, T, D)")
    expect(found == (2, 4, 3, 2), f"expected shape (2, 4, 3, 2), not {found}")
    expect(
        not torch.equal(result, x.reshape(2, 4, 3, 2)),
        "one view to (B, H, T, D) mixes tokens: split C first, then exchange T and H",
    )
    strided = x.view(2, 3, 2, 4).permute(0, 3, 1, 2)
    expect(
        not torch.equal(result, strided),
        "head h got every H-th number; it gets D numbers in a row",
    )
    expect_close(result, right, "4 heads of x (2, 3, 8)")


@exercise
def expand_key_heads(W_k: torch.Tensor, H: int, K: int) -> torch.Tensor:
    """Return a key matrix (H·D, C) of H heads that acts like W_k (K·D, C) of K heads.

    Rows k·D to (k + 1)·D of W_k belong to key head k. A model with H key heads and your
    matrix computes the same as grouped attention, where query head h uses key head
    h // (H / K).
    """
    D = len(W_k) // K
    return W_k.view(K, D, -1).repeat_interleave(H // K, dim=0).flatten(0, 1)


@expand_key_heads.check
def _(answer: Answer) -> None:
    W_k = torch.arange(4 * 3.0).view(4, 3)  # K = 2 heads of D = 2, C = 3
    result, right = answer(W_k, 6, 2), expand_key_heads(W_k, 6, 2)
    found = tuple(result.shape) if hasattr(result, "shape") else result
    expect(found == (12, 3), f"expected shape (12, 3), not {found}")
    mistakes = (
        (W_k.repeat(3, 1), "heads 0, 1, 2 share key head 0; yours take turns"),
        (
            W_k.repeat_interleave(3, dim=0),
            "repeat whole heads of D rows, not single rows",
        ),
        (right / 3, "the heads are copies; do not divide them"),
    )
    for mistake, reason in mistakes:
        expect(not torch.allclose(result, mistake), reason)
    expect_close(result, right, "6 heads from K = 2 heads")
    expect_close(answer(W_k, 2, 2), W_k, "K = H, where nothing changes")
