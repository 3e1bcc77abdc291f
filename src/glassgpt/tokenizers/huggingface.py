"""Any Hugging Face `tokenizer.json`: SentencePiece-like BPE and Unigram, WordPiece, WordLevel, byte-level BPE of other splitting.

The `tokenizers` library encodes. Decoding is ours: each token is given its bytes once, by the library's own decoder, so that
bytes which are no whole character yet can be held back, as with every tokenizer here.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from glassgpt.tokenizers.base import END_OF_TEXT, Vocabulary, byte_symbols, concatenated, lone_surrogate, place_of
from glassgpt.utils.errors import UserError

# How families of models name the end of a text, where no tokenizer_config.json says it: GPT-2, Llama 3, Llama 2 and Mistral,
# Gemma, DeepSeek, and two that smaller projects use.
END_OF_TEXT_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<｜end▁of▁sentence｜>", "<|eos|>", "[EOS]")

_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")
# A code point that Unicode promises never to assign, in front of what no text is to be matched with.
_NO_TEXT = "\U0010ffff"
_UNKNOWN = _NO_TEXT + "unknown"  # more than one character, or BPE would find it


class HFTokenizer(Vocabulary):
    """A tokenizer given by the text of a `tokenizer.json` that the `tokenizers` library reads.

    Decoding an encoded text gives the text, unless the tokenizer loses something: a normalizer (lower case, NFKC), WordPiece's
    splitting at spaces, unknown characters where there is a token for them, `▁` in SentencePiece's vocabularies (a space), a
    space that the text begins with under Metaspace, and a byte token spelled out (`<0x41>`) under Unigram. Where unknown
    characters have no token, `encode` refuses them. The decoded text is the library's, save that bytes which are no UTF-8
    become U+FFFD as Python does it (the library turns a whole run of byte tokens into U+FFFD). `byte_lengths` takes each token
    as it stands within a text.

    `end_of_text` names that token, where it is none of the usual names. Raises `UserError` where the text cannot be used.
    """

    kind = "hf"

    def __init__(self, tokenizer_json: str, end_of_text: str | None = None) -> None:
        from tokenizers import Tokenizer as Library

        try:
            content = json.loads(tokenizer_json)
            ids = token_ids(content)
            self.end_of_text = find_end_of_text(content, end_of_text)
            self.prompt_prefix = starting_ids(content.get("post_processor"))
            self._special = special_ids(content, self.end_of_text)
            self.vocab_size = max(ids.values()) + 1
            self._encoder = Library.from_str(json.dumps(_for_encoding(content, ids, self._special, self.vocab_size)))
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else error
            raise UserError(f"it is no tokenizer.json that can be used ({reason})") from error
        except Exception as error:  # the library raises nothing more special
            raise UserError(f"the tokenizers library refuses it: {error}") from error
        self._json, self._end_of_text_name = tokenizer_json, end_of_text
        self._check_ids(content)
        self._set_decoder(content, ids)

    def _check_ids(self, content: Mapping[str, Any]) -> None:
        """The library numbers the added tokens anew: a file whose numbers differ would be read wrongly without a word."""
        for token in content.get("added_tokens") or []:
            name = _NO_TEXT + token["content"] if token["id"] in self._special else token["content"]
            if self._encoder.token_to_id(name) != token["id"]:
                raise UserError(
                    f"the id {token['id']} of its added token {token['content']!r} does not follow from its vocabulary"
                )

    def _set_decoder(self, content: Mapping[str, Any], ids: Mapping[str, int]) -> None:
        """Fill the table with what each token is within a text; `_begun` gives what it is at the beginning of one."""
        decoder = content.get("decoder") or {}
        if '"CTC"' in json.dumps(decoder):
            raise UserError(
                "its decoder is made for speech (CTC), where a token stands for what its neighbours make of it"
            )
        # The only decoder whose tokens say what follows them: "</w>" is a space, unless the text ends there.
        self._suffix: str | None = decoder["suffix"] if decoder.get("type") == "BPEDecoder" else None
        self._join = self._encoder.decoder.decode if self._encoder.decoder is not None else " ".join
        self._names: list[str | None] = [None] * self.vocab_size
        for name, i in ids.items():
            self._names[i] = name
        self._table = [self._bytes_of(name, self._join(["a", name])[1:]) if name else b"" for name in self._names]

    def _bytes_of(self, name: str, text: str) -> bytes:
        """The bytes of a token, whose decoded text shows U+FFFD where they are but a part of a character."""
        if "\ufffd" not in text or "\ufffd" in name:
            return text.encode()
        if match := _BYTE_TOKEN.fullmatch(name):
            return bytes([int(match[1], 16)])
        return bytes([_BYTE_OF[symbol] for symbol in name])

    def _begun(self, i: int) -> bytes:
        """The bytes of a token that begins a text, where some decoders drop a space."""
        name = self._names[i]
        return self._bytes_of(name, self._join([name])) if name else b""

    def _ends_word(self, i: int) -> bool:
        return self._suffix is not None and i < self.vocab_size and (self._names[i] or "").endswith(self._suffix)

    def decode_bytes(self, ids: Iterable[int], *, after: int | None = None) -> bytes:
        parts = []
        for i in self._checked(ids):
            parts += [b" "] if after is not None and self._ends_word(after) else []
            parts += [self._begun(i) if after is None else self._table[i]]
            after = i
        return b"".join(parts)

    def byte_lengths(self) -> npt.NDArray[np.int64]:
        spaces = [self._ends_word(i) and i not in self._special for i in range(self.vocab_size)]
        return super().byte_lengths() + np.array(spaces, dtype=np.int64)

    def encode_documents(self, texts: Sequence[str]) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint64]]:
        try:
            encodings = self._encoder.encode_batch_fast(list(texts), add_special_tokens=False)
        except Exception as error:  # the library raises nothing more special
            _refuse_surrogates(texts)
            raise UserError(f"this tokenizer cannot encode the text: {error}") from error
        parts = [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]
        for text, part in zip(texts, parts, strict=True):
            if (part == self.vocab_size).any():
                raise self._unknown_character(text)
        return concatenated(parts)

    def _unknown_character(self, text: str) -> UserError:
        encoding = self._encoder.encode(text, add_special_tokens=False)
        offset: int = encoding.offsets[encoding.ids.index(self.vocab_size)][0]
        return UserError(
            f"the character {text[offset]!r} (U+{ord(text[offset]):04X}) {place_of(text, offset)} has no id in this tokenizer;\n"
            "remove or replace it"
        )

    def to_json(self) -> str:
        return saved_with_end_of_text(self._json, self._end_of_text_name)

    def to_hugging_face(self) -> str:
        return self._json


_BYTE_OF = {symbol: byte for byte, symbol in enumerate(byte_symbols())}


def split_words(tokenizer_json: str, text: str) -> list[str]:
    """What a tokenizer.json splits a text into, normalised, before its model sees it."""
    from tokenizers import Tokenizer as Library

    library = Library.from_str(tokenizer_json)
    normal = text if library.normalizer is None else library.normalizer.normalize_str(text)
    return (
        [normal]
        if library.pre_tokenizer is None
        else [word for word, _ in library.pre_tokenizer.pre_tokenize_str(normal)]
    )


def token_ids(content: Mapping[str, Any]) -> dict[str, int]:
    """The id of each token of a tokenizer.json by its name. Raises `KeyError`, `TypeError` or `ValueError` where there are none."""
    vocab = content["model"]["vocab"]
    ids = {piece: i for i, (piece, _) in enumerate(vocab)} if isinstance(vocab, list) else dict(vocab)
    ids |= {token["content"]: token["id"] for token in content.get("added_tokens") or []}
    if not ids:
        raise ValueError("it has no tokens")
    if not all(isinstance(i, int) and 0 <= i < 1 << 31 for i in ids.values()):
        raise ValueError("an id is no whole number from 0 on")
    return ids


def find_end_of_text(content: Mapping[str, Any], name: str | None = None) -> int | None:
    """The id of the token called `name`, if there is one, else of the first added token with a usual name."""
    if name is not None and (named := token_ids(content).get(name)) is not None:
        return named
    added = {token["content"]: int(token["id"]) for token in content.get("added_tokens") or []}
    return next((added[usual] for usual in END_OF_TEXT_NAMES if usual in added), None)


def starting_ids(post_processor: Mapping[str, Any] | None) -> tuple[int, ...]:
    """The special tokens that a post-processor puts before a text: what models such as Llama expect a prompt to begin with."""
    match post_processor:
        case {"type": "Sequence", "processors": list(processors)}:
            return tuple(i for processor in reversed(processors) for i in starting_ids(processor))
        case {"type": "BertProcessing" | "RobertaProcessing", "cls": [_, int(i)]}:
            return (i,)
        case {"type": "TemplateProcessing", "single": list(pieces), "special_tokens": dict(tokens)}:
            before = pieces[: next((at for at, piece in enumerate(pieces) if "Sequence" in piece), 0)]
            return tuple(i for piece in before for i in tokens[piece["SpecialToken"]["id"]]["ids"])
    return ()


def saved_with_end_of_text(tokenizer_json: str, name: str | None) -> str:
    """The file as it is where it tells its end of text itself, else with the name: the format has no place for one."""
    content = json.loads(tokenizer_json) if name is not None else {}
    if name is None or find_end_of_text(content, name) == find_end_of_text(content):
        return tokenizer_json
    return json.dumps({"kind": "hf", "end_of_text": name, "tokenizer_json": tokenizer_json}, ensure_ascii=False) + "\n"


def special_ids(content: Mapping[str, Any], end_of_text: int | None) -> frozenset[int]:
    """Special tokens. Byte tokens are text, though whoever trains with the library must list them as special to have them."""
    is_text = _BYTE_TOKEN.fullmatch if content["model"].get("byte_fallback") else lambda name: None
    special = {
        token["id"]
        for token in content.get("added_tokens") or []
        if token.get("special") and not is_text(token["content"])
    }
    return frozenset(special | ({end_of_text} if end_of_text is not None else set()))


def _for_encoding(
    content: Mapping[str, Any], ids: Mapping[str, int], special: frozenset[int], unknown: int
) -> dict[str, Any]:
    """The tokenizer.json for encoding: one encoding for a text, no text becomes a special token, nothing vanishes.

    The library's `encode_special_tokens` is not enough: Unigram, WordLevel and WordPiece look any word up in the vocabulary, the
    special tokens among them, so these get names there that no text has. Characters for which there is neither a token nor one for
    the unknown would be left out without a word by BPE: they become the id `unknown`, one above all others.
    """
    model = dict(content["model"])
    renamed = {name: _NO_TEXT + name if i in special else name for name, i in ids.items()}
    if isinstance(model["vocab"], list):
        model["vocab"] = [[renamed[piece], score] for piece, score in model["vocab"]]
    else:
        unknown_token = renamed.get(model.get("unk_token") or "", _UNKNOWN)
        model |= {"vocab": {renamed[name]: i for name, i in ids.items()}, "unk_token": unknown_token}
        if unknown_token == _UNKNOWN:
            model["vocab"][_UNKNOWN] = unknown
    if "merges" in model:
        model |= {"merges": [merge for merge in model["merges"] if _merges_text(merge, renamed)], "dropout": None}
    added = [
        {**token, "content": renamed[token["content"]]}
        for token in content.get("added_tokens") or []
        if not (
            token.get("special") and token["id"] not in special
        )  # byte tokens, which text must not be matched with either
    ]
    return {
        **content,
        "model": model,
        "added_tokens": added,
        "post_processor": None,
        "truncation": None,
        "padding": None,
    }


def _merges_text(merge: str | Sequence[str], renamed: Mapping[str, str]) -> bool:
    """Whether a merge of BPE neither uses nor makes a special token."""
    first, second = merge.split(" ") if isinstance(merge, str) else merge
    return all(renamed.get(name, name) == name for name in (first, second, first + second))


def _refuse_surrogates(texts: Iterable[str]) -> None:
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise lone_surrogate(text, error.start) from None
