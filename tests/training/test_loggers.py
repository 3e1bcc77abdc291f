"""Log targets, read back by their own libraries or from their files: what a run recorded, each step once, and never in
its way."""

import json
import shutil
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto.wandb_internal_pb2 import Record

from glassgpt.config.schema import TrainConfig
from glassgpt.runs.run_directory import RunDirectory
from glassgpt.training import loggers as log_targets
from glassgpt.training.loggers import numbers_of
from glassgpt.training.run import resume, train
from glassgpt.utils.errors import UserError
from kill_harness import Quiet, differences, fast_training, records_of, tiny_config


@pytest.fixture(autouse=True)
def light(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No test is slow, online, or in anybody's own W&B settings."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "wandb-home"))
    with fast_training():
        yield


def lose_last_checkpoint(run: Path) -> None:
    """As if the run had been killed at its end, with step 5 the last that was saved."""
    shutil.rmtree(run / "checkpoints" / "000010")


def expected_numbers(run: Path) -> dict[str, dict[int, float]]:
    """Name -> step -> number, by the run's own records."""
    found: dict[str, dict[int, float]] = {}
    for record in records_of(run):
        for name, value in numbers_of(record):
            found.setdefault(name, {})[record["step"]] = value
    return found


def test_tensorboard_has_each_step_once_after_a_kill_too(tmp_path: Path, text: Path) -> None:
    run = train(tiny_config(text, log="tensorboard"), tmp_path / "run", progress=Quiet())
    lose_last_checkpoint(run)
    resume(run, progress=Quiet())
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    expected = expected_numbers(run)
    assert {
        "train/loss",
        "train/lr",
        "train/tokens_seen",
        "val/bits_per_byte",
        "grad_norms/embedding",
        "weight_norms/norms",
    } <= expected.keys()
    assert set(events.Tags()["scalars"]) == expected.keys()
    for name, by_step in expected.items():
        reported = [(event.step, event.value) for event in events.Scalars(name)]
        assert [step for step, _ in reported] == list(by_step), name
        assert [value for _, value in reported] == pytest.approx(list(by_step.values()), rel=1e-6), (
            name
        )  # float32 there
    samples = {
        event.step: event.tensor_proto.string_val[0].decode() for event in events.Tensors("samples/1/text_summary")
    }
    assert list(samples) == [0, 5, 10]
    assert samples[10] in (run / "samples.md").read_text()
    assert 'log = "tensorboard"' in events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()


def wandb_records(path: Path) -> Iterator[Record]:
    """The records of a `.wandb` file: LevelDB's log format, blocks of 32 KiB of (checksum, length, type, data), behind
    7 bytes."""
    data, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 0 < (rest := -at % 32768) < 7:
            at += rest
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        if not kind or at + 7 + length > len(data):  # zeros up to the end, or still being written
            return
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(parts)
            parts = b""


def finished_records(path: Path) -> list[Record]:
    """All of a finished run's: W&B's process writes the last ones while ours has gone on."""
    give_up = time.monotonic() + 60
    while not (records := list(wandb_records(path))) or not records[-1].HasField("exit"):
        assert time.monotonic() < give_up, f"{path} has no end"
        time.sleep(0.05)
    return records


def test_wandb_has_what_the_run_recorded_and_a_run_that_goes_on_is_the_same_one(tmp_path: Path, text: Path) -> None:
    run = train(tiny_config(text, log="wandb"), tmp_path / "run", progress=Quiet())
    whole = expected_numbers(run)
    lose_last_checkpoint(run)
    resume(run, progress=Quiet())
    reported: list[dict[str, dict[int, float]]] = []
    names = set()
    for path in sorted((run / "wandb").glob("offline-run-*/*.wandb")):
        steps: dict[str, dict[int, float]] = {}
        for record in finished_records(path):
            if record.HasField("run"):
                names.add((record.run.run_id, record.run.display_name, record.run.project))
            if record.HasField("history"):
                items = {
                    item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item
                }
                for name, value in items.items():
                    if name in whole:
                        steps.setdefault(name, {})[items["_step"]] = value
        reported.append(steps)
    assert names == {((run / "wandb" / "glassgpt-id").read_text(), "run", "glassgpt")}
    assert reported[0] == whole
    assert reported[1]["train/loss"] == {step: loss for step, loss in whole["train/loss"].items() if step > 5}
    assert reported[1]["val/loss"].keys() == {10}


@pytest.mark.parametrize("log", ["tensorboard", "wandb", "both"])
def test_a_missing_library_is_told_before_anything_is_written(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, log: str
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'glassgpt\[log\]'"):
        train(tiny_config(text, log=log), tmp_path / "run", progress=Quiet())
    assert not (tmp_path / "run").exists()


def test_a_folder_of_its_name_is_no_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """W&B itself makes a folder `wandb` where it runs, which Python takes for a package without files."""
    for library in ("tensorboard", "wandb"):
        (tmp_path / library).mkdir()
        monkeypatch.delitem(sys.modules, library)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for log in ("tensorboard", "wandb"):
        with pytest.raises(UserError, match=f"needs {log}, which is not installed"):
            log_targets.require_loggers(log)


def test_settings_that_wandb_cannot_read_are_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("mode is none of ours\nand much more")

    monkeypatch.setattr("wandb.setup", fail)
    with pytest.raises(UserError, match=r"cannot be set up \(mode is none of ours\)"):
        log_targets.require_loggers("wandb")


class Told:
    """A run of W&B that has the steps before 8."""

    starting_step, disabled, offline, url = 8, False, False, "https://example.org"

    def __init__(self) -> None:
        self.steps: list[int] = []

    def log(self, numbers: object, step: int) -> None:
        self.steps.append(step)


def test_what_wandb_has_is_not_told_again(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reported = Told()
    monkeypatch.setattr("wandb.init", lambda **options: reported)
    target = log_targets.WeightsAndBiases(RunDirectory(tmp_path), tiny_config(text), 6)
    for step in (6, 7, 8, 9):
        target.write(step, {"train/loss": 1.0})
        target.write_samples(step, ["a"])
    assert reported.steps == [8, 8, 9, 9]


def test_wandb_switched_off_says_so(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for its run, since W&B reads WANDB_MODE once a process."""
    reported = Told()
    reported.disabled = True
    monkeypatch.setattr("wandb.init", lambda **options: reported)
    assert "WANDB_MODE" in log_targets.WeightsAndBiases(RunDirectory(tmp_path), tiny_config(text), 0).place


def test_truth_values_are_no_numbers() -> None:
    assert dict(numbers_of({"step": 1, "val_loss": 2, "hellaswag_published": True})) == {"val/loss": 2.0}


def test_without_a_key_wandb_is_refused_before_anything_is_written(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("glassgpt.training.loggers._is_online", lambda: True)
    monkeypatch.setattr("wandb.login", lambda **options: False)
    with pytest.raises(UserError, match="WANDB_MODE=offline"):
        train(tiny_config(text, log="wandb"), tmp_path / "run", progress=Quiet())
    assert not (tmp_path / "run").exists()


def test_neither_library_is_imported_unless_asked(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for library in ("tensorboard", "torch.utils.tensorboard", "wandb"):
        monkeypatch.setitem(sys.modules, library, None)  # whose import fails
    train(tiny_config(text, steps=1), tmp_path / "run", progress=Quiet())


class Failing:
    """A target that fails at one of its calls."""

    place = "nowhere"

    def __init__(self, run: RunDirectory, config: TrainConfig, first_step: int) -> None:
        self.calls: list[str] = []

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if len(self.calls) > 4:
            raise OSError(28, "No space left on device")

    def write(self, step: int, numbers: Any) -> None:
        self._call("write")

    def write_samples(self, step: int, samples: Any) -> None:
        self._call("write_samples")

    def flush(self) -> None:
        self._call("flush")

    def close(self, failed: bool) -> None:
        self._call("close")


class Unopened(Failing):
    """One that cannot even be opened."""

    def __init__(self, run: RunDirectory, config: TrainConfig, first_step: int) -> None:
        raise RuntimeError("no route to host\nand much more")


@pytest.mark.parametrize(("target", "reason"), [(Failing, "No space left on device"), (Unopened, "no route to host")])
def test_a_target_that_fails_is_told_of_once_and_changes_nothing(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, target: type[Failing], reason: str
) -> None:
    monkeypatch.setitem(log_targets._OPENERS, "tensorboard", ("TensorBoard", target))
    progress = Quiet()
    run = train(tiny_config(text, log="tensorboard"), tmp_path / "run", progress=progress)
    warnings = [message for message in progress.messages if message.startswith("warning: TensorBoard failed")]
    assert len(warnings) == 1
    assert reason in warnings[0]
    quiet = train(tiny_config(text), tmp_path / "quiet", progress=Quiet())
    assert set(differences(run, quiet)) <= {"config.toml"}


def test_a_resumed_run_may_log_elsewhere_and_lasts(tmp_path: Path, text: Path) -> None:
    run = train(tiny_config(text), tmp_path / "run", progress=Quiet())
    resume(run, steps=12, log="tensorboard", progress=Quiet())
    assert RunDirectory(run).read_config().log == "tensorboard"
    resume(run, steps=14, progress=Quiet())
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [11, 12, 13, 14]
    train(tiny_config(text), run, overwrite=True, progress=Quiet())
    assert not (run / "tensorboard").exists()
