"""Evaluation: the loss is the mean over all tokens except the first, for any batch size.

The reference is a loop that evaluates one window at a time.
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
from glassgpt.data.prepare import find_prepared, prepare
from glassgpt.evaluation import perplexity
from glassgpt.evaluation.perplexity import details, evaluate, measure_stream
from glassgpt.interop.references import LoadedModel, find_checkpoint, load
from glassgpt.model.gpt import GPT
from glassgpt.runs.checkpoint import checkpoint_paths
from glassgpt.tokenizers.base import bytes_to_unicode
from glassgpt.tokenizers.builtin import BPETokenizer, BytesTokenizer, CharacterTokenizer, Tokenizer
from glassgpt.tokenizers.huggingface import HFTokenizer
from glassgpt.training.run import train
from glassgpt.utils import device as device_module
from glassgpt.utils.errors import UserError
from glassgpt.utils.files import sha256_of
from kill_harness import Quiet, fast_training, records_of, tiny_config, write_text

LETTERS = CharacterTokenizer("abcdefghijklm")


@pytest.fixture(autouse=True, scope="module")
def fast() -> Iterator[None]:
    """Use one thread for the whole module."""
    with fast_training():
        yield


def model_for(tokenizer: Tokenizer, **changes: Any) -> GPT:
    """Return a tiny random model for the tokenizer's vocabulary."""
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
        model.embedding.weight.mul_(30)  # the losses of tokens then differ widely
    return model


def uniform_model(tokenizer: Tokenizer) -> GPT:
    """Return a model that gives every token of the vocabulary the same probability."""
    model = model_for(tokenizer)
    torch.nn.init.zeros_(model.embedding.weight)
    return model


def stream_of(tokens: int) -> TokenStream:
    """Return a stream of this many random tokens."""
    return TokenStream([np.random.default_rng(tokens).integers(LETTERS.vocab_size, size=tokens).astype("<u2")])


def reference_losses(model: GPT, ids: np.ndarray[Any, Any]) -> list[float]:
    """Return the loss of each token except the first, by PyTorch's cross-entropy, one window of 16 after another."""
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
    losses = reference_losses(model, stream.read(0, tokens))
    assert max(losses) - min(losses) > 0.5 or tokens == 2
    for batch_size in (256, 1, 2, 3, 5, 7, 64):
        monkeypatch.setattr(perplexity, "EVALUATION_TOKENS", 16 * batch_size)
        figures = measure_stream(model, stream, LETTERS).figures
        # float32 sums of 16 products depend on the batch's shape in the last digits, 6e-8 each.
        assert figures["loss"] == pytest.approx(math.fsum(losses) / len(losses), rel=1e-6)
        assert figures["perplexity"] == pytest.approx(math.exp(figures["loss"]))
        assert figures["tokens"] == tokens - 1


@pytest.mark.parametrize("limit", [1, 15, 16, 17, 40, 118, 10**9])
def test_a_limit_evaluates_only_the_first_tokens(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perplexity, "EVALUATION_TOKENS", 32)
    model, ids = model_for(LETTERS), stream_of(119).read(0, 119)
    losses = reference_losses(model, ids)[:limit]
    ids[limit + 1 :] = 60_000  # outside the vocabulary: reading one would raise IndexError
    figures = measure_stream(model, TokenStream([ids]), LETTERS, limit=limit).figures
    assert figures["tokens"] == len(losses)
    assert figures["loss"] == pytest.approx(math.fsum(losses) / len(losses), rel=1e-6)


def test_a_uniform_model_of_bytes_has_eight_bits_per_byte() -> None:
    tokenizer = BytesTokenizer()
    figures = measure_stream(
        uniform_model(tokenizer), TokenStream([tokenizer.encode("any text at all, naïve or not")]), tokenizer
    ).figures
    assert figures["perplexity"] == pytest.approx(tokenizer.vocab_size, rel=1e-6)
    assert figures["bits_per_byte"] == pytest.approx(math.log2(tokenizer.vocab_size), rel=1e-6)


def test_bits_per_byte_divide_by_the_bytes_of_the_predicted_characters() -> None:
    """By hand: characters of 1, 2, 3 and 4 bytes, five times; without the first, 19 x 2 bits over 49 bytes."""
    tokenizer = CharacterTokenizer("aé€😀")
    figures = measure_stream(uniform_model(tokenizer), TokenStream([tokenizer.encode("aé€😀" * 5)]), tokenizer).figures
    assert figures["loss"] == pytest.approx(math.log(4), rel=1e-6)  # the four padding ids have no probability
    assert figures["bits_per_byte"] == pytest.approx(19 * 2 / 49, rel=1e-6)
    assert figures["tokens"] == 19


def test_bits_per_byte_exclude_special_tokens() -> None:
    """By hand: each of 257 ids costs ln 257; 5 text tokens of 1 byte and 2 end-of-text tokens are predicted."""
    tokenizer = BPETokenizer.from_merges({s: i for i, s in enumerate([*bytes_to_unicode(), "<|endoftext|>"])}, [])
    end = 256
    stream = TokenStream([np.array([end, *b"ab", end, *b"cde", end], dtype="<u2")])
    model = uniform_model(tokenizer)
    measured = measure_stream(model, stream, tokenizer)
    assert (measured.figures["tokens"], measured.text_bytes) == (7, 5)
    assert measured.figures["loss"] == pytest.approx(math.log(257), rel=1e-6)  # the mean over all tokens
    assert measured.figures["bits_per_byte"] == pytest.approx(math.log2(257), rel=1e-6)  # 5 tokens over 5 bytes, not 7
    with torch.no_grad():  # a less probable end of text changes only the loss
        model.get_parameter("norm.weight").zero_()
        model.get_parameter("norm.bias").fill_(1.0)
        model.embedding.weight[end].fill_(-1.0)
    improbable_end = measure_stream(model, stream, tokenizer)
    assert improbable_end.figures["loss"] > measured.figures["loss"] + 4
    assert improbable_end.figures["bits_per_byte"] == pytest.approx(8, abs=1e-6)


def test_perplexity_is_infinite_if_it_overflows() -> None:
    model = uniform_model(LETTERS)
    with torch.no_grad():
        model.get_parameter("norm.weight").zero_()
        model.get_parameter("norm.bias").fill_(100.0)
        model.embedding.weight[0].fill_(1.0)  # the logit of "a" is 1600, all others are 0
    figures = measure_stream(model, TokenStream([LETTERS.encode("bcd")]), LETTERS).figures
    assert figures["loss"] == pytest.approx(1600)
    assert figures["perplexity"] == math.inf


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_does_not_change_the_model_and_disables_dropout(training: bool) -> None:
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


# --- loss by position and by document ---------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3, 256])
def test_the_loss_by_position_is_the_mean_at_each_position(batch_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perplexity, "EVALUATION_TOKENS", 16 * batch_size)
    model, stream = model_for(LETTERS), stream_of(119)
    losses = reference_losses(model, stream.read(0, 119))
    measured = measure_stream(model, stream, LETTERS)
    by_position = details(measured, stream, LETTERS)["loss_by_position"]
    assert details(measured, stream, LETTERS) == {
        "loss_by_position": by_position,
        "tokens_by_position": [8] * 6 + [7] * 10,
    }
    assert by_position == pytest.approx([np.mean(losses[position::16]) for position in range(16)], rel=1e-6)
    short = stream_of(9)
    assert len(details(measure_stream(model, short, LETTERS), short, LETTERS)["loss_by_position"]) == 8


def documents_stream(folder: Path, texts: list[str]) -> tuple[TokenStream, BPETokenizer]:
    """Return a stream of the documents, each after an end-of-text token, in shards of 40 tokens, and its tokenizer."""
    tokenizer = BPETokenizer.from_merges({s: i for i, s in enumerate([*bytes_to_unicode(), "<|endoftext|>"])}, [])
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    data = DataConfig(
        source=str(folder / "texts.jsonl"), validation_source=str(folder / "texts.jsonl"), shard_tokens=40
    )
    return open_dataset(prepare(data, folder / "out", tokenizer=tokenizer)).validation, tokenizer


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_the_loss_of_a_document_sums_the_losses_of_its_tokens(
    tmp_path: Path, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference sums the losses between two end-of-text tokens; the first document begins at the second token."""
    texts = ["one", "a longer document, over several windows of sixteen", "é" * 70, "x", "the end"]
    monkeypatch.setattr(perplexity, "EVALUATION_TOKENS", 16 * batch_size)
    stream, tokenizer = documents_stream(tmp_path, texts)
    model = model_for(tokenizer)
    ids = stream.read(0, len(stream))
    losses = np.array([np.nan, *reference_losses(model, ids)])
    documents = measure_stream(model, stream, tokenizer, by_document=True).documents
    assert documents is not None
    starts = np.flatnonzero(ids == 256)
    assert documents.starts.tolist() == starts.tolist()
    for number, (start, text) in enumerate(zip(starts, texts, strict=True)):
        size = len(text.encode())
        own_losses = losses[start + 1 : start + 1 + size]
        assert (documents.tokens[number], documents.bytes[number]) == (size, size)
        assert documents.nats[number] == pytest.approx(own_losses.sum(), rel=1e-6)
        result = {name: column[number] for name, column in documents.columns.items()}
        assert result["bits_per_byte"] == pytest.approx(own_losses.sum() / np.log(2) / size, rel=1e-6)
        assert (result["document"], result["tokens"]) == (number, size)


@pytest.mark.parametrize("marks", [["</s>"], ["</s>", "<s>"], []], ids=str)
def test_bits_per_byte_count_the_bytes_of_the_documents(tmp_path: Path, marks: list[str]) -> None:
    """SentencePiece's tokenizers put a space before each text, which is not part of it."""
    pieces = [*marks, "▁", *"\nlowertahi", "▁the", "▁low"]
    added = [{"id": i, "content": mark, "special": True} for i, mark in enumerate(marks)]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    space = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": False}
    single: list[Any] = [{"SpecialToken": {"id": mark, "type_id": 0}} for mark in marks[1:]]
    template = {"type": "TemplateProcessing", "pair": [], "single": [*single, {"Sequence": {"id": "A", "type_id": 0}}]}
    content = {
        "version": "1.0",
        "added_tokens": [each | flags for each in added],
        "pre_tokenizer": space,
        "decoder": space,
        "post_processor": template
        | {"special_tokens": {mark: {"id": mark, "ids": [i], "tokens": [mark]} for i, mark in enumerate(marks)}},
        "model": {"type": "Unigram", "unk_id": None, "vocab": [[piece, -(len(piece) ** 0.5)] for piece in pieces]},
    }
    tokenizer = HFTokenizer(json.dumps(content))
    texts = ["the low", "tall", "low the tower", "hi"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    data = DataConfig(source=str(tmp_path / "a.jsonl"), validation_source=str(tmp_path / "a.jsonl"))
    stream = open_dataset(prepare(data, tmp_path / "out", tokenizer=tokenizer)).validation
    measured = measure_stream(model_for(tokenizer), stream, tokenizer)
    assert measured.text_nats > 0
    # Without marks, an empty line is before each document here. The first token, a mark or a space, is not predicted.
    assert measured.text_bytes == sum(map(len, texts)) + (0 if marks else 2 * len(texts))


def test_worst_documents_are_sorted_by_loss_and_exclude_short_ones(tmp_path: Path) -> None:
    texts = [f"{letter * 20} and so on" for letter in "abcdefgh"] + ["z"]
    stream, tokenizer = documents_stream(tmp_path, texts)
    measured = measure_stream(model_for(tokenizer), stream, tokenizer, by_document=True)
    result = details(measured, stream, tokenizer, documents=True)
    assert result["documents"]["document"] == list(range(9))
    assert result["document_count"] == 9
    assert details(measured, stream, tokenizer) == {
        name: value for name, value in result.items() if name != "documents"
    }
    losses = result["documents"]["loss"][:8]
    worst = result["worst_documents"]
    assert [document["loss"] for document in worst] == sorted(losses, reverse=True)[:5]
    assert [document["text"] for document in worst] == [texts[document["document"]] for document in worst]


def test_token_losses_are_returned_on_request(run: Path) -> None:
    """Their mean is the loss; the token ids are those of the split except the first."""
    result = evaluate(run, tokens=True)
    assert len(result["token_ids"]) == len(result["token_losses"]) == result["tokens"]
    assert np.mean(result["token_losses"]) == pytest.approx(result["loss"], rel=1e-9)
    _, tokenizer = load(run)
    assert tokenizer is not None
    text = (run.parent / "text.txt").read_text()
    assert text.endswith(tokenizer.decode(np.array(result["token_ids"])))
    assert "token_losses" not in evaluate(run)


def test_a_shorter_context_uses_shorter_windows(run: Path) -> None:
    """With a context of 1, each token is predicted from the previous token alone, in windows of one token."""
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


def test_a_huge_context_needs_memory_for_the_text_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = BytesTokenizer()
    model, text = model_for(tokenizer, position="rope"), tmp_path / "text.txt"
    text.write_text("abc " * 250)
    loaded = LoadedModel("model", model, tokenizer, None, None)
    result = evaluate(loaded, source=str(text), split="all", context_length=10**12)
    assert result["tokens"] == 999
    assert result["loss"] == evaluate(loaded, source=str(text), split="all", context_length=999)["loss"]
    needed = 1000 * (2 * model.config.n_embd + model.config.resolved_n_inner) * 4
    monkeypatch.setattr(device_module, "available_memory", lambda device, swap=False: needed // 2)
    with pytest.raises(UserError, match=r"use a context length of at most 450$"):
        evaluate(loaded, source=str(text), split="all", context_length=10**12)
    assert evaluate(loaded, source=str(text), split="all", context_length=450)["tokens"] == 999


def test_the_result_names_the_model_the_data_and_the_versions(run: Path) -> None:
    result = evaluate(f"{run}@5", quantize="int8")
    assert result["model"] == f"{run}@5"
    assert (result["step"], result["split"], result["quantization"]) == (5, "validation", "int8")
    assert (result["data"], result["precision"]) == ("text", "float32")
    assert result["glassgpt"] == version("glassgpt")
    assert result["torch"] == torch.__version__
    assert result["data_fingerprint"] == find_checkpoint(run).state.data_fingerprint


def test_figures_per_document_are_returned_on_request(run: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.jsonl").write_text('{"text": "one text"}\n{"text": null}\n{"text": "another"}\n')
    source = str(tmp_path / "texts.jsonl")
    with pytest.raises(UserError, match="--skip-bad"):
        evaluate(run, source=source)
    without_documents = evaluate(run, source=source, skip_bad=True)
    result = evaluate(run, source=source, skip_bad=True, documents=True)
    assert "documents" not in without_documents
    assert result == without_documents | {"documents": mock.ANY}
    assert result["documents"]["document"] == [0, 1]


def test_a_limit_truncates_the_last_document(tmp_path: Path) -> None:
    stream, tokenizer = documents_stream(tmp_path, ["one", "two", "three"])
    documents = measure_stream(model_for(tokenizer), stream, tokenizer, limit=5, by_document=True).documents
    assert documents is not None
    assert documents.tokens.tolist() == [3, 1, 0]


def test_evaluation_during_training_does_not_read_the_document_index(tmp_path: Path) -> None:
    stream, tokenizer = documents_stream(tmp_path, ["one", "two", "three"])
    with mock.patch.object(TokenStream, "document_starts", side_effect=AssertionError):
        assert measure_stream(model_for(tokenizer), stream, tokenizer).documents is None


def test_padded_ids_do_not_change_the_loss() -> None:
    stream = stream_of(60)
    unpadded, padded = (model_for(LETTERS, vocab_multiple=multiple, tied_head=False) for multiple in (1, 64))
    rows = dict(unpadded.named_parameters())
    with torch.no_grad():
        for name, parameter in padded.named_parameters():
            parameter[: len(rows[name])] = rows[name]
    figures, expected = (measure_stream(model, stream, LETTERS).figures for model in (padded, unpadded))
    assert figures["loss"] == pytest.approx(expected["loss"], rel=1e-6)


def test_the_loss_of_a_mixture_is_the_weighted_mean_of_its_texts(run: Path, tmp_path: Path) -> None:
    one, two = (
        write_text(tmp_path / name, size, seed=seed)
        for name, size, seed in (("one.txt", 4000, 1), ("two.txt", 6000, 2))
    )
    config = tiny_config(one, data={"mixture": {str(one): 3, str(two): 1}})
    mixed = train(config, tmp_path / "mixed", progress=Quiet())
    result = evaluate(mixed)
    single = [evaluate(mixed, source=str(path), split="validation") for path in (one, two)]
    assert list(result["losses"].values()) == pytest.approx([each["loss"] for each in single])
    assert result["loss"] == pytest.approx(0.75 * single[0]["loss"] + 0.25 * single[1]["loss"])
    # Each character of these texts is one byte, so bits per byte are nats per token in another unit.
    assert result["bits_per_byte"] == pytest.approx(result["loss"] / math.log(2))
    assert result["tokens"] == sum(each["tokens"] for each in single)
    (record,) = [record for record in records_of(mixed) if record["step"] == 10 and "val_loss" in record]
    assert record["val_loss"] == result["loss"]
    assert set(result["texts"]) == {"one", "two"}


# --- runs and other references ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a finished run with checkpoints of steps 5 and 10."""
    folder = tmp_path_factory.mktemp("evaluate")
    return train(tiny_config(write_text(folder / "text.txt")), folder / "run", progress=Quiet())


def figures_of(result: dict[str, Any]) -> dict[str, Any]:
    """Return the figures without the names of what was measured."""
    return {key: value for key, value in result.items() if key not in ("model", "data", "data_fingerprint")}


@pytest.mark.parametrize("step", [5, 10])
def test_evaluation_of_a_checkpoint_equals_the_record_of_its_run(run: Path, step: int) -> None:
    (record,) = [record for record in records_of(run) if record["step"] == step and "val_loss" in record]
    result = evaluate(f"{run}@{step}")
    figures = {key: record[f"val_{key}"] for key in ("loss", "perplexity", "bits_per_byte", "tokens")}
    assert {key: result[key] for key in figures} == figures


def test_the_loss_with_int8_weights_is_near_the_exact_loss(run: Path) -> None:
    """The same tokens are evaluated; the loss differs by less than 0.01, but is not equal."""
    exact, quantized = (evaluate(run, quantize=kind) for kind in (None, "int8"))
    assert quantized["tokens"] == exact["tokens"]
    assert 0 < abs(quantized["loss"] - exact["loss"]) < 0.01
    with pytest.raises(UserError, match="'int3'"):
        evaluate(run, quantize="int3")


def test_evaluation_of_other_splits_and_other_texts(run: Path, tmp_path: Path) -> None:
    text = run.parent / "text.txt"
    assert evaluate(run, split="train")["tokens"] == 3599
    # Another text with the same last tenth gives the same figures.
    (tmp_path / "same.txt").write_text("x" * 3600 + text.read_text()[3600:])
    same = evaluate(run, source=str(tmp_path / "same.txt"), split="validation")
    assert figures_of(same) == figures_of(evaluate(run))
    # A text other than the training text is evaluated whole; a copy of the training text only on its validation split.
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


def test_a_gpu_precision_becomes_float32_on_a_cpu(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    (checkpoint,) = [path for path in checkpoint_paths(copy / "checkpoints") if path.name == "000010"]
    config, manifest = checkpoint / "config.toml", checkpoint / "manifest.json"
    before = sha256_of(config)
    config.write_text(config.read_text().replace('precision = "auto"', 'precision = "float16"'))
    manifest.write_text(manifest.read_text().replace(before, sha256_of(config)))
    assert find_checkpoint(copy).config.precision == "float16"
    assert figures_of(evaluate(copy, device="cpu")) == figures_of(evaluate(run, device="cpu"))


@pytest.mark.parametrize("tokenizer", ["characters", "bytes"])
def test_a_validation_split_that_may_contain_training_text_is_refused(tmp_path: Path, tokenizer: str) -> None:
    """If the text was edited after training, its validation split may contain text that the model was trained on."""
    text = write_text(tmp_path / "text.txt")
    config = tiny_config(text, data={"tokenizer": tokenizer})
    run = train(config, tmp_path / "run", progress=Quiet())
    content = text.read_text()
    before = evaluate(run)["loss"]
    text.write_text(content[2000:] + content[:2000])
    assert evaluate(run)["loss"] == before  # on the dataset that the run was trained on
    shutil.rmtree(find_prepared(config.data, None)[0])
    with pytest.raises(UserError, match="has changed since the model was trained on it"):
        evaluate(run)


def test_models_and_texts_that_cannot_be_evaluated_are_errors(run: Path, tmp_path: Path) -> None:
    (tmp_path / "greek.txt").write_text("the quick brown fox jumps over λ" * 9)
    with pytest.raises(UserError, match="'λ'"):
        evaluate(run, source=str(tmp_path / "greek.txt"))
    with pytest.raises(UserError, match="split must be validation, train or all, got 'test'"):
        evaluate(run, split="test")
    with pytest.raises(UserError, match="missing does not exist"):
        evaluate(tmp_path / "missing")
