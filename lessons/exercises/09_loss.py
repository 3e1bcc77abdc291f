"""Exercises of lesson 9, loss."""

import math
from typing import Any

import torch
import torch.nn.functional as F

from glassgpt.learn.exercises import Answer, exercise, expect, expect_close


def _is_close(result: Any, other: torch.Tensor) -> bool:
    is_tensor = isinstance(result, torch.Tensor) and result.shape == other.shape
    return is_tensor and torch.allclose(result.double(), other.double(), atol=1e-5)


def _is_number(result: Any, other: float) -> bool:
    is_number = isinstance(result, int | float | torch.Tensor)
    return is_number and math.isclose(float(result), other, rel_tol=1e-4)


@exercise
def text_bits_per_byte(loss: float, n_tokens: int, text: str) -> float:
    """Return the bits per byte of a text, stored in UTF-8.

    A model predicted its n_tokens tokens with a mean loss in nats per token.
    """
    return loss * n_tokens / math.log(2) / len(text.encode("utf-8"))


@text_bits_per_byte.check
def _(answer: Answer) -> None:
    text = "Né à Orléans, 50 €"  # 18 characters, 23 bytes
    bits = 2.5 * 8 / math.log(2)
    result = answer(2.5, 8, text)
    for mistake, reason in (
        (
            bits / 18,
            "it divides by the characters; é has two bytes in UTF-8, and € three",
        ),
        (2.5 * 8 / 23, "it returns nats per byte; a bit is ln 2 nats"),
        (2.5 * 8 * math.log(2) / 23, "it multiplies by ln 2; 1 nat is 1 / ln 2 bits"),
        (2.5 / math.log(2), "it returns bits per token"),
        (bits / 8 / 23, "it does not multiply the mean loss by the number of tokens"),
        (bits, "it returns the bits of the whole text; divide by its bytes"),
    ):
        expect(not _is_number(result, mistake), reason)
    expect_close(result, bits / 23, "8 tokens with a loss of 2.5, and 23 bytes")
    expect_close(answer(math.log(2), 4, "abcd"), 1.0, "4 tokens of 1 bit, and 4 bytes")


@exercise
def perplexity_of_batches(losses: list[float], counts: list[int]) -> float:
    """Return the perplexity of a text that was measured in batches.

    losses holds the mean loss of each batch in nats per token, and counts its number of
    tokens. Not all batches are equally large.
    """
    total = sum(loss * n for loss, n in zip(losses, counts, strict=True))
    return math.exp(total / sum(counts))


@perplexity_of_batches.check
def _(answer: Answer) -> None:
    losses, counts = [1.0, 2.0, 4.0], [50, 40, 10]
    result = answer(list(losses), list(counts))
    weighted = sum(math.exp(loss) * n for loss, n in zip(losses, counts, strict=True))
    for mistake, reason in (
        (1.7, "it returns the loss; perplexity is e to the power of the loss"),
        (math.exp(7 / 3), "each batch counts the same; weight it by its tokens"),
        (weighted / 100, "it averages perplexities; average the losses, then use exp"),
        (sum(map(math.exp, losses)) / 3, "it averages perplexities, without weights"),
        (2**1.7, "the losses are in nats: use e, not 2"),
    ):
        expect(not _is_number(result, mistake), reason)
    expect_close(result, math.exp(1.7), "the perplexity of 50, 40 and 10 tokens")
    chance = answer([math.log(78)] * 2, [64, 9])
    expect_close(chance, 78.0, "the perplexity of chance among 78 tokens")


@exercise
def smoothed_gradient(
    logits: torch.Tensor, targets: torch.Tensor, share: float
) -> torch.Tensor:
    """Return the gradient (N, V) of the mean loss by the logits (N, V).

    The loss is the cross-entropy with smoothed targets (Szegedy et al., 2016): a part
    `share` of each row's probability is spread equally over all V tokens, the target
    included. The rest is the target's. targets (N,) holds ids.
    """
    N, V = logits.shape
    onehot = torch.nn.functional.one_hot(targets, V)
    q = (1 - share) * onehot + share / V
    return (logits.softmax(dim=1) - q) / N


@smoothed_gradient.check
def _(answer: Answer) -> None:
    logits = 2 * torch.randn(3, 5, generator=torch.Generator().manual_seed(9))
    targets = torch.tensor([4, 0, 2])
    result = answer(logits.clone(), targets.clone(), 0.2)
    onehot, p = F.one_hot(targets, 5), logits.softmax(dim=1)
    right = (p - 0.8 * onehot - 0.04) / 3
    others = 0.8 * onehot + 0.05 * (1 - onehot)
    for mistake, reason in (
        (right * 3, "that is the gradient of the sum; the mean divides by N"),
        (right * 3 / 5, "it divides by V; the mean is over N rows"),
        (-right, "the sign is reversed: a gradient points to a larger loss"),
        ((p - onehot) / 3, "the targets are not smoothed"),
        (
            (p - others) / 3,
            "the share is spread over the others only; include the target",
        ),
        ((p - 0.8 * onehot) / 3, "the smoothed targets of a row must sum to 1"),
        ((logits.softmax(dim=0) - 0.8 * onehot - 0.04) / 3, "the softmax is over rows"),
        (
            (logits - 0.8 * onehot - 0.04) / 3,
            "it uses logits in place of probabilities",
        ),
    ):
        expect(not _is_close(result, mistake), reason)
    expect_close(result, right, "the gradient for a share of 0.2")
    plain = answer(logits.clone(), targets.clone(), 0.0)
    expect_close(plain, (p - onehot) / 3, "the gradient for a share of 0")
