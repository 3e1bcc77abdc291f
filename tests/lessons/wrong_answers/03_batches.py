"""Wrong answers to the exercises of lesson 3, each with a different mistake."""

from torch import Tensor


def _wrapped(ids: Tensor, T: int) -> tuple[Tensor, Tensor]:
    inputs = ids[:-1].reshape(-1, T)
    return inputs, inputs.roll(-1, 1)


def _without_overlap(ids: Tensor, T: int) -> tuple[Tensor, Tensor]:
    windows = ids[: len(ids) // (T + 1) * (T + 1)].reshape(-1, T + 1)
    return windows[:, :-1], windows[:, 1:]


def _backwards(ids: Tensor, T: int) -> tuple[Tensor, Tensor]:
    return ids[:-1].reshape(-1, T), ids[:-1].roll(1).reshape(-1, T)


WRONG = {
    "count_windows": [
        lambda N, T: N // T,
        lambda N, T: N // (T + 1),
        lambda N, T: N - T,
        lambda N, T: (N - 1) // T + 1,
        lambda N, T: (N - T) // T,
    ],
    "inputs_and_targets": [
        lambda ids, T: (ids[:-1].reshape(-1, T), ids[:-1].reshape(-1, T)),
        _wrapped,
        _without_overlap,
        _backwards,
        lambda ids, T: (ids[:-1].reshape(T, -1).T, ids[1:].reshape(T, -1).T),
        lambda ids, T: ids[:-1].reshape(-1, T),
    ],
    "windows_of_rank": [
        lambda step, B, rank, W: list(range(step * B, (step + 1) * B)),
        lambda step, B, rank, W: list(range(step * B, step * B + B // W)),
        lambda step, B, rank, W: list(range(step * B + rank, step * B + rank + B // W)),
        lambda step, B, rank, W: list(range(rank * B // W, (rank + 1) * B // W)),
        lambda step, B, rank, W: list(range((step * W + rank) * B, (step * W + rank + 1) * B)),
    ],
}
