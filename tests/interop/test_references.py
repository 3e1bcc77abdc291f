"""Model references: which checkpoint a string names, what loading returns, and the errors if it names none."""

import contextlib
import dataclasses
import itertools
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import glassgpt
from glassgpt.cli.main import main
from glassgpt.config.schema import TrainConfig
from glassgpt.evaluation.perplexity import evaluate
from glassgpt.interop import references
from glassgpt.interop.hf_models import export_hf
from glassgpt.interop.references import describe, export, find_checkpoint, load
from glassgpt.model.summary import ModelSummary
from glassgpt.runs import checkpoint
from glassgpt.runs.checkpoint import Checkpoint, checkpoint_paths, open_checkpoint, prune_checkpoints
from glassgpt.tokenizers.builtin import BytesTokenizer
from glassgpt.training.run import train
from glassgpt.utils.errors import UserError
from glassgpt.utils.files import sha256_of
from kill_harness import Quiet, edit_state, fast_training, tiny_config, write_text


@pytest.fixture(autouse=True, scope="module")
def fast() -> Iterator[None]:
    """Use one thread for the whole module."""
    with fast_training():
        yield


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run with dropout and checkpoints of steps 3, 6, 9 and 10; that of step 3 has the lowest loss."""
    folder = tmp_path_factory.mktemp("reference")
    losses = iter([9.0, 2.0, 4.0, 3.0, 2.5])
    with pytest.MonkeyPatch.context() as patch:
        evaluate = glassgpt.evaluation.perplexity.evaluate_data
        patch.setattr(
            "glassgpt.training.loop.evaluate_data", lambda *a, **k: {**evaluate(*a, **k), "loss": next(losses)}
        )
        config = tiny_config(
            write_text(folder / "text.txt"),
            model={"dropout": 0.5},
            eval_every=3,
            checkpoint_every=3,
            keep_checkpoints=3,
        )
        return train(config, folder / "run", progress=Quiet())


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    """Return a copy of the finished run, which a test may damage."""
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


def damage(path: Path) -> None:
    """Remove the last byte of a file."""
    path.write_bytes(path.read_bytes()[:-1])


def test_a_reference_can_name_the_newest_the_best_a_step_or_a_directory(run: Path) -> None:
    assert [int(path.name) for path in checkpoint_paths(run / "checkpoints")] == [3, 6, 9, 10]
    expected = {"": 10, "@best": 3, "@6": 6, "@000009": 9, "/checkpoints/000006": 6}
    for suffix, step in expected.items():
        assert find_checkpoint(f"{run}{suffix}").path == run / "checkpoints" / f"{step:06d}"
        assert find_checkpoint(Path(f"{run}{suffix}")).state.step == step


@pytest.mark.parametrize(
    "moment", ["before it is opened", "while it is verified", "before it is loaded", "before its weights are"]
)
def test_if_training_deletes_a_checkpoint_that_is_being_read_a_newer_one_is_read(
    run: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    newest, count = run / "checkpoints" / "000010", 0

    def prune() -> None:
        nonlocal count
        count += 1
        if count == 1:
            edit_state(shutil.copytree(newest, newest.with_name("000012")), step=12)
            prune_checkpoints(newest.parent, 1, None)
            assert not newest.exists()

    def prune_before(action: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            prune()
            return action(*arguments, **options)

        return wrapped

    name = {
        "before it is opened": "open_checkpoint",
        "while it is verified": "sha256_of",
        "before it is loaded": "load_source",
        "before its weights are": "read_tensors",
    }[moment]
    for module in (references, checkpoint):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, prune_before(getattr(module, name)))
    model, _ = load(run)
    assert count >= 2
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_the_newest_readable_state_names_the_best_checkpoint(run: Path) -> None:
    checkpoints = {int(path.name): path for path in checkpoint_paths(run / "checkpoints")}
    damage(checkpoints[6] / "state.json")  # neither the newest nor the best, so it is not read
    assert find_checkpoint(f"{run}@best").state.step == 3
    edit_state(checkpoints[10], best_step=9)
    assert find_checkpoint(f"{run}@best").state.step == 9
    edit_state(checkpoints[10], best_step=None)
    with pytest.raises(UserError, match="no best checkpoint"):
        find_checkpoint(f"{run}@best")


def test_if_no_state_can_be_read_the_best_checkpoint_is_refused_with_the_reason(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = checkpoint_paths(run / "checkpoints")
    for path in paths:
        damage(path / "state.json")
    with pytest.raises(UserError, match=re.escape(f"{paths[0]} is damaged: state.json")):
        find_checkpoint(f"{run}@best")
    listings = iter([paths, paths, []])  # the last one, in which the best step is looked up, finds them pruned
    monkeypatch.setattr(references, "checkpoint_paths", lambda directory: next(listings))
    with pytest.raises(UserError, match="were removed meanwhile"):
        find_checkpoint(f"{run}@best")


def test_the_best_of_a_run_has_the_lowest_validation_loss(run: Path) -> None:
    losses = {int(path.name): Checkpoint(path).state.val_loss for path in checkpoint_paths(run / "checkpoints")}
    evaluated = {step: loss for step, loss in losses.items() if loss is not None}
    assert len(evaluated) > 1
    assert find_checkpoint(f"{run}@best").state.step == min(evaluated, key=evaluated.__getitem__)


def test_a_path_may_contain_an_at_sign(run: Path) -> None:
    moved = run.rename(run.with_name("me@home"))
    assert find_checkpoint(moved).state.step == 10
    assert find_checkpoint(f"{moved}@6").state.step == 6


def test_references_that_name_no_checkpoint_are_errors(run: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "begun").mkdir()
    shutil.copy(run / "config.toml", tmp_path / "begun")
    errors = {
        f"{tmp_path}/missing": "missing does not exist",
        f"{tmp_path}/missing@best": "missing does not exist",
        f"{run}@7": "no checkpoint '7'; it has 3, 6, 9, 10 and best",
        f"{run}@": "names no checkpoint after the @",
        "": "'' is not a model; pass",
        f"{run}@latest": "no checkpoint 'latest'; it has",
        f"{tmp_path}/photos": "neither a run nor a checkpoint",
        f"{tmp_path}": f"name a run in it, such as {tmp_path}/begun",
        f"{tmp_path}/begun": "has no checkpoint yet",
        f"{run}/config.toml": "is not a model",
    }
    for reference, message in errors.items():
        with pytest.raises(UserError, match=message):
            find_checkpoint(reference)


def test_a_damaged_newest_checkpoint_is_reported_and_the_previous_one_is_used(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(run / "checkpoints" / "000010" / "model.safetensors")
    assert find_checkpoint(run).state.step == 9
    assert "000010 is damaged: model.safetensors" in capsys.readouterr().err
    for reference in (f"{run}@10", f"{run}/checkpoints/000010"):
        with pytest.raises(UserError, match=r"000010 is damaged: model\.safetensors"):
            find_checkpoint(reference)


@pytest.mark.parametrize("name", ["model.safetensors", "state.json", "config.toml"])
def test_a_damaged_best_checkpoint_is_an_error(run: Path, name: str) -> None:
    damage(run / "checkpoints" / "000003" / name)
    with pytest.raises(UserError, match=f"000003 is damaged: {name}"):
        find_checkpoint(f"{run}@best")


def test_a_run_with_only_damaged_checkpoints_is_an_error(run: Path) -> None:
    for path in checkpoint_paths(run / "checkpoints"):
        (path / "state.json").unlink()
    for reference in (str(run), f"{run}@best", f"{run}@6"):
        with pytest.raises(UserError, match=r"whole|damaged"):
            find_checkpoint(reference)


def test_load_returns_the_model_in_evaluation_mode_and_its_tokenizer(run: Path) -> None:
    model, tokenizer = load(f"{run}@6")
    assert not model.training
    assert glassgpt.load is load
    weights = safetensors.torch.load_file(run / "checkpoints" / "000006" / "model.safetensors")
    assert all(torch.equal(parameter, weights[name]) for name, parameter in model.named_parameters())
    assert tokenizer is not None
    ids = torch.from_numpy(tokenizer.encode("the quick"))[None]
    logits = model(ids)
    assert logits.shape == (1, 9, tokenizer.vocab_size)
    assert torch.equal(logits, model(ids))  # dropout, 0.5 in this run, is disabled
    assert tokenizer.decode(ids[0].tolist()) == "the quick"


def test_an_unavailable_device_is_an_error(run: Path) -> None:
    with pytest.raises(UserError, match="'cuda:99'"):
        load(run, device="cuda:99")
    with pytest.raises(UserError, match="'abacus'"):
        load(run, device="abacus")


def test_weights_are_hashed_only_if_they_are_loaded(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`info` hashes no weights, `@best` those of one checkpoint, and all parts of `eval` together those of one."""
    hashed: list[str] = []

    def recorded_hash(path: Path) -> str:
        hashed.append(f"{path.parent.name}/{path.name}")
        return sha256_of(path)

    monkeypatch.setattr(checkpoint, "sha256_of", recorded_hash)
    for reference in (str(run), f"{run}@best", f"{run}@6"):
        describe(reference)
    assert hashed == []
    load(f"{run}@best")
    assert hashed.count("000003/model.safetensors") == 1
    assert {name.split("/")[0] for name in hashed} == {"000003"}
    hashed.clear()
    item = {"activity_label": "a", "ctx": "the quick", "endings": ["brown", "fox", "jumps", "over"], "label": 0}
    (run / "items.jsonl").write_text(json.dumps(item) + "\n")
    # The other style needs a colon, which the characters of this text do not include.
    monkeypatch.setattr("glassgpt.evaluation.hellaswag.STYLES", ("build-nanogpt",))
    monkeypatch.setattr("glassgpt.cli.evaluate._hellaswag_table", str)  # the table needs both styles
    assert main(["eval", str(run), "--hellaswag", "--hellaswag-file", str(run / "items.jsonl")]) == 0
    assert [name for name in hashed if name.endswith("model.safetensors")] == ["000010/model.safetensors"]


def test_the_description_contains_the_figures_of_the_checkpoint(run: Path) -> None:
    text, parameters = describe(f"{run}@6"), ModelSummary(find_checkpoint(run).config.model).parameters
    for figure in (
        str(run / "checkpoints" / "000006"),
        "384 tokens seen",
        "4.0000 nats",
        "text.txt",
        "characters",
        f"{parameters:,}",
    ):
        assert figure in text, figure


# --- fine-tuning ------------------------------------------------------------------------------------------------------


def fine_tune(source: Path, out: Path, **changes: Any) -> tuple[Path, TrainConfig]:
    """Train one step from a source model; return the run and the config of its checkpoint."""
    text = write_text(out.with_name("other.txt"), seed=5)
    run = train(tiny_config(text, init_from=str(source), steps=1, **changes), out, progress=Quiet())
    return run, open_checkpoint(run / "checkpoints" / "000001").config


def test_fine_tuning_starts_from_the_source_weights_with_a_cropped_context(run: Path, tmp_path: Path) -> None:
    """A learning rate of 1e-12 keeps the weights to 1e-9: they equal the source's, without the cropped positions."""
    no_learning = {"optim": {"lr": 1e-12, "warmup_steps": 0}}
    tuned, config = fine_tune(
        run, tmp_path / "tuned", model={"context_length": 8, "n_layer": 7, "dropout": 0.25}, **no_learning
    )
    assert config.model == dataclasses.replace(find_checkpoint(run).config.model, context_length=8, dropout=0.25)
    (before, _), (after, _) = load(run), load(tuned)
    weights = dict(before.named_parameters())
    for name, parameter in after.named_parameters():
        cropped = name == "positions.table.weight"
        assert parameter.shape[0] == (8 if cropped else weights[name].shape[0])
        torch.testing.assert_close(parameter, weights[name][: parameter.shape[0]], rtol=0, atol=1e-9)


def test_fine_tuning_cannot_lengthen_the_context(run: Path, tmp_path: Path) -> None:
    _, config = fine_tune(run, tmp_path / "tuned", model={"context_length": 32})
    assert config.model.context_length == 16


def test_fine_tuning_uses_the_tokenizer_of_the_source(run: Path, tmp_path: Path) -> None:
    """The new text has fewer characters, so a vocabulary of its own would give other ids."""
    (tmp_path / "few.txt").write_text("the fox\n" * 200)
    config = tiny_config(tmp_path / "few.txt", init_from=f"{run}@best", steps=1)
    tuned = train(config, tmp_path / "tuned", progress=Quiet())
    (_, before), (_, after) = load(run), load(tuned)
    assert before is not None
    assert after is not None
    assert after.to_json() == before.to_json()


@pytest.mark.parametrize("window", [None, 12])
def test_fine_tuning_starts_from_a_hugging_face_model(window: int | None, tmp_path: Path) -> None:
    """The weights, the tokenizer and the shape are those of the Llama or Mistral directory.

    The context is shorter here, so that a window of 12 tokens covers it and is dropped.
    """
    text = write_text(tmp_path / "text.txt")
    shape: dict[str, Any] = {
        "norm": "rmsnorm",
        "activation": "swiglu",
        "position": "rope",
        "n_kv_head": 1,
        "window": window,
        "bias": False,
    }
    source = train(tiny_config(text, steps=2, model=shape), tmp_path / "source", progress=Quiet())
    assert export(source, tmp_path / "hf") == ("Llama" if window is None else "Mistral")
    no_learning = {"optim": {"lr": 1e-12, "warmup_steps": 0}}
    tuned, config = fine_tune(tmp_path / "hf", tmp_path / "tuned", model={"context_length": 8}, **no_learning)
    assert (config.model.context_length, config.model.window, config.model.resolved_n_kv_head) == (8, None, 1)
    (before, expected_tokenizer), (after, tokenizer) = load(source), load(tuned)
    assert expected_tokenizer is not None
    assert tokenizer is not None
    assert tokenizer.to_json() == expected_tokenizer.to_json()
    for name, parameter in after.named_parameters():
        torch.testing.assert_close(parameter, before.get_parameter(name), rtol=0, atol=1e-9)
    figures = evaluate(tmp_path / "hf", source=str(text), split="all")
    assert figures["loss"] == pytest.approx(evaluate(source, source=str(text), split="all")["loss"], rel=1e-6)


def test_evaluating_a_model_without_a_run_needs_a_text_and_a_tokenizer(tmp_path: Path) -> None:
    text = write_text(tmp_path / "text.txt")
    source = train(tiny_config(text, steps=1), tmp_path / "source", progress=Quiet())
    export(source, tmp_path / "hf")
    with pytest.raises(UserError, match="--data"):
        evaluate(tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").unlink()
    for function in (
        lambda: evaluate(tmp_path / "hf", source=str(text)),
        lambda: fine_tune(tmp_path / "hf", tmp_path / "tuned"),
    ):
        with pytest.raises(UserError, match="has no tokenizer"):
            function()


def test_an_export_does_not_overwrite_files(run: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty"):
        export(run, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_an_export_may_write_into_an_existing_directory_without_files(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The directory is behind a link and has files of an interrupted export, or it is the current one.

    All files have the same mode.
    """
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / ".partial-.export").mkdir()
    (tmp_path / "here" / ".partial-.export" / "model.safetensors").touch()
    (tmp_path / "link").symlink_to(tmp_path / "here")
    assert export(run, tmp_path / "link") == "GPT2"
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "there")
    export(run, ".")
    for folder in (tmp_path / "here", Path()):
        names = sorted(path.name for path in folder.iterdir())
        assert names == [
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
        ]
        assert len({path.stat().st_mode for path in folder.iterdir()}) == 1
        load(folder.resolve())


def test_padding_above_the_models_ids_does_not_prevent_loading(run: Path, tmp_path: Path) -> None:
    """No text becomes a special token, unlike other added tokens."""
    export(run, tmp_path / "hf")
    model, tokenizer = load(tmp_path / "hf")
    assert tokenizer is not None
    content = json.loads(tokenizer.to_hugging_face())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    for is_special in (True, False):
        token = {"id": model.vocab_size, "content": "<pad>", "special": is_special, **flags}
        (tmp_path / "hf" / "tokenizer.json").write_text(json.dumps({**content, "added_tokens": [token]}))
        if is_special:
            _, padded = load(tmp_path / "hf")
            assert padded is not None
            assert padded.vocab_size == model.vocab_size + 1
            tuned, _ = load(fine_tune(tmp_path / "hf", tmp_path / "tuned")[0])
            assert tuned.vocab_size == model.vocab_size
        else:
            with pytest.raises(UserError, match=f"{model.vocab_size + 1} ids and the model {model.vocab_size}"):
                load(tmp_path / "hf")


@pytest.mark.parametrize("moves", range(6))
def test_an_export_that_was_killed_can_be_repeated(
    run: Path, tmp_path: Path, moves: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was killed while its files were moved into the directory; the next one has fewer files."""
    out, move, count = tmp_path / "out", Path.replace, itertools.count()
    out.mkdir()

    def killed(self: Path, target: Path) -> Path:
        if next(count) == moves:
            raise KeyboardInterrupt
        return move(self, target)

    with monkeypatch.context() as patched, contextlib.suppress(KeyboardInterrupt):
        patched.setattr(Path, "replace", killed)
        export(run, out)
    assert (out / "config.json").exists() is (moves >= 5)
    if moves < 5:
        export_hf(load(run)[0], None, out)
        assert sorted(path.name for path in out.iterdir()) == [
            "config.json",
            "generation_config.json",
            "model.safetensors",
        ]


def test_a_tokenizer_of_another_model_is_refused(run: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").write_text(BytesTokenizer().to_json())
    reason = r"tokenizer has 256 ids and the model \d+"
    for function in (lambda: load(tmp_path / "hf"), lambda: fine_tune(tmp_path / "hf", tmp_path / "tuned")):
        with pytest.raises(UserError, match=reason):
            function()
    assert not (tmp_path / "tuned").exists()
    assert "do not match" in describe(tmp_path / "hf")
