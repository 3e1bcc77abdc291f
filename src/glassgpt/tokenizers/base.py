"""The tokenizers' base class, what its subclasses share, and decoding of one id at a time.

A tokenizer is a list of byte strings, one per id, and a way to encode. Decoding joins the byte strings. Text is what
UTF-8 can hold: every tokenizer refuses half a surrogate pair, which a Python string can carry, with a `UserError`.
Shapes: `T` tokens, `V` vocabulary.
"""

import codecs
import hashlib
import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence, Sized
from functools import cached_property
from operator import index
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from glassgpt.utils.arguments import check_arguments
from glassgpt.utils.errors import UserError

T = TypeVar("T", bound=Sized)

END_OF_TEXT = "<|endoftext|>"


class Tokenizer(ABC):
    """What the rest of the package needs from a tokenizer."""

    kind: str
    """`characters`, `bytes`, `gpt2`, `bpe` (another byte-level BPE), or `hf` (others of the `tokenizers` library)."""
    vocab_size: int
    """V: the ids are 0 to V - 1."""
    end_of_text: int | None
    """The id that separates documents, if there is one. No text encodes to it."""
    prompt_prefix: tuple[int, ...] = ()
    """The special ids that a prompt begins with, such as <s> of Llama; empty for most. `encode` leaves them out."""
    _table: list[bytes]
    _special: frozenset[int] = frozenset()
    _unknown_id: int | None = None

    def _set_table(self, table: list[bytes]) -> None:
        self._table, self.vocab_size = table, len(table)

    @property
    def begin_of_text(self) -> int | None:
        """The id that a text begins with: the first of the prompt's prefix, otherwise `end_of_text`."""
        return self.prompt_prefix[0] if self.prompt_prefix else self.end_of_text

    @property
    def document_marks(self) -> list[int]:
        """The ids before each document: end of text, then the prompt's prefix. If both are the same id, only one."""
        marks = [*([] if self.end_of_text is None else [self.end_of_text]), *self.prompt_prefix]
        return marks[:1] if len(marks) == 2 and marks[0] == marks[1] else marks

    @property
    def within_text(self) -> "Tokenizer":
        """This tokenizer for further parts of a text, without the space that some put before a text."""
        return self

    @cached_property
    def sha256(self) -> str:
        """The hash of the tokenizer's file."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @check_arguments
    def encode(self, text: str) -> npt.NDArray[np.int64]:
        """Return the ids (T,) of a text; special tokens in it are plain text. Raises `UserError` if there are none."""
        return self.encode_documents([text])[0].astype(np.int64)

    @abstractmethod
    def encode_documents(self, texts: Sequence[str]) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint64]]:
        """Return all ids (T,), and offsets (documents + 1,): text i is `ids[offsets[i] : offsets[i + 1]]`."""

    def decode_bytes(self, ids: Iterable[int], *, after: int | None = None) -> bytes:
        """Return the bytes of the ids, special tokens by name. Raises `UserError` for an id outside the vocabulary.

        `after` is the id before them, None at the beginning of a text, where some tokenizers drop the first word's
        space: `decode_bytes(a + b)` equals `decode_bytes(a) + decode_bytes(b, after=a[-1])`.
        """
        return b"".join([self._table[i] for i in self._valid(ids)])

    def _valid(self, ids: Iterable[int]) -> list[int]:
        try:
            numbers = list(map(index, ids.tolist() if isinstance(ids, np.ndarray) else ids))
        except TypeError as error:
            raise UserError(f"ids must be a sequence of whole numbers, as `encode` returns ({error})") from None
        if numbers and not 0 <= min(numbers) <= max(numbers) < self.vocab_size:
            wrong, last = next(i for i in numbers if not 0 <= i < self.vocab_size), self.vocab_size - 1
            raise UserError(f"{wrong} is not an id of this {self.kind} tokenizer; its ids are 0 to {last}")
        return numbers

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of the ids, with U+FFFD for bytes that are not UTF-8. Raises as `decode_bytes` does."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    @cached_property
    def is_text(self) -> npt.NDArray[np.bool_]:
        """Whether each id (V,) stands for text: not the special tokens, nor the one for unknown characters."""
        return ~np.isin(np.arange(self.vocab_size), list(self._special))

    @property
    def model_vocab_size(self) -> int:
        """Ids that a model needs: not the special tokens above all others that no text becomes, such as padding."""
        needed = [*np.flatnonzero(self.is_text).tolist(), *self.document_marks, self._unknown_id or 0]
        return max(needed) + 1

    def byte_lengths(self) -> npt.NDArray[np.int64]:
        """Return the bytes (V,) that each id stands for within a text; 0 for ids that are not text."""
        return self._lengths

    def text_bytes(self, ids: npt.NDArray[np.int64], before: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the bytes of text of ids (T,), each after the id `before` it (T,), -1 at the beginning of a text.

        A text also begins after special ids in `document_marks`. A space that the tokenizer puts there does not count.
        """
        return self._lengths[ids]

    @cached_property
    def _lengths(self) -> npt.NDArray[np.int64]:
        return np.array([len(token) for token in self._table], dtype=np.int64) * self.is_text

    @abstractmethod
    def to_json(self) -> str:
        """Return JSON text from which `load_tokenizer` restores this tokenizer without network."""

    @abstractmethod
    def to_hugging_face(self) -> str:
        """Return the same vocabulary as a `tokenizer.json` of the `tokenizers` library."""


class StreamDecoder:
    """Decodes ids one at a time, holding back bytes until they form whole characters; `after` as in `decode_bytes`."""

    def __init__(self, tokenizer: Tokenizer, after: int | None = None) -> None:
        self._tokenizer, self._after = tokenizer, after
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token: int) -> str:
        """Return the text that this id completes: empty within a character, U+FFFD for bytes that cannot become one."""
        text = self._decoder.decode(self._tokenizer.decode_bytes([token], after=self._after))
        self._after = token
        return text

    def finish(self) -> str:
        """Return U+FFFD if the ids ended within a character, and reset the decoder."""
        self._after = None
        return self._decoder.decode(b"", final=True)


def offsets_of(texts: Sequence[Sized]) -> npt.NDArray[np.uint64]:
    """Return the offsets (texts + 1,) of texts, or of their ids, one after another: where each begins and ends."""
    lengths = np.fromiter(map(len, texts), dtype=np.uint64, count=len(texts))
    return np.concatenate([np.zeros(1, dtype=np.uint64), np.cumsum(lengths)])


def batches_by_size(items: Iterable[T], limit: int) -> Iterator[list[T]]:
    """Yield consecutive items in lists whose lengths (`len` of each item) add up to `limit` or a little more."""
    batch: list[T] = []
    size = 0
    for item in items:
        batch.append(item)
        size += len(item)
        if size >= limit:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def describe_character(text: str, offset: int) -> str:
    """Describe a character and its position: offset from 0 as in Python, line and column from 1 as in editors."""
    line, column = text.count("\n", 0, offset) + 1, offset - text.rfind("\n", 0, offset)
    place = f"at offset {offset} (line {line}, column {column}; in {text[max(0, offset - 15) : offset + 16]!r})"
    return f"{text[offset]!r} (U+{ord(text[offset]):04X}) {place}"


def surrogate_error(text: str, offset: int) -> UserError:
    """Return the error for half a surrogate pair."""
    advice = "remove or replace it (text from a command line or terminal must be UTF-8)"
    return UserError(f"half a surrogate pair, {describe_character(text, offset)}, is not valid Unicode;\n{advice}")


def encode_text(text: str) -> bytes:
    """Return a text's UTF-8. Raises `UserError` for half a surrogate pair."""
    return encode_texts([text])[0]


def encode_texts(texts: Iterable[str]) -> list[bytes]:
    """Return the UTF-8 of each text. Raises `UserError` for half a surrogate pair."""
    try:
        return list(map(str.encode, texts))
    except UnicodeEncodeError as error:
        raise surrogate_error(error.object, error.start) from None


def bytes_to_unicode() -> list[str]:
    """Return the character that GPT-2's files use for each byte: itself if printable, otherwise from U+0100 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = itertools.count(0x100)
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


BYTE_OF = {character: byte for byte, character in enumerate(bytes_to_unicode())}
