"""Exercises of lesson 1, text to numbers."""

from glassgpt.learn.exercises import Answer, exercise, expect, expect_close


@exercise
def pad_vocabulary(vocab_size: int, multiple: int) -> int:
    """Return the smallest multiple of `multiple` that is at least `vocab_size`."""
    return -(-vocab_size // multiple) * multiple


@pad_vocabulary.check
def _(answer: Answer) -> None:
    result = answer(50257, 128)
    expect(
        result != 50176,
        "50257 ids do not fit into 50176 rows; round up, not down or to the nearest",
    )
    expect_close(result, 50304, "50257 ids in a multiple of 128")
    expect(
        answer(50304, 128) != 50432,
        "50304 is a multiple of 128 already, and needs no padding",
    )
    expect_close(answer(50304, 128), 50304, "50304 ids in a multiple of 128")
    expect_close(answer(65, 64), 128, "65 ids in a multiple of 64")
    expect_close(answer(78, 1), 78, "78 ids in a multiple of 1")


@exercise
def most_frequent_pair(words: dict[tuple[int, ...], int]) -> tuple[int, int]:
    """Return the pair of neighbouring ids that occurs most often.

    `words` has how often each word, a tuple of ids, occurs in the text. Among equally
    frequent pairs, return the smallest: (1, 2) is smaller than (1, 3) and (2, 1).
    """
    pairs = {}
    for word, occurrences in words.items():
        for i in range(len(word) - 1):
            pair = word[i : i + 2]
            pairs[pair] = pairs.get(pair, 0) + occurrences
    return min(pairs, key=lambda pair: (-pairs[pair], pair))


@most_frequent_pair.check
def _(answer: Answer) -> None:
    result = answer({(1, 2, 3): 2, (4, 5): 7})
    expect(
        isinstance(result, tuple) and len(result) == 2,
        f"expected a pair of ids such as (1, 2), not {result!r}",
    )
    expect(
        result == (4, 5),
        f"(4, 5) occurs 7 times, {result} less often; use how often each word occurs",
    )
    result = answer({(1, 2, 1, 2, 1, 2): 2, (5, 6): 5})
    expect(
        result == (1, 2),
        "a word has the pair (1, 2) 3 times and occurs 2 times: that is 6, not 2",
    )
    result = answer({(1, 2): 3, (2, 3): 3, (3, 1): 3})
    expect(result == (1, 2), f"three pairs occur 3 times; (1, 2) is smallest: {result}")
    result = answer({(9, 8): 3, (1, 2): 3})
    expect(result == (1, 2), f"(1, 2) is smaller than (9, 8) and as frequent: {result}")
    result = answer({(1, 7, 2): 3, (2, 1): 3, (1, 9, 2): 3})
    expect(result == (1, 7), f"{result} are not neighbours, or (1, 7) is smaller")


@exercise
def encode_word(word: list[int], merges: list[tuple[int, int]]) -> list[int]:
    """Return the ids of a word after byte-pair encoding.

    `word` has the ids of its bytes. `merges` has the pairs in the order in which they
    were learned; merge number r, from 0 on, makes the id 256 + r. A later merge may
    join ids that earlier merges made.
    """
    ids = list(word)
    for new, pair in enumerate(merges, start=256):
        place = 0
        while place + 1 < len(ids):
            if (ids[place], ids[place + 1]) == pair:
                ids[place : place + 2] = [new]
            place += 1
    return ids


@encode_word.check
def _(answer: Answer) -> None:
    expect(answer([7, 8], []) == [7, 8], "without merges, the ids stay as they are")
    result = answer([1, 2, 3], [(2, 3), (1, 2)])
    expect(
        result != [257, 3],
        "(2, 3) was learned first, so it is merged first, although (1, 2) comes "
        "first in the word",
    )
    expect(result == [1, 256], f"[1, 2, 3], first (2, 3): [1, 256], not {result}")
    result = answer([1, 2, 9, 1, 2], [(1, 2)])
    expect(
        result == [256, 9, 256],
        f"each occurrence of the pair is merged: [256, 9, 256], not {result}",
    )
    result = answer([1, 2, 3], [(1, 2), (256, 3)])
    expect(
        result == [257],
        f"merges use the ids of earlier merges: [257] for [1, 2, 3], not {result}",
    )
    result = answer([5, 5, 5], [(5, 5)])
    expect(
        result == [256, 5], f"[5, 5, 5] becomes [256, 5] from the left, not {result}"
    )
