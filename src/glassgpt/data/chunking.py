"""Cutting long texts where GPT-2 splits them anyway, so that the parts have the tokens of the whole."""

import re
from collections.abc import Iterable, Iterator

# White space as Unicode's property has it, which GPT-2's splitting means by \s; Python's \s has four control characters more.
_S = r"[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]"
_NOT_S = _S.replace("[", "[^")
# Where GPT-2 splits a text whatever comes before and after. Its pattern is
# '(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+ : words take at most one space before them, so white
# space always begins a new piece, the last of several is split from those before it, and a single newline is a piece of its own.
# `.*` takes all it can, so the match ends at the last such place.
_AFTER_NEWLINE = re.compile(rf"(?s:.*){_NOT_S}\n(?={_NOT_S})")
_BEFORE_SPACE = re.compile(rf"(?s:.*){_NOT_S}(?= {_NOT_S})")
_AT_WHITE_SPACE = re.compile(rf"(?s:.*)(?:{_NOT_S}(?={_S})|(?!\r\n){_S}(?={_S}{_NOT_S}))")


def cut(pieces: Iterable[str], limit: int) -> Iterator[str]:
    """The joined pieces, in parts of at most `limit` characters: at least one, which is empty for an empty text.

    The parts depend on the text alone, never on the pieces in which it comes.
    """
    held: list[str] = []
    size = 0
    for piece in pieces:
        held.append(piece)
        size += len(piece)
        if size > limit:
            text, start = "".join(held), 0
            held.clear()  # else the text is there twice while its parts are used
            while len(text) - start > limit:
                end = last_cut(text, start, limit)
                yield text[start:end]
                start = end
            held.append(text[start:])
            size = len(held[0])
            del text
    yield "".join(held)


def last_cut(text: str, start: int, limit: int) -> int:
    """Where the part that begins at `start` ends: depends on the `limit` + 1 characters from there on, and on nothing else."""
    beyond = start + limit + 1
    # The first two hold for most other tokenizers too; a line's end that would make a part small is not worth it.
    for pattern, first in (
        (_AFTER_NEWLINE, start + limit // 2),
        (_BEFORE_SPACE, start + limit // 2),
        (_AT_WHITE_SPACE, start),
    ):
        if found := pattern.match(text, first, beyond):
            return found.end()
    end = start + limit
    return end - 1 if text[end - 1 : end + 1] == "\r\n" and limit > 1 else end
