"""Exercises of lesson 15, inside a trained model."""

import math

import torch

from glassgpt.learn.exercises import Answer, exercise, expect, expect_close


@exercise
def settled_depth(logits: torch.Tensor, token: int) -> int | None:
    """Return the first depth from which `token` stays the most likely one.

    `logits` (L + 1, V) are those of a logit lens at one position: row 0 after the
    embedding, the last row after the last layer. Return None if another token is the
    most likely one in the end.
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
    expect(steady != 1, "counted from the end; depth 0 is the embedding")
    expect(steady == 2, f"2 wins at depths 2 and 3, so 2 is right, not {steady}")
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

    z (H, D) are the heads' outputs at one position. The output projection `out`
    (C, H * D) maps them, joined head after head, to the residual stream: attention adds
    out @ z.flatten(). A vector x of the stream adds x @ direction to the logit.
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
    for wrong, reason in (
        (
            head_contributions(z, out.T, direction),
            "`out` is transposed: C are its rows",
        ),
        (
            (z * (direction @ out).view(3, 2).T).sum(dim=-1),
            "the columns of `out` are taken in turns; a head has D columns in a row",
        ),
        (expected.flip(0), "the heads are in reverse order"),
        (expected / 2, "a mean over the heads; the contributions have to sum"),
        ((out @ z.flatten()).view(2, 3).sum(dim=-1), "`direction` has no effect"),
    ):
        expect(not torch.allclose(result, wrong, atol=1e-5), reason)
    total = out @ z.flatten() @ direction
    expect_close(result.sum(), total, "the sum over the heads")
    expect_close(result, expected, "the contributions")


@exercise
def induction_weights(ids: torch.Tensor, strength: float) -> torch.Tensor:
    """Return the attention weights (T, T) of an induction head, built by hand.

    The query at t asks for the id ids[t] (T,). The key at s holds the id before it,
    ids[s - 1], which a previous-token head has written; position 0 holds none. The
    score is `strength` if both are equal, and 0 otherwise. The weights are the causal
    softmax of the scores: position t sees itself and earlier positions.
    """
    scores = torch.zeros(len(ids), len(ids))
    scores[:, 1:] = strength * (ids[:, None] == ids[None, :-1])
    future = torch.ones_like(scores, dtype=torch.bool).triu(diagonal=1)
    return scores.masked_fill(future, -math.inf).softmax(dim=-1)


@induction_weights.check
def _(answer: Answer) -> None:
    ids = torch.tensor([3, 1, 2, 3, 1, 2])
    result = answer(ids, 20.0)
    shape = tuple(getattr(result, "shape", ()))
    expect(shape == (6, 6), f"expected shape (6, 6), not {shape}")
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
        "row 2 looks at position 0 as if id 2 stood before it; nothing does",
    )
    expect(result[3, 1] > 0.9, "row 3 (id 3) has to look at position 1, after id 3")
    expected = induction_weights(ids, 1.0)
    result = answer(ids, 1.0)
    expect(
        not torch.allclose(result, induction_weights(ids, 20.0), atol=1e-3),
        "`strength` has no effect",
    )
    expect_close(result, expected, "the weights for a strength of 1")
