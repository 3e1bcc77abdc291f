"""Loggers: TensorBoard and W&B contain what a run recorded, each step once, and never affect the run.

Their logs are read by their own libraries or from their files.
"""

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
def fast_and_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Train fast, offline, and without the user's W&B settings."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "wandb-home"))
    with fast_training():
        yield


def lose_last_checkpoint(run: Path) -> None:
    """Remove the last checkpoint, as if the run had been killed after that of step 5."""
    shutil.rmtree(run / "checkpoints" / "000010")


def expected_numbers(run: Path) -> dict[str, dict[int, float]]:
    """Return the numbers in the run's records by name and step."""
    numbers: dict[str, dict[int, float]] = {}
    for record in records_of(run):
        for name, value in numbers_of(record):
            numbers.setdefault(name, {})[record["step"]] = value
    return numbers


def test_tensorboard_contains_each_step_once_even_after_a_kill(tmp_path: Path, text: Path) -> None:
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
        # TensorBoard stores float32.
        assert [value for _, value in reported] == pytest.approx(list(by_step.values()), rel=1e-6), name
    samples = {
        event.step: event.tensor_proto.string_val[0].decode() for event in events.Tensors("samples/1/text_summary")
    }
    assert list(samples) == [0, 5, 10]
    assert samples[10] in (run / "samples.md").read_text()
    assert 'log = "tensorboard"' in events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()


def wandb_records(path: Path) -> Iterator[Record]:
    """Yield the records of a `.wandb` file.

    It has a header of 7 bytes and LevelDB's log format: blocks of 32 KiB with (checksum, length, type, data).
    """
    data, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 0 < (rest := -at % 32768) < 7:
            at += rest
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        if not kind or at + 7 + length > len(data):  # padding at the end, or a record that is still being written
            return
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a complete record, or the last part of one
            yield Record.FromString(parts)
            parts = b""


def finished_records(path: Path) -> list[Record]:
    """Return the records of a finished run, after W&B's process has written the last one."""
    give_up = time.monotonic() + 60
    while not (records := list(wandb_records(path))) or not records[-1].HasField("exit"):
        assert time.monotonic() < give_up, f"{path} has no end"
        time.sleep(0.05)
    return records


def test_wandb_contains_the_records_and_a_resumed_run_has_the_same_id(tmp_path: Path, text: Path) -> None:
    run = train(tiny_config(text, log="wandb"), tmp_path / "run", progress=Quiet())
    expected = expected_numbers(run)
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
                    if name in expected:
                        steps.setdefault(name, {})[items["_step"]] = value
        reported.append(steps)
    assert names == {((run / "wandb" / "glassgpt-id").read_text(), "run", "glassgpt")}
    assert reported[0] == expected
    assert reported[1]["train/loss"] == {step: loss for step, loss in expected["train/loss"].items() if step > 5}
    assert reported[1]["val/loss"].keys() == {10}


@pytest.mark.parametrize("log", ["tensorboard", "wandb", "both"])
def test_a_missing_library_is_an_error_before_anything_is_written(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, log: str
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'glassgpt\[log\]'"):
        train(tiny_config(text, log=log), tmp_path / "run", progress=Quiet())
    assert not (tmp_path / "run").exists()


def test_a_folder_with_the_name_of_a_library_does_not_count_as_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """W&B creates a folder `wandb` in the working directory, which Python imports as a package without files."""
    for library in ("tensorboard", "wandb"):
        (tmp_path / library).mkdir()
        monkeypatch.delitem(sys.modules, library)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for log in ("tensorboard", "wandb"):
        with pytest.raises(UserError, match=f"needs {log}, which is not installed"):
            log_targets.require_loggers(log)


def test_an_error_of_wandbs_setup_becomes_a_user_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("mode is none of ours\nand much more")

    monkeypatch.setattr("wandb.setup", fail)
    with pytest.raises(UserError, match=r"cannot be set up \(mode is none of ours\)"):
        log_targets.require_loggers("wandb")


class ResumedWandbRun:
    """A stand-in for a W&B run that already contains the steps before 8."""

    starting_step, disabled, offline, url = 8, False, False, "https://example.org"

    def __init__(self) -> None:
        self.steps: list[int] = []

    def log(self, numbers: object, step: int) -> None:
        self.steps.append(step)


def test_steps_that_wandb_already_contains_are_not_logged_again(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb_run = ResumedWandbRun()
    monkeypatch.setattr("wandb.init", lambda **options: wandb_run)
    target = log_targets.WeightsAndBiases(RunDirectory(tmp_path), tiny_config(text), 6)
    for step in (6, 7, 8, 9):
        target.write(step, {"train/loss": 1.0})
        target.write_samples(step, ["a"])
    assert wandb_run.steps == [8, 8, 9, 9]


def test_the_displayed_place_says_if_wandb_is_disabled(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in replaces the W&B run, because W&B reads WANDB_MODE only once per process."""
    wandb_run = ResumedWandbRun()
    wandb_run.disabled = True
    monkeypatch.setattr("wandb.init", lambda **options: wandb_run)
    assert "WANDB_MODE" in log_targets.WeightsAndBiases(RunDirectory(tmp_path), tiny_config(text), 0).place


def test_booleans_are_not_logged() -> None:
    assert dict(numbers_of({"step": 1, "val_loss": 2, "hellaswag_published": True})) == {"val/loss": 2.0}


def test_without_a_key_wandb_is_refused_before_anything_is_written(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("glassgpt.training.loggers._is_online", lambda: True)
    monkeypatch.setattr("wandb.login", lambda **options: False)
    with pytest.raises(UserError, match="WANDB_MODE=offline"):
        train(tiny_config(text, log="wandb"), tmp_path / "run", progress=Quiet())
    assert not (tmp_path / "run").exists()


def test_no_logging_library_is_imported_without_log(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for library in ("tensorboard", "torch.utils.tensorboard", "wandb"):
        monkeypatch.setitem(sys.modules, library, None)  # importing it raises an error
    train(tiny_config(text, steps=1), tmp_path / "run", progress=Quiet())


class FailingLogger:
    """A logger that fails at its fifth call."""

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


class UnopenableLogger(FailingLogger):
    """A logger that cannot be opened."""

    def __init__(self, run: RunDirectory, config: TrainConfig, first_step: int) -> None:
        raise RuntimeError("no route to host\nand much more")


@pytest.mark.parametrize(
    ("target", "reason"), [(FailingLogger, "No space left on device"), (UnopenableLogger, "no route to host")]
)
def test_a_failing_logger_gives_one_warning_and_does_not_change_the_run(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, target: type[FailingLogger], reason: str
) -> None:
    monkeypatch.setitem(log_targets._OPENERS, "tensorboard", ("TensorBoard", target))
    progress = Quiet()
    run = train(tiny_config(text, log="tensorboard"), tmp_path / "run", progress=progress)
    warnings = [message for message in progress.messages if message.startswith("warning: TensorBoard failed")]
    assert len(warnings) == 1
    assert reason in warnings[0]
    without_log = train(tiny_config(text), tmp_path / "quiet", progress=Quiet())
    assert set(differences(run, without_log)) <= {"config.toml"}


def test_a_resumed_run_may_change_its_logger_and_keeps_it(tmp_path: Path, text: Path) -> None:
    run = train(tiny_config(text), tmp_path / "run", progress=Quiet())
    resume(run, steps=12, log="tensorboard", progress=Quiet())
    assert RunDirectory(run).read_config().log == "tensorboard"
    resume(run, steps=14, progress=Quiet())
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [11, 12, 13, 14]
    train(tiny_config(text), run, overwrite=True, progress=Quiet())
    assert not (run / "tensorboard").exists()
