"""The data of a run: one dataset or a mixture, one tokenizer, absolute paths."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from glassgpt.config.schema import DataConfig
from glassgpt.data.prepare import prepare, require_tokenizer
from glassgpt.data.training_data import open_training_data, pinned, with_own_tokenizer
from glassgpt.tokenizers.base import bytes_to_unicode
from glassgpt.tokenizers.builtin import BPETokenizer
from glassgpt.utils.errors import UserError


@pytest.fixture(autouse=True)
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two texts of different characters in the working directory."""
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("abcab" * 200)
    Path("b.txt").write_text("xyz " * 200)


def bpe(path: str, *merges: str) -> None:
    vocab = [*bytes_to_unicode(), *("".join(merge.split()) for merge in merges), "<|endoftext|>"]
    Path(path).write_text(BPETokenizer.from_merges({token: i for i, token in enumerate(vocab)}, merges).to_json())


def quiet(line: str) -> None:
    pass


def test_a_mixture_has_the_characters_of_all_its_texts() -> None:
    training_data = open_training_data(DataConfig(mixture={"a.txt": 3, "b.txt": 1}), None, quiet)
    assert training_data.weights == (0.75, 0.25)
    assert training_data.names == ["a", "b"]
    assert training_data.tokenizer.decode(range(training_data.tokenizer.vocab_size)) == "\n abcxyz"
    windows = training_data.batches(16, 40, 0, "shuffled").batch_at(0)
    from_b = np.array([training_data.tokenizer.decode(window).strip("abc") != "" for window in windows])
    assert from_b.sum() == 10


def test_the_fingerprint_depends_on_weights_and_texts() -> None:
    def fingerprint(mixture: dict[str, float]) -> str:
        return open_training_data(DataConfig(tokenizer="bytes", mixture=mixture), None, quiet).fingerprint

    one = fingerprint({"a.txt": 3, "b.txt": 1})
    assert one == fingerprint({"a.txt": 0.75, "b.txt": 0.25})
    assert len({one, fingerprint({"a.txt": 1, "b.txt": 1}), fingerprint({"b.txt": 1, "a.txt": 3})}) == 3


def test_names_are_absolute_and_unique() -> None:
    data = pinned(DataConfig(mixture={"a.txt": 0.5, "python-docs": 0.5}))
    assert data.mixture == {str(Path("a.txt").resolve()): 0.5, "python-docs": 0.5}
    with pytest.raises(UserError, match=r"data\.mixture.*a\.txt twice"):
        pinned(DataConfig(mixture={"a.txt": 0.5, "./a.txt": 0.25, "b.txt": 0.25}))


def test_a_mixture_uses_the_tokenizer_of_a_prepared_dataset() -> None:
    bpe("one.json", "a b")
    bpe("two.json", "a b", "x y")
    dataset = str(prepare(DataConfig(source="a.txt", tokenizer="one.json"), Path("d")).resolve())
    mixed = DataConfig(mixture={dataset: 1, "b.txt": 1})
    training_data = open_training_data(mixed, None, quiet)
    assert training_data.tokenizer.vocab_size == 258
    lines: list[str] = []
    assert with_own_tokenizer(mixed, training_data, lines.append).tokenizer == f"{dataset}/tokenizer.json"
    assert "own tokenizer" in lines[0]
    open_training_data(dataclasses.replace(mixed, tokenizer="one.json"), None, quiet)
    with pytest.raises(UserError, match="another tokenizer"):
        require_tokenizer(dataclasses.replace(mixed, tokenizer="gpt2"))
    with pytest.raises(UserError, match="another tokenizer"):
        open_training_data(dataclasses.replace(mixed, tokenizer="two.json"), None, quiet)


def test_a_mixture_refuses_a_validation_source_and_weights_of_zero() -> None:
    with pytest.raises(UserError, match="validation_source"):
        DataConfig(mixture={"a.txt": 1}, validation_source="b.txt")
    for weight in (0.0, -1.0):
        with pytest.raises(UserError, match=r"data\.mixture"):
            DataConfig(mixture={"a.txt": weight})
