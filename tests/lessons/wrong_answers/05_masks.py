"""Wrong answers to the exercises of lesson 5, each with a different mistake."""

import torch
from torch import Tensor


def _document(is_end: Tensor) -> Tensor:
    return is_end.long().cumsum(dim=0) - is_end.long()


def _same(document: Tensor) -> Tensor:
    return document[:, None] == document


def _back(windows: list[int | None]) -> int:
    return sum((window or 1) - 1 for window in windows)


WRONG = {
    "visible_pairs": [
        lambda T, W: T * W,
        lambda T, W: T * (T + 1) // 2,
        lambda T, W: T * W - W * (W - 1) // 2,
        lambda T, W: sum(min(t, W - 1) for t in range(T)),
        lambda T, W: sum(min(t + 1, W + 1) for t in range(T)),
    ],
    "document_mask": [
        lambda is_end: _same(_document(is_end)),
        lambda is_end: _same(is_end.long().cumsum(dim=0)).tril(),
        lambda is_end: _same(_document(is_end)).triu(),
        lambda is_end: torch.ones(len(is_end), len(is_end)).tril().bool(),
        lambda is_end: _same(_document(is_end)).tril(diagonal=-1),
        lambda is_end: _same(_document(is_end)).tril().float(),
    ],
    "oldest_reached": [
        lambda T, windows: T - 1 - sum(window or 0 for window in windows),
        lambda T, windows: 0 if None in windows else T - 1 - _back(windows),
        lambda T, windows: max(0, T - 1 - _back(windows)),
        lambda T, windows: T - max(window or T for window in windows),
        lambda T, windows: _back(windows),
    ],
}
