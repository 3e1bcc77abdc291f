"""Tokenizers given by a Hugging Face `tokenizer.json`: byte-level BPE (Radford et al., 2019), and any other kind.

`fastokens` encodes byte-level BPE, the `tokenizers` library everything else. Decoding is our own: the library's decoder
gives each token its bytes once, so that the bytes of incomplete characters can be held back while streaming.
"""

import hashlib
import itertools
import json
import re
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from glassgpt.tokenizers import base
from glassgpt.tokenizers.base import BYTE_OF, END_OF_TEXT, Tokenizer
from glassgpt.tokenizers.limits import MOST_IDS, require_bounded, steps
from glassgpt.utils.errors import UserError
from glassgpt.utils.files import parse_json

# Names of the end of text without a tokenizer_config.json: of GPT-2, Llama 3, Llama 2 and Mistral, Gemma, DeepSeek, and
# two that smaller projects use.
END_OF_TEXT_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<｜end▁of▁sentence｜>", "<|eos|>", "[EOS]")

# sha256 of GPT-2's tokens, joined by newlines in the order of their ids, to recognise the vocabulary in any file.
_GPT2_TOKENS = "7db3ecccc3244b0f6caf9087f7d9c8224cbb8bdc6d01888e547329c0e064260f"
_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")
# A code point that Unicode promises never to assign: the prefix of names that no text may match.
_NO_TEXT = "\U0010ffff"
_UNKNOWN = _NO_TEXT + "unknown"  # more than one character, or BPE would find it


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turn the errors of a damaged file, and those of the libraries, into a `UserError` of one line."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except BaseException as error:
        # A panic of the libraries, which are in Rust, is not an `Exception`.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{what} ({' '.join(reason[:200].split())})") from None


class FileTokenizer(Tokenizer):
    """What tokenizers of a `tokenizer.json` share: its text, which they keep unchanged, and its special tokens."""

    @abstractmethod
    def __init__(self, tokenizer_json: str, end_of_text: str | None = None) -> None: ...

    def _read(self, tokenizer_json: str, end_of_text: str | None) -> dict[str, Any]:
        """Set everything but the table, and return the file's content. Raises `ValueError` if it has contradictions."""
        content: dict[str, Any] = parse_json(tokenizer_json, "it")
        require_bounded(content)
        self._json, self._end_of_text_name = tokenizer_json, end_of_text
        self.end_of_text = find_end_of_text(content, end_of_text)
        self.prompt_prefix = find_prompt_prefix(content.get("post_processor"))
        ids, model = token_ids(content), content["model"]
        name = model.get("unk_token")
        self._unknown_id = model.get("unk_id") if name is None else ids.get(name)
        self._special = find_special_ids(content, self.end_of_text, self._unknown_id)
        if missing := set(self.document_marks) - set(ids.values()):
            raise ValueError(f"its post_processor has an id without a token, {min(missing)}")
        return content

    def text_bytes(self, ids: npt.NDArray[np.int64], before: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        begins = np.isin(before, (-1, *self._special.intersection(self.document_marks)))
        return np.where(begins, self._first_lengths[ids], self._lengths[ids])

    @cached_property
    def _first_lengths(self) -> npt.NDArray[np.int64]:
        """The bytes (V,) that each id stands for at the beginning of a text."""
        text = b""
        with suppress(UserError):  # it has no letter "a"
            text = self.decode_bytes(self.encode("a"))
        added = text[:-1] if text.endswith(b"a") else b""  # what the tokenizer puts before a text and decoding keeps
        pieces = [self.decode_bytes([i]) if piece else piece for i, piece in enumerate(self._table)]
        return np.array([len(piece.removeprefix(added)) for piece in pieces], dtype=np.int64) * self.is_text

    @cached_property
    def within_text(self) -> "FileTokenizer":
        content = json.loads(self._json)
        steps = {key: content.get(key) for key in ("normalizer", "pre_tokenizer")}
        plain = {key: _without_prefix(step) for key, step in steps.items()}
        return self if plain == steps else type(self)(json.dumps({**content, **plain}), self._end_of_text_name)

    def to_json(self) -> str:
        """Return the file's text, wrapped with the name of its end of text if that does not follow from the file."""
        if self.end_of_text == find_end_of_text(json.loads(self._json)):
            return self._json
        wrapped = {"kind": "hf", "end_of_text": self._end_of_text_name, "tokenizer_json": self._json}
        return json.dumps(wrapped, ensure_ascii=False) + "\n"

    def to_hugging_face(self) -> str:
        return self._json


class BPETokenizer(FileTokenizer):
    """Byte-level BPE, given by the text of a Hugging Face `tokenizer.json`.

    `fastokens` encodes, at least 10 times as fast as tiktoken, with tiktoken's ids. `end_of_text` names that token if
    it has an unusual name. Raises `UserError` if the text is not a byte-level BPE with ids 0 to V - 1.
    """

    def __init__(self, tokenizer_json: str, end_of_text: str | None = None) -> None:
        from fastokens import Tokenizer as Encoder

        with _explained("not a byte-level BPE of a Hugging Face tokenizer.json"):
            self._set_table(_byte_level_table(self._read(tokenizer_json, end_of_text)))
            self._encoder = Encoder.from_json_str(tokenizer_json)
        self._encoder.no_truncation()  # a file made for a model of 1,024 tokens may ask for it
        self.kind = "gpt2" if hashlib.sha256(b"\n".join(self._table)).hexdigest() == _GPT2_TOKENS else "bpe"

    @classmethod
    def from_merges(cls, vocab: Mapping[str, int], merges: Sequence[str]) -> "BPETokenizer":
        """Build a tokenizer that splits text as GPT-2 does; `<|endoftext|>` is a special token if `vocab` has it.

        `vocab` has each token's id, `merges` the pairs ("a b") in order, both in the characters of `bytes_to_unicode`.
        """
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        special = [{"id": vocab[END_OF_TEXT], "content": END_OF_TEXT, **flags}] if END_OF_TEXT in vocab else []
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        unused = dict.fromkeys(("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"))
        model: dict[str, Any] = {"type": "BPE", **unused, "fuse_unk": False, "byte_fallback": False}
        model |= {"vocab": dict(vocab), "merges": list(merges)}
        return cls(format_tokenizer_json(byte_level, byte_level, model, special))

    def encode_documents(self, texts: Sequence[str]) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint64]]:
        with _explained("this tokenizer cannot encode the text"):
            try:
                ids, offsets = self._encoder.encode_batch_flat(list(texts), split_special_tokens=True)
            except UnicodeEncodeError as error:
                raise base.surrogate_error(error.object, error.start) from None
        return np.frombuffer(ids, "<u4").astype(np.uint32), np.frombuffer(offsets, "<u8").astype(np.uint64)

    def merges(self) -> list[tuple[str, str]]:
        """Return the merged pairs in their order, in the characters of `bytes_to_unicode`."""
        return _merge_pairs(json.loads(self._json)["model"])

    def pre_tokenize(self, text: str) -> list[str]:
        """Split a text as before merging, in the characters of `bytes_to_unicode`: no token crosses two parts."""
        from tokenizers import Tokenizer as Library

        library = Library.from_str(self._json)
        text = text if library.normalizer is None else library.normalizer.normalize_str(text)
        return [word for word, _ in library.pre_tokenizer.pre_tokenize_str(text)]


class HFTokenizer(FileTokenizer):
    """A tokenizer given by the text of a `tokenizer.json` that the `tokenizers` library reads.

    Decoding an encoded text returns the text, unless the tokenizer loses something: by a normalizer (lower case, NFKC),
    by WordPiece's splitting at spaces, by a token for unknown characters, by `▁` as the space of SentencePiece, by
    Metaspace's leading space, or by a spelled-out byte token (`<0x41>`) under Unigram. `encode` refuses unknown
    characters without a token. Bytes that are not UTF-8 decode to U+FFFD as in Python; the library replaces a whole run
    of byte tokens. `byte_lengths` takes each token as within a text. `end_of_text` names that token if it has an
    unusual name. Raises `UserError` if the text is not supported.
    """

    kind = "hf"

    def __init__(self, tokenizer_json: str, end_of_text: str | None = None) -> None:
        from tokenizers import Tokenizer as Library

        with _explained("not a valid tokenizer.json"):
            content = self._read(tokenizer_json, end_of_text)
            ids, decoder = token_ids(content), content.get("decoder") or {}
            self.vocab_size = max(ids.values()) + 1
            encoding = _for_encoding(content, ids, self._special, self.vocab_size)
            if any(step.get("type") == "CTC" for step in steps(decoder)):
                raise ValueError("its decoder is for speech (CTC): a token's text depends on its neighbours")
            # Of the only decoder whose tokens determine what follows: "</w>" is a space, unless the text ends there.
            self._suffix: str | None = decoder["suffix"] if decoder.get("type") == "BPEDecoder" else None
        with _explained("the tokenizers library refuses it"):
            self._encoder = Library.from_str(json.dumps(encoding))
        for token in content.get("added_tokens") or []:  # the library renumbers them
            name = _NO_TEXT + token["content"] if token["id"] in self._special else token["content"]
            if self._encoder.token_to_id(name) != token["id"]:
                raise UserError(f"the id {token['id']} of its added token {token['content'][:40]!r} is out of order")
        self._join = self._encoder.decoder.decode if self._encoder.decoder is not None else " ".join
        names, vocab = {i: name for name, i in ids.items()}, content["model"]["vocab"]
        names |= {i: name for i, (name, _) in enumerate(vocab)} if isinstance(vocab, list) else {}  # some come twice
        self._names = [names.get(i, "") for i in range(self.vocab_size)]
        with _explained("its decoder fails"):
            self._table = [self._bytes_of(name, "a") for name in self._names]

    def _bytes_of(self, name: str, before: str = "") -> bytes:
        """Return a token's bytes after a token of one letter, or at a text's beginning, where some lose a space."""
        if not name:
            return b""
        text = self._join([before, name])[1:] if before else self._join([name])
        if "\ufffd" not in text or "\ufffd" in name:
            return text.encode()
        # The token is only a part of a character. Its name is `<0xE2>` for one byte, or has a symbol for each byte.
        if match := _BYTE_TOKEN.fullmatch(name):
            return bytes([int(match[1], 16)])
        return _symbol_bytes(name)

    def _ends_word(self, i: int) -> bool:
        return self._suffix is not None and i < self.vocab_size and self._names[i].endswith(self._suffix)

    @_explained("its decoder fails")
    def decode_bytes(self, ids: Iterable[int], *, after: int | None = None) -> bytes:
        parts = []
        for i in self._valid(ids):
            parts += [b" "] if after is not None and self._ends_word(after) else []
            parts += [self._bytes_of(self._names[i]) if after is None else self._table[i]]
            after = i
        return b"".join(parts)

    def byte_lengths(self) -> npt.NDArray[np.int64]:
        return self._lengths + self._spaces

    def text_bytes(self, ids: npt.NDArray[np.int64], before: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        spaces = self._spaces[before] * (before >= 0)  # of the words that end before the ids, unless the text ends too
        return super().text_bytes(ids, before) + spaces * self.is_text[ids]

    @cached_property
    def _spaces(self) -> npt.NDArray[np.int64]:
        """The spaces (V,), 0 or 1, that follow each id."""
        return np.array([self._ends_word(i) for i in range(self.vocab_size)], dtype=np.int64) * self.is_text

    def encode_documents(self, texts: Sequence[str]) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint64]]:
        with _explained("this tokenizer cannot encode the text"):
            try:
                encodings = self._encoder.encode_batch_fast(list(texts), add_special_tokens=False)
            except Exception:
                base.encode_texts(texts)  # raises the better error
                raise
        offsets = base.offsets_of(encodings)
        every_id = itertools.chain.from_iterable(encoding.ids for encoding in encodings)
        ids = np.fromiter(every_id, dtype=np.uint32, count=int(offsets[-1]))
        unknown = ids == self.vocab_size
        if unknown.any():
            text = texts[int(np.searchsorted(offsets, unknown.argmax(), side="right")) - 1]
            encoding = self._encoder.encode(text, add_special_tokens=False)  # the fast batch has no offsets
            offset: int = encoding.offsets[encoding.ids.index(self.vocab_size)][0]
            character = base.describe_character(text, offset)
            raise UserError(f"the character {character} has no id;\nremove or replace it")
        return ids, offsets


def _symbol_bytes(name: str) -> bytes:
    """Return a token's bytes as the library does: those of its symbols, if it has no other characters."""
    try:
        return bytes(map(BYTE_OF.__getitem__, name))
    except KeyError:
        return name.encode()


def _byte_level_table(content: Mapping[str, Any]) -> list[bytes]:
    """Return the bytes of each id. Raises `KeyError` or `ValueError` unless it is a byte-level BPE."""
    # fastokens would accept other kinds too: SentencePiece's, or BPE with dropout.
    model, vocab = content["model"], content["model"]["vocab"]
    is_byte_level = (content.get("decoder") or {}).get("type") == "ByteLevel"
    # The model's type may be missing: GPT-2's own file is older than that field.
    if "merges" not in model or not is_byte_level or '"ByteLevel"' not in json.dumps(content.get("pre_tokenizer")):
        raise ValueError("its tokens are not pairs of bytes")
    unsupported = ("dropout", "byte_fallback", "continuing_subword_prefix", "end_of_word_suffix")
    if options := [name for name in unsupported if model.get(name)]:
        raise ValueError(f"it has {', '.join(options)}")
    if not BYTE_OF.keys() <= vocab.keys():
        raise ValueError("some of the 256 bytes have no token")
    ids, added = token_ids(content), {token["content"] for token in content.get("added_tokens") or []}
    if others := set("".join(ids.keys() - added)) - BYTE_OF.keys():
        raise ValueError(f"{min(others)!r} is not the symbol of a byte")
    if set(ids.values()) != set(range(len(ids))):
        raise ValueError("the ids have gaps")
    return [_symbol_bytes(name) for name in sorted(ids, key=ids.__getitem__)]


def format_tokenizer_json(
    pre_tokenizer: Mapping[str, Any], decoder: Mapping[str, Any], model: Mapping[str, Any], added: Sequence[object] = ()
) -> str:
    """Return the text of a tokenizer.json with these parts."""
    content: dict[str, Any] = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": list(added)}
    content |= {"normalizer": None, "pre_tokenizer": pre_tokenizer, "post_processor": None}
    content |= {"decoder": decoder, "model": model}
    return json.dumps(content, ensure_ascii=False) + "\n"


def token_ids(content: Mapping[str, Any]) -> dict[str, int]:
    """Return a tokenizer.json's ids by token. Raises `KeyError`, `TypeError` or `ValueError` if it is not valid."""
    vocab = content["model"]["vocab"]
    ids = {piece: i for i, (piece, _) in enumerate(vocab)} if isinstance(vocab, list) else dict(vocab)
    for token in content.get("added_tokens") or []:
        if ids.setdefault(token["content"], token["id"]) != token["id"]:
            raise ValueError(f"its added token {token['content'][:40]!r} has two ids")
    if not ids:
        raise ValueError("it has no tokens")
    if not all(type(i) is int and 0 <= i < MOST_IDS for i in ids.values()):  # not True, which is also an `int`
        raise ValueError(f"an id is not an integer from 0 to {MOST_IDS - 1:,}")
    if len(set(ids.values())) < len(ids):
        raise ValueError("two of its tokens have the same id")
    return ids


def find_end_of_text(content: Mapping[str, Any], name: str | None = None) -> int | None:
    """Return the id of the token called `name`, otherwise of the first added token with a usual name."""
    if name is not None and (named := token_ids(content).get(name)) is not None:
        return named
    added = {token["content"]: int(token["id"]) for token in content.get("added_tokens") or []}
    return next((added[usual] for usual in END_OF_TEXT_NAMES if usual in added), None)


def find_prompt_prefix(post_processor: Mapping[str, Any] | None) -> tuple[int, ...]:
    """Return the special ids that a post-processor puts before a text, such as <s> of Llama."""
    match post_processor:
        case {"type": "Sequence", "processors": list(processors)}:
            return tuple(i for processor in reversed(processors) for i in find_prompt_prefix(processor))
        case {"type": "BertProcessing" | "RobertaProcessing", "cls": [_, int(i)]}:
            return (i,)
        case {"type": "TemplateProcessing", "single": list(pieces), "special_tokens": dict(tokens)}:
            before = pieces[: next((at for at, piece in enumerate(pieces) if "Sequence" in piece), 0)]
            return tuple(i for piece in before for i in tokens[piece["SpecialToken"]["id"]]["ids"])
    return ()


def find_special_ids(content: Mapping[str, Any], end_of_text: int | None, unknown: int | None) -> frozenset[int]:
    """Return the ids that are not text: the special tokens, end of text and the token for unknown text.

    Byte tokens are text, though the library's trainer lists them as special.
    """
    has_byte_tokens = content["model"].get("byte_fallback")
    added = [token for token in content.get("added_tokens") or [] if token.get("special")]
    special = {token["id"] for token in added if not (has_byte_tokens and _BYTE_TOKEN.fullmatch(token["content"]))}
    return frozenset(special | {i for i in (end_of_text, unknown) if i is not None})


def _for_encoding(
    content: Mapping[str, Any], ids: Mapping[str, int], special: frozenset[int], unknown: int
) -> dict[str, Any]:
    """Return the tokenizer.json for encoding: no text becomes a special token, and no character is lost.

    The library's `encode_special_tokens` is not enough: Unigram, WordLevel and WordPiece look up words among the
    special tokens too, so these get names that no text has. BPE silently drops characters without a token if there is
    no unknown token, and Unigram does not name them: they become the id `unknown`, one above all others.
    """
    model = dict(content["model"])
    special_names = {name for name, i in ids.items() if i in special}
    renamed = {name: _NO_TEXT + name if name in special_names else name for name in ids}
    if isinstance(model["vocab"], list):
        model["vocab"] = [[renamed[piece], score] for piece, score in model["vocab"]]
        if model.get("unk_id") is None and len(model["vocab"]) == unknown:  # otherwise added tokens have the next ids
            model |= {"vocab": [*model["vocab"], [_UNKNOWN, 0.0]], "unk_id": unknown}
    else:
        unknown_token = renamed.get(model.get("unk_token") or "", _UNKNOWN)
        model |= {"vocab": {renamed[name]: i for name, i in ids.items()}, "unk_token": unknown_token}
        if unknown_token == _UNKNOWN:
            model["vocab"][_UNKNOWN] = unknown
    if "merges" in model:
        pairs = [pair for pair in _merge_pairs(model) if special_names.isdisjoint((*pair, "".join(pair)))]
        model |= {"merges": pairs, "dropout": None}
    added = [
        {**token, "content": renamed[token["content"]]}
        for token in content.get("added_tokens") or []
        if token["id"] in special or not token.get("special")  # not byte tokens, which text must not match either
    ]
    unused = dict.fromkeys(("post_processor", "truncation", "padding"))
    return {**content, "model": model, "added_tokens": added, **unused}


def _without_prefix(step: Any) -> Any:
    """Return a normalizer or pre-tokenizer that puts nothing before a text."""
    match step:
        case {"type": "Sequence"}:
            return {k: [*map(_without_prefix, v)] if isinstance(v, list) else v for k, v in step.items()}
        case {"type": "Prepend"}:
            return {**step, "prepend": ""}
        case {"type": "Metaspace"}:
            return {**step, "prepend_scheme": "never", "add_prefix_space": False}
        case {"add_prefix_space": True}:
            return {**step, "add_prefix_space": False}
    return step


def _merge_pairs(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the pairs that a BPE merges, in their order. Older files write a pair as one text."""
    return [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in model["merges"]]
