"""Exercises of lesson 15, inside a trained model."""

import math

import torch

from glassgpt.learn.exercises import (
    Answer,
    exercise,
    expect,
    expect_close,
    expect_none_of,
)


@exercise
def settled_depth(logits: torch.Tensor, token: int) -> int | None:
    """Return the first depth from which `token` stays the most likely one to the end.

    `logits` (L + 1, V) are those of a logit lens at one position. Row d is depth d: row
    0 is after the embedding, row L after the last layer. `token` is an id below V.
    Return None if another token is the most likely one at depth L.
    """
    depth = len(logits)
    while depth > 0 and logits[depth - 1].argmax() == token:
        depth -= 1
    return depth if depth < len(logits) else None


@settled_depth.check
def _(answer: Answer) -> None:
    def rows(*winners: int) -> torch.Tensor:
        return 3 * torch.eye(4)[list(winners)] - 5

    steady = answer(rows(0, 1, 2, 2), 2)
    expect(
        steady == 2,
        f"token 2 wins at depths 2 and 3 of 3, so 2 is right, not {steady}: row d of "
        "the logits is depth d",
    )
    lost = answer(rows(1, 2, 2, 3), 2)
    expect(lost is None, f"another token wins in the end: None is right, not {lost}")
    back = answer(rows(2, 1, 2, 2), 2)
    expect(back != 0, "the token wins at depth 0, but loses at 1; it has to stay")
    expect(back == 2, f"2 wins at depths 0, 2 and 3, so 2 is right, not {back}")
    always = answer(rows(3, 3, 3), 3)
    expect(always == 0, f"a token that wins from the start: 0 is right, not {always}")


@exercise
def head_contributions(
    z: torch.Tensor, out: torch.Tensor, direction: torch.Tensor
) -> torch.Tensor:
    """Return what each of H heads adds to a logit, as (H,).

    z (H, D) are the heads' outputs at one position. The output projection `out` (C, H ×
    D) maps them, joined head after head, to the residual stream: attention adds `out @
    z.flatten()` to it. A vector x (C,) that is added to the stream adds `x @ direction`
    to the logit, with `direction` (C,) the *d* of the lesson.
    """
    columns = (direction @ out).view_as(z)
    return (z * columns).sum(dim=-1)


@head_contributions.check
def _(answer: Answer) -> None:
    generator = torch.Generator().manual_seed(0)
    z, direction = torch.randn(2, 3, generator=generator), torch.ones(6)
    out = torch.randn(6, 6, generator=generator)
    direction[1] = -2.0
    result = answer(z, out, direction)
    shape = tuple(getattr(result, "shape", ()))
    expect(shape != (), "expected one number per head; this is a single value")
    expect(shape == (2,), f"expected shape (2,), not {shape}")
    expected = head_contributions(z, out, direction)
    total = out @ z.flatten() @ direction
    mistakes = {
        "`out` is transposed: C are its rows": head_contributions(z, out.T, direction),
        "the columns of `out` are taken in turns; a head has D columns in a row": (
            (z * (direction @ out).view(3, 2).T).sum(dim=-1)
        ),
        "the heads are in reverse order": expected.flip(0),
        "a mean over the heads; the contributions have to sum": expected / 2,
        "`direction` has no effect": (out @ z.flatten()).view(2, 3).sum(dim=-1),
        "each head gets the sum of all; use only its own D columns of `out`": (
            total.expand(2)
        ),
        "a contribution can be negative": expected.abs(),
    }
    expect_none_of(result, mistakes)
    expect_close(result.sum(), total, "the sum over the heads")
    expect_close(result, expected, "the contributions")


@exercise
def induction_weights(ids: torch.Tensor, strength: float) -> torch.Tensor:
    """Return the attention weights (T, T) of an induction head, built by hand.

    ids (T,) are the ids of the text. The query at t asks for `ids[t]`. The key at s
    holds the id before it, `ids[s - 1]`, which a previous-token head has written. The
    key at 0 holds no id and equals no query. The score is `strength` if both are equal,
    and 0 otherwise. The weights are the causal softmax of the scores: position t sees
    itself and earlier positions.
    """
    scores = torch.zeros(len(ids), len(ids))
    scores[:, 1:] = strength * (ids[:, None] == ids[None, :-1])
    future = torch.ones_like(scores, dtype=torch.bool).triu(diagonal=1)
    return scores.masked_fill(future, -math.inf).softmax(dim=-1)


@induction_weights.check
def _(answer: Answer) -> None:
    ids = torch.tensor([3, 1, 0, 3, 1, 0])
    result = answer(ids, 20.0)
    shape = tuple(getattr(result, "shape", ()))
    expect(shape == (6, 6), f"expected shape (6, 6), not {shape}")
    expect(
        not result.isnan().any(),
        "some weights are not numbers: each row needs a finite score; t sees itself",
    )
    expect(
        bool(result.triu(diagonal=1).abs().max() < 1e-6),
        "weight on later positions; set their scores to -inf before the softmax",
    )
    expect_close(result.sum(dim=-1), torch.ones(6), "the sum of each row of weights")
    expect(
        result[3, 0] < 0.4,
        "row 3 looks at position 0, the same id; the answer stands one after it",
    )
    expect(
        result[2, 0] < 0.4,
        "row 2 looks at position 0 as if id 0 stood before it; nothing does",
    )
    expect(result[3, 1] > 0.9, "row 3 (id 3) has to look at position 1, after id 3")
    expected = induction_weights(ids, 1.0)
    result = answer(ids, 1.0)
    expect(
        not torch.allclose(result, induction_weights(ids, 20.0), atol=1e-3),
        "`strength` has no effect",
    )
    expect_close(result, expected, "the weights for a strength of 1")
