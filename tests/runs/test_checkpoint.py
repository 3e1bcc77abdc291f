"""Checkpoints: complete or absent, verified before use, and equal to the saved state."""

import dataclasses
import errno
import hashlib
import json
import math
import random
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from glassgpt.config.schema import TrainConfig
from glassgpt.distributed.strategies import Strategy
from glassgpt.model.gpt import GPT
from glassgpt.runs.checkpoint import (
    Snapshot,
    TrainingState,
    checkpoint_paths,
    latest_checkpoint,
    open_checkpoint,
    prune_checkpoints,
    save_checkpoint,
    take_snapshot,
)
from glassgpt.tokenizers.builtin import CharacterTokenizer
from glassgpt.training.optim import build_optimizers
from glassgpt.utils.errors import UserError
from glassgpt.utils.threads import in_background
from kill_harness import edit_state, fast_training, tiny_config

FILES = ["config.toml", "manifest.json", "model.safetensors", "optimizer.safetensors", "state.json", "tokenizer.json"]
TOKENIZER = CharacterTokenizer("abcdefgh")


@pytest.fixture(autouse=True)
def fast() -> Iterator[None]:
    """Make saves fast by not flushing them; tests/utils/test_files.py checks the flushes."""
    with fast_training():
        yield


def config_with(**changes: object) -> TrainConfig:
    return tiny_config(Path("text.txt")).override(**{"model": {"vocab_size": 8}, **changes})


class Training:
    """A model with its optimizers, whose updates depend only on the step."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.model = GPT.create(config.model, config.seed)
        self.strategy = Strategy(self.model)
        self.optimizers = build_optimizers(self.strategy, config.optim)
        self.step = 0

    def update(self, steps: int) -> None:
        for _ in range(steps):
            windows = torch.randint(8, (4, 17), generator=torch.Generator().manual_seed(self.step))
            self.model(windows[:, :-1], windows[:, 1:]).backward()
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad()
            self.step += 1

    def save(self, directory: Path, **state: float) -> Path:
        training = TrainingState(step=self.step, **state)  # type: ignore[arg-type]
        return save_checkpoint(directory, self.snapshot(), self.config, TOKENIZER, training)

    def snapshot(self) -> Snapshot:
        snapshot = take_snapshot(self.strategy, self.optimizers)
        assert snapshot is not None
        return snapshot

    def weights(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}


@pytest.fixture(scope="module")
def module_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save checkpoints of steps 1, 2 and 3 once for the whole module; return their directory."""
    directory, training = tmp_path_factory.mktemp("checkpoints"), Training(config_with())
    for _ in range(3):
        training.update(1)
        training.save(directory)
    return directory


@pytest.fixture
def checkpoints(module_checkpoints: Path, tmp_path: Path) -> Path:
    """Copy the checkpoints of steps 1, 2 and 3, so that a test can damage them."""
    return Path(shutil.copytree(module_checkpoints, tmp_path / "checkpoints"))


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ------------------------------------------------------------------------------------------------------------- content


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_training_resumed_from_a_checkpoint_equals_uninterrupted_training(tmp_path: Path, optimizer: str) -> None:
    uninterrupted = Training(config_with(optim={"name": optimizer}))
    uninterrupted.update(3)
    checkpoint = open_checkpoint(uninterrupted.save(tmp_path))
    uninterrupted.update(3)
    resumed = Training(checkpoint.config)
    resumed.update(1)  # other weights and moments, all of which must be replaced
    checkpoint.load_model(resumed.model)
    checkpoint.load_optimizers(resumed.strategy, resumed.optimizers)
    resumed.step = checkpoint.state.step
    resumed.update(3)
    assert equal(resumed.weights(), uninterrupted.weights())


def test_state_config_and_tokenizer_are_restored(tmp_path: Path) -> None:
    training = Training(config_with())
    training.update(2)
    state = TrainingState(
        step=2, val_loss=0.1 + 0.2, best_step=1, best_val_loss=1e-17, scaler={"scale": 2.0, "_growth_tracker": 3}
    )
    path = save_checkpoint(tmp_path, training.snapshot(), training.config, TOKENIZER, state)
    checkpoint = open_checkpoint(path)
    assert path == tmp_path / "000002"
    assert checkpoint.state == state
    assert checkpoint.config == training.config
    assert checkpoint.tokenizer.to_json() == TOKENIZER.to_json()


def test_the_manifest_has_the_sha256_of_every_file(checkpoints: Path) -> None:
    path = checkpoints / "000003"
    assert sorted(file.name for file in path.iterdir()) == FILES
    hashes = json.loads((path / "manifest.json").read_text())["sha256"]
    assert hashes == {
        name: hashlib.sha256((path / name).read_bytes()).hexdigest() for name in FILES if name != "manifest.json"
    }


@pytest.mark.slow
def test_a_compiled_model_is_saved_under_the_names_of_the_uncompiled_one(tmp_path: Path) -> None:
    training = Training(config_with())
    names = set(training.weights())
    training.model.compile(backend="eager")
    training.update(1)
    path = training.save(tmp_path)
    assert set(safetensors.torch.load_file(path / "model.safetensors")) == names
    assert "embedding.weight" in names
    moments = set(safetensors.torch.load_file(path / "optimizer.safetensors"))
    assert moments == {f"{kind}.{name}" for kind in ("step", "exp_avg", "exp_avg_sq") for name in names}


@pytest.mark.parametrize(
    "shape", [{"n_embd": 32}, {"n_layer": 2}, {"tied_head": False}, {"bias": False}, {"context_length": 8}]
)
def test_a_checkpoint_of_another_architecture_is_refused_and_changes_nothing(
    checkpoints: Path, shape: dict[str, object]
) -> None:
    other = Training(config_with(model={"vocab_size": 8, **shape}))
    before = other.weights()
    with pytest.raises(UserError, match=r"000003 is a checkpoint of another architecture: '[a-z0-9_.]+' differs"):
        open_checkpoint(checkpoints / "000003").load_model(other.model)
    assert equal(other.weights(), before)


# --------------------------------------------------------------------------------------------------------------- damage


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


ODD_VALUES: list[Any] = [True, -1, 3.5, 10**18, 10**400, "x", [1], [[1.0]], [["a", "b"]], {"scale": -1.0}, math.inf]


def test_values_that_a_state_cannot_have_are_damage(checkpoints: Path) -> None:
    """Although the manifest has their sha256. Each key gets values of other types, sizes and shapes, or is missing."""
    path = checkpoints / "000003"
    valid: dict[str, list[Any]] = {"recent": [[[1.0, 2.0]]], "val_loss": [3.5, -1, 10**18, math.inf]}
    valid |= {"tokens_seen": [64], "data_fingerprint": ["x"], "best_val_loss": [3.5, -1, 10**18]}
    valid["pending_evaluation"] = [{"scale": -1.0}]
    original = dataclasses.asdict(open_checkpoint(path).state)
    changes = [{key: value} for key in original for value in ODD_VALUES if value not in valid.get(key, [])]
    for change in [*changes, {"unknown": 1}, {"step": 2}]:
        edit_state(path, **{**original, **change})
        with pytest.raises(UserError, match="000003 is damaged"):
            open_checkpoint(path)
    (path / "state.json").unlink()
    with pytest.raises(UserError, match=r"state\.json"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    "content",
    ["", "3", "[]", "{}", "[" * 10**5, "\x00", '{"sha256": []}', '{"sha256": {}}', '{"sha256": {"../x": "0"}}'],
    ids=lambda content: content[:20],
)
def test_a_manifest_that_does_not_name_the_files_is_damage(checkpoints: Path, content: str) -> None:
    (checkpoints / "000003" / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=r"000003 is damaged: manifest\.json"):
        open_checkpoint(checkpoints / "000003")


@pytest.mark.parametrize("damage", [flip_a_bit, truncate, Path.unlink])
@pytest.mark.parametrize("name", FILES)
def test_damage_is_named_and_the_previous_checkpoint_is_used(
    checkpoints: Path, name: str, damage: Callable[[Path], None]
) -> None:
    damage(checkpoints / "000003" / name)
    with pytest.raises(UserError, match="000003") as caught:
        open_checkpoint(checkpoints / "000003")
    assert name == "manifest.json" or name in str(caught.value)
    warnings: list[str] = []
    checkpoint = latest_checkpoint(checkpoints, warnings.append)
    assert checkpoint is not None
    assert checkpoint.path == checkpoints / "000002"
    assert warnings == [f"{caught.value}; trying the one before it"]


def test_every_flipped_bit_is_detected(checkpoints: Path) -> None:
    draw = random.Random(0)
    for name in FILES:
        path = checkpoints / "000003" / name
        content = path.read_bytes()
        for _ in range(40):
            altered = bytearray(content)
            altered[draw.randrange(len(altered))] ^= 1 << draw.randrange(8)
            path.write_bytes(altered)
            with pytest.raises(UserError, match="damaged"):
                open_checkpoint(path.parent)
        path.write_bytes(content)
    open_checkpoint(checkpoints / "000003")


def test_a_directory_of_damaged_checkpoints_is_an_error_and_one_without_returns_none(checkpoints: Path) -> None:
    for path in checkpoint_paths(checkpoints):
        truncate(path / "model.safetensors")
    warnings: list[str] = []
    with pytest.raises(UserError, match="no checkpoint in"):
        latest_checkpoint(checkpoints, warnings.append)
    assert [warning.count("damaged: model.safetensors") for warning in warnings] == [1, 1, 1]
    for folder in (checkpoints / "missing", checkpoints.parent):
        assert latest_checkpoint(folder, warnings.append) is None


def test_the_partial_files_of_a_killed_save_are_not_a_checkpoint(checkpoints: Path) -> None:
    shutil.copytree(checkpoints / "000003", checkpoints / ".partial-000004")
    checkpoint = latest_checkpoint(checkpoints, pytest.fail)
    assert checkpoint is not None
    assert checkpoint.path == checkpoints / "000003"
    with pytest.raises(UserError, match=r"manifest\.json"):
        open_checkpoint(checkpoints)


def test_checkpoints_are_sorted_by_step(tmp_path: Path) -> None:
    """A name that training does not write leads to no checkpoint, or to another one, and an empty directory is none."""
    wrong = ("12", "notes", "0000500", "٠٠٠٥٠٠", "²²²²²²", "9" * 200)
    for name in ("000900", "1000000", "999999", *wrong):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").touch()
    (tmp_path / "999999999").mkdir()
    (tmp_path / "999999998").touch()
    assert [path.name for path in checkpoint_paths(tmp_path)] == ["000900", "999999", "1000000"]


# -------------------------------------------------------------------------------------------------------- failing saves


@pytest.mark.parametrize("when", [0, 1])
@pytest.mark.parametrize("kind", ["os", "safetensors"])
def test_a_full_disk_while_tensors_are_saved_keeps_the_earlier_checkpoints(
    checkpoints: Path, monkeypatch: pytest.MonkeyPatch, when: int, kind: str
) -> None:
    """Safetensors raises its own error with this text on Linux; tests/training/test_resume.py fills a real disk."""
    before = {path: path.read_bytes() for path in checkpoints.rglob("*") if path.is_file()}
    save, calls = safetensors.torch.save_file, iter(range(2))

    def full(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
        if next(calls) == when:
            path.write_bytes(b"only the beginn")
            raise (
                OSError(errno.ENOSPC, "x")
                if kind == "os"
                else SafetensorError("I/O error: No space left on device (os error 28)")
            )
        save(tensors, path)

    monkeypatch.setattr("safetensors.torch.save_file", full)
    training = Training(config_with())
    training.update(4)
    with pytest.raises(UserError, match=r"cannot write .*000004: the disk is full"):
        training.save(checkpoints)
    assert {path: path.read_bytes() for path in checkpoints.rglob("*") if path.is_file()} == before
    assert [path.name for path in sorted(checkpoints.iterdir())] == ["000001", "000002", "000003"]


def test_other_errors_of_safetensors_are_raised_unchanged(checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
        raise SafetensorError("no such luck")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(SafetensorError, match="no such luck"):
        Training(config_with()).save(checkpoints)
    assert not list(checkpoints.glob(".partial-*"))


# ------------------------------------------------------------------------------------------------------------- pruning


@pytest.mark.parametrize(
    ("keep", "best", "kept"),
    [
        (1, None, [60]),
        (2, None, [50, 60]),
        (2, 30, [30, 50, 60]),
        (2, 60, [50, 60]),
        (9, 10, [10, 20, 30, 40, 50, 60]),
        (1, 99, [60]),
    ],
)
def test_the_newest_and_the_best_are_kept(tmp_path: Path, keep: int, best: int | None, kept: list[int]) -> None:
    for step in range(10, 70, 10):
        (tmp_path / f"{step:06d}").mkdir()
        (tmp_path / f"{step:06d}" / "manifest.json").touch()
    for name in (".partial-000070", "000080"):  # an empty one does not count as the newest
        (tmp_path / name).mkdir()
    (tmp_path / "notes").mkdir()
    prune_checkpoints(tmp_path, keep, best)
    assert [int(path.name) for path in checkpoint_paths(tmp_path)] == kept
    assert (tmp_path / "notes").is_dir()
    assert not (tmp_path / ".partial-000070").exists()


# ---------------------------------------------------------------------------------------------------- in the background


def test_a_snapshot_is_written_in_the_background_while_training_continues(tmp_path: Path) -> None:
    """The checkpoint has the weights at the time of the snapshot, although training has made three updates since."""
    training = Training(config_with(optim={"name": "muon"}))
    training.update(2)
    before, go = training.weights(), threading.Event()
    snapshot, state = training.snapshot(), TrainingState(step=2)

    def write() -> None:
        go.wait()
        save_checkpoint(tmp_path, snapshot, training.config, TOKENIZER, state)

    writing = in_background(write, "save")
    training.update(3)
    assert not checkpoint_paths(tmp_path)
    go.set()
    writing.result()
    resumed = Training(config_with(optim={"name": "muon"}))
    checkpoint = open_checkpoint(tmp_path / "000002")
    checkpoint.load_model(resumed.model)
    checkpoint.load_optimizers(resumed.strategy, resumed.optimizers)
    assert equal(resumed.weights(), before)
    resumed.step = 2
    resumed.update(3)
    assert equal(resumed.weights(), training.weights())


def test_a_background_result_waits_for_the_task_and_raises_its_error() -> None:
    finished, go = list[str](), threading.Event()

    def first() -> None:
        go.wait()
        finished.append("first")

    waiting = in_background(first, "save")
    assert not waiting.done()
    with pytest.raises(TimeoutError):
        waiting.result(timeout=0.05)
    go.set()
    waiting.result()
    assert finished == ["first"]

    def fail() -> None:
        raise UserError("the disk is full")

    with pytest.raises(UserError, match="disk is full"):
        in_background(fail, "save").result()
