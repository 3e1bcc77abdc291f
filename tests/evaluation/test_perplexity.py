"""Evaluation: the mean over every token but the first, whatever the batches, against a loop that does one window at a
time.
"""

import json
import math
import shutil
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from glassgpt.config.model import ModelConfig
from glassgpt.config.schema import DataConfig
from glassgpt.data.dataset import TokenStream, open_dataset
from glassgpt.data.prepare import prepare
from glassgpt.evaluation import perplexity
from glassgpt.evaluation.perplexity import details, evaluate, measure_stream
from glassgpt.interop.references import find_checkpoint, load
from glassgpt.model.gpt import GPT
from glassgpt.runs.checkpoint import checkpoint_paths
from glassgpt.tokenizers.base import bytes_to_unicode
from glassgpt.tokenizers.builtin import BPETokenizer, BytesTokenizer, CharacterTokenizer, Tokenizer
from glassgpt.training.run import train
from glassgpt.utils.errors import UserError
from glassgpt.utils.files import sha256_of
from kill_harness import Quiet, fast_training, records_of, tiny_config, write_text

LETTERS = CharacterTokenizer("abcdefghijklm")


@pytest.fixture(autouse=True, scope="module")
def light() -> Iterator[None]:
    """One thread for the whole file."""
    with fast_training():
        yield


def model_for(tokenizer: Tokenizer, **changes: Any) -> GPT:
    shape: dict[str, Any] = {
        "n_layer": 1,
        "n_head": 2,
        "n_embd": 16,
        "context_length": 16,
        "vocab_multiple": 8,
        "dropout": 0.5,
    }
    model = GPT.create(ModelConfig(vocab_size=tokenizer.vocab_size, **{**shape, **changes}), seed=1)
    with torch.no_grad():
        model.embedding.weight.mul_(30)  # so that the losses of the tokens differ widely
    return model


def undecided(tokenizer: Tokenizer) -> GPT:
    """A model that gives every token of the vocabulary the same probability."""
    model = model_for(tokenizer)
    torch.nn.init.zeros_(model.embedding.weight)
    return model


def stream_of(tokens: int) -> TokenStream:
    return TokenStream([np.random.default_rng(tokens).integers(LETTERS.vocab_size, size=tokens).astype("<u2")])


def plain_losses(model: GPT, ids: np.ndarray[Any, Any]) -> list[float]:
    """The loss of each token but the first, by the library, one window after another."""
    model.eval()
    losses = []
    with torch.no_grad():
        for start in range(0, len(ids) - 1, 16):
            window = torch.from_numpy(ids[start : start + 17])
            losses += F.cross_entropy(model(window[None, :-1])[0], window[1:], reduction="none").double().tolist()
    return losses


@pytest.mark.parametrize("tokens", [2, 16, 17, 18, 33, 113, 119])
def test_the_loss_is_the_mean_over_all_tokens_for_any_batch_size(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, stream = model_for(LETTERS), stream_of(tokens)
    losses = plain_losses(model, stream.read(0, tokens))
    assert max(losses) - min(losses) > 0.5 or tokens == 2
    for batch_size in (256, 1, 2, 3, 5, 7, 64):
        monkeypatch.setattr(perplexity, "EVALUATION_TOKENS", 16 * batch_size)
        found = measure_stream(model, stream, LETTERS).figures
        # float32 sums of 16 products differ with the batch's shape in the last digits: 6e-8 each.
        assert found["loss"] == pytest.approx(math.fsum(losses) / len(losses), rel=1e-6)
        assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
        assert found["tokens"] == tokens - 1


@pytest.mark.parametrize("limit", [1, 15, 16, 17, 40, 118, 10**9])
def test_a_limit_takes_the_first_tokens_and_reads_no_further(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perplexity, "EVALUATION_TOKENS", 32)
    model, ids = model_for(LETTERS), stream_of(119).read(0, 119)
    losses = plain_losses(model, ids)[:limit]
    ids[limit + 1 :] = 60_000  # no token of the model: it would raise IndexError
    found = measure_stream(model, TokenStream([ids]), LETTERS, limit=limit).figures
    assert found["tokens"] == len(losses)
    assert found["loss"] == pytest.approx(math.fsum(losses) / len(losses), rel=1e-6)


def test_a_uniform_guess_among_bytes_is_eight_bits_per_byte() -> None:
    tokenizer = BytesTokenizer()
    found = measure_stream(
        undecided(tokenizer), TokenStream([tokenizer.encode("any text at all, naïve or not")]), tokenizer
    ).figures
    assert found["perplexity"] == pytest.approx(tokenizer.vocab_size, rel=1e-6)
    assert found["bits_per_byte"] == pytest.approx(math.log2(tokenizer.vocab_size), rel=1e-6)


def test_bits_per_byte_count_the_bytes_of_the_predicted_characters() -> None:
    """By hand: four characters of 1, 2, 3 and 4 bytes, five times, the first not predicted: 19 x 2 bits over 49
    bytes.
    """
    tokenizer = CharacterTokenizer("aé€😀")
    found = measure_stream(undecided(tokenizer), TokenStream([tokenizer.encode("aé€😀" * 5)]), tokenizer).figures
    assert found["loss"] == pytest.approx(math.log(4), rel=1e-6)  # the four padded ids get no probability
    assert found["bits_per_byte"] == pytest.approx(19 * 2 / 49, rel=1e-6)
    assert found["tokens"] == 19


def test_bits_per_byte_exclude_special_tokens() -> None:
    """By hand: each of 257 ids costs ln 257; after the first token 5 text tokens of 1 byte and 2 ends of text are
    predicted.
    """
    tokenizer = BPETokenizer.from_merges({s: i for i, s in enumerate([*bytes_to_unicode(), "<|endoftext|>"])}, [])
    end = 256
    stream = TokenStream([np.array([end, *b"ab", end, *b"cde", end], dtype="<u2")])
    model = undecided(tokenizer)
    measured = measure_stream(model, stream, tokenizer)
    assert (measured.figures["tokens"], measured.text_bytes) == (7, 5)
    assert measured.figures["loss"] == pytest.approx(math.log(257), rel=1e-6)  # the mean over all tokens
    assert measured.figures["bits_per_byte"] == pytest.approx(math.log2(257), rel=1e-6)  # 5 tokens over 5 bytes, not 7
    with torch.no_grad():  # an end of text that costs more changes the loss only
        model.get_parameter("norm.weight").zero_()
        model.get_parameter("norm.bias").fill_(1.0)
        model.embedding.weight[end].fill_(-1.0)
    dearer = measure_stream(model, stream, tokenizer)
    assert dearer.figures["loss"] > measured.figures["loss"] + 4
    assert dearer.figures["bits_per_byte"] == pytest.approx(8, abs=1e-6)


def test_a_loss_beyond_floating_point_has_an_infinite_perplexity() -> None:
    model = undecided(LETTERS)
    with torch.no_grad():
        model.get_parameter("norm.weight").zero_()
        model.get_parameter("norm.bias").fill_(100.0)
        model.embedding.weight[0].fill_(1.0)  # logit 1600 for "a", 0 for all else
    found = measure_stream(model, TokenStream([LETTERS.encode("bcd")]), LETTERS).figures
    assert found["loss"] == pytest.approx(1600)
    assert found["perplexity"] == math.inf


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_does_not_change_the_model_and_uses_no_dropout(training: bool) -> None:
    model, stream = model_for(LETTERS), stream_of(50)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model.train(training)
    first = measure_stream(model, stream, LETTERS).figures
    assert measure_stream(model, stream, LETTERS).figures == first
    assert model.training is training
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None


@pytest.mark.parametrize("tokens", [0, 1])
def test_fewer_than_two_tokens_are_an_error(tokens: int) -> None:
    with pytest.raises(UserError, match=f"{tokens} tokens"):
        measure_stream(model_for(LETTERS), stream_of(tokens), LETTERS)


# ------------------------------------------------------------------------------------------------- by place and by
# document


@pytest.mark.parametrize("batch_size", [1, 3, 256])
def test_the_loss_by_position_is_the_mean_at_each_position(batch_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perplexity, "EVALUATION_TOKENS", 16 * batch_size)
    model, stream = model_for(LETTERS), stream_of(119)
    losses = plain_losses(model, stream.read(0, 119))
    measured = measure_stream(model, stream, LETTERS)
    found = details(measured, stream, LETTERS)["loss_by_position"]
    assert details(measured, stream, LETTERS) == {"loss_by_position": found, "tokens_by_position": [8] * 6 + [7] * 10}
    assert found == pytest.approx([np.mean(losses[place::16]) for place in range(16)], rel=1e-6)
    short = stream_of(9)
    assert len(details(measure_stream(model, short, LETTERS), short, LETTERS)["loss_by_position"]) == 8


def documents_stream(folder: Path, texts: list[str]) -> tuple[TokenStream, BPETokenizer]:
    """The documents after end-of-text marks, in shards of 40 tokens."""
    tokenizer = BPETokenizer.from_merges({s: i for i, s in enumerate([*bytes_to_unicode(), "<|endoftext|>"])}, [])
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    data = DataConfig(
        source=str(folder / "texts.jsonl"), validation_source=str(folder / "texts.jsonl"), shard_tokens=40
    )
    return open_dataset(prepare(data, folder / "out", tokenizer=tokenizer)).validation, tokenizer


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_each_document_has_the_losses_of_its_own_text(
    tmp_path: Path, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a sum over the plain losses of the tokens between two marks; the first text's first token is the stream's
    second.
    """
    texts = ["one", "a longer document, over several windows of sixteen", "é" * 70, "x", "the end"]
    monkeypatch.setattr(perplexity, "EVALUATION_TOKENS", 16 * batch_size)
    stream, tokenizer = documents_stream(tmp_path, texts)
    model = model_for(tokenizer)
    ids = stream.read(0, len(stream))
    losses = np.array([np.nan, *plain_losses(model, ids)])
    found = measure_stream(model, stream, tokenizer, by_document=True).documents
    assert found is not None
    starts = np.flatnonzero(ids == 256)
    assert found.starts.tolist() == starts.tolist()
    for number, (start, text) in enumerate(zip(starts, texts, strict=True)):
        size = len(text.encode())
        own = losses[start + 1 : start + 1 + size]
        assert (found.tokens[number], found.bytes[number]) == (size, size)
        assert found.nats[number] == pytest.approx(own.sum(), rel=1e-6)
        result = {name: column[number] for name, column in found.columns.items()}
        assert result["bits_per_byte"] == pytest.approx(own.sum() / np.log(2) / size, rel=1e-6)
        assert (result["document"], result["tokens"]) == (number, size)


def test_the_worst_documents_come_first_and_short_ones_are_left_out(tmp_path: Path) -> None:
    texts = [f"{letter * 20} and so on" for letter in "abcdefgh"] + ["z"]
    stream, tokenizer = documents_stream(tmp_path, texts)
    found = measure_stream(model_for(tokenizer), stream, tokenizer, by_document=True)
    result = details(found, stream, tokenizer, documents=True)
    assert result["documents"]["document"] == list(range(9))
    assert result["document_count"] == 9
    assert details(found, stream, tokenizer) == {name: value for name, value in result.items() if name != "documents"}
    losses = result["documents"]["loss"][:8]
    worst = result["worst_documents"]
    assert [document["loss"] for document in worst] == sorted(losses, reverse=True)[:5]
    assert [document["text"] for document in worst] == [texts[document["document"]] for document in worst]


def test_token_losses_on_request(run: Path) -> None:
    """The mean of the token losses is the loss; the ids are the split's, without its first."""
    result = evaluate(run, tokens=True)
    assert len(result["token_ids"]) == len(result["token_losses"]) == result["tokens"]
    assert np.mean(result["token_losses"]) == pytest.approx(result["loss"], rel=1e-9)
    _, tokenizer = load(run)
    assert tokenizer is not None
    text = (run.parent / "text.txt").read_text()
    assert text.endswith(tokenizer.decode(np.array(result["token_ids"])))
    assert "token_losses" not in evaluate(run)


def test_shorter_windows(run: Path) -> None:
    """Fewer tokens of context: as many windows of one token, each predicted from one token alone."""
    model, _ = load(run)
    result = evaluate(run, context_length=1, tokens=True)
    ids = result["token_ids"]
    with torch.no_grad():
        logits = model(torch.tensor(ids[:-1])[:, None])[:, 0]
    expected = F.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")
    assert result["token_losses"][1:] == pytest.approx(expected.tolist(), rel=1e-5)
    assert (result["context_length"], len(result["loss_by_position"])) == (1, 1)
    limit = model.config.context_length
    with pytest.raises(UserError, match=f"from 1 to {limit}"):
        evaluate(run, context_length=limit + 1)


def test_the_result_says_what_was_measured(run: Path) -> None:
    result = evaluate(f"{run}@5", quantize="int8")
    assert result["model"] == f"{run}@5"
    assert (result["step"], result["split"], result["quantization"]) == (5, "validation", "int8")
    assert (result["data"], result["precision"]) == ("text", "float32")
    assert result["glassgpt"] == version("glassgpt")
    assert result["torch"] == torch.__version__
    assert result["data_fingerprint"] == find_checkpoint(run).state.data_fingerprint


def test_figures_of_every_document_on_request(run: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.jsonl").write_text('{"text": "one text"}\n{"text": null}\n{"text": "another"}\n')
    source = str(tmp_path / "texts.jsonl")
    with pytest.raises(UserError, match="--skip-bad"):
        evaluate(run, source=source)
    plain = evaluate(run, source=source, skip_bad=True)
    result = evaluate(run, source=source, skip_bad=True, documents=True)
    assert "documents" not in plain
    assert result == plain | {"documents": mock.ANY}
    assert result["documents"]["document"] == [0, 1]


def test_a_limit_cuts_the_last_document(tmp_path: Path) -> None:
    stream, tokenizer = documents_stream(tmp_path, ["one", "two", "three"])
    found = measure_stream(model_for(tokenizer), stream, tokenizer, limit=5, by_document=True).documents
    assert found is not None
    assert found.tokens.tolist() == [3, 1, 0]


def test_an_evaluation_in_training_does_not_read_the_index_of_documents(tmp_path: Path) -> None:
    stream, tokenizer = documents_stream(tmp_path, ["one", "two", "three"])
    with mock.patch.object(TokenStream, "document_starts", side_effect=AssertionError):
        assert measure_stream(model_for(tokenizer), stream, tokenizer).documents is None


def test_padded_ids_do_not_change_the_loss() -> None:
    stream = stream_of(60)
    plain, padded = (model_for(LETTERS, vocab_multiple=multiple, tied_head=False) for multiple in (1, 64))
    rows = dict(plain.named_parameters())
    with torch.no_grad():
        for name, parameter in padded.named_parameters():
            parameter[: len(rows[name])] = rows[name]
    found, expected = (measure_stream(model, stream, LETTERS).figures for model in (padded, plain))
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-6)


def test_a_mixture_is_the_mean_by_its_weights(run: Path, tmp_path: Path) -> None:
    one, two = (
        write_text(tmp_path / name, size, seed=seed)
        for name, size, seed in (("one.txt", 4000, 1), ("two.txt", 6000, 2))
    )
    config = tiny_config(one, data={"mixture": {str(one): 3, str(two): 1}})
    mixed = train(config, tmp_path / "mixed", progress=Quiet())
    found = evaluate(mixed)
    alone = [evaluate(mixed, source=str(path), split="validation") for path in (one, two)]
    assert list(found["losses"].values()) == pytest.approx([each["loss"] for each in alone])
    assert found["loss"] == pytest.approx(0.75 * alone[0]["loss"] + 0.25 * alone[1]["loss"])
    # Each character of these texts is a byte, so bits a byte are nats a token in another unit.
    assert found["bits_per_byte"] == pytest.approx(found["loss"] / math.log(2))
    assert found["tokens"] == sum(each["tokens"] for each in alone)
    (record,) = [record for record in records_of(mixed) if record["step"] == 10 and "val_loss" in record]
    assert record["val_loss"] == found["loss"]
    assert set(found["texts"]) == {"one", "two"}


# -------------------------------------------------------------------------------------------------------------- a
# reference


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with checkpoints of steps 5 and 10."""
    folder = tmp_path_factory.mktemp("evaluate")
    return train(tiny_config(write_text(folder / "text.txt")), folder / "run", progress=Quiet())


def figures_of(result: dict[str, Any]) -> dict[str, Any]:
    """The numbers, without what was measured."""
    return {key: value for key, value in result.items() if key not in ("model", "data", "data_fingerprint")}


@pytest.mark.parametrize("step", [5, 10])
def test_a_checkpoint_has_the_loss_that_its_run_recorded(run: Path, step: int) -> None:
    (record,) = [record for record in records_of(run) if record["step"] == step and "val_loss" in record]
    found = evaluate(f"{run}@{step}")
    figures = {key: record[f"val_{key}"] for key in ("loss", "perplexity", "bits_per_byte", "tokens")}
    assert {key: found[key] for key in figures} == figures


def test_the_loss_of_int8_can_be_measured(run: Path) -> None:
    """Another loss than the weights' own, but a near one; over the same tokens."""
    plain, rounded = (evaluate(run, quantize=kind) for kind in (None, "int8"))
    assert rounded["tokens"] == plain["tokens"]
    assert 0 < abs(rounded["loss"] - plain["loss"]) < 0.01
    with pytest.raises(UserError, match="'int3'"):
        evaluate(run, quantize="int3")


def test_other_splits_and_other_texts(run: Path, tmp_path: Path) -> None:
    text = run.parent / "text.txt"
    assert evaluate(run, split="train")["tokens"] == 3599
    # Another text whose last tenth is the same one gives the same numbers; a longer one does not.
    (tmp_path / "same.txt").write_text("x" * 3600 + text.read_text()[3600:])
    same = evaluate(run, source=str(tmp_path / "same.txt"), split="validation")
    assert figures_of(same) == figures_of(evaluate(run))
    # A text that the model was not trained on counts whole; a copy of its own text does not, wherever it lies.
    other = str(write_text(tmp_path / "other.txt", 8000, seed=5))
    assert evaluate(run, source=other)["tokens"] == 7999
    assert evaluate(run, source=other, split="validation")["tokens"] == 799
    (tmp_path / "copy.txt").write_bytes(text.read_bytes())
    assert figures_of(evaluate(run, source=str(tmp_path / "copy.txt"))) == figures_of(evaluate(run))


def test_a_prepared_dataset_is_evaluated_on_its_validation_split(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    other = write_text(tmp_path / "other.txt", 8000, seed=5)
    _, tokenizer = load(run)
    prepare(DataConfig(source=str(other)), out=tmp_path / "dataset", tokenizer=tokenizer)
    for source in (str(tmp_path / "dataset"), "~/dataset"):
        assert evaluate(run, source=source)["tokens"] == 799


def test_a_precision_of_gpus_becomes_float32_on_a_cpu(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    (checkpoint,) = [path for path in checkpoint_paths(copy / "checkpoints") if path.name == "000010"]
    config, manifest = checkpoint / "config.toml", checkpoint / "manifest.json"
    before = sha256_of(config)
    config.write_text(config.read_text().replace('precision = "auto"', 'precision = "float16"'))
    manifest.write_text(manifest.read_text().replace(before, sha256_of(config)))
    assert find_checkpoint(copy).config.precision == "float16"
    assert figures_of(evaluate(copy, device="cpu")) == figures_of(evaluate(run, device="cpu"))


@pytest.mark.parametrize("tokenizer", ["characters", "bytes"])
def test_a_validation_split_that_may_hold_training_text_is_refused(tmp_path: Path, tokenizer: str) -> None:
    """One seed validated on training data: here it would happen if the text were edited between training and
    evaluation.
    """
    text = write_text(tmp_path / "text.txt")
    config = tiny_config(text, data={"tokenizer": tokenizer})
    run = train(config, tmp_path / "run", progress=Quiet())
    content = text.read_text()
    text.write_text(content[2000:] + content[:2000])
    with pytest.raises(UserError, match="has changed since the model was trained on it"):
        evaluate(run)


def test_references_and_texts_that_cannot_be_evaluated_are_errors(run: Path, tmp_path: Path) -> None:
    (tmp_path / "greek.txt").write_text("the quick brown fox jumps over λ" * 9)
    with pytest.raises(UserError, match="'λ'"):
        evaluate(run, source=str(tmp_path / "greek.txt"))
    with pytest.raises(UserError, match="split must be validation, train or all, got 'test'"):
        evaluate(run, split="test")
    with pytest.raises(UserError, match="missing does not exist"):
        evaluate(tmp_path / "missing")
