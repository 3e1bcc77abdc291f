"""Wrong answers to the exercises of lesson 16, each with a different mistake."""

import torch
from torch import Tensor

Turns = list[tuple[list[int], list[int]]]


def _one_end(turns: Turns, user: int, assistant: int, end: int) -> list[int]:
    return [i for question, answer in turns for i in (user, *question, assistant, *answer)] + [end]


def _no_end(turns: Turns, user: int, assistant: int, end: int) -> list[int]:
    return _one_end(turns, user, assistant, end)[:-1]


def _nested(turns: Turns, user: int, assistant: int, end: int) -> list[list[int]]:
    return [[user, *question, assistant, *answer, end] for question, answer in turns]


def _swapped(turns: Turns, user: int, assistant: int, end: int) -> list[int]:
    return [i for question, answer in turns for i in (assistant, *question, user, *answer, end)]


def _one_user(turns: Turns, user: int, assistant: int, end: int) -> list[int]:
    return [user, *(i for question, answer in turns for i in (*question, assistant, *answer, end))]


def _masked(
    ids: Tensor, assistant: int, end: int, first: int = 1, last: int = 0, shift: int = 1, turns: int = 2
) -> Tensor:
    """Targets in which answers count from `first` after the assistant's mark to `last` after the end."""
    shown = torch.zeros(len(ids), dtype=torch.bool)
    starts, ends = ((ids == mark).nonzero()[:turns, 0].tolist() for mark in (assistant, end))
    for start, stop in zip(starts, ends, strict=True):
        shown[start + first : stop + last + 1] = True
    targets = ids.masked_fill(~shown, -100)[1:]
    return targets if shift else torch.where(targets == -100, -100, ids[:-1])


WRONG = {
    "chat_of_turns": [_one_end, _no_end, _nested, _swapped, _one_user],
    "loss_of_batch": [
        lambda losses, counts: losses.mean().item(),
        lambda losses, counts: (losses * counts).sum().item(),
        lambda losses, counts: ((losses * counts).sum() / len(losses)).item(),
        lambda losses, counts: ((losses * counts).sum() / counts.sum()).item(),
        lambda losses, counts: losses.nanmean().item(),
    ],
    "answer_targets": [
        lambda ids, assistant, end: ids[1:],
        lambda ids, assistant, end: _masked(ids, assistant, end, last=-1),
        lambda ids, assistant, end: _masked(ids, assistant, end, first=0),
        lambda ids, assistant, end: _masked(ids, assistant, end, first=2),
        lambda ids, assistant, end: _masked(ids, assistant, end, shift=0),
        lambda ids, assistant, end: _masked(ids, assistant, end, turns=1),
        lambda ids, assistant, end: ids.masked_fill(ids == assistant, -100),
    ],
}
