"""How text becomes token ids and back: characters, bytes, and byte-level BPE with GPT-2's vocabulary.

A tokenizer is a list of byte strings, one an id, and a way to encode. Decoding joins the byte strings, so it is the same
for all of them. Text is what UTF-8 can hold: half a surrogate pair, which a Python string can carry (from a command line
that is not valid UTF-8, say), is refused with a `UserError` by every tokenizer rather than silently replaced.

Shapes: `T` tokens, `V` vocabulary.
"""

import codecs
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from .errors import UserError, did_you_mean
from .files import sha256_of

END_OF_TEXT = "<|endoftext|>"


class Tokenizer(Protocol):
    """What the rest of the package asks of a tokenizer."""

    kind: str
    """`characters`, `bytes`, `gpt2`, or `bpe` for any other vocabulary of byte pairs."""
    vocab_size: int
    """V: the ids are 0 to V - 1."""
    end_of_text: int | None
    """The id that separates documents, where there is one. No text encodes to it."""

    def encode(self, text: str) -> npt.NDArray[np.int64]:
        """The ids (T,) of a text. What looks like a special token is ordinary text. Raises `UserError` for text without ids."""
        ...

    def encode_documents(self, texts: Sequence[str]) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint64]]:
        """The ids (T,) of all texts one after the other, and offsets (documents + 1,): text i is `ids[offsets[i] : offsets[i + 1]]`."""
        ...

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes that the ids stand for; `end_of_text` stands for its name. Raises `UserError` for an id outside the vocabulary."""
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


class _Vocabulary(Tokenizer):
    """What follows from the table of byte strings alone."""

    _table: list[bytes]
    _special: frozenset[int]

    def _fill(self, table: list[bytes], special: Iterable[int] = ()) -> None:
        self._table, self._special = table, frozenset(special)
        self.vocab_size = len(table)

    def encode(self, text: str) -> npt.NDArray[np.int64]:
        return self.encode_documents([text])[0].astype(np.int64)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        numbers = ids.tolist() if isinstance(ids, np.ndarray) else [int(i) for i in ids]
        if numbers and not 0 <= min(numbers) <= max(numbers) < self.vocab_size:
            wrong = next(i for i in numbers if not 0 <= i < self.vocab_size)
            raise UserError(f"{wrong} is no token id of this {self.kind} tokenizer, whose ids are 0 to {self.vocab_size - 1}")
        return b"".join([self._table[i] for i in numbers])

    def decode(self, ids: Iterable[int]) -> str:
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def byte_lengths(self) -> npt.NDArray[np.int64]:
        return np.array([0 if i in self._special else len(token) for i, token in enumerate(self._table)], dtype=np.int64)


class CharacterTokenizer(_Vocabulary):
    """One id for each distinct character, in the order given. Raises `UserError` for no characters or one given twice."""

    kind = "characters"
    end_of_text = None

    def __init__(self, characters: str) -> None:
        if not characters:
            raise UserError("a character tokenizer needs at least one character, and the text is empty")
        if len(set(characters)) < len(characters):
            raise UserError("a character tokenizer lists each character once, and this list repeats one")
        self._characters = characters
        codes = np.concatenate([chunk for _, chunk in _code_points(characters)])
        # The last entry, above every known character, catches all code points beyond: see `mode="clip"`.
        self._unknown = np.uint32(len(characters))
        self._id_of = np.full(int(codes.max()) + 2, self._unknown, dtype=np.uint32)
        self._id_of[codes] = np.arange(len(characters), dtype=np.uint32)
        self._fill([character.encode() for character in characters])

    @classmethod
    def from_texts(cls, texts: Iterable[str]) -> "CharacterTokenizer":
        """The sorted distinct characters of the texts. Raises `UserError` where there are none."""
        seen = np.zeros(0x110000, dtype=np.bool_)
        for text in texts:
            for _, codes in _code_points(text):
                seen[codes] = True
        return cls("".join(map(chr, np.flatnonzero(seen))))

    def encode_documents(self, texts: Sequence[str]) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint64]]:
        return _concatenated([self._ids(text) for text in texts])

    def _ids(self, text: str) -> npt.NDArray[np.uint32]:
        ids = np.empty(len(text), dtype=np.uint32)
        for start, codes in _code_points(text):
            part = ids[start : start + len(codes)]
            np.take(self._id_of, codes, mode="clip", out=part)
            unknown = part == self._unknown
            if unknown.any():
                raise self._unknown_character(text, start + int(unknown.argmax()))
        return ids

    def _unknown_character(self, text: str, offset: int) -> UserError:
        character = text[offset]
        return UserError(
            f"the character {character!r} (U+{ord(character):04X}) {_place(text, offset)} is none of the {self.vocab_size} that this "
            "tokenizer knows;\nremove or replace it, or train with data.tokenizer 'bytes' or 'gpt2', which encode any text"
        )

    def to_json(self) -> str:
        return json.dumps({"kind": self.kind, "characters": self._characters}, ensure_ascii=False) + "\n"


class BytesTokenizer(_Vocabulary):
    """The 256 byte values of UTF-8 text: any text has ids, and the id is the byte."""

    kind = "bytes"
    end_of_text = None

    def __init__(self) -> None:
        self._fill([bytes([value]) for value in range(256)])

    def encode_documents(self, texts: Sequence[str]) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint64]]:
        return _concatenated([self._ids(text) for text in texts])

    def _ids(self, text: str) -> npt.NDArray[np.uint32]:
        try:
            return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint32)
        except UnicodeEncodeError as error:
            raise _lone_surrogate(text, error.start) from None

    def to_json(self) -> str:
        return json.dumps({"kind": self.kind}) + "\n"


# sha256 of GPT-2's tokens, joined by newlines in the order of their ids: the vocabulary is recognised in whatever file it comes.
_GPT2_TOKENS = "7db3ecccc3244b0f6caf9087f7d9c8224cbb8bdc6d01888e547329c0e064260f"


class BPETokenizer(_Vocabulary):
    """Byte-level BPE (Radford et al., 2019), given by the text of a Hugging Face `tokenizer.json`, which it keeps as it is.

    `fastokens` encodes, 10 times and more as fast as tiktoken, with tiktoken's ids. Raises `UserError` where the text is no
    byte-level BPE with ids 0 to V - 1.
    """

    def __init__(self, tokenizer_json: str) -> None:
        from fastokens import Tokenizer as Encoder

        try:
            content = json.loads(tokenizer_json)
            added = content.get("added_tokens") or []
            self._fill(_token_bytes(content["model"]["vocab"], added), (token["id"] for token in added if token.get("special")))
            self._encoder = Encoder.from_json_str(tokenizer_json)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else error
            raise UserError(f"this is no byte-level BPE in the format of a Hugging Face tokenizer.json ({reason})") from error
        self._encoder.no_truncation()  # a file made for a model of 1,024 tokens may ask for it
        self._json = tokenizer_json
        self.kind = "gpt2" if hashlib.sha256(b"\n".join(self._table)).hexdigest() == _GPT2_TOKENS else "bpe"
        self.end_of_text = next((i for i in sorted(self._special) if self._table[i] == END_OF_TEXT.encode()), None)

    @classmethod
    def from_merges(cls, vocab: Mapping[str, int], merges: Sequence[str]) -> "BPETokenizer":
        """A tokenizer that splits text as GPT-2 does.

        `vocab` gives the id of each token and `merges` the pairs ("a b") in the order in which they are merged, both in
        GPT-2's spelling of bytes. `<|endoftext|>`, if `vocab` has it, is a special token.
        """
        special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None}
        content = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [{"id": vocab[END_OF_TEXT], "content": END_OF_TEXT, **special}] if END_OF_TEXT in vocab else [],
            "normalizer": None,
            "pre_tokenizer": byte_level,
            "post_processor": None,
            "decoder": byte_level,
            "model": {**model, "fuse_unk": False, "byte_fallback": False, "vocab": dict(vocab), "merges": list(merges)},
        }
        return cls(json.dumps(content, ensure_ascii=False) + "\n")

    @classmethod
    def gpt2(cls) -> "BPETokenizer":
        """GPT-2's 50,257 tokens, from OpenAI's two files: see `_gpt2_file` for where they are looked for.

        Raises `UserError` where they are neither on this machine nor to be had from the network.
        """
        _, *merges = _gpt2_file("vocab.bpe").decode().splitlines()  # the first line is the version
        return cls.from_merges(json.loads(_gpt2_file("encoder.json")), merges)

    def encode_documents(self, texts: Sequence[str]) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint64]]:
        try:
            ids, offsets = self._encoder.encode_batch_flat(list(texts), split_special_tokens=True)
        except UnicodeEncodeError as error:
            raise _lone_surrogate(error.object, error.start) from None
        return np.frombuffer(ids, "<u4").astype(np.uint32), np.frombuffer(offsets, "<u8").astype(np.uint64)

    def to_json(self) -> str:
        return self._json


class StreamDecoder:
    """Turns ids into text one at a time, holding back bytes until they are whole characters."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token: int) -> str:
        """The text that became whole with this id: empty within a character, U+FFFD for bytes that cannot become one."""
        return self._decoder.decode(self._tokenizer.decode_bytes([token]))

    def finish(self) -> str:
        """What is left: U+FFFD where the ids ended within a character. The decoder then starts anew."""
        return self._decoder.decode(b"", final=True)


_BUILDERS: Mapping[str, Callable[[Iterable[str]], Tokenizer]] = {
    "characters": CharacterTokenizer.from_texts,
    "bytes": lambda texts: BytesTokenizer(),
    "gpt2": lambda texts: BPETokenizer.gpt2(),
}


def build_tokenizer(kind: str, texts: Iterable[str] = ()) -> Tokenizer:
    """A new tokenizer of a kind: `characters` (those of the texts), `bytes` or `gpt2` (both leave the texts unread).

    Raises `UserError` for an unknown kind, for texts without a character, and where GPT-2's files cannot be had.
    """
    if kind not in _BUILDERS:
        raise UserError(f"there is no tokenizer {kind!r}{did_you_mean(kind, _BUILDERS)} (tokenizers: {', '.join(_BUILDERS)})")
    return _BUILDERS[kind](texts)


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer saved in a file: `to_json` of any tokenizer here, or a Hugging Face `tokenizer.json` with a byte-level BPE.

    Raises `UserError`, naming the file, where it is missing, damaged or of another kind.
    """
    try:
        return _restore(path.read_bytes().decode())
    except OSError as error:
        raise UserError(f"cannot read the tokenizer {path}: {error.strerror}") from error
    except UserError as error:
        raise UserError(f"cannot use the tokenizer {path}: {error}") from error
    except ValueError as error:  # invalid UTF-8 or JSON
        raise UserError(f"the tokenizer {path} is damaged ({error}); take it from another checkpoint or from the dataset") from error


def export_tokenizer(tokenizer: Tokenizer, directory: Path, context_length: int) -> None:
    """TO BE REPLACED AT THE MERGE: the files that transformers' AutoTokenizer reads, of a `BPETokenizer` only."""
    if not isinstance(tokenizer, BPETokenizer):
        raise UserError(f"the {tokenizer.kind} tokenizer cannot be written for transformers yet")
    special = END_OF_TEXT if tokenizer.end_of_text is not None else None
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": context_length, "clean_up_tokenization_spaces": False}
    (directory / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    (directory / "tokenizer_config.json").write_text(json.dumps({**config, "bos_token": special, "eos_token": special}), encoding="utf-8")


def _restore(text: str) -> Tokenizer:
    match json.loads(text):
        case {"kind": "characters", "characters": str(characters)}:
            return CharacterTokenizer(characters)
        case {"kind": "bytes"}:
            return BytesTokenizer()
        case {"model": {"type": "BPE"}}:
            return BPETokenizer(text)
    raise UserError("it is neither a glassgpt tokenizer (characters, bytes) nor a Hugging Face tokenizer.json with a BPE model")


# Characters are looked up in pieces: as UTF-32 a text takes four times its size.
_CHUNK = 1 << 20


def _code_points(text: str) -> Iterator[tuple[int, npt.NDArray[np.uint32]]]:
    """The text's code points in pieces, each with the offset of its first character."""
    for start in range(0, len(text), _CHUNK):
        try:
            encoded = text[start : start + _CHUNK].encode("utf-32-le")
        except UnicodeEncodeError as error:
            raise _lone_surrogate(text, start + error.start) from None
        yield start, np.frombuffer(encoded, dtype="<u4")


def _concatenated(parts: list[npt.NDArray[np.uint32]]) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint64]]:
    offsets = np.zeros(len(parts) + 1, dtype=np.uint64)
    offsets[1:] = np.cumsum([len(part) for part in parts])
    return (np.concatenate(parts) if parts else np.empty(0, dtype=np.uint32)), offsets


def _place(text: str, offset: int) -> str:
    """Where a character stands, for an error: offset from 0 as Python counts, line and column from 1 as editors do."""
    line, column = text.count("\n", 0, offset) + 1, offset - text.rfind("\n", 0, offset)
    return f"at offset {offset} (line {line}, column {column}; in {text[max(0, offset - 15) : offset + 16]!r})"


def _lone_surrogate(text: str, offset: int) -> UserError:
    return UserError(
        f"the text has half a surrogate pair, {text[offset]!r} (U+{ord(text[offset]):04X}), {_place(text, offset)}, so it is not "
        "valid Unicode;\nremove or replace it (text from a command line or terminal must be UTF-8)"
    )


def _byte_symbols() -> list[str]:
    """The visible character by which GPT-2's files spell each byte: itself where it is printable, else from U+0100 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = itertools.count(0x100)
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _token_bytes(vocab: Mapping[str, int], added: Sequence[Mapping[str, Any]]) -> list[bytes]:
    """The bytes of each id. Raises `KeyError` or `ValueError` unless these are the tokens 0 to V - 1 of a byte-level vocabulary."""
    byte_of = {symbol: byte for byte, symbol in enumerate(_byte_symbols())}
    if not byte_of.keys() <= vocab.keys():
        raise ValueError("some of the 256 bytes have no token")
    tokens = {token["id"]: token["content"].encode() for token in added}  # as they are, not spelled in symbols
    tokens |= {i: bytes([byte_of[symbol] for symbol in token]) for token, i in vocab.items() if i not in tokens}
    if tokens.keys() != set(range(len(tokens))):
        raise ValueError("the ids have gaps")
    return [tokens[i] for i in range(len(tokens))]


_GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
_GPT2_SHA256 = {  # as in tiktoken_ext/openai_public.py
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}


def _gpt2_file(name: str) -> bytes:
    """One of OpenAI's two files, verified: from the folder that TIKTOKEN_CACHE_DIR names (under tiktoken's name for it, or
    its own), else from glassgpt's cache, into which it is downloaded where it is missing."""
    from .data.download import cache_directory, download

    url, sha256, cache = _GPT2_URL + name, _GPT2_SHA256[name], cache_directory() / "gpt2"
    if folder := os.environ.get("TIKTOKEN_CACHE_DIR"):
        for path in (Path(folder) / hashlib.sha1(url.encode()).hexdigest(), Path(folder) / name):
            if path.is_file():
                if sha256_of(path) != sha256:
                    raise UserError(f"{path} is not GPT-2's {name} (its sha256 differs, so it may be damaged): remove it and try again")
                return path.read_bytes()
    manual = (
        f"Without network: get {' and '.join(_GPT2_SHA256)} from {_GPT2_URL} on another machine and put both into {cache}, "
        "or set TIKTOKEN_CACHE_DIR to tiktoken's cache that has them"
    )
    return download(url, cache / name, sha256=sha256, what=f"GPT-2's {name}", manual=manual).read_bytes()
