"""Exercises of lesson 16, from base model to chat."""

import math

import torch

from glassgpt.learn.exercises import Answer, exercise, expect, expect_close

IGNORED = -100


@exercise
def chat_of_turns(
    turns: list[tuple[list[int], list[int]]], user: int, assistant: int, end: int
) -> list[int]:
    """Return the ids of a chat of several turns, as one list.

    A turn is a pair: the ids of a question and those of its answer. It becomes the id
    `user`, the question, the id `assistant`, the answer, and the id `end`.
    """
    ids = []
    for question, answer in turns:
        ids += [user, *question, assistant, *answer, end]
    return ids


@chat_of_turns.check
def _(answer: Answer) -> None:
    turns = [([1, 2], [3]), ([4], [5, 6])]
    result = answer(turns, 90, 91, 92)
    expect(isinstance(result, list), f"return a list of ids, not {result!r:.40}")
    expect(
        all(isinstance(each, int) for each in result),
        "the list has lists in it; join the turns to one list of ids",
    )
    expect(92 in result, "`end` is missing: a model would never learn to stop")
    expect(
        result.count(92) == 2,
        f"`end` occurs {result.count(92)} times; it ends each of the two answers",
    )
    for name, role in (("user", 90), ("assistant", 91)):
        expect(
            result.count(role) == 2,
            f"`{name}` occurs {result.count(role)} times; each of two turns has one",
        )
    expected = chat_of_turns(turns, 90, 91, 92)
    expect(
        result != chat_of_turns(turns, 91, 90, 92),
        "`user` and `assistant` are swapped: the question belongs to the user",
    )
    expect(result == expected, f"for {turns}: expected {expected}, not {result}")


@exercise
def loss_of_batch(losses: torch.Tensor, counts: torch.Tensor) -> float:
    """Return the mean loss over all targets that count, from K micro-batches.

    losses (K,): the mean loss of each micro-batch over its targets that count.
    counts (K,): how many of these it has. A micro-batch without one has the loss nan.
    At least one micro-batch has one.
    """
    kept = counts > 0
    total = (losses[kept] * counts[kept]).sum()
    return (total / counts.sum()).item()


@loss_of_batch.check
def _(answer: Answer) -> None:
    losses, counts = torch.tensor([1.0, 5.0]), torch.tensor([30, 10])
    result = answer(losses, counts)
    expect(result is not None, "it returns nothing; is a return missing?")
    result = float(result)
    for wrong, reason in (
        (3.0, "the mean of the means: it gives 10 targets the weight of 30"),
        (80.0, "the sum of all losses; divide by the number of targets that count"),
        (40.0, "divided by the number of micro-batches, not of targets that count"),
        (4.0, "the weights are the wrong way round: more targets weigh more"),
    ):
        expect(not math.isclose(result, wrong, rel_tol=1e-5), f"{result:g} is {reason}")
    expect_close(result, 2.0, "the loss of (1 for 30 targets, 5 for 10)")
    empty = torch.tensor([1.0, math.nan, 5.0]), torch.tensor([30, 0, 10])
    result = float(answer(*empty))
    expect(
        not math.isnan(result),
        "nan: a micro-batch without targets has nan, and nan times 0 is nan",
    )
    expect_close(result, 2.0, "the loss with a micro-batch without targets")


@exercise
def answer_targets(ids: torch.Tensor, assistant: int, end: int) -> torch.Tensor:
    """Return the targets (T,) of a chat with ids (T + 1,), for the inputs ids[:-1].

    Targets are the ids, shifted by one. Those of the answers count, and so does the
    `end` after each answer. All others are -100. An answer follows the id `assistant`;
    a chat may have several.
    """
    targets = ids[1:].clone()
    in_answer = False
    for t in range(len(targets)):
        in_answer = in_answer or bool(ids[t] == assistant)
        if not in_answer:
            targets[t] = -100
        in_answer = in_answer and bool(ids[t + 1] != end)
    return targets


@answer_targets.check
def _(answer: Answer) -> None:
    chat = chat_of_turns([([1, 2], [3, 4]), ([5], [6])], 90, 91, 92)
    ids = torch.tensor(chat)
    result = answer(ids, 91, 92)
    shape = tuple(getattr(result, "shape", ()))
    expect(
        shape != (len(chat),),
        "one value per id; the last id is only a target, so return one fewer",
    )
    expect(shape == (len(chat) - 1,), f"expected shape {(len(chat) - 1,)}, not {shape}")
    expected = answer_targets(ids, 91, 92)
    counted = result != IGNORED
    expect(
        not torch.equal(result, torch.where(expected != IGNORED, ids[:-1], IGNORED)),
        "the targets are the inputs; a model would only learn to copy. Shift by one",
    )
    expect(
        torch.equal(result[counted], ids[1:][counted]),
        "a target that counts is not the id after its input",
    )
    expect(91 not in result, "`assistant` counts, but the program writes it")
    expect(90 not in result, "`user` counts, but the program writes it")
    expect(92 in result, "`end` does not count; a model would never stop")
    expect(
        bool(counted[5]) and bool(counted[10]),
        "an `end` after an answer does not count; each answer has one",
    )
    expect(
        bool(counted[3]),
        "the first token of an answer does not count; its input is `assistant`",
    )
    expect(bool(counted[9]), "the second answer does not count; each turn has one")
    expect(
        not counted[:2].any() and not counted[7],
        "tokens of a question count; only answers do",
    )
    expect_close(result, expected, "the targets of a chat of two turns")
