"""Bounds for a `tokenizer.json` from elsewhere, checked before a library reads it.

The libraries have none: an id of a billion reserves as many entries, and a normalizer that makes a text a million times
longer ends the process when the memory is full.
"""

import itertools
import unicodedata
from base64 import b64decode
from collections.abc import Iterator, Mapping
from typing import Any

MOST_IDS = 1 << 21  # twice the largest vocabulary in use
_MOST_GROWTH = 32  # times that a text may become longer; in known files 11, by a name for a line break
_LONGEST_MAPPED = 72  # bytes that NFKC, which SentencePiece's map contains, makes of one character


def steps(part: Any) -> Iterator[Mapping[str, Any]]:
    """Yield the steps of a normalizer, pre-tokenizer or decoder in order, also those in sequences."""
    if isinstance(part, dict):
        inner: list[Any] = [part.get(name) for name in ("normalizers", "pretokenizers", "decoders")]
        inner = [each for each in inner if isinstance(each, list)]
        yield from itertools.chain(*map(steps, itertools.chain(*inner))) if inner else (part,)


def require_bounded(content: Mapping[str, Any]) -> None:
    """Raise `ValueError` if a text could become more than `_MOST_GROWTH` times longer, or merges lack their prefix."""
    model = content.get("model")
    if isinstance(model, dict) and (prefix := model.get("continuing_subword_prefix")):
        # The library cuts the prefix's length off without a look: in the middle of a character it ends the process.
        pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in model.get("merges") or ())
        if not all(isinstance(pair, list) and "".join(map(str, pair[-1:])).startswith(str(prefix)) for pair in pairs):
            raise ValueError(f"its merges do not have its continuing_subword_prefix {prefix!r}")
    for name in ("normalizer", "pre_tokenizer", "decoder"):
        done: list[tuple[float, set[str] | None]] = []  # growth after a step, characters that it inserts (None: any)
        for found, factor, inserted in map(_growth, steps(content.get(name))):
            # A step multiplies the growth of earlier ones whose characters it finds.
            earlier = (old for old, text in done if found is None or text is None or found & text)
            done.append((max(1, factor) * max(earlier, default=1), inserted))
            if done[-1][0] > _MOST_GROWTH:
                raise ValueError(f"its {name} can make a text {done[-1][0]:,.0f} times longer")


def _growth(step: Mapping[str, Any]) -> tuple[set[str] | None, float, set[str] | None]:
    """The characters that a step finds (None: any), how many times longer it makes them, and those it inserts."""
    match step:
        case {"type": "Replace", "pattern": {"String": str(found)}, "content": str(text)}:
            return _folded(found), len(text) / max(1, len(found)), _folded(text)
        case {"type": "Replace", "content": str(text)}:
            return None, len(text), _folded(text)
        case {"type": "Prepend", "prepend": str(text)}:
            return set(), len(text), _folded(text)
        case {"type": "ByteLevel" | "Metaspace"}:  # two bytes for one, or a character before each part
            return None, 2, None
        case {"type": "Precompiled", "precompiled_charsmap": str(encoded)}:
            blob = b64decode(encoded)
            texts = blob[4 + int.from_bytes(blob[:4], "little") :].split(b"\0")
            return None, max(map(len, texts)) / _LONGEST_MAPPED, set()
    return set(), 1, set()


def _folded(text: str) -> set[str]:
    """The characters of a text without what other steps may change: case, accents and compatible forms."""
    return set(unicodedata.normalize("NFKD", text).casefold())
