"""Exercises of lesson 2, ids to vectors."""

import torch

from glassgpt.learn.exercises import Answer, exercise, expect, expect_close


def _draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


@exercise
def count_input_weights(V: int, C: int, context: int, position: str) -> int:
    """Return how many numbers a model learns for its embedding and its positions.

    The vocabulary has V ids and a vector has C numbers. `position` is "learned",
    "sinusoidal" or "rope"; texts have at most `context` tokens.
    """
    return V * C + (context * C if position == "learned" else 0)


@count_input_weights.check
def _(answer: Answer) -> None:
    result = answer(50257, 768, 1024, "learned")
    expect(
        result != 50257 * 768,
        "learned positions are a second table, with a row of C numbers per position",
    )
    expect(
        result != 50257 * 768 + 1024,
        "each position has a row of C numbers, not a single number",
    )
    expect_close(result, 39_383_808, "GPT-2 small, with learned positions")
    for position in ("sinusoidal", "rope"):
        expect(
            answer(1000, 64, 128, position) != 1128 * 64,
            f"{position} positions follow from a formula; none of it is learned",
        )
        expect_close(answer(1000, 64, 128, position), 64_000, f"{position} positions")


@exercise
def gradient_of_embedding(
    ids: torch.Tensor, upstream: torch.Tensor, V: int
) -> torch.Tensor:
    """Return the gradient (V, C) of the loss by the embedding table.

    The model looked up the rows of ids (T,). `upstream` (T, C) has the gradient of
    the loss by each of these T vectors.
    """
    gradient = torch.zeros(V, upstream.shape[1])
    for i, row in zip(ids.tolist(), upstream, strict=True):
        gradient[i] += row
    return gradient


@gradient_of_embedding.check
def _(answer: Answer) -> None:
    ids, upstream = torch.tensor([2, 0, 2]), _draw(3, 4)
    result = answer(ids, upstream, 5)
    expect(
        getattr(result, "shape", None) == (5, 4),
        f"expected shape (5, 4), a row per id, not {getattr(result, 'shape', None)}",
    )
    expect_close(result[[1, 3, 4]], torch.zeros(3, 4), "rows of ids that do not occur")
    expect_close(result[0], upstream[1], "row 0, which occurs once")
    expect(
        not torch.allclose(result[2], upstream[2]),
        "id 2 occurs twice, and the second gradient replaced the first; add them",
    )
    expect(
        not torch.allclose(result[2], (upstream[0] + upstream[2]) / 2),
        "id 2 occurs twice; its gradients are added, not averaged",
    )
    expect_close(result[2], upstream[0] + upstream[2], "row 2, which occurs twice")


@exercise
def rotate_neighbours(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Return x (T, D) at positions (T,), rotated in pairs of neighbours.

    Some models (GPT-J) pair the numbers 2i and 2i + 1 of a head, not i and i + D/2.
    As in the lesson, pair i turns by 10000^(-2i/D) times the position.
    """
    D = x.shape[1]
    a, b = x[:, 0::2], x[:, 1::2]
    angles = positions[:, None] * 10000 ** (-torch.arange(0, D, 2) / D)
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=2).flatten(1)


def _rotated(x: torch.Tensor, angles: torch.Tensor, halves: bool) -> torch.Tensor:
    """x (T, D) in halves or in pairs of neighbours, turned by angles (T, D/2)."""
    pairs = x.unflatten(1, (2, -1)) if halves else x.unflatten(1, (-1, 2)).mT
    turned = torch.polar(torch.ones_like(angles), angles) * torch.complex(
        *pairs.unbind(1)
    )
    result = torch.stack([turned.real, turned.imag], dim=1)
    return (result if halves else result.mT).flatten(1)


@rotate_neighbours.check
def _(answer: Answer) -> None:
    x, positions = _draw(6, 8), torch.arange(6) + 3
    speeds = 10000 ** (-torch.arange(0, 8, 2) / 8)
    angles = positions[:, None] * speeds
    result = answer(x, positions)
    expect(
        getattr(result, "shape", None) == (6, 8),
        f"expected shape (6, 8), not {getattr(result, 'shape', None)}",
    )
    slow = positions[:, None] * 10000 ** (-torch.arange(4) / 8)
    for wrong, reason in (
        (_rotated(x, angles, True), "it pairs i with i + D/2; pair 2i with 2i + 1"),
        (_rotated(x, -angles, False), "it turns by the negative of the angle"),
        (_rotated(x, slow, False), "pair i turns by 10000^(-2i/D), not 10000^(-i/D)"),
        (
            _rotated(x, torch.arange(6)[:, None] * speeds, False),
            "it counts positions from 0; use `positions`, which start at 3 here",
        ),
    ):
        expect(not torch.allclose(result, wrong, atol=1e-5), reason)
    lengths = result.unflatten(1, (4, 2)).norm(dim=2)
    expect_close(
        lengths,
        x.unflatten(1, (4, 2)).norm(dim=2),
        "the lengths of the pairs 2i and 2i + 1, which no rotation changes",
    )
    expect_close(result, _rotated(x, angles, False), "the rotated numbers", 1e-4)
