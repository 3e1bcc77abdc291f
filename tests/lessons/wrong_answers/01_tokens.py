"""Wrong answers to the exercises of lesson 1, each with a different mistake."""

from collections import Counter
from collections.abc import Callable, Iterable
from itertools import combinations, pairwise

Words = dict[tuple[int, ...], int]
Pair = tuple[int, int]


def _most(words: Words, pairs_of: Callable[[tuple[int, ...]], Iterable[Pair]], weighted: bool = True) -> Pair:
    pairs: Counter[Pair] = Counter()
    for word, count in words.items():
        for pair in pairs_of(word):
            pairs[pair] += count if weighted else 1
    return min(pairs, key=lambda pair: (-pairs[pair], pair))


def _last_of_equals(words: Words) -> Pair:
    pairs: Counter[Pair] = Counter()
    for word, count in words.items():
        for pair in pairwise(word):
            pairs[pair] += count
    return max(pairs, key=lambda pair: (pairs[pair], pair))


def _merged(ids: list[int], pair: Pair, new: int, most: int = 99) -> list[int]:
    place = 0
    while place + 1 < len(ids) and most:
        if (ids[place], ids[place + 1]) == pair:
            ids[place : place + 2] = [new]
            most -= 1
        place += 1
    return ids


def _from_the_left(word: list[int], merges: list[Pair]) -> list[int]:
    ids = list(word)
    while found := [place for place, pair in enumerate(pairwise(ids)) if pair in merges]:
        place = found[0]
        ids[place : place + 2] = [256 + merges.index((ids[place], ids[place + 1]))]
    return ids


def _in_order(word: list[int], merges: list[Pair], most: int = 99, first_id: int = 256) -> list[int]:
    ids = list(word)
    for rank, pair in enumerate(merges):
        ids = _merged(ids, pair, first_id + rank, most)
    return ids


def _longest(word: list[int], merges: list[Pair]) -> list[int]:
    spelled: dict[int, list[int]] = {i: [i] for i in range(256)}
    for rank, (left, right) in enumerate(merges):
        spelled[256 + rank] = spelled[left] + spelled[right]
    ids: list[int] = []
    while word:
        best = max((i for i in spelled if word[: len(spelled[i])] == spelled[i]), key=lambda i: len(spelled[i]))
        ids, word = [*ids, best], word[len(spelled[best]) :]
    return ids


WRONG = {
    "pad_vocabulary": [
        lambda vocab_size, multiple: vocab_size // multiple * multiple,
        lambda vocab_size, multiple: (vocab_size // multiple + 1) * multiple,
        lambda vocab_size, multiple: round(vocab_size / multiple) * multiple,
        lambda vocab_size, multiple: vocab_size + multiple,
    ],
    "most_frequent_pair": [
        lambda words: _most(words, pairwise, weighted=False),
        lambda words: _most(words, lambda word: set(pairwise(word))),
        _last_of_equals,
        lambda words: _most(words, lambda word: combinations(word, 2)),
        lambda words: max(words, key=lambda word: words[word]),
    ],
    "encode_word": [
        _from_the_left,
        lambda word, merges: _in_order(word, merges, most=1),
        _longest,
        lambda word, merges: _in_order(word, [pair if max(pair) < 256 else (-1, -1) for pair in merges]),
        lambda word, merges: _in_order(word, merges, first_id=257),
        lambda word, merges: list(word),
    ],
}
