"""tokenizer.json files against the `tokenizers` library that wrote them, and exported ones against transformers.

The tests train a small vocabulary of each family: Llama's, Mistral's, T5's, BERT's, GPT-1's, whole words, and
byte-level BPE with another splitting than GPT-2's.
"""

import base64
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import tokenizers as library
from glassgpt.data.text_files import split_text
from glassgpt.tokenizers.base import StreamDecoder, bytes_to_unicode
from glassgpt.tokenizers.builtin import (
    BPETokenizer,
    BytesTokenizer,
    CharacterTokenizer,
    Tokenizer,
    export_tokenizer,
    load_tokenizer,
)
from glassgpt.tokenizers.huggingface import HFTokenizer
from glassgpt.utils.errors import UserError
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

LINES = [
    "the low lower lowest, newer and wider: don't stop! Über älter 123 €",
    "hello  world, hello there. </s> (low) tall taller",
] * 9
SPECIALS = ["<unk>", "<s>", "</s>"]
BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]


def trained(model: Any, trainer: Any, **parts: Any) -> dict[str, Any]:
    """Return a tokenizer.json with this model, trained on the lines, and these parts (pre_tokenizer, decoder ...)."""
    tokenizer = library.Tokenizer(model)
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    tokenizer.train_from_iterator(LINES, trainer)
    content: dict[str, Any] = json.loads(tokenizer.to_str())
    return content


def llama(**parts: Any) -> dict[str, Any]:
    """Llama's family: spaces become ▁, one ▁ is prepended, byte tokens are not added tokens, prompts begin with <s>."""
    content = trained(
        models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True),
        trainers.BpeTrainer(vocab_size=330, special_tokens=SPECIALS + BYTE_TOKENS, show_progress=False),
        **(
            {
                "normalizer": normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
                "post_processor": processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 1)]),
                "decoder": decoders.Sequence(
                    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
                ),
            }
            | parts
        ),
    )
    content["added_tokens"] = content["added_tokens"][:3]
    return content


def mistral() -> dict[str, Any]:
    """Mistral's newer tokenizers: the library's Metaspace prepends ▁ unless the text begins with a space."""
    return llama(normalizer=None, pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="first", split=False))


def unigram() -> dict[str, Any]:
    """T5's family: special tokens are pieces of the vocabulary, so the library also finds them in text."""
    return trained(
        models.Unigram(),
        trainers.UnigramTrainer(
            vocab_size=70, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
        ),
        normalizer=normalizers.NFKC(),
        pre_tokenizer=pre_tokenizers.Metaspace(),
        post_processor=processors.TemplateProcessing("$A </s>", None, [("</s>", 1)]),
        decoder=decoders.Metaspace(),
    )


def wordpiece() -> dict[str, Any]:
    """BERT's family."""
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    return trained(
        models.WordPiece(unk_token="[UNK]"),
        trainers.WordPieceTrainer(vocab_size=120, special_tokens=specials, show_progress=False),
        normalizer=normalizers.BertNormalizer(lowercase=True),
        pre_tokenizer=pre_tokenizers.WhitespaceSplit(),  # so that "[SEP]" is a word
        post_processor=processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2)),
        decoder=decoders.WordPiece(),
    )


def words() -> dict[str, Any]:
    """Whole words, without a decoder: the library joins them with spaces."""
    trainer = trainers.WordLevelTrainer(special_tokens=["[UNK]", "[EOS]"], show_progress=False)
    return trained(models.WordLevel(unk_token="[UNK]"), trainer, pre_tokenizer=pre_tokenizers.WhitespaceSplit())


def gpt1() -> dict[str, Any]:
    """GPT-1's family: tokens that end a word have a suffix."""
    return trained(
        models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"),
        trainers.BpeTrainer(vocab_size=150, special_tokens=["<unk>"], end_of_word_suffix="</w>", show_progress=False),
        pre_tokenizer=pre_tokenizers.BertPreTokenizer(),
        decoder=decoders.BPEDecoder(),
    )


def byte_level(alphabet: list[str] | None = None) -> dict[str, Any]:
    """Byte-level BPE that splits at punctuation first, which fastokens does not support."""
    alphabet = pre_tokenizers.ByteLevel.alphabet() if alphabet is None else alphabet
    splitters = [pre_tokenizers.Punctuation("contiguous"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    return trained(
        models.BPE(),
        trainers.BpeTrainer(vocab_size=310, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False),
        pre_tokenizer=pre_tokenizers.Sequence(splitters),
        post_processor=processors.ByteLevel(trim_offsets=False),
        decoder=decoders.ByteLevel(),
    )


FILES = {
    make.__name__: json.dumps(make(), ensure_ascii=False)
    for make in (llama, mistral, unigram, wordpiece, words, gpt1, byte_level)
}
MERGES = ["l o", "lo w", "Ġ low", "Ã ©"]
BPE_VOCABULARY = [*bytes_to_unicode(), *(merge.replace(" ", "") for merge in MERGES), "<|endoftext|>"]
BPE = BPETokenizer.from_merges({token: i for i, token in enumerate(BPE_VOCABULARY)}, MERGES)
OURS = {name: HFTokenizer(text) for name, text in FILES.items()}
each_family = pytest.mark.parametrize("name", FILES)


def reference(name: str) -> library.Tokenizer:
    """Return the library's own tokenizer of a family, set to encode special tokens in text as text."""
    theirs = library.Tokenizer.from_str(FILES[name])
    theirs.encode_special_tokens = True
    return theirs


PIECES = [
    "the",
    " low",
    "lowest",
    " ",
    "  ",
    "\n",
    "é",
    "€",
    "\U0001f600",
    "e\u0301",
    "▁",
    "'t",
    ".",
    ",",
    "taller",
    "12",
    "ﬁ",
    "\x00",
    "世",
]
SPECIAL_SPELLINGS = ["</s>", "<s>", "<unk>", "<eos>", "[SEP]", "[EOS]", "<0x41>", " </s> ", " [SEP] "]
TEXTS = st.lists(st.sampled_from(PIECES) | st.text(st.characters(codec="utf-8"), max_size=4), max_size=12).map("".join)
TEXTS = TEXTS.filter(
    lambda text: not any(name in text for name in ("</s>", "<unk>", "<pad>", "["))
)  # the library finds them in text
HARD = st.lists(
    st.sampled_from(PIECES + SPECIAL_SPELLINGS) | st.text(st.characters(codec="utf-8"), max_size=3), max_size=12
).map("".join)


@each_family
@settings(max_examples=60, deadline=None)
@given(texts=st.lists(TEXTS, max_size=3))
def test_ids_and_text_equal_the_librarys(name: str, texts: list[str]) -> None:
    ours, theirs = OURS[name], reference(name)
    ids, offsets = ours.encode_documents(texts)
    expected = [theirs.encode(text, add_special_tokens=False).ids for text in texts]
    assert ids.tolist() == [i for part in expected for i in part]
    assert np.diff(offsets.astype(int)).tolist() == [len(part) for part in expected]
    for part in expected:
        assert ours.decode(part) == theirs.decode(part, skip_special_tokens=False)


@pytest.mark.parametrize("name", ["llama", "mistral", "byte_level"])
@settings(max_examples=150, deadline=None)
@given(text=HARD)
@example("</s>")
@example(" <s> a </s>\n")
def test_text_round_trips(name: str, text: str) -> None:
    """Text may spell special tokens. SentencePiece's ▁ is a space; Metaspace drops one space at the beginning."""
    expected = text if name == "byte_level" else text.replace("▁", " ")
    expected = expected.removeprefix(" ") if name == "mistral" else expected
    ids = OURS[name].encode(text)
    assert OURS[name].decode(ids) == expected
    assert bytes_of(OURS[name], text) == len(expected.encode())


def bytes_of(tokenizer: Tokenizer, text: str) -> int:
    """Return the bytes of the text's tokens, at the beginning of a text and after each mark of a document alike."""
    ids = tokenizer.encode(text)
    sizes = [
        tokenizer.text_bytes(ids, np.array([before, *ids][: len(ids)], dtype=np.int64)).tolist()
        for before in (-1, *tokenizer.document_marks)
    ]
    assert all(size == sizes[0] for size in sizes)
    return sum(sizes[0])


METASPACES = {
    scheme: {
        "pre_tokenizer": pre_tokenizers.Metaspace(prepend_scheme=scheme),
        "decoder": decoders.Metaspace(prepend_scheme=scheme),
    }
    for scheme in ("always", "first", "never")
}


def spaced(name: str) -> dict[str, Any]:
    """A tokenizer that puts a space before each text, which some decoders drop, or one that does not."""
    if name == "byte level":
        content: dict[str, Any] = json.loads(BPE.to_json())
        content["pre_tokenizer"]["add_prefix_space"] = True
        return content
    if name == "kept by the decoder":
        return llama(decoder=decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]))
    return gpt1() if name == "ends of words" else llama(normalizer=None, **METASPACES[name])


@pytest.mark.parametrize("name", [*METASPACES, "byte level", "kept by the decoder", "ends of words"])
def test_the_bytes_of_a_text_do_not_include_spaces_that_the_tokenizer_adds(name: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(saved(tmp_path, json.dumps(spaced(name))))
    for text in ("the low", "low", "lowest tall the", "e"):
        assert bytes_of(tokenizer, text) == len(text.encode())


@pytest.mark.parametrize("separator", [" ", "\n", "  "])
@pytest.mark.parametrize("name", [*METASPACES, "byte level", "kept by the decoder", "llama", "unigram"])
def test_a_text_in_parts_has_the_ids_of_the_whole_text(name: str, separator: str, tmp_path: Path) -> None:
    """No space is added where a long text is cut."""
    content = json.loads(FILES[name]) if name in FILES else spaced(name)
    tokenizer = load_tokenizer(saved(tmp_path, json.dumps(content)))
    whole = separator.join(LINES[0].replace("\n", " ").split(" ") * 20)
    first, *others = split_text([whole], 100)
    assert len(others) > 10
    ids = [*tokenizer.encode(first), *(i for part in others for i in tokenizer.within_text.encode(part))]
    expected = library.Tokenizer.from_str(json.dumps(content)).encode(whole, add_special_tokens=False).ids
    assert tokenizer.decode(ids) == tokenizer.decode(expected)
    assert ids == expected or not content.get("pre_tokenizer")  # without one, a token may go across any place


@pytest.mark.parametrize(("make", "unknown"), [(unigram, "<unk>"), (words, "[UNK]"), (llama, "<unk>")])
def test_the_token_for_unknown_text_has_no_bytes(make: Any, unknown: str) -> None:
    """Also if it is not listed among the added tokens."""
    content = make()
    added = [token for token in content["added_tokens"] if token["content"] != unknown]
    tokenizer = HFTokenizer(json.dumps({**content, "added_tokens": added}))
    ids = [tokenizer.decode([i]) for i in range(tokenizer.vocab_size)].index(unknown)
    assert tokenizer.text_bytes(np.array([ids]), np.array([-1])).tolist() == [0]
    assert not tokenizer.is_text[ids]


@each_family
@settings(max_examples=100, deadline=None)
@given(text=HARD)
@example("the </s> low")
@example("[SEP] the [EOS]")
def test_text_never_encodes_to_a_special_token(name: str, text: str) -> None:
    """Only the token for unknown characters may occur. The library itself finds `</s>` in a text with Unigram."""
    tokens = json.loads(FILES[name])["added_tokens"]
    special = {token["id"] for token in tokens if token["special"] and token["content"] not in ("<unk>", "[UNK]")}
    assert special or name == "gpt1"
    assert not special & set(OURS[name].encode(text).tolist())


def test_the_library_itself_finds_special_tokens_in_text() -> None:
    """This shows that the test above is needed."""
    assert 1 in reference("unigram").encode("the </s> low", add_special_tokens=False).ids


def test_merges_never_result_in_special_tokens() -> None:
    content = llama()
    content["model"]["merges"] += [["<", "s"], ["<s", ">"]]
    content["model"]["vocab"] |= {"<s": 330, "<": content["model"]["vocab"].get("<", 331)}
    tokenizer = HFTokenizer(json.dumps(content))
    assert 1 not in tokenizer.encode("<s>")
    assert tokenizer.decode(tokenizer.encode("a<s>")) == "a<s>"


@each_family
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_streaming_equals_decoding(name: str, data: st.DataObject) -> None:
    """The ids are random, so some bytes are not UTF-8. Decoding in two parts also equals decoding in one."""
    tokenizer = OURS[name]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=20))
    stream = StreamDecoder(tokenizer)
    assert "".join([*(stream.feed(i) for i in ids), stream.finish()]) == tokenizer.decode(ids)
    cut = data.draw(st.integers(0, len(ids)))
    after = ids[cut - 1] if cut else None
    assert tokenizer.decode_bytes(ids[:cut]) + tokenizer.decode_bytes(ids[cut:], after=after) == tokenizer.decode_bytes(
        ids
    )


def test_a_character_of_several_byte_tokens_is_returned_when_complete() -> None:
    tokenizer = OURS["llama"]
    ids = tokenizer.encode("a\U0001f600\U0001f601b").tolist()
    stream = StreamDecoder(tokenizer)
    assert [piece for piece in (stream.feed(i) for i in ids) if piece] == ["a", "\U0001f600", "\U0001f601", "b"]


@pytest.mark.parametrize("name", ["llama", "mistral", "unigram", "wordpiece", "byte_level"])
def test_the_prompt_prefix_is_that_of_the_post_processor(name: str) -> None:
    theirs = library.Tokenizer.from_str(FILES[name]).encode("the lowest")
    first = theirs.special_tokens_mask.index(0)
    assert list(OURS[name].prompt_prefix) == theirs.ids[:first]
    ours = OURS[name].encode("the lowest").tolist()
    assert theirs.ids[first : first + len(ours)] == ours


def test_the_prompt_prefix_is_found_in_a_sequence_of_post_processors() -> None:
    """The file is a short version of Llama 3's."""
    content = json.loads(
        BPETokenizer.from_merges({s: i for i, s in enumerate([*bytes_to_unicode(), "<|endoftext|>"])}, []).to_json()
    )
    start = {"id": "<|endoftext|>", "ids": [256], "tokens": ["<|endoftext|>"]}
    single = [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    template = {
        "type": "TemplateProcessing",
        "single": single,
        "pair": single * 2,
        "special_tokens": {"<|endoftext|>": start},
    }
    content["post_processor"] = {"type": "Sequence", "processors": [content["decoder"], template]}
    tokenizer = BPETokenizer(json.dumps(content))
    assert tokenizer.prompt_prefix == (256,)
    assert tokenizer.encode("a").tolist() == [ord("a")]
    assert HFTokenizer(json.dumps(content)).prompt_prefix == (256,)


# End of text


def saved(directory: Path, text: str, **config: Any) -> Path:
    """Write tokenizer.json, and tokenizer_config.json if there is a config; return the path of the first."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(text, encoding="utf-8")
    if config:
        (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory / "tokenizer.json"


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, "</s>"),
        ({"eos_token": "<s>"}, "<s>"),
        ({"eos_token": {"content": "lo", "special": True}}, "lo"),
        ({"eos_token": None}, "</s>"),
        ({"eos_token": "<none such>"}, "</s>"),
    ],
    ids=str,
)
def test_the_end_of_text_is_the_configured_token_or_one_with_a_usual_name(
    config: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    """`to_json` stores the choice, so the tokenizer can be restored without the configuration file."""
    tokenizer = load_tokenizer(saved(tmp_path / "a", FILES["llama"], **config))
    again = load_tokenizer(saved(tmp_path / "b", tokenizer.to_json()))
    for one in (tokenizer, again):
        assert isinstance(one, HFTokenizer)
        assert one.end_of_text == json.loads(FILES["llama"])["model"]["vocab"].get(expected)
        assert one.end_of_text not in one.encode(f"the {expected} the")
        assert one.byte_lengths()[one.end_of_text] == 0
    assert again.to_json() == tokenizer.to_json()
    assert again.to_hugging_face() == FILES["llama"]


def test_byte_level_bpe_uses_the_configured_end_of_text(tmp_path: Path) -> None:
    vocab = {symbol: i for i, symbol in enumerate([*bytes_to_unicode(), "<|endoftext|>"])}
    content = json.loads(BPETokenizer.from_merges(vocab, []).to_json())
    content["added_tokens"].append({**content["added_tokens"][0], "id": 257, "content": "<|im_end|>"})
    tokenizer = load_tokenizer(saved(tmp_path / "a", json.dumps(content), eos_token="<|im_end|>"))
    again = load_tokenizer(saved(tmp_path / "b", tokenizer.to_json()))
    assert [(type(one), one.end_of_text) for one in (tokenizer, again)] == [(BPETokenizer, 257)] * 2
    assert load_tokenizer(saved(tmp_path / "c", json.dumps(content))).end_of_text == 256


# Supported and unsupported files


@each_family
def test_each_file_is_read_and_restored(name: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(saved(tmp_path, FILES[name]))
    assert isinstance(tokenizer, HFTokenizer)
    assert tokenizer.kind == "hf"
    assert tokenizer.to_json() == FILES[name]
    assert tokenizer.vocab_size == library.Tokenizer.from_str(FILES[name]).get_vocab_size()


def test_byte_tokens_listed_as_special_are_text() -> None:
    """The library's trainer lists byte-fallback tokens as special."""
    content = llama()
    listed = [
        {**content["added_tokens"][0], "id": 3 + byte, "content": token} for byte, token in enumerate(BYTE_TOKENS)
    ]
    tokenizer = HFTokenizer(json.dumps({**content, "added_tokens": content["added_tokens"] + listed}))
    text = "世<0x41> the"
    assert tokenizer.encode(text).tolist() == OURS["llama"].encode(text).tolist()
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.byte_lengths().tolist() == OURS["llama"].byte_lengths().tolist()


@pytest.mark.parametrize("option", [{"dropout": 0.5}, {"byte_fallback": True}, {"end_of_word_suffix": "</w>"}], ids=str)
def test_byte_level_bpe_that_fastokens_does_not_support_uses_the_library(
    option: dict[str, Any], tmp_path: Path
) -> None:
    """fastokens would accept dropout and Llama's byte fallback, but encode differently."""
    content = json.loads(BPE.to_json())
    content["model"] |= option
    assert isinstance(load_tokenizer(saved(tmp_path, json.dumps(content))), HFTokenizer)
    assert isinstance(load_tokenizer(saved(tmp_path, BPE.to_json())), BPETokenizer)


def test_a_model_without_a_type_is_recognised() -> None:
    content = json.loads(FILES["llama"])
    del content["model"]["type"]
    assert HFTokenizer(json.dumps(content)).encode(LINES[0]).tolist() == OURS["llama"].encode(LINES[0]).tolist()


def test_dropout_truncation_and_padding_of_a_file_are_ignored() -> None:
    content = json.loads(FILES["llama"])
    content["model"]["dropout"] = 0.9
    content["truncation"] = {"max_length": 2, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    content["padding"] = {
        "strategy": {"Fixed": 99},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<unk>",
    }
    tokenizer = HFTokenizer(json.dumps(content))
    assert [tokenizer.encode(LINES[0]).tolist() for _ in range(3)] == [OURS["llama"].encode(LINES[0]).tolist()] * 3


def test_added_tokens_that_are_not_special_match_text() -> None:
    content = json.loads(FILES["llama"])
    content["added_tokens"].append({**content["added_tokens"][0], "id": 330, "content": "<|x|>", "special": False})
    tokenizer = HFTokenizer(json.dumps(content))
    assert tokenizer.encode("low<|x|>low").tolist().count(330) == 1
    assert tokenizer.decode(tokenizer.encode("low<|x|>low")) == library.Tokenizer.from_str(json.dumps(content)).decode(
        tokenizer.encode("low<|x|>low").tolist()
    )
    assert tokenizer.byte_lengths()[330] == 5


def test_ids_may_have_gaps() -> None:
    """An id in a gap decodes to the empty string."""
    content = json.loads(BytesTokenizer().to_hugging_face())
    content["model"]["vocab"] = {symbol: 2 * i for i, symbol in enumerate(bytes_to_unicode())}
    tokenizer = HFTokenizer(json.dumps(content))
    assert tokenizer.vocab_size == 511
    assert tokenizer.encode("aé").tolist() == [2 * ord("a"), 2 * 0xC3, 2 * 0xA9]
    assert tokenizer.decode([2 * ord("a"), 3, 2 * 0xC3, 2 * 0xA9]) == "aé"
    assert tokenizer.byte_lengths()[:3].tolist() == [1, 0, 1]


UNKNOWN_CHARACTER = r"the character '世' \(U\+4E16\) at offset 4 \(line 1, column 5"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (byte_level(alphabet=[]), UNKNOWN_CHARACTER),
        (
            {
                **words(),
                "model": {"type": "WordLevel", "vocab": {"the": 0, "low": 1}, "unk_token": "[UNK]"},
                "added_tokens": [],
            },
            UNKNOWN_CHARACTER,
        ),
        (
            {
                **unigram(),
                "model": {"type": "Unigram", "vocab": [[c, -1.0] for c in "▁thelow"], "unk_id": None},
                "added_tokens": [],
            },
            UNKNOWN_CHARACTER,
        ),
    ],
    ids=["byte-level BPE of few bytes", "words", "Unigram"],
)
def test_text_without_an_id_is_refused(content: dict[str, Any], words: str) -> None:
    tokenizer = HFTokenizer(json.dumps(content | {"post_processor": None}))
    assert tokenizer.decode(tokenizer.encode("the low")) == "the low"
    with pytest.raises(UserError, match=words):
        tokenizer.encode_documents(["the low", "the 世 low"])


@each_family
def test_half_a_surrogate_pair_and_ids_outside_the_vocabulary_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"(?s)U\+DC80.*offset 3 \(line 2, column 2;.*remove or replace"):
        OURS[name].encode_documents(["a", "b\nc\udc80"])
    for wrong in (-1, OURS[name].vocab_size, 2**70):
        with pytest.raises(UserError, match=rf"{wrong} is not an id of this hf tokenizer"):
            OURS[name].decode([0, wrong])


def altered(**changes: Any) -> str:
    """Return Llama's tokenizer.json with these top-level fields changed."""
    return json.dumps({**json.loads(FILES["llama"]), **changes})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            altered(model={"type": "Whole", "vocab": {"a": 0}}, added_tokens=[], post_processor=None),
            "tokenizers library refuses it",
        ),
        (altered(model={"type": "BPE", "vocab": {}, "merges": []}, added_tokens=[]), "no tokens"),
        (altered(model={"type": "BPE", "vocab": {"a": -1}, "merges": []}, added_tokens=[]), "an integer"),
        (altered(model={"type": "BPE", "vocab": {"a": "b"}, "merges": []}, added_tokens=[]), "an integer"),
        (altered(model={"type": "Unigram", "vocab": [["a"]]}), "not a valid tokenizer.json"),
        (altered(pre_tokenizer={"type": "Whatever"}), "tokenizers library refuses it"),
        (
            altered(decoder={"type": "CTC", "pad_token": "a", "word_delimiter_token": "|", "cleanup": True}),
            "CTC",
        ),
    ],
)
def test_an_unsupported_file_is_an_error_of_one_line(text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words) as caught:
        load_tokenizer(saved(tmp_path, text))
    assert str(tmp_path / "tokenizer.json") in str(caught.value)
    assert "\n" not in str(caught.value)


def with_added(content: dict[str, Any], *tokens: dict[str, Any]) -> dict[str, Any]:
    """Return the tokenizer.json with these tokens added, which are not special by default."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
    return {**content, "added_tokens": [*content["added_tokens"], *({**flags, **token} for token in tokens)]}


ADDED = with_added(
    json.loads(BPE.to_json()),
    {"id": BPE_VOCABULARY.index("é"), "content": "é"},  # the symbol of the byte 0xE9
    *({"id": len(BPE_VOCABULARY) + i, "content": text} for i, text in enumerate(["aé", " low", "世é", "<x>"])),
)


@settings(max_examples=20, deadline=None)
@given(text=st.lists(st.sampled_from([*PIECES, "é", "aé", "世é", "<x>"]) | st.text(max_size=3)).map("".join))
@example("邵 é aé 世é")
def test_added_tokens_are_encoded_and_decoded_as_by_the_library(text: str) -> None:
    """Also an added token that equals the symbol of a byte, or has other characters than these symbols."""
    for ours in (BPETokenizer(json.dumps(ADDED)), HFTokenizer(json.dumps(ADDED))):
        theirs = library.Tokenizer.from_str(json.dumps(ADDED))
        theirs.encode_special_tokens = True
        try:
            ids = ours.encode(text).tolist()
        except UserError:  # half a surrogate pair
            return
        assert ids == theirs.encode(text, add_special_tokens=False).ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=False)
    assert ours.decode(ours.encode("邵")) == "邵"


def test_only_ids_that_a_text_can_become_are_needed_by_a_model() -> None:
    size, content = len(BPE_VOCABULARY), json.loads(BPE.to_json())
    pad, other = {"id": size, "content": "<pad>", "special": True}, {"id": size + 1, "content": "<x>"}
    assert BPETokenizer(json.dumps(with_added(content, pad))).model_vocab_size == size
    assert BPETokenizer(json.dumps(with_added(content, pad))).vocab_size == size + 1
    assert BPETokenizer(json.dumps(with_added(content, pad, other))).model_vocab_size == size + 2
    assert BPETokenizer(json.dumps(with_added(content, pad)), "<pad>").model_vocab_size == size + 1
    assert OURS["words"].model_vocab_size == OURS["words"].vocab_size


@pytest.mark.parametrize(
    "tokens",
    [
        [{"id": 5, "content": "<x>"}],
        [{"id": 400, "content": "e"}],
        [{"id": 330, "content": "<x>"}, {"id": 331, "content": "<x>"}],
        [{"id": 330, "content": "<x>"}, {"id": 330, "content": "<y>"}],
        [{"id": 10**18, "content": "<x>"}],
        [{"id": 10**8, "content": "<x>"}],
        [{"id": -1, "content": "<x>"}],
        [{"id": True, "content": "<x>"}],
        [{"id": "330", "content": "<x>"}],
        [{"id": 330, "content": None}],
        [{"id": 330}],
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["llama", "bpe"])
def test_contradictory_added_tokens_are_refused(name: str, tokens: list[dict[str, Any]], tmp_path: Path) -> None:
    content = json.loads(FILES["llama"] if name == "llama" else BPE.to_json())
    with pytest.raises(UserError, match=r"tokenizer\.json") as caught:
        load_tokenizer(saved(tmp_path, json.dumps(with_added(content, *tokens))))
    assert "\n" not in str(caught.value)


def test_two_tokens_of_a_vocabulary_with_one_id_are_refused() -> None:
    content = json.loads(FILES["words"])
    content["model"]["vocab"]["another"] = content["model"]["vocab"]["the"]
    with pytest.raises(UserError, match="same id"):
        HFTokenizer(json.dumps(content))


def test_a_piece_that_unigram_lists_twice_decodes_alike() -> None:
    content = json.loads(FILES["unigram"])
    content["model"]["vocab"].append([content["model"]["vocab"][9][0], -20.0])
    theirs = library.Tokenizer.from_str(json.dumps(content))
    last = len(content["model"]["vocab"]) - 1
    for i in (9, last):
        assert HFTokenizer(json.dumps(content)).decode([i]) == theirs.decode([i]) != ""


# Files that the libraries do not survive


def test_merges_without_the_prefix_that_the_file_names_are_refused() -> None:
    content = json.loads(BPE.to_json())
    content["model"]["continuing_subword_prefix"] = "x"
    with pytest.raises((UserError, ValueError), match="continuing_subword_prefix"):
        HFTokenizer(json.dumps(content))


def step(kind: str, **values: Any) -> dict[str, Any]:
    return {"type": kind, **values}


def rule(found: str, text: str) -> dict[str, Any]:
    return step("Replace", pattern={"String": found}, content=text)


def regex(found: str, text: str) -> dict[str, Any]:
    return step("Replace", pattern={"Regex": found}, content=text)


BYTES_STEP = step("ByteLevel", add_prefix_space=True, trim_offsets=True, use_regex=True)
LONG_MAP = base64.b64encode(bytes(4) + b"x" * 10_000 + b"\0").decode()


@pytest.mark.parametrize(
    ("part", "items"),
    [
        ("normalizer", [rule("a", "a" * 33)]),
        ("normalizer", [rule("a", "aaaa")] * 4),
        ("normalizer", [rule("a", "bbbb"), rule("b", "cccc"), step("NFC"), rule("c", "dddd")]),
        (
            "normalizer",
            [rule("a", "BBBB"), step("Lowercase"), rule("b", "éééé"), step("StripAccents"), rule("e", "cccc")],
        ),
        ("normalizer", [step("Sequence", normalizers=[rule("a", "aaaa")] * 2), rule("a", "aaaa")]),
        ("normalizer", [regex(".", "xxxx")] * 3),
        ("normalizer", [regex("x*", "xxxx")] * 3),
        ("normalizer", [step("Prepend", prepend="a" * 1000)]),
        ("normalizer", [step("ByteLevel")] * 6),
        ("normalizer", [step("Precompiled", precompiled_charsmap=LONG_MAP)]),
        ("pre_tokenizer", [BYTES_STEP] * 6),
        ("decoder", [rule("a", "a" * 33)]),
    ],
)
def test_a_file_that_makes_texts_very_long_is_refused(part: str, items: list[dict[str, Any]]) -> None:
    names = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "decoder": "decoders"}
    with pytest.raises(UserError, match="times longer"):
        HFTokenizer(altered(**{part: {"type": "Sequence", names[part]: items}}))


@pytest.mark.parametrize(
    "items",
    [
        [step("Prepend", prepend="▁"), rule(" ", "▁")],
        [
            rule("\n", "<|newline|>"),
            step("NFC"),
            regex("[x]", ""),
            rule("\t", "<|tab|>"),
            rule("  ", "<|spaces|>"),
            rule(" ", "▁"),
        ],
        [
            regex(r"\s+", " "),
            regex(" {2,}", "▁"),
            regex("[’`]", "'"),
            regex("a+", "a"),
            regex("x", ""),
            regex("▁", " "),
        ],
        [rule("...", "…"), step("NFKC"), step("Lowercase"), step("StripAccents")],
    ],
)
def test_usual_normalizers_are_not_refused(items: list[dict[str, Any]]) -> None:
    content = altered(normalizer={"type": "Sequence", "normalizers": items})
    theirs = library.Tokenizer.from_str(content)
    assert HFTokenizer(content).encode("the low…").tolist() == theirs.encode("the low…", add_special_tokens=False).ids


@pytest.mark.parametrize(
    "changes",
    [
        {"normalizer": step("Precompiled", precompiled_charsmap="AAAA")},
        {"normalizer": step("Precompiled", precompiled_charsmap="////")},
        {"decoder": step("Strip", content="a", start=1, stop=1)},
        {"pre_tokenizer": step("FixedLength", length=0)},
        {"pre_tokenizer": step("Split", pattern={"Regex": "(a+)+b"}, behavior="Isolated", invert=False)},
        {"pre_tokenizer": step("Split", pattern={"Regex": "("}, behavior="Isolated", invert=False)},
        {"model": None},
        {"model": []},
        {"added_tokens": {"a": 1}},
        {"post_processor": step("BertProcessing", sep=["a", 1], cls=["b", 10**6])},
    ],
    ids=str,
)
def test_what_makes_the_library_panic_is_an_error(changes: dict[str, Any], tmp_path: Path) -> None:
    """Some files show it only when a text is encoded."""
    with pytest.raises(UserError) as caught:
        load_tokenizer(saved(tmp_path, altered(**changes))).encode("a" * 40 + "c")
    assert len(str(caught.value)) < 500
    assert "\n" not in str(caught.value)


def test_deeply_nested_files_and_folders_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, '{"model": ' + "[" * 5000 + "]" * 5000 + "}")
    with pytest.raises(UserError, match="nested"):
        load_tokenizer(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError, match="pipe"):
        load_tokenizer(path)
    with pytest.raises(UserError, match="directory"):
        load_tokenizer(tmp_path)


def test_an_added_token_whose_id_the_library_would_change_is_refused() -> None:
    content = unigram()
    content["added_tokens"].append({**content["added_tokens"][0], "id": 99, "content": "<far>"})
    with pytest.raises(UserError, match="99 of its added token '<far>'"):
        HFTokenizer(json.dumps(content))


def test_a_damaged_configuration_is_named(tmp_path: Path) -> None:
    path = saved(tmp_path, FILES["llama"])
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer_config\.json is not valid"):
        load_tokenizer(path)


# Export to transformers

CHARACTERS = CharacterTokenizer("\n\t\r !.'abcdeinst\x00\x85é€\u0301\u200d\u2028\U0001f600<>|▁\ufffd")
EXPORTED: dict[str, Tokenizer] = {"characters": CHARACTERS, "bytes": BytesTokenizer(), "bpe": BPE, **OURS}
SPACING = ["a", " ", "\n", " .", " n't", "é", " 's", "e\u0301", "\U0001f600", "\r\n", "\t", "  ", "\x00", "\u2028"]
PLAIN = {"characters": st.lists(st.sampled_from([*SPACING, *CHARACTERS._characters]), max_size=12).map("".join)}


@pytest.fixture(scope="module")
def auto_tokenizer() -> Any:
    return pytest.importorskip("transformers", reason="transformers is not installed").AutoTokenizer


@pytest.mark.parametrize("name", EXPORTED)
@pytest.mark.parametrize("model_type", [None, "gpt2", "llama"])
def test_transformers_has_the_same_ids_and_text(
    name: str, model_type: str | None, auto_tokenizer: Any, tmp_path: Path
) -> None:
    """They also agree if a model's config.json is present, which may make transformers choose another class."""
    ours = EXPORTED[name]
    if model_type is not None:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    export_tokenizer(ours, tmp_path, 77)
    theirs = auto_tokenizer.from_pretrained(tmp_path)
    again = load_tokenizer(tmp_path / "tokenizer.json")
    assert theirs.is_fast
    assert (theirs.model_max_length, len(theirs)) == (77, ours.vocab_size)
    assert theirs.eos_token_id == ours.end_of_text == again.end_of_text
    assert theirs.bos_token_id == (ours.prompt_prefix[0] if ours.prompt_prefix else ours.end_of_text)
    unknown = {
        "characters": None,
        "bytes": None,
        "bpe": "<|endoftext|>",
        "byte_level": "<eos>",
        "wordpiece": "[UNK]",
        "words": "[UNK]",
    }
    assert theirs.unk_token == unknown.get(name, "<unk>")

    @settings(max_examples=25 if model_type is None else 5, deadline=None)
    @given(PLAIN.get(name, TEXTS))
    @example("a .\n\n's n't  a !\r\n" if name == "characters" else "the .\n's n't  low !")
    def same(text: str) -> None:
        ids = ours.encode(text).tolist()
        assert theirs.encode(text, add_special_tokens=False) == ids
        assert again.encode(text).tolist() == ids
        assert theirs.decode(ids) == ours.decode(ids) == again.decode(ids)

    same()


@settings(max_examples=40, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("name", ["characters", "bytes", "bpe"])
def test_any_ids_decode_to_the_same_text_after_export(name: str, data: st.DataObject, tmp_path_factory: Any) -> None:
    """Bytes that are not UTF-8 become U+FFFD as in the library, which decodes byte-level tokens as Python does."""
    ours = EXPORTED[name]
    theirs = library.Tokenizer.from_str(ours.to_hugging_face())
    ids = data.draw(st.lists(st.integers(0, ours.vocab_size - 1), max_size=20))
    assert theirs.decode(ids, skip_special_tokens=False) == ours.decode(ids)


def test_special_tokens_in_text_are_special_in_transformers_by_default(auto_tokenizer: Any, tmp_path: Path) -> None:
    for name, spelled in (("bpe", "<|endoftext|>"), ("llama", "</s>")):
        ours = EXPORTED[name]
        export_tokenizer(ours, tmp_path / name, 8)
        theirs = auto_tokenizer.from_pretrained(tmp_path / name)
        assert ours.end_of_text in theirs.encode(f"low{spelled}")
        assert (
            theirs.encode(f"low{spelled}", add_special_tokens=False, split_special_tokens=True)
            == ours.encode(f"low{spelled}").tolist()
        )


def test_a_character_unknown_to_an_exported_tokenizer_is_an_error(auto_tokenizer: Any, tmp_path: Path) -> None:
    export_tokenizer(CHARACTERS, tmp_path, 8)
    with pytest.raises(Exception, match="WordLevel error"):
        auto_tokenizer.from_pretrained(tmp_path).encode("aZ")


def test_exported_character_and_byte_tokenizers_are_read_back_as_the_same_kind(tmp_path: Path) -> None:
    for tokenizer in (CHARACTERS, BytesTokenizer()):
        export_tokenizer(tokenizer, tmp_path, 8)
        again = load_tokenizer(tmp_path / "tokenizer.json")
        assert (type(again), again.to_json()) == (type(tokenizer), tokenizer.to_json())


def test_an_exported_configuration_names_the_special_tokens(tmp_path: Path) -> None:
    export_tokenizer(BPE, tmp_path / "new" / "directory", 1024)
    assert json.loads((tmp_path / "new" / "directory" / "tokenizer_config.json").read_text(encoding="utf-8")) == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 1024,
        "bos_token": "<|endoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
    }
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="choose another path"):
        export_tokenizer(BPE, tmp_path / "file" / "x", 8)
