"""Exercises of lesson 14, generating text."""

import torch

from glassgpt.learn.exercises import Answer, exercise, expect, expect_close


def _is_close(result: object, other: torch.Tensor) -> bool:
    is_tensor = isinstance(result, torch.Tensor) and result.shape == other.shape
    return is_tensor and torch.allclose(result.float(), other, atol=1e-5)


@exercise
def change_temperature(p: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return the probabilities p (V,), which hold at temperature 1, at another one.

    The logits are not given. The temperature is above 0, and so are all probabilities.
    """
    powers = p ** (1 / temperature)
    return powers / powers.sum()


@change_temperature.check
def _(answer: Answer) -> None:
    p = torch.tensor([0.6, 0.3, 0.1])
    result = answer(p.clone(), 0.5)
    for mistake, reason in (
        ((p / 0.5).softmax(dim=0), "a softmax needs logits, and p holds probabilities"),
        (p / 0.5, "it divides probabilities; the temperature divides logits"),
        (p**2, "the ratios are right, but the result does not sum to 1"),
        (
            p**0.5 / (p**0.5).sum(),
            "0.5 makes it flatter; use the power 1 / temperature",
        ),
        (p, "the probabilities do not change"),
    ):
        expect(not _is_close(result, mistake), reason)
    expect_close(result, p**2 / (p**2).sum(), "0.6, 0.3, 0.1 at temperature 0.5")
    hot = answer(p.clone(), 2.0)
    expect_close(hot, p**0.5 / (p**0.5).sum(), "0.6, 0.3, 0.1 at temperature 2")
    expect_close(answer(p.clone(), 1.0), p, "0.6, 0.3, 0.1 at temperature 1")


@exercise
def top_p_mask(p: torch.Tensor, share: float) -> torch.Tensor:
    """Return which tokens top-p keeps: a mask (V,) of True and False.

    It keeps the fewest most likely tokens whose probabilities sum to at least `share`.
    The probabilities p (V,) are in no order, and no two are equal.
    """
    ordered, order = p.sort(descending=True)
    mask = torch.zeros(len(p), dtype=torch.bool)
    mask[order] = ordered.cumsum(dim=0) - ordered < share
    return mask


@top_p_mask.check
def _(answer: Answer) -> None:
    p = torch.tensor([0.1, 0.15, 0.5, 0.25])
    result = answer(p.clone(), 0.6)
    for mistake, reason in (
        ([1, 1, 0, 0], "the mask follows the sorted order; go back to the order of p"),
        ([0, 0, 1, 0], "the kept tokens sum to 0.5; the one that reaches 0.6 stays"),
        ([0, 0, 0, 0], "it compares each probability with the share, not their sum"),
        ([1, 1, 1, 0], "it sums tokens in the order of p, not the most likely first"),
    ):
        expect(not _is_close(result, torch.tensor(mistake).float()), reason)
    dtype = getattr(result, "dtype", type(result).__name__)
    expect(dtype == torch.bool, f"a mask is a bool tensor, not {dtype}")
    keep = torch.tensor([False, False, True, True])
    expect_close(result, keep, "the mask for a share of 0.6")
    one = answer(p.clone(), 0.3)
    expect_close(one, p == 0.5, "the mask for a share below the largest probability")
    expect_close(answer(p.clone(), 0.8), p > 0.12, "the mask for a share of 0.8")


@exercise
def most_likely_pair(first: torch.Tensor, second: torch.Tensor) -> tuple[int, int]:
    """Return the two ids of the most likely text of two tokens.

    first (V,) holds the probabilities of the first token. Row i of second (V, V) holds
    those of the second token if the first is i.
    """
    joint = first[:, None] * second
    i, j = divmod(int(joint.argmax()), len(first))
    return i, j


@most_likely_pair.check
def _(answer: Answer) -> None:
    first = torch.tensor([0.4, 0.35, 0.15, 0.1])
    second = torch.tensor(
        [
            [0.4, 0.2, 0.2, 0.2],
            [0.05, 0.05, 0.1, 0.8],
            [0.5, 0.2, 0.2, 0.1],
            [0.0, 0.05, 0.95, 0.0],
        ]
    )
    result = answer(first.clone(), second.clone())
    is_pair = isinstance(result, tuple | list) and len(result) == 2
    expect(is_pair, f"expected two ids, not {str(result)[:60]}")
    pair = tuple(int(part) for part in result)
    for mistake, reason in (
        ((0, 0), "it is greedy: (0, 0) has 0.4 · 0.4 = 0.16, and (1, 3) has 0.28"),
        ((3, 2), "it takes the largest number of second; multiply it by first"),
        ((0, 3), "it picks both tokens separately; the second depends on the first"),
        ((3, 1), "the ids are exchanged: the first token comes first"),
        ((2, 0), "it multiplies column i of second by first[i]; first belongs to rows"),
    ):
        expect(pair != mistake, reason)
    expect(pair == (1, 3), f"expected (1, 3) for the first example, not {pair}")
    last = torch.tensor([[0.9, 0.1], [0.2, 0.8]])
    pair = tuple(int(part) for part in answer(torch.tensor([0.2, 0.8]), last))
    expect(pair == (1, 1), f"expected (1, 1) for the second example, not {pair}")
    likely = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.5, 0.3], [0.0, 0.05, 0.95]])
    result = answer(torch.tensor([0.5, 0.3, 0.2]), likely)
    pair = tuple(int(part) for part in result)
    expect(pair != (2, 2), "both probabilities are multiplied, not added")
    expect(pair == (0, 0), f"expected (0, 0) for the third example, not {pair}")
