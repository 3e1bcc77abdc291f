"""Showing tokenizers: all characters are printable, the tokens join to the text, and the figures are right."""

import json
import unicodedata
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from glassgpt.cli.data import find_tokenizer
from glassgpt.cli.main import main
from glassgpt.data.tokenizer_training import train_bpe
from glassgpt.tokenizers.builtin import BytesTokenizer, CharacterTokenizer
from glassgpt.tokenizers.inspect import (
    SAMPLE,
    bytes_per_token,
    compare_with_gpt2,
    describe,
    show_tokens,
)
from glassgpt.utils.errors import UserError
from glassgpt.utils.formatting import escape_token

Capture = pytest.CaptureFixture[str]
BYTES = BytesTokenizer()
BPE = train_bpe(["the low lower lowest " * 5, "naïve " * 5], 280)
DISPLAY_FORMS = {"␣": " ", "⏎": "\n", "→": "\t", "␍": "\r"}


@settings(max_examples=300)
@given(st.binary(max_size=20) | st.text(st.characters(codec="utf-8"), max_size=10).map(str.encode))
@example("\u200b\u00a0\ufe0f\u3164\u2800\U000e0041\u0301a\u034f\x1b[2J\x7f\u202e".encode())
def test_every_token_is_displayed_with_printable_characters(data: bytes) -> None:
    shown = escape_token(data)
    assert bool(shown) == bool(data)
    assert shown.isprintable()
    assert not any(unicodedata.category(character)[0] in "ZC" for character in shown)
    assert not set(shown) & set("\u034f\u3164\u2800\ufe0f\u115f")
    assert not (shown and unicodedata.combining(shown[0]))


def test_display_forms_of_bytes() -> None:
    assert escape_token(b"a b\n\t\r") == "a␣b⏎→␍"
    assert escape_token("日".encode()[:2]) == "<e6><97>"
    assert escape_token(b"\x80a\xff") == "<80>a<ff>"
    assert escape_token("é\u0301\u200b".encode()) == "é\u0301<U+200B>"
    assert escape_token("\u0301".encode()) == "◌\u0301"


@settings(max_examples=100)
@given(st.text("ab lower\n\tï日", min_size=1, max_size=30))
def test_the_displayed_pieces_are_the_tokens_of_the_text(text: str) -> None:
    for tokenizer in (BYTES, BPE):
        *lines, count = show_tokens(tokenizer, text)
        ids = tokenizer.encode(text)
        pieces = [piece for line in lines for piece in line.strip("│").split("│")]
        assert pieces == [escape_token(tokenizer.decode_bytes([i])) for i in ids.tolist()]
        assert (
            count
            == f"{len(ids):,} tokens, {len(text.encode()):,} bytes: {len(text.encode()) / len(ids):.2f} bytes per token"
        )


def test_a_newline_token_ends_the_displayed_line() -> None:
    assert show_tokens(BYTES, "a b\nc")[:2] == ["a│␣│b│⏎│", "c"]
    assert show_tokens(BPE, "the low 日\n")[0] == "the│␣low│␣│<e6>│<97>│<a5>│⏎"
    assert show_tokens(BYTES, "") == ["", "0 tokens, 0 bytes"]


def test_a_description_contains_the_facts() -> None:
    text = describe(BPE)
    for part in (
        "bpe (byte-level BPE)",
        f"{BPE.vocab_size}, of 2 bytes each",
        f"<|endoftext|> (id {BPE.vocab_size - 1})",
        "␣lowest  (7 bytes",
    ):
        assert part in text
    assert "│" in text
    assert "none" in describe(BYTES)
    characters = CharacterTokenizer("ab")
    assert "the character 'H'" in describe(characters)
    assert "a│b│a" in describe(characters, "aba")
    with pytest.raises(UserError, match="the character 'H'"):
        describe(characters, "H")
    assert all(line.isprintable() for line in text.splitlines())


def test_bytes_per_token_is_computed_over_all_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("glassgpt.tokenizers.inspect._BATCH", 10)
    texts = ["the low", "日本", "lower " * 20, ""]
    size = sum(len(text.encode()) for text in texts)
    assert bytes_per_token([BYTES, BPE], texts) == [1.0, size / sum(len(BPE.encode(text)) for text in texts)]
    with pytest.raises(UserError, match="no text"):
        bytes_per_token([BYTES], [""])


def test_the_comparison_shows_gpt2s_bytes_per_token() -> None:
    assert (
        compare_with_gpt2(BYTES, ["Hello, I'm a language model"]) == "1.000; GPT-2's 50,257: 3.857"
    )  # 27 bytes, 7 tokens
    assert compare_with_gpt2(find_tokenizer("gpt2"), ["Hello, I'm a language model"]) == "3.857"


def test_without_gpt2s_files_the_comparison_shows_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> None:
        raise UserError("cannot download it: no network.\nPut it there by hand")

    monkeypatch.setattr("glassgpt.tokenizers.builtin.gpt2_tokenizer", none)
    line = compare_with_gpt2(BYTES, ["text"])
    assert line.startswith("1.000; ")
    assert line.endswith("no network.")


# The command line


def test_the_commands_train_and_show(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "glassgpt.tokenizers.inspect.compare_with_gpt2",
        lambda tokenizer, texts: f"{bytes_per_token([tokenizer], texts)[0]:.1f}",
    )
    text, out = tmp_path / "text.txt", tmp_path / "my tokenizer.json"
    text.write_text("the low lower lowest " * 50, encoding="latin-1")
    assert main(["tokenizer", "train", str(text), "--vocab-size", "265", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert f"{out}: 265 tokens\nbytes per token on text: 3." in printed
    assert f"--data.tokenizer '{out}'" in printed
    assert main(["tokenizer", "show", str(out), "--text", "lowest low", "--data", str(text)]) == 0
    printed = capsys.readouterr().out
    assert "│␣low" in printed
    assert "bytes per token       on text: 3." in printed


def test_column_and_skip_bad_select_the_rows(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "glassgpt.tokenizers.inspect.compare_with_gpt2", lambda tokenizer, texts: f"{len(''.join(texts))} characters"
    )
    rows, out = tmp_path / "rows.jsonl", str(tmp_path / "my.json")
    rows.write_text(
        json.dumps({"body": "the low lower " * 9, "text": "other"})
        + "\n"
        + json.dumps({"body": None, "text": ""})
        + "\n"
    )
    train, show = (
        ["tokenizer", "train", str(rows), "--vocab-size", "260", "--out", out],
        ["tokenizer", "show", out, "--data", str(rows)],
    )
    for command in (train, show):
        assert main([*command, "--column", "body"]) == 2
        assert "--skip-bad" in capsys.readouterr().err
        assert main([*command, "--column", "body", "--skip-bad"]) == 0
        assert "126 characters" in capsys.readouterr().out


def test_show_finds_the_tokenizers_of_datasets_and_models(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "text.txt").write_text("abc abd " * 40)
    dataset, bare = tmp_path / "dataset", tmp_path / "bare"
    assert main(["prepare", str(tmp_path / "text.txt"), "--out", str(dataset)]) == 0
    assert main(["tokenizer", "show", str(dataset), "--text", "abc"]) == 0
    assert main(["tokenizer", "show", "bytes", "--text", "é"]) == 0
    printed = capsys.readouterr().out
    assert "a│b│c" in printed
    assert "<c3>│<a9>" in printed
    bare.mkdir()
    (bare / "config.json").write_text(json.dumps({"model_type": "words"}))
    for name, reason in {
        "characters": "character tokenizer",
        "x.json": "x.json",
        "nothing": "nothing",
        str(bare): "no weights",
    }.items():
        assert main(["tokenizer", "show", name]) == 2
        assert reason in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("tokenizer", "(commands: tokenizer train, tokenizer show)"),
        ("tokenizer trian x", "did you mean 'tokenizer train'"),
        ("tokenizer train", "SOURCE is missing"),
        ("tokenizer train x", "--vocab-size"),
        ("tokenizer train missing.txt --vocab-size 300", "missing.txt"),
        ("tokenizer train python-docs --vocab-size 256 --out x.json", "--vocab-size must be from 257"),
        ("tokenizer train python-docs --vocab-size 300 --encoding utf-9", "utf-9"),
        ("tokenizer show", "is missing"),
    ],
)
def test_wrong_arguments_are_reported(arguments: str, expected: str, capsys: Capture) -> None:
    assert main(arguments.split()) == 2
    assert expected in capsys.readouterr().err


def test_the_sample_has_each_kind_of_white_space_and_no_display_form() -> None:
    assert {" ", "\n", "\t"} <= set(SAMPLE)
    assert all(mark not in SAMPLE for mark in DISPLAY_FORMS)
