"""What a tokenizer is: the protocol, what follows from a table of byte strings, and decoding one id at a time.

A tokenizer is a list of byte strings, one an id, and a way to encode. Decoding joins the byte strings. Text is what UTF-8 can
hold: half a surrogate pair, which a Python string can carry (from a command line that is not valid UTF-8, say), is refused
with a `UserError` by every tokenizer rather than silently replaced.

Shapes: `T` tokens, `V` vocabulary.
"""

import codecs
import itertools
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from glassgpt.utils.errors import UserError

END_OF_TEXT = "<|endoftext|>"


class Tokenizer(Protocol):
    """What the rest of the package asks of a tokenizer."""

    kind: str
    """`characters`, `bytes`, `gpt2`, `bpe` for any other byte-level BPE, or `hf` for what the `tokenizers` library reads."""
    vocab_size: int
    """V: the ids are 0 to V - 1."""
    end_of_text: int | None
    """The id that separates documents, where there is one. No text encodes to it."""
    prompt_prefix: tuple[int, ...]
    """The ids that a text of its own begins with before its first word, such as <s> of Llama; none for most.

    `encode` leaves them out, since its ids must be those of the text alone wherever it stands (in the middle of a document, in
    a count of bytes); whoever begins a prompt puts them first. A model trained behind <s> writes badly without it.
    """

    def encode(self, text: str) -> npt.NDArray[np.int64]:
        """The ids (T,) of a text. What looks like a special token is ordinary text. Raises `UserError` for text without ids."""
        ...

    def encode_documents(self, texts: Sequence[str]) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint64]]:
        """The ids (T,) of all texts one after the other, and offsets (documents + 1,): text i is `ids[offsets[i] : offsets[i + 1]]`."""
        ...

    def decode_bytes(self, ids: Iterable[int], *, after: int | None = None) -> bytes:
        """The bytes that the ids stand for; `end_of_text` stands for its name. Raises `UserError` for an id outside the vocabulary.

        `after` is the id before them, None at the beginning of a text, where some tokenizers drop the space of the first word. So
        `decode_bytes(a + b)` is `decode_bytes(a) + decode_bytes(b, after=a[-1])`, which is what makes streaming exact.
        """
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids, U+FFFD for bytes that are not UTF-8. Raises `UserError` for an id outside the vocabulary."""
        ...

    def byte_lengths(self) -> npt.NDArray[np.int64]:
        """Bytes of text (V,) that each id stands for; special tokens stand for none."""
        ...

    def to_json(self) -> str:
        """What `load_tokenizer` needs to restore this tokenizer without network, as JSON text."""
        ...

    def to_hugging_face(self) -> str:
        """The same vocabulary as a `tokenizer.json` of the `tokenizers` library."""
        ...


class Vocabulary(Tokenizer):
    """What follows from the table of byte strings alone."""

    prompt_prefix: tuple[int, ...] = ()
    _table: list[bytes]
    _special: frozenset[int]

    def _fill(self, table: list[bytes], special: Iterable[int] = ()) -> None:
        self._table, self._special = table, frozenset(special)
        self.vocab_size = len(table)

    def encode(self, text: str) -> npt.NDArray[np.int64]:
        return self.encode_documents([text])[0].astype(np.int64)

    def decode_bytes(self, ids: Iterable[int], *, after: int | None = None) -> bytes:
        return b"".join([self._table[i] for i in self._checked(ids)])

    def _checked(self, ids: Iterable[int]) -> list[int]:
        numbers: list[int] = ids.tolist() if isinstance(ids, np.ndarray) else [int(i) for i in ids]
        if numbers and not 0 <= min(numbers) <= max(numbers) < self.vocab_size:
            wrong = next(i for i in numbers if not 0 <= i < self.vocab_size)
            raise UserError(
                f"{wrong} is no token id of this {self.kind} tokenizer, whose ids are 0 to {self.vocab_size - 1}"
            )
        return numbers

    def decode(self, ids: Iterable[int]) -> str:
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def byte_lengths(self) -> npt.NDArray[np.int64]:
        return np.array(
            [0 if i in self._special else len(token) for i, token in enumerate(self._table)], dtype=np.int64
        )


def begin_of_text(tokenizer: Tokenizer) -> int | None:
    """The id that a text of its own begins with: the first of the prompt's prefix, else the end of the text before, else None."""
    return tokenizer.prompt_prefix[0] if tokenizer.prompt_prefix else tokenizer.end_of_text


class StreamDecoder:
    """Turns ids into text one at a time, holding back bytes until they are whole characters.

    `after` is the last id of the text that goes on here, None where a text begins.
    """

    def __init__(self, tokenizer: Tokenizer, after: int | None = None) -> None:
        self._tokenizer = tokenizer
        self._after = after
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token: int) -> str:
        """The text that became whole with this id: empty within a character, U+FFFD for bytes that cannot become one."""
        text = self._decoder.decode(self._tokenizer.decode_bytes([token], after=self._after))
        self._after = token
        return text

    def finish(self) -> str:
        """What is left: U+FFFD where the ids ended within a character. The decoder then starts anew."""
        self._after = None
        return self._decoder.decode(b"", final=True)


def concatenated(parts: list[npt.NDArray[np.uint32]]) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint64]]:
    """The ids of several texts as `encode_documents` returns them."""
    offsets = np.zeros(len(parts) + 1, dtype=np.uint64)
    offsets[1:] = np.cumsum([len(part) for part in parts])
    return (np.concatenate(parts) if parts else np.empty(0, dtype=np.uint32)), offsets


def place_of(text: str, offset: int) -> str:
    """Where a character stands, for an error: offset from 0 as Python counts, line and column from 1 as editors do."""
    line, column = text.count("\n", 0, offset) + 1, offset - text.rfind("\n", 0, offset)
    return f"at offset {offset} (line {line}, column {column}; in {text[max(0, offset - 15) : offset + 16]!r})"


def lone_surrogate(text: str, offset: int) -> UserError:
    """The refusal of half a surrogate pair."""
    return UserError(
        f"the text has half a surrogate pair, {text[offset]!r} (U+{ord(text[offset]):04X}), {place_of(text, offset)}, so it is not "
        "valid Unicode;\nremove or replace it (text from a command line or terminal must be UTF-8)"
    )


def byte_symbols() -> list[str]:
    """The visible character by which GPT-2's files spell each byte: itself where it is printable, else from U+0100 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = itertools.count(0x100)
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
