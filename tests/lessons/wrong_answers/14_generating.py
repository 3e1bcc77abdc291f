"""Wrong answers to the exercises of lesson 14, each with a different mistake."""

import torch
from torch import Tensor


def _sorted_mask(p: Tensor, share: float) -> Tensor:
    ordered = p.sort(descending=True).values
    return ordered.cumsum(dim=0) - ordered < share


def _without_the_last(p: Tensor, share: float) -> Tensor:
    ordered, order = p.sort(descending=True)
    mask = torch.zeros(len(p), dtype=torch.bool)
    mask[order] = ordered.cumsum(dim=0) < share
    return mask


def _greedy(first: Tensor, second: Tensor) -> tuple[int, int]:
    i = int(first.argmax())
    return i, int(second[i].argmax())


def _transposed(first: Tensor, second: Tensor) -> tuple[int, int]:
    i, j = divmod(int((first * second).argmax()), len(first))
    return i, j


WRONG = {
    "change_temperature": [
        lambda p, temperature: (p / temperature).softmax(dim=0),
        lambda p, temperature: p / temperature,
        lambda p, temperature: p ** (1 / temperature),
        lambda p, temperature: p**temperature / (p**temperature).sum(),
        lambda p, temperature: p,
    ],
    "top_p_mask": [
        _sorted_mask,
        _without_the_last,
        lambda p, share: p >= share,
        lambda p, share: p.cumsum(dim=0) - p < share,
        lambda p, share: p.sort(descending=True).indices,
        lambda p, share: (p * (p > 0.2)).ceil(),
    ],
    "most_likely_pair": [
        _greedy,
        _transposed,
        lambda first, second: divmod(int(second.argmax()), len(first)),
        lambda first, second: (int(first.argmax()), int((first @ second).argmax())),
        lambda first, second: (3, 1),
        lambda first, second: divmod(int((first[:, None] + second).argmax()), len(first)),
        lambda first, second: int((first[:, None] * second).argmax()),
    ],
}
