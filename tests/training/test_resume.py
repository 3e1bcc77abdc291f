"""A resumed run equals an uninterrupted one: after kills, signals, extension, damage or a full disk."""

import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from glassgpt.config.schema import TrainConfig
from glassgpt.data.prepare import find_prepared, prepare
from glassgpt.distributed.group import Ranks
from glassgpt.evaluation.perplexity import evaluate, evaluate_data
from glassgpt.model.gpt import GPT
from glassgpt.runs.checkpoint import checkpoint_paths, latest_checkpoint, open_checkpoint
from glassgpt.runs.metrics import MetricsWriter
from glassgpt.runs.run_directory import RunDirectory
from glassgpt.training import run as run_module
from glassgpt.training import setup
from glassgpt.training.interrupts import NOTICE
from glassgpt.training.optim import lr_at
from glassgpt.training.run import resume, train
from glassgpt.utils.device import describe_environment, find_precision
from glassgpt.utils.errors import UserError, program
from kill_harness import SENTENCE, Quiet, differences, fast_training, records_of, tiny_config, write_text

HARNESS = Path(__file__).parents[1] / "kill_harness.py"


@pytest.fixture(autouse=True)
def fast() -> Iterator[None]:
    """Train without flushing to disk, because no test here kills this process."""
    with fast_training():
        yield


class CrashError(Exception):
    """Stops a run in the middle."""


class CrashAt(Quiet):
    """Crashes the run after an update, before it evaluates or saves."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.at = step

    def step(self, record: Any) -> None:
        if record["step"] == self.at:
            raise CrashError


def crash(config: TrainConfig, out: Path, step: int) -> Path:
    """Train a run that crashes at this step, and return it."""
    with pytest.raises(CrashError):
        train(config, out, progress=CrashAt(step))
    return out


def train_uninterrupted(config: TrainConfig, out: Path) -> Path:
    """Train a whole run and return it."""
    return train(config, out, progress=Quiet())


def contents(run: Path) -> dict[str, bytes]:
    """Return the bytes of all files by their relative path."""
    return {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}


def truncate(path: Path) -> None:
    """Remove the last byte of a file."""
    path.write_bytes(path.read_bytes()[:-1])


# --- kills ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.linux
def test_a_run_killed_twenty_times_equals_an_uninterrupted_one() -> None:
    """SIGKILLs come at random times, some during a save. If the test fails, it prints the seed of the times."""
    result = subprocess.run(
        [sys.executable, str(HARNESS), "--kills", "20"], capture_output=True, text=True, timeout=200
    )
    print(result.stdout, result.stderr)
    assert result.returncode == 0
    outcome = json.loads(result.stdout.splitlines()[-1])
    assert outcome["kills"] >= 20
    assert outcome["in_save"] >= 5  # a `.partial-` directory without the final one remained
    assert outcome["in_probe"] >= 2  # the same for a `.partial-` file
    assert outcome["differences"] == outcome["left_behind"] == []
    assert len(set(outcome["steps"])) >= 5  # the kills are spread over the run, with progress between them


@pytest.mark.parametrize("step", [1, 4, 5, 9, 10])
def test_a_run_resumed_after_a_crash_equals_an_uninterrupted_one(tmp_path: Path, text: Path, step: int) -> None:
    config = tiny_config(text, model={"dropout": 0.1}, eval_every=3, checkpoint_every=4)
    run = crash(config, tmp_path / "run", step)
    resume(run, progress=Quiet())
    assert differences(run, train_uninterrupted(config, tmp_path / "uninterrupted")) == []


class EndDuringSave(Quiet):
    """Raises an exception after update 3, while the save of step 2 is still in progress."""

    def __init__(self, error: BaseException, saving: threading.Event, continue_save: threading.Event) -> None:
        super().__init__()
        self.error, self.saving, self.continue_save = error, saving, continue_save

    def step(self, record: Any) -> None:
        """Raise the exception once the thread is inside its save."""
        if record["step"] == 3:
            assert self.saving.wait(30)
            threading.Timer(0.2, self.continue_save.set).start()
            raise self.error


@pytest.mark.parametrize(
    ("error", "alone", "state"),
    [(CrashError(), True, "failed"), (KeyboardInterrupt(), True, "interrupted"), (CrashError(), False, "failed")],
    ids=["exception", "second Ctrl-C", "rank of several"],
)
def test_a_run_that_ends_during_a_save_keeps_its_lock_until_the_save_is_written(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, alone: bool, state: str
) -> None:
    """One of several ranks waits only briefly, because its process ends; its save does not change the last status."""
    run, saving, continue_save, saving_at_unlock = tmp_path / "run", threading.Event(), threading.Event(), list[bool]()
    sync, locked = MetricsWriter.sync, RunDirectory.locked

    def slow_sync(self: MetricsWriter) -> None:
        saving.set()
        assert continue_save.wait(30)
        sync(self)  # raises an error if the file was closed in the meantime

    @contextmanager
    def observed_lock(self: RunDirectory, wait: float = 0.0) -> Iterator[None]:
        with locked(self, wait):
            try:
                yield
            finally:
                saving_at_unlock.append(is_saving())
                assert self.read_status()["state"] == state

    def is_saving() -> bool:
        threads = [thread for thread in threading.enumerate() if thread.name == "glassgpt-save"]
        for thread in threads:
            thread.join(0.02)  # a thread ends shortly after it has set its result
        return any(thread.is_alive() for thread in threads)

    monkeypatch.setattr(MetricsWriter, "sync", slow_sync)
    monkeypatch.setattr(RunDirectory, "locked", observed_lock)
    monkeypatch.setattr("glassgpt.training.recorder.LAST_WRITE_SECONDS", 0.01)
    monkeypatch.setattr(Ranks, "is_alone", property(lambda self: alone), raising=False)
    with pytest.raises(type(error)):
        train(tiny_config(text, checkpoint_every=2), run, progress=EndDuringSave(error, saving, continue_save))
    assert saving_at_unlock == [not alone]
    give_up = time.monotonic() + 30
    while is_saving() and time.monotonic() < give_up:
        time.sleep(0.01)
    open_checkpoint(run / "checkpoints" / "000002")
    assert RunDirectory(run).read_status()["state"] == state


def test_a_run_without_checkpoints_starts_again(tmp_path: Path, text: Path) -> None:
    config = tiny_config(text, eval_every=0, checkpoint_every=0)
    run = crash(config, tmp_path / "run", 7)
    assert checkpoint_paths(run / "checkpoints") == []
    resume(run, progress=Quiet())
    assert differences(run, train_uninterrupted(config, tmp_path / "uninterrupted")) == []


def test_a_resumed_run_keeps_its_best_checkpoint(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([9.0, 2.0, 4.0, 3.0, 2.5])

    def evaluate_with_loss(*arguments: Any, **options: Any) -> dict[str, Any]:
        return {**evaluate_data(*arguments, **options), "loss": next(losses)}

    monkeypatch.setattr("glassgpt.training.loop.evaluate_data", evaluate_with_loss)
    run = crash(tiny_config(text, eval_every=3, checkpoint_every=3, keep_checkpoints=1), tmp_path / "run", 7)
    resume(run, progress=Quiet())
    assert [path.name for path in checkpoint_paths(run / "checkpoints")] == ["000003", "000010"]
    state = open_checkpoint(run / "checkpoints" / "000010").state
    assert (state.best_step, state.best_val_loss) == (3, 2.0)


def test_a_best_loss_on_other_validation_tokens_is_discarded(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses, progress = iter([9.0, 2.0, 4.0, 3.0, 3.5, 3.5]), Quiet()

    def evaluate_with_loss(*arguments: Any, **options: Any) -> dict[str, Any]:
        return {**evaluate_data(*arguments, **options), "loss": next(losses)}

    monkeypatch.setattr("glassgpt.training.loop.evaluate_data", evaluate_with_loss)
    config = tiny_config(text, eval_every=2, checkpoint_every=2, keep_checkpoints=1, eval_tokens=20)
    run = crash(config, tmp_path / "run", 3)
    resume(run, eval_tokens=40, progress=progress)
    assert [path.name for path in checkpoint_paths(run / "checkpoints")] == ["000006", "000010"]
    state = open_checkpoint(run / "checkpoints" / "000010").state
    assert (state.best_step, state.best_val_loss) == (6, 3.0)  # not step 2 with 2.0
    (message,) = [message for message in progress.messages if message.startswith("eval_tokens: 20 -> 40")]
    assert "best validation loss" in message


# --- signals ----------------------------------------------------------------------------------------------------------

PROGRAM = """
import sys, time, torch
from pathlib import Path
import glassgpt as g
from glassgpt.training.progress import Progress

class Slow(Progress):
    def step(self, record):
        time.sleep(0.1)

torch.set_num_threads(1)
g.train(g.TrainConfig.from_toml(Path(sys.argv[1]).read_text()), sys.argv[2], progress=Slow())
"""


def has_begun(run: Path, child: subprocess.Popen[str]) -> bool:
    """Return whether the run has recorded five steps or its process has ended."""
    metrics = run / "metrics.jsonl"
    return child.poll() is not None or (metrics.exists() and metrics.read_text().count("\n") > 5)


@pytest.mark.slow
def test_ctrl_c_and_sigterm_save_the_step_and_print_how_to_resume(tmp_path: Path, text: Path) -> None:
    # 100 slowed steps take 10 s, and the signal is sent after five. No other checkpoint is saved before the end.
    config = tiny_config(text, steps=100, model={"dropout": 0.1}, eval_every=0, checkpoint_every=0)
    (tmp_path / "config.toml").write_text(config.to_toml())
    runs = {number: tmp_path / number.name for number in (signal.SIGINT, signal.SIGTERM)}
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "config.toml")]
    children = {
        number: subprocess.Popen([*command, str(run)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for number, run in runs.items()
    }
    for number, child in children.items():
        give_up = time.monotonic() + 60
        while not has_begun(runs[number], child) and time.monotonic() < give_up:
            time.sleep(0.001)
        before = (runs[number] / "config.toml").read_bytes()
        with pytest.raises(UserError, match="another process is training"):  # two processes must not train one run
            resume(runs[number], progress=Quiet())
        with pytest.raises(UserError, match="another process is training"):
            train(config.override(seed=1), runs[number], overwrite=True, progress=Quiet())
        assert (runs[number] / "config.toml").read_bytes() == before
        child.send_signal(number)
    outputs = {number: child.communicate(timeout=60) for number, child in children.items()}
    assert "KeyboardInterrupt" in outputs[signal.SIGINT][1]
    assert (children[signal.SIGTERM].returncode, outputs[signal.SIGTERM][1]) == (0, NOTICE.decode())
    expected = train_uninterrupted(config, tmp_path / "uninterrupted")
    for number, run in runs.items():
        (saved,) = checkpoint_paths(run / "checkpoints")
        step = int(saved.name)
        assert 5 <= step < 100
        assert records_of(run)[-1]["step"] == step
        assert f"stopped at step {step} and saved; resume with: {program()} train --resume {run}" in outputs[number][0]
        resume(run, progress=Quiet())
        # The checkpoint saved after the signal, and the last one.
        assert differences(run, expected) == ["the checkpoints kept"]


def test_a_signal_right_after_the_decision_to_save_loses_no_step(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the loop would end after a step that was not saved, although the message says that it was."""
    config, due = tiny_config(text, eval_every=0, checkpoint_every=100), setup.is_due

    def is_due_then_signal(step: int, every: int) -> bool:
        if (step, every) == (3, 100):
            signal.raise_signal(signal.SIGINT)
        return due(step, every)

    monkeypatch.setattr("glassgpt.training.loop.is_due", is_due_then_signal)
    with pytest.raises(KeyboardInterrupt):
        train_uninterrupted(config, tmp_path / "run")
    (saved,) = checkpoint_paths(tmp_path / "run" / "checkpoints")
    assert int(saved.name) == records_of(tmp_path / "run")[-1]["step"]


class SignalAt:
    """Replaces `GPT.forward`: call number `at`, in training or in an evaluation, receives Ctrl-C."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
        self.calls, forward = 0, GPT.forward

        def counted(model: GPT, *arguments: Any, **options: Any) -> Tensor:
            self.calls += 1
            if self.calls == at:
                signal.raise_signal(signal.SIGINT)
            return forward(model, *arguments, **options)

        monkeypatch.setattr(GPT, "forward", counted)


def test_a_signal_stops_at_the_next_batch_and_the_resumed_run_is_exact(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interrupted update is dropped. An interrupted evaluation is repeated, also if that is killed."""

    class CrashAfterEvaluation(Quiet):
        def sampled(self, step: int, samples: Any) -> None:
            raise CrashError

    monkeypatch.setattr("glassgpt.evaluation.perplexity.EVALUATION_TOKENS", 64)
    config = tiny_config(text, steps=4, eval_every=2, checkpoint_every=4, model={"dropout": 0.1})
    expected = train_uninterrupted(config, tmp_path / "expected")
    # Evaluations at steps 0, 2 and 4 have seven batches, and updates have two micro-batches.
    for at, steps_done in ((2, 0), (10, 1), (13, 2), (24, 4)):
        run = tmp_path / str(at)
        with monkeypatch.context() as patched:
            counter = SignalAt(patched, at)
            with pytest.raises(KeyboardInterrupt):
                train(config, run, progress=Quiet())
        assert counter.calls == at
        assert RunDirectory(run).read_status()["state"] == "interrupted"
        assert [int(path.name) for path in checkpoint_paths(run / "checkpoints")][-1:] == [steps_done][:steps_done]
        assert [record["step"] for record in records_of(run) if "loss" in record] == [*range(1, steps_done + 1)]
        if at == 13:
            with pytest.raises(CrashError):
                resume(run, progress=CrashAfterEvaluation())
        resume(run, progress=Quiet())
        assert [name for name in differences(run, expected) if name != "the checkpoints kept"] == []


# --- restarts by torchrun ---------------------------------------------------------------------------------------------


def test_a_restart_resumes_and_a_second_job_with_the_same_id_cannot_overwrite(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(text)
    run, ranks = RunDirectory(tmp_path / "run"), Ranks()
    run.path.mkdir()
    run.write_config(config)
    facts = {"launch": "job", "request": run_module._request_of(config), "host": "elsewhere", "pid": 1}
    run.write_status("running", **facts)
    ranks.launch_id = "another job"
    assert not run_module._is_restart(run, config, overwrite=True, ranks=ranks)
    ranks.launch_id = "job"
    assert run_module._is_restart(run, config, overwrite=False, ranks=ranks)
    assert not run_module._is_restart(run, config.override(seed=2), overwrite=False, ranks=ranks)
    with pytest.raises(UserError, match=r"--rdzv-id.*--overwrite"):
        run_module._is_restart(run, config, overwrite=True, ranks=ranks)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert run_module._is_restart(run, config, overwrite=True, ranks=ranks)
    run.status_path.write_text("{")
    with pytest.raises(UserError, match=r"status\.json.*--resume"):
        run_module._is_restart(run, config, overwrite=False, ranks=ranks)


# --- extension --------------------------------------------------------------------------------------------------------


def test_resuming_a_finished_run_changes_nothing(tmp_path: Path, text: Path) -> None:
    run = train_uninterrupted(tiny_config(text), tmp_path / "run")
    before, progress = contents(run), Quiet()
    assert resume(run, progress=progress) == run
    resume(run, steps=10, progress=Quiet())
    with pytest.raises(UserError, match="step 10"):
        resume(run, steps=9, progress=Quiet())
    assert contents(run) == before
    assert "is finished at step 10" in progress.messages[-1]


def test_an_extended_run_equals_a_longer_one_if_the_rate_is_constant(tmp_path: Path, text: Path) -> None:
    changes: dict[str, Any] = {"optim": {"schedule": "constant"}, "model": {"dropout": 0.1}}
    run = train_uninterrupted(tiny_config(text, **changes), tmp_path / "run")
    resume(run, steps=20, progress=Quiet())
    assert (
        differences(run, train_uninterrupted(tiny_config(text, steps=20, **changes), tmp_path / "uninterrupted")) == []
    )


def test_an_extended_run_continues_with_the_schedule_of_the_longer_run(tmp_path: Path, text: Path) -> None:
    config, progress = tiny_config(text), Quiet()
    run = train_uninterrupted(config, tmp_path / "run")
    before = (run / "metrics.jsonl").read_text()
    resume(run, steps=13, progress=progress)
    assert (run / "metrics.jsonl").read_text().startswith(before)
    rates = [record["lr"] for record in records_of(run) if "loss" in record]
    assert rates == [lr_at(step, 10 if step < 10 else 13, config.optim) for step in range(13)]
    assert "from step 10 on, the schedule is that of a run of 13 steps" in progress.messages
    assert TrainConfig.from_toml((run / "config.toml").read_text()).steps == 13
    assert [record["step"] for record in records_of(run) if "val_loss" in record] == [0, 5, 10, 13]
    assert checkpoint_paths(run / "checkpoints")[-1].name == "000013"


def test_an_interrupted_extension_resumes_to_the_new_number_of_steps(tmp_path: Path, text: Path) -> None:
    runs = [train_uninterrupted(tiny_config(text), tmp_path / name) for name in ("one", "two")]
    with pytest.raises(CrashError):
        resume(runs[0], steps=20, progress=CrashAt(12))
    resume(runs[0], progress=Quiet())
    resume(runs[1], steps=20, progress=Quiet())
    assert differences(*runs) == []


# --- settings that may change -----------------------------------------------------------------------------------------


def losses_of(run: Path) -> list[float]:
    """Return the losses of all updates."""
    return [record["loss"] for record in records_of(run) if "loss" in record]


@pytest.mark.parametrize(
    "change",
    [
        {"micro_batch_size": 4},
        {"micro_batch_size": 1},
        {"activation_checkpointing": "full"},
        {"activation_checkpointing": "selective"},
        {"eval_every": 2, "eval_tokens": 40},
        {"checkpoint_every": 3, "keep_checkpoints": 9},
        {"sample": {"count": 0}, "probe": {"tokens": 0}},
        {"compile": "on", "compile_backend": "eager"},
    ],
    ids=str,
)
def test_execution_settings_may_change_on_resume_without_changing_the_losses(
    tmp_path: Path, text: Path, change: dict[str, Any]
) -> None:
    config, progress = tiny_config(text), Quiet()
    run = crash(config, tmp_path / "run", 7)
    resume(run, progress=progress, **change)
    assert losses_of(run) == pytest.approx(losses_of(train_uninterrupted(config, tmp_path / "uninterrupted")), rel=1e-5)
    for name in change:
        assert [message for message in progress.messages if message.startswith(name) and "from step 5" in message]
    assert TrainConfig.from_toml((run / "config.toml").read_text()) == TrainConfig.from_toml(
        (tmp_path / "uninterrupted" / "config.toml").read_text()
    ).override(**change)


def test_new_intervals_and_numbers_of_kept_checkpoints_apply_after_a_resume(tmp_path: Path, text: Path) -> None:
    run = crash(tiny_config(text), tmp_path / "run", 7)
    resume(run, eval_every=2, checkpoint_every=1, keep_checkpoints=3, progress=Quiet())
    assert [record["step"] for record in records_of(run) if "val_loss" in record] == [0, 5, 6, 8, 10]
    assert {path.name for path in checkpoint_paths(run / "checkpoints")} >= {"000008", "000009", "000010"}


def test_an_execution_setting_edited_in_the_config_applies(tmp_path: Path, text: Path) -> None:
    run, progress = crash(tiny_config(text), tmp_path / "run", 7), Quiet()
    config = (run / "config.toml").read_text()
    (run / "config.toml").write_text(config.replace("micro_batch_size = 2", "micro_batch_size = 4"))
    resume(run, progress=progress)
    assert [message for message in progress.messages if message.startswith("micro_batch_size: 2 -> 4")]


@pytest.mark.parametrize("change", [{"micro_batch_size": 4}, {"device": "auto"}, {"compile_backend": "eager"}], ids=str)
def test_resume_warns_if_a_setting_changes_the_dropout_masks(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    monkeypatch.setattr(Ranks, "device", lambda self, name: torch.device("cpu"))
    run, progress = crash(tiny_config(text, model={"dropout": 0.2}), tmp_path / "run", 7), Quiet()
    resume(run, progress=progress, **change)
    (name,) = change
    assert [message for message in progress.messages if message.startswith(f"{name}: ") and "dropout" in message]


@pytest.mark.parametrize(
    ("change", "name"), [({"optim": {"lr": 0.5}}, "optim.lr"), ({"seed": 7}, "seed"), ({"epochs": 2.0}, "epochs")]
)
def test_a_setting_that_changes_the_results_is_refused_on_resume(
    tmp_path: Path, text: Path, change: dict[str, Any], name: str
) -> None:
    run = crash(tiny_config(text), tmp_path / "run", 7)
    before = contents(run)
    with pytest.raises(UserError, match=f"{re.escape(name)}.*--resume"):
        resume(run, progress=Quiet(), **change)
    assert contents(run) == before


# --- changes since the run began --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "other",
    [SENTENCE * 50, SENTENCE * 50 + "λ", "the\n" * 900],
    ids=["same characters", "more characters", "fewer characters"],
)
def test_a_changed_text_without_its_dataset_is_refused_and_the_run_is_unchanged(
    tmp_path: Path, text: Path, other: str
) -> None:
    run = crash(tiny_config(text), tmp_path / "run", 7)
    before = contents(run)
    text.write_text(other, encoding="utf-8")
    shutil.rmtree(find_prepared(tiny_config(text).data, None)[0])
    with pytest.raises(UserError, match="the text has changed since this run began"):
        resume(run, progress=Quiet())
    assert contents(run) == before


@pytest.mark.parametrize("is_mixture", [False, True])
def test_a_run_uses_the_dataset_that_it_began_with(tmp_path: Path, is_mixture: bool) -> None:
    """Texts are added, changed and removed next to the run, whose own files are no text either."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in ("a", "b", "c"):
        write_text(folder / f"{name}.txt", seed=ord(name))
    data = {"mixture": {str(folder): 1.0, str(folder / "a.txt"): 1.0}} if is_mixture else {}
    config = tiny_config(folder, data=data)
    expected = train_uninterrupted(config, tmp_path / "uninterrupted")
    run = crash(config, folder / "runs" / "run", 5)
    with pytest.raises(CrashError):
        resume(run, progress=CrashAt(7))  # nothing has changed
    write_text(folder / "more.txt")
    (folder / "b.txt").unlink()
    (folder / "c.txt").write_text("λ")
    progress = Quiet()
    resume(run, progress=progress)
    assert sum(str(folder) in message and "has changed" in message for message in progress.messages) == 1
    assert differences(run, expected) == []
    assert evaluate(run)["loss"] == evaluate(expected)["loss"]


def test_the_same_text_in_a_newer_file_is_accepted(tmp_path: Path, text: Path) -> None:
    config = tiny_config(text)
    run = crash(config, tmp_path / "run", 7)
    text.unlink()
    time.sleep(0.01)
    write_text(text)
    resume(run, progress=Quiet())
    assert differences(run, train_uninterrupted(config, tmp_path / "uninterrupted")) == []


class ThreadCounter(Quiet):
    """Records the numbers of threads with which updates were computed."""

    def __init__(self) -> None:
        super().__init__()
        self.threads: set[int] = set()

    def step(self, record: Mapping[str, Any]) -> None:
        self.threads.add(torch.get_num_threads())


def test_the_number_of_threads_is_recorded_and_restored(tmp_path: Path, text: Path) -> None:
    torch.set_num_threads(2)
    run = crash(tiny_config(text, steps=2), tmp_path / "run", 1)
    assert json.loads((run / "environment.json").read_text())["threads"] == 2
    torch.set_num_threads(1)
    progress = ThreadCounter()
    resume(run, progress=progress)
    assert progress.threads == {2}
    assert torch.get_num_threads() == 1  # the caller's number of threads is restored
    assert not [message for message in progress.messages if "warning" in message]


def test_a_changed_environment_gives_a_warning(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def describe_another(device: torch.device, precision: str) -> dict[str, Any]:
        return {**describe_environment(device, precision), "torch": "9.0", "cpu": "an abacus"}

    run, progress = crash(tiny_config(text), tmp_path / "run", 7), Quiet()
    monkeypatch.setattr(setup, "describe_environment", describe_another)
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # changes nothing, as the number of threads is restored
    resume(run, progress=progress)
    (warning,) = [message for message in progress.messages if "warning" in message]
    assert f"torch was {torch.__version__}, is 9.0" in warning
    assert "is an abacus" in warning
    assert "MKL_CBWR=COMPATIBLE" in warning
    assert not re.search("precision|run_id|OMP_NUM", warning)


@pytest.mark.parametrize("threads", [2, 0, -1, None, "1", 10**6])
def test_an_edited_environment_is_restored_from_the_checkpoint(tmp_path: Path, text: Path, threads: object) -> None:
    config = tiny_config(text, sample={"count": 0}, probe={"tokens": 0})
    run, progress = crash(config, tmp_path / "run", 7), ThreadCounter()
    original = (run / "environment.json").read_text()
    (run / "environment.json").write_text(json.dumps({**json.loads(original), "threads": threads}))
    resume(run, progress=progress)
    assert progress.threads == {1}
    (warning,) = [message for message in progress.messages if "warning" in message]
    assert "environment.json" in warning
    assert "threads" in warning
    assert (run / "environment.json").read_text() == original


@pytest.mark.parametrize("threads", [0, -1, None, "1", 10**6, 1.5, True])
def test_an_impossible_environment_is_refused_without_a_checkpoint(tmp_path: Path, text: Path, threads: object) -> None:
    run = crash(tiny_config(text, eval_every=0, checkpoint_every=0, sample={"count": 0}), tmp_path / "run", 2)
    environment = json.loads((run / "environment.json").read_text())
    (run / "environment.json").write_text(json.dumps({**environment, "threads": threads}))
    with pytest.raises(UserError, match=r"environment\.json is damaged: threads"):
        resume(run, progress=Quiet())


def test_a_resumed_run_keeps_the_precision_that_auto_chose(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, progress = tiny_config(text), Quiet()
    expected, run = train_uninterrupted(config, tmp_path / "uninterrupted"), crash(config, tmp_path / "run", 7)

    def find_precision_of_gpu(name: str, device: torch.device) -> str:
        return find_precision("bfloat16" if name == "auto" else name, device)

    monkeypatch.setattr(setup, "find_precision", find_precision_of_gpu)
    resume(run, progress=progress)
    assert differences(run, expected) == []
    assert not [message for message in progress.messages if "precision" in message]


def test_a_device_that_lacks_the_precision_of_the_run_is_refused(tmp_path: Path, text: Path) -> None:
    run = crash(tiny_config(text, eval_every=0, checkpoint_every=0), tmp_path / "run", 2)  # no checkpoint has a copy
    environment = json.loads((run / "environment.json").read_text())
    (run / "environment.json").write_text(json.dumps({**environment, "precision": "tf32"}))
    before = contents(run)
    with pytest.raises(UserError, match=r"'tf32'.*cpu"):
        resume(run, progress=Quiet())
    assert contents(run) == before


@pytest.mark.parametrize(
    ("name", "edit"),
    [
        ("model.n_embd", ("n_embd = 16", "n_embd = 32")),
        ("optim.lr", ("lr = 0.01", "lr = 0.5")),
        ("seed", ("seed = 1337", "seed = 7")),
    ],
)
def test_an_edited_setting_that_changes_the_results_is_refused(
    tmp_path: Path, text: Path, name: str, edit: tuple[str, str]
) -> None:
    run = crash(tiny_config(text), tmp_path / "run", 7)
    config = (run / "config.toml").read_text()
    assert edit[0] in config
    (run / "config.toml").write_text(config.replace(*edit))
    before = contents(run)
    with pytest.raises(UserError, match=rf"^{re.escape(name)} in .*config\.toml"):
        resume(run, progress=Quiet())
    assert contents(run) == before


@pytest.mark.parametrize("has_text", [True, False])
def test_tokens_that_changed_on_disk_are_never_used(tmp_path: Path, text: Path, has_text: bool) -> None:
    """They are prepared again if the run has their text; otherwise they are an error."""
    dataset = prepare(tiny_config(text).data, tmp_path / "dataset")
    config = tiny_config(text if has_text else dataset, sample={"count": 0}, probe={"tokens": 0})
    expected, run = train_uninterrupted(config, tmp_path / "expected"), crash(config, tmp_path / "run", 7)
    loss, shard = evaluate(expected)["loss"], prepare(config.data) / "train-00000-00000.bin"
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    uses: list[Callable[[], object]] = [
        lambda: resume(run, progress=Quiet()),
        lambda: train(config, tmp_path / "new", progress=Quiet()),
        lambda: evaluate(expected)["loss"],
    ]
    for use in uses:
        shard.write_bytes(content)
        if has_text:
            assert use() in (run, tmp_path / "new", loss)
        else:
            with pytest.raises(UserError, match=rf"{dataset}.*train-00000-00000\.bin"):
                use()
    if has_text:
        assert differences(run, expected) == differences(tmp_path / "new", expected) == []


def test_resume_prepares_a_removed_dataset_again(tmp_path: Path) -> None:
    """The dataset has several files, several shards and removed duplicates."""
    (tmp_path / "texts").mkdir()
    for number in (1, 2, 2, 3):
        write_text(tmp_path / "texts" / f"{number}-{len(list((tmp_path / 'texts').iterdir()))}.txt", seed=number)
    config = tiny_config(tmp_path / "texts", data={"deduplicate": True, "shard_tokens": 1500})
    run = crash(config, tmp_path / "run", 7)
    dataset = prepare(config.data)
    shutil.rmtree(dataset)
    resume(run, progress=Quiet())
    assert dataset.is_dir()
    assert differences(run, train_uninterrupted(config, tmp_path / "uninterrupted")) == []


def test_a_run_on_a_prepared_dataset_needs_it_and_its_tokenizer(tmp_path: Path, text: Path) -> None:
    config = tiny_config(text)
    prepared = prepare(config.data, tmp_path / "ready")
    source = train_uninterrupted(config, tmp_path / "own")
    run = crash(tiny_config(prepared), tmp_path / "run", 7)
    other = prepare(config.override(data={"tokenizer": "bytes"}).data, tmp_path / "other")
    with pytest.raises(UserError, match=r"other .*bytes"):
        train(tiny_config(other, init_from=str(source)), tmp_path / "on", progress=Quiet())
    assert not (tmp_path / "on").exists()
    prepared.rename(tmp_path / "away")
    with pytest.raises(UserError, match="there is no file, folder or registered source"):
        resume(run, progress=Quiet())
    assert prepare(config.data, prepared, workers=1) == prepared
    resume(run, progress=Quiet())
    assert differences(run, train_uninterrupted(tiny_config(prepared), tmp_path / "uninterrupted")) == []


def test_a_run_can_be_resumed_from_another_working_directory(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(text.parent)
    source = train_uninterrupted(tiny_config(Path(text.name)), Path("source"))
    source_path = source.resolve()
    run = crash(tiny_config(Path(text.name), init_from=str(source)), Path("run"), 7).resolve()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    resume(run, progress=Quiet())
    expected = train_uninterrupted(tiny_config(text, init_from=str(source_path)), tmp_path / "uninterrupted")
    assert differences(run, expected) == []


def test_a_run_whose_text_has_moved_resumes_with_the_new_path_in_its_config(tmp_path: Path, text: Path) -> None:
    expected = train_uninterrupted(tiny_config(text), tmp_path / "uninterrupted")
    run = crash(tiny_config(text), tmp_path / "run", 7)
    moved = text.rename(tmp_path / "moved.txt")
    with pytest.raises(
        UserError, match=r"there is no file.*\n.*has moved, write its new place into .*config\.toml as data\.source"
    ):
        resume(run, progress=Quiet())
    config = (run / "config.toml").read_text()
    (run / "config.toml").write_text(config.replace(str(text), str(moved)))
    resume(run, progress=Quiet())
    assert differences(run, expected) == ["config.toml"]
    (run / "config.toml").write_text(
        (run / "config.toml").read_text().replace(str(moved), str(write_text(tmp_path / "other.txt", seed=9)))
    )
    with pytest.raises(UserError, match="the text has changed"):
        resume(run, steps=12, progress=Quiet())


def test_a_run_whose_text_is_a_link_can_be_resumed_repeatedly(tmp_path: Path, text: Path) -> None:
    """The checkpoints and config.toml must contain the same path, the link or its target."""
    run = crash(tiny_config(text), tmp_path / "run", 4)
    text.symlink_to(text.rename(tmp_path / "moved.txt"))
    for steps in (7, 8, 10):
        resume(run, steps=steps, progress=Quiet())
    assert checkpoint_paths(run / "checkpoints")[-1].name == "000010"


def test_a_run_can_be_shortened_but_not_to_a_step_already_reached(tmp_path: Path, text: Path) -> None:
    run = crash(tiny_config(text), tmp_path / "run", 7)
    with pytest.raises(UserError, match=r"step 5.*--steps"):
        resume(run, steps=5, progress=Quiet())
    resume(run, steps=6, progress=Quiet())
    assert checkpoint_paths(run / "checkpoints")[-1].name == "000006"


def test_a_path_that_is_not_a_run_cannot_be_resumed(tmp_path: Path) -> None:
    for path, message in ((tmp_path / "missing", "no run at"), (tmp_path, "is not a run")):
        with pytest.raises(UserError, match=message):
            resume(path, progress=Quiet())
    assert list(tmp_path.iterdir()) == []


def test_a_fine_tuned_run_resumes_without_its_source_run(tmp_path: Path, text: Path) -> None:
    source = train_uninterrupted(tiny_config(text), tmp_path / "source")
    write_text(text, seed=3)
    config = tiny_config(text, init_from=str(source), checkpoint_every=2)
    expected = train_uninterrupted(config, tmp_path / "uninterrupted")
    run = crash(config, tmp_path / "run", 7)
    shutil.rmtree(source)
    resume(run, progress=Quiet())
    assert differences(run, expected) == []


# --- damaged checkpoints ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", [truncate, Path.unlink], ids=["truncated", "missing"])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
def test_a_damaged_checkpoint_is_reported_and_the_previous_one_is_used(
    tmp_path: Path, text: Path, name: str, damage: Callable[[Path], None]
) -> None:
    config = tiny_config(text, checkpoint_every=2, eval_every=0)
    run = crash(config, tmp_path / "run", 7)
    damage(run / "checkpoints" / "000006" / name)
    damaged = contents(run / "checkpoints" / "000006")
    progress = Quiet()
    resume(run, progress=progress)
    (warning,) = [message for message in progress.messages if name in message]
    assert "000006" in warning
    assert contents(run / "checkpoints" / "damaged-000006") == damaged  # moved, not deleted
    assert differences(run, train_uninterrupted(config, tmp_path / "uninterrupted")) == []


def test_a_damaged_checkpoint_does_not_displace_valid_ones(tmp_path: Path, text: Path) -> None:
    """If it counted as one of the newest, the run would delete each checkpoint right after it was saved."""
    config = tiny_config(text, checkpoint_every=2, keep_checkpoints=1, eval_every=0)
    run = crash(config, tmp_path / "run", 5)
    shutil.copytree(run / "checkpoints" / "000004", run / "checkpoints" / "000009")
    truncate(run / "checkpoints" / "000009" / "model.safetensors")
    (run / "checkpoints" / "damaged-000009").mkdir()  # left by an earlier resume
    with pytest.raises(CrashError):
        resume(run, progress=CrashAt(7))
    open_checkpoint(run / "checkpoints" / "000006")
    assert (run / "checkpoints" / "damaged-000009-2" / "model.safetensors").is_file()
    resume(run, progress=Quiet())
    assert differences(run, train_uninterrupted(config, tmp_path / "uninterrupted")) == []


def test_if_all_checkpoints_are_damaged_the_run_is_unchanged(tmp_path: Path, text: Path) -> None:
    run = crash(tiny_config(text, checkpoint_every=2), tmp_path / "run", 7)
    for path in checkpoint_paths(run / "checkpoints"):
        truncate(path / "optimizer.safetensors")
    before = contents(run)
    with pytest.raises(UserError, match="no checkpoint in") as error:
        resume(run, progress=Quiet())
    assert "--overwrite" not in str(error.value)
    assert contents(run) == before


# --- full disk --------------------------------------------------------------------------------------------------------


def test_a_write_error_of_a_full_disk_keeps_the_last_checkpoint(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(text, checkpoint_every=2, eval_every=0)
    save = safetensors.torch.save_file

    def save_to_full_disk(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
        save(tensors, path, metadata)
        if path.parent.name == ".partial-000006":
            raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patched:
        patched.setattr("safetensors.torch.save_file", save_to_full_disk)
        with pytest.raises(UserError, match=r"cannot write .*000006: the disk is full"):
            train_uninterrupted(config, tmp_path / "run")
    assert [path.name for path in checkpoint_paths(tmp_path / "run" / "checkpoints")] == ["000002", "000004"]
    resume(tmp_path / "run", progress=Quiet())
    assert differences(tmp_path / "run", train_uninterrupted(config, tmp_path / "uninterrupted")) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Return a disk of one megabyte. Skip if this process cannot mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True, text=True
    )
    if not mounted or mounted.returncode:
        pytest.skip(
            f"a small disk cannot be mounted here: {mounted.stderr.strip() if mounted else 'there is no mount'}"
        )
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


class FillAt(Quiet):
    """Fills the disk at a step except for some bytes, after the save of the previous step is done."""

    def __init__(self, step: int, filler: Path, left: int) -> None:
        super().__init__()
        self.at, self.filler, self.left = step, filler, left

    def step(self, record: Any) -> None:
        if record["step"] == self.at:
            while any(thread.name == "glassgpt-save" for thread in threading.enumerate()):
                time.sleep(0.001)
            self.filler.write_bytes(bytes(shutil.disk_usage(self.filler.parent).free - self.left))


@pytest.mark.slow
@pytest.mark.parametrize("kilobytes", [0, 4, 8, 20, 32, 48, 60])
def test_a_mounted_full_disk_keeps_the_last_checkpoint(
    tmp_path: Path, text: Path, small_disk: Path, kilobytes: int
) -> None:
    """A checkpoint takes about 64 KB, so the disk is full before the save or in its weights, moments or small files."""
    config = tiny_config(text, checkpoint_every=2, eval_every=3)
    run, filler = small_disk / "run", small_disk / "filler"
    with pytest.raises(UserError, match="the disk is full"):
        train(config, run, progress=FillAt(5, filler, kilobytes * 1024))
    newest = checkpoint_paths(run / "checkpoints")[-1]
    assert newest.name == "000004"
    open_checkpoint(newest)
    assert not list((run / "checkpoints").glob(".partial-*"))
    filler.unlink()
    resume(run, progress=Quiet())
    assert differences(run, train_uninterrupted(config, tmp_path / "uninterrupted")) == []


def test_a_run_without_checkpoints_prints_that_it_starts_again(tmp_path: Path, text: Path) -> None:
    run = crash(tiny_config(text), tmp_path / "run", 7)
    shutil.rmtree(run / "checkpoints")
    progress = Quiet()
    resume(run, progress=progress)
    assert any("has no checkpoint: it starts again at step 0" in message for message in progress.messages)
    assert [record["step"] for record in records_of(run) if "loss" in record] == list(range(1, 11))


def test_a_finished_run_whose_metrics_have_a_foreign_line_is_extended(tmp_path: Path, text: Path) -> None:
    run = train_uninterrupted(tiny_config(text), tmp_path / "run")
    with open(run / "metrics.jsonl", "a") as file:
        file.write("garbage\n")
    resume(run, steps=12, progress=Quiet())
    assert (run / "edited-metrics.jsonl").read_text().endswith("garbage\n")
    assert [record["step"] for record in records_of(run) if "loss" in record] == list(range(1, 13))


def test_other_ranks_wait_without_limit_for_the_verification_of_the_checkpoint(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, ranks, phases = crash(tiny_config(text), tmp_path / "run", 7), Ranks(), list[tuple[str, bool]]()

    def record_phase(*arguments: Any) -> Any:
        phases.append((ranks._status.phase, ranks._status.may_take_long))
        return latest_checkpoint(*arguments)

    monkeypatch.setattr(run_module, "latest_checkpoint", record_phase)
    run_module._find_resume_point(RunDirectory(run), ranks, {}, Quiet())
    assert phases == [("the verification of the checkpoint", True)]
