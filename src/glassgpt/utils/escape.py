"""Text and bytes shown so that nothing in them is invisible."""

import re
import unicodedata

_MARKS = {" ": "␣", "\n": "⏎", "\t": "→", "\r": "␍"}
# What Python calls printable and no font shows: fillers, joiners, selectors of a glyph's variant, the empty Braille pattern.
_UNSEEN = re.compile(
    r"[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)


def escape_token(data: bytes) -> str:
    """Bytes as text in which all is seen: ␣ ⏎ → ␍ for white space, <e2> for a byte that is no whole character, <U+200B> for
    what no font shows, ◌ below a mark that would sit on the sign before it."""
    # A byte that cannot be decoded becomes the lone surrogate 0xDC00 + byte, which no UTF-8 decodes to.
    text = data.decode("utf-8", errors="surrogateescape")
    head = "◌" if text and unicodedata.combining(text[0]) else ""
    return head + "".join(map(_mark, text))


def _mark(character: str) -> str:
    if character in _MARKS:
        return _MARKS[character]
    if "\udc80" <= character <= "\udcff":
        return f"<{ord(character) - 0xDC00:02x}>"
    if not character.isprintable() or _UNSEEN.match(character):
        return f"<U+{ord(character):04X}>"
    return character
