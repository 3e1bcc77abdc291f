"""A model reference is one string: which checkpoint it names, what loading it gives, and what it says when it names
none.
"""

import dataclasses
import json
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
from glassgpt.interop.references import describe, export, find_checkpoint, load
from glassgpt.model.summary import ModelSummary
from glassgpt.runs import checkpoint
from glassgpt.runs.checkpoint import Checkpoint, checkpoint_paths, open_checkpoint, prune_checkpoints
from glassgpt.tokenizers.builtin import BytesTokenizer
from glassgpt.training.run import train
from glassgpt.utils.errors import UserError
from glassgpt.utils.files import sha256_of
from kill_harness import Quiet, fast_training, tiny_config, write_text


@pytest.fixture(autouse=True, scope="module")
def light() -> Iterator[None]:
    """One thread for the whole file."""
    with fast_training():
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with dropout and checkpoints of steps 3, 6, 9 and 10, the first of them evaluated as best."""
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
def run(made: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(made, tmp_path / "run"))


def tell(checkpoint: Path, best_step: int | None) -> None:
    """Have a checkpoint take another step for the best, and give the manifest the new sum."""
    state, manifest = (json.loads((checkpoint / name).read_text()) for name in ("state.json", "manifest.json"))
    (checkpoint / "state.json").write_text(json.dumps({**state, "best_step": best_step}))
    manifest["sha256"]["state.json"] = sha256_of(checkpoint / "state.json")
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def test_a_reference_names_the_newest_the_best_a_step_or_a_directory(run: Path) -> None:
    assert [int(path.name) for path in checkpoint_paths(run / "checkpoints")] == [3, 6, 9, 10]
    expected = {"": 10, "@best": 3, "@6": 6, "@000009": 9, "/checkpoints/000006": 6}
    for suffix, step in expected.items():
        assert find_checkpoint(f"{run}{suffix}").path == run / "checkpoints" / f"{step:06d}"
        assert find_checkpoint(Path(f"{run}{suffix}")).state.step == step


@pytest.mark.parametrize("moment", ["before it is opened", "while it is verified", "before it is loaded"])
def test_a_checkpoint_that_training_prunes_meanwhile_is_replaced_by_a_newer_one(
    run: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    newest, count = run / "checkpoints" / "000010", 0

    def prune() -> None:
        nonlocal count
        count += 1
        if count == 1:
            shutil.copytree(newest, newest.with_name("000012"))
            prune_checkpoints(newest.parent, 1, None)
            assert not newest.exists()

    def first(action: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            prune()
            return action(*arguments, **options)

        return wrapped

    name = {
        "before it is opened": "open_checkpoint",
        "while it is verified": "sha256_of",
        "before it is loaded": "load_source",
    }[moment]
    for module in (references, checkpoint):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, first(getattr(module, name)))
    model, _ = load(run)
    assert count >= 2
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_the_newest_readable_state_names_the_best_checkpoint(run: Path) -> None:
    checkpoints = {int(path.name): path for path in checkpoint_paths(run / "checkpoints")}
    damage(checkpoints[6] / "state.json")  # neither the newest nor the best: nobody needs it
    assert find_checkpoint(f"{run}@best").state.step == 3
    tell(checkpoints[10], best_step=9)
    assert find_checkpoint(f"{run}@best").state.step == 9
    tell(checkpoints[10], best_step=None)
    with pytest.raises(UserError, match="no best checkpoint"):
        find_checkpoint(f"{run}@best")


def test_the_best_of_a_run_has_the_lowest_validation_loss(run: Path) -> None:
    losses = {int(path.name): Checkpoint(path).state.val_loss for path in checkpoint_paths(run / "checkpoints")}
    evaluated = {step: loss for step, loss in losses.items() if loss is not None}
    assert len(evaluated) > 1
    assert find_checkpoint(f"{run}@best").state.step == min(evaluated, key=evaluated.__getitem__)


def test_a_path_may_have_an_at_sign_in_it(run: Path) -> None:
    moved = run.rename(run.with_name("me@home"))
    assert find_checkpoint(moved).state.step == 10
    assert find_checkpoint(f"{moved}@6").state.step == 6


def test_references_to_nothing_are_errors(run: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "begun").mkdir()
    shutil.copy(run / "config.toml", tmp_path / "begun")
    errors = {
        f"{tmp_path}/missing": "missing does not exist",
        f"{tmp_path}/missing@best": "missing does not exist",
        f"{run}@7": "no checkpoint '7'; it has 3, 6, 9, 10 and best",
        f"{run}@latest": "no checkpoint 'latest'; it has",
        f"{tmp_path}/photos": "neither a run nor a checkpoint",
        f"{tmp_path}/begun": "has no checkpoint yet",
        f"{run}/config.toml": "is not a model",
    }
    for reference, message in errors.items():
        with pytest.raises(UserError, match=message):
            find_checkpoint(reference)


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(
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


def test_only_damaged_checkpoints_are_an_error(run: Path) -> None:
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
    assert torch.equal(logits, model(ids))  # dropout of 0.5 is off
    assert tokenizer.decode(ids[0].tolist()) == "the quick"


def test_an_unavailable_device_is_an_error(run: Path) -> None:
    with pytest.raises(UserError, match="'cuda:99'"):
        load(run, device="cuda:99")
    with pytest.raises(UserError, match="'abacus'"):
        load(run, device="abacus")


def test_weights_are_hashed_only_if_they_are_loaded(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`info` hashes nothing, `@best` one checkpoint, and `eval` in all its parts one."""
    hashed: list[str] = []

    def counting(path: Path) -> str:
        hashed.append(f"{path.parent.name}/{path.name}")
        return sha256_of(path)

    monkeypatch.setattr(checkpoint, "sha256_of", counting)
    for reference in (str(run), f"{run}@best", f"{run}@6"):
        describe(reference)
    assert hashed == []
    load(f"{run}@best")
    assert hashed.count("000003/model.safetensors") == 1
    assert {name.split("/")[0] for name in hashed} == {"000003"}
    hashed.clear()
    item = {"activity_label": "a", "ctx": "the quick", "endings": ["brown", "fox", "jumps", "over"], "label": 0}
    (run / "items.jsonl").write_text(json.dumps(item) + "\n")
    monkeypatch.setattr("glassgpt.evaluation.hellaswag.STYLES", ("build-nanogpt",))  # the text has no colon
    monkeypatch.setattr("glassgpt.cli.evaluate._hellaswag_table", str)  # it shows both styles
    assert main(["eval", str(run), "--hellaswag", "--hellaswag-file", str(run / "items.jsonl")]) == 0
    assert [name for name in hashed if name.endswith("model.safetensors")] == ["000010/model.safetensors"]


def test_the_description_has_the_figures(run: Path) -> None:
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


# --------------------------------------------------------------------------------------------------------- fine-tuning


def fine_tuned(source: Path, out: Path, **changes: Any) -> tuple[Path, TrainConfig]:
    text = write_text(out.with_name("other.txt"), seed=5)
    run = train(tiny_config(text, init_from=str(source), steps=1, **changes), out, progress=Quiet())
    return run, open_checkpoint(run / "checkpoints" / "000001").config


def test_fine_tuning_starts_from_the_weights_with_the_context_cropped(run: Path, tmp_path: Path) -> None:
    """At a rate of nearly nothing one step leaves the weights as they began: the source's, but for the dropped
    positions.
    """
    still = {"optim": {"lr": 1e-12, "warmup_steps": 0}}
    tuned, config = fine_tuned(
        run, tmp_path / "tuned", model={"context_length": 8, "n_layer": 7, "dropout": 0.25}, **still
    )
    assert config.model == dataclasses.replace(find_checkpoint(run).config.model, context_length=8, dropout=0.25)
    (before, _), (after, _) = load(run), load(tuned)
    weights = dict(before.named_parameters())
    for name, parameter in after.named_parameters():
        cropped = name == "positions.table.weight"
        assert parameter.shape[0] == (8 if cropped else weights[name].shape[0])
        torch.testing.assert_close(parameter, weights[name][: parameter.shape[0]], rtol=0, atol=1e-9)


def test_fine_tuning_cannot_lengthen_the_context(run: Path, tmp_path: Path) -> None:
    _, config = fine_tuned(run, tmp_path / "tuned", model={"context_length": 32})
    assert config.model.context_length == 16


def test_fine_tuning_encodes_with_the_sources_tokenizer(run: Path, tmp_path: Path) -> None:
    """The new text has fewer characters; its own vocabulary would give other ids."""
    (tmp_path / "few.txt").write_text("the fox\n" * 200)
    config = tiny_config(tmp_path / "few.txt", init_from=f"{run}@best", steps=1)
    tuned = train(config, tmp_path / "tuned", progress=Quiet())
    (_, before), (_, after) = load(run), load(tuned)
    assert before is not None
    assert after is not None
    assert after.to_json() == before.to_json()


@pytest.mark.parametrize("window", [None, 12])
def test_fine_tuning_starts_from_a_hugging_face_model(window: int | None, tmp_path: Path) -> None:
    """A Llama or Mistral directory: its weights, its tokenizer, its shape but for the context, which may lose the
    window.
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
    still = {"optim": {"lr": 1e-12, "warmup_steps": 0}}
    tuned, config = fine_tuned(tmp_path / "hf", tmp_path / "tuned", model={"context_length": 8}, **still)
    assert (config.model.context_length, config.model.window, config.model.resolved_n_kv_head) == (8, None, 1)
    (before, letters), (after, same) = load(source), load(tuned)
    assert letters is not None
    assert same is not None
    assert same.to_json() == letters.to_json()
    for name, parameter in after.named_parameters():
        torch.testing.assert_close(parameter, before.get_parameter(name), rtol=0, atol=1e-9)
    figures = evaluate(tmp_path / "hf", source=str(text), split="all")
    assert figures["loss"] == pytest.approx(evaluate(source, source=str(text), split="all")["loss"], rel=1e-6)


def test_a_model_without_a_run_needs_a_text(tmp_path: Path) -> None:
    text = write_text(tmp_path / "text.txt")
    source = train(tiny_config(text, steps=1), tmp_path / "source", progress=Quiet())
    export(source, tmp_path / "hf")
    with pytest.raises(UserError, match="--data"):
        evaluate(tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").unlink()
    for use in (
        lambda: evaluate(tmp_path / "hf", source=str(text)),
        lambda: fine_tuned(tmp_path / "hf", tmp_path / "tuned"),
    ):
        with pytest.raises(UserError, match="has no tokenizer"):
            use()


def test_an_export_replaces_nothing(run: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty"):
        export(run, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_an_existing_empty_directory_is_filled(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the user stands, behind a link, after a kill that left a part behind; and all files have the same mode."""
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


def test_a_tokenizer_of_another_model_is_refused(run: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").write_text(BytesTokenizer().to_json())
    reason = r"tokenizer has 256 ids and the model \d+"
    for use in (lambda: load(tmp_path / "hf"), lambda: fine_tuned(tmp_path / "hf", tmp_path / "tuned")):
        with pytest.raises(UserError, match=reason):
            use()
    assert not (tmp_path / "tuned").exists()
    assert "do not match" in describe(tmp_path / "hf")
