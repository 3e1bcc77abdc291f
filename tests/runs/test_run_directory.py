"""A run's directory: where runs may start, the lock, clearing, and truncation of metrics, samples and probes."""

import os
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from glassgpt.runs.metrics import MetricsWriter, append_samples
from glassgpt.runs.run_directory import RunDirectory
from glassgpt.training.run import resume, train
from glassgpt.utils.errors import UserError
from glassgpt.utils.files import write_atomic
from kill_harness import Quiet, fast_training, probes_of, tiny_config, write_text

NOBODY = 65534
# Texts that are hard to store: an empty one, some with headings of the file, and every kind of line end.
AWKWARD = ["", "## Step 000000\n", "\n\n## Step 999999", "\r\r## Step 000009", "a\x0cb\u2028c\r\n# d"]


@contextmanager
def unprivileged() -> Iterator[None]:
    """Check file permissions inside this context even if the tests run as root, by switching to another user."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """Create a folder that every user may enter; pytest's temporary folders are private."""
    with tempfile.TemporaryDirectory(prefix="glassgpt-open-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """Create a run's directory with a config and an environment."""
    run = RunDirectory(tmp_path / "run")
    with run.locked():
        run.write_environment({"threads": 1, "data_fingerprint": "0"})
        run.write_config(tiny_config(tmp_path / "text.txt"))
    return run


def test_config_and_environment_are_read_back(run: RunDirectory, tmp_path: Path) -> None:
    assert run.read_config() == tiny_config(tmp_path / "text.txt")
    assert run.read_environment() == {"threads": 1, "data_fingerprint": "0"}


@pytest.mark.parametrize("content", [None, "{", "\udcff"])
def test_an_environment_that_cannot_be_read_is_named(run: RunDirectory, content: str | None) -> None:
    run.environment_path.unlink()
    if content is not None:
        run.environment_path.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=r"environment\.json"):
        run.read_environment()


# ------------------------------------------------------------------------------------------------- where runs may start


def test_a_folder_that_is_not_a_run_cannot_be_resumed(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run at"):
        RunDirectory(tmp_path / "missing").require_run()
    with pytest.raises(UserError, match="is not a run"):
        RunDirectory(tmp_path).require_run()


def test_a_new_run_may_start_in_a_missing_or_empty_folder(tmp_path: Path) -> None:
    for overwrite in (False, True):
        RunDirectory(tmp_path / "new").require_free(overwrite)
        RunDirectory(tmp_path).require_free(overwrite)


def test_a_new_run_may_start_in_the_folder_of_a_run_killed_before_its_config(tmp_path: Path) -> None:
    for name in (".lock", "environment.json", ".partial-environment.json", ".partial-config.toml"):
        (tmp_path / name).write_text("x")
        RunDirectory(tmp_path).require_free(overwrite=False)


def test_locking_a_run_removes_only_the_partial_files_of_a_killed_writer(tmp_path: Path) -> None:
    kept = {".partial-removed-config.toml", ".partial-model.bin", ".partial-report.html.5-6", ".lock"}
    for name in kept | {
        ".partial-config.toml.1-2",
        ".partial-environment.json.3-4",
        ".partial-samples.md.5-6",
        ".partial-nonfinite-000001.jso.1-2",
    }:
        (tmp_path / name).write_text("x")
    with RunDirectory(tmp_path).locked():
        assert {path.name for path in tmp_path.iterdir()} == kept


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["thesis.tex", "checkpoints/epoch=3.ckpt", "checkpoints/1000", "metrics.jsonl"])
def test_a_folder_with_other_files_is_refused_even_with_overwrite(tmp_path: Path, name: str, overwrite: bool) -> None:
    (tmp_path / name).mkdir(parents=True)
    with pytest.raises(UserError, match=r"run.*--out"):
        RunDirectory(tmp_path).require_free(overwrite)


def test_an_existing_run_is_refused_without_overwrite(run: RunDirectory) -> None:
    with pytest.raises(UserError, match=r"there is already a run at .*--resume .*--overwrite"):
        run.require_free(overwrite=False)
    run.require_free(overwrite=True)


def test_a_file_is_refused_as_a_run_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="file is a file"):
        RunDirectory(tmp_path / "file").require_free(overwrite=True)


def test_a_directory_whose_weights_could_not_be_read_is_refused(tmp_path: Path) -> None:
    """The safetensors library opens paths in UTF-8 only."""
    with pytest.raises(UserError, match="UTF-8"):
        RunDirectory(tmp_path / "\udcff").require_free(overwrite=False)


def test_a_path_through_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="file/run"), RunDirectory(tmp_path / "file" / "run").locked():
        pass


def test_clear_removes_a_run_and_nothing_else(run: RunDirectory) -> None:
    (run.checkpoints / "000005").mkdir(parents=True)
    run.probes.mkdir()
    for path in (run.checkpoints / "000005" / "state.json", run.probe_path(5)):
        path.write_text("{}")
    for name in ("metrics.jsonl", "samples.md", "report.html", "nonfinite-000003.json", "notes.txt"):
        (run.path / name).write_text("x")
    run.clear()
    assert sorted(path.name for path in run.path.iterdir()) == [".lock", "notes.txt"]


@pytest.mark.parametrize("removed", range(5))
def test_a_run_that_was_killed_while_it_was_cleared_can_be_cleared_again(
    run: RunDirectory, removed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run.checkpoints / "000005").mkdir(parents=True)
    for name in (
        "metrics.jsonl",
        "samples.md",
        "report.html",
        "nonfinite-000003.json",
        "checkpoints/000005/state.json",
    ):
        (run.path / name).write_text("x")
    count, system = 0, os.unlink

    def unlink(path: str | Path, **options: Any) -> None:
        nonlocal count
        count += 1
        if count > removed:
            raise KeyboardInterrupt
        system(path, **options)

    monkeypatch.setattr("os.unlink", unlink)
    with pytest.raises(KeyboardInterrupt):
        run.clear()
    monkeypatch.undo()
    assert not run.is_run
    with pytest.raises(UserError, match="--overwrite"):
        run.require_free(overwrite=False)
    run.require_free(overwrite=True)
    run.clear()
    assert not run.checkpoints.exists()


def test_if_checkpoints_cannot_be_removed_nothing_else_is_removed(open_folder: Path) -> None:
    run = RunDirectory(open_folder / "run")
    with run.locked():
        run.write_config(tiny_config(open_folder / "text.txt"))
    (run.checkpoints / "000005").mkdir(parents=True)
    (run.checkpoints / "000005" / "state.json").write_text("{}")
    run.metrics_path.write_text("")
    run.path.chmod(0o777)  # as if another user had trained there
    with unprivileged(), pytest.raises(UserError, match=r"cannot replace the run in .*: permission denied"):
        run.clear()
    assert (run.checkpoints / "000005" / "state.json").exists()
    assert run.metrics_path.exists()
    with pytest.raises(UserError, match="--overwrite"):
        run.require_free(overwrite=False)


def test_a_folder_that_may_not_be_entered_is_explained(open_folder: Path) -> None:
    (open_folder / "closed").mkdir(mode=0o700)
    run = RunDirectory(open_folder / "closed" / "run")
    for attempt in (run.require_run, lambda: run.require_free(False), RunDirectory(open_folder / "closed").require_run):
        with unprivileged(), pytest.raises(UserError, match="permission denied"):
            attempt()


def test_a_tilde_is_expanded_to_the_home_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somewhere")
    assert RunDirectory("~/runs/x").path == Path("/somewhere/runs/x")
    assert RunDirectory("~nobody-of-that-name/x").path == Path("~nobody-of-that-name/x")


def test_a_config_that_is_not_utf8_is_explained(run: RunDirectory) -> None:
    run.config_path.write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"config\.toml is not valid UTF-8"):
        run.read_config()


# ------------------------------------------------------------------------------------------------------------- the lock


def test_a_second_trainer_in_this_process_is_refused(run: RunDirectory) -> None:
    with run.locked(), pytest.raises(UserError, match="another process is training"), RunDirectory(run.path).locked():
        pass
    with run.locked():  # the lock is free again
        pass


def test_a_run_that_could_not_be_locked_can_be_locked_once_it_is_mended(run: RunDirectory) -> None:
    run.samples_path.mkdir()
    with pytest.raises(UserError, match=r"samples\.md") as refused, run.locked():
        pass
    run.samples_path.rmdir()
    with run.locked():
        assert refused.value  # as a notebook keeps the last error, and with it all that it refers to


def test_an_error_in_a_run_that_was_moved_says_so(run: RunDirectory) -> None:
    def move_and_write() -> None:
        run.path.rename(run.path.with_name("elsewhere"))
        run.config_path.write_text("")

    with pytest.raises(UserError, match="moved"), run.locked():
        move_and_write()


def test_the_lock_of_another_process_ends_when_the_process_is_killed(run: RunDirectory) -> None:
    program = """if True:
        import sys
        from glassgpt.runs.run_directory import RunDirectory
        with RunDirectory(sys.argv[1]).locked():
            print("held", flush=True)
            input()
    """
    with subprocess.Popen(
        [sys.executable, "-c", program, str(run.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match="another process is training"), run.locked():
            pass
        other.send_signal(signal.SIGKILL)
        other.wait()
    with run.locked():
        pass


def test_a_directory_without_write_permission_is_explained(open_folder: Path) -> None:
    (open_folder / "run").mkdir()
    for folder in (open_folder / "run", open_folder):
        folder.chmod(0o555)
    for path in (open_folder / "run", open_folder / "new"):
        with (
            unprivileged(),
            pytest.raises(UserError, match=rf"cannot train in {path}: permission denied"),
            RunDirectory(path).locked(),
        ):
            pass
    open_folder.chmod(0o755)
    assert list((open_folder / "run").iterdir()) == []
    assert not (open_folder / "new").exists()


def test_training_in_a_directory_without_write_permission_changes_nothing(
    open_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLASSGPT_CACHE", str(open_folder / "cache"))
    config = tiny_config(write_text(open_folder / "text.txt"), steps=2)
    with fast_training():
        run = train(config, open_folder / "run", progress=Quiet())
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for path in (run, *run.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    attempts: list[Callable[[], Path]] = [
        lambda: resume(run, steps=4, progress=Quiet()),
        lambda: train(config, run, overwrite=True, progress=Quiet()),
    ]
    for attempt in attempts:
        with unprivileged(), fast_training(), pytest.raises(UserError, match="permission denied"):
            attempt()
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    for path in (run, *run.rglob("*")):  # so that the folder can be removed
        path.chmod(0o755)


# -------------------------------------------------------------------------------------------------- metrics and samples


def write_records(run: RunDirectory, steps: int) -> None:
    """Write a record of each step, and an evaluation, samples and a probe at steps 0, 2, 4, …."""
    draw = random.Random(0)
    metrics = MetricsWriter(run.metrics_path)
    run.probes.mkdir()
    for step in range(steps + 1):
        if step:
            metrics.write({"step": step, "loss": step / 7})
        if step % 2 == 0:
            metrics.write({"step": step, "val_loss": step / 3})
            append_samples(run.samples_path, step, [draw.choice(AWKWARD) for _ in range(3)])
            write_atomic(run.probe_path(step), str(step))
    metrics.close()


@pytest.mark.parametrize("step", [-1, 0, 1, 2, 5, 6, 9])
def test_cut_back_restores_the_files_as_they_were_at_a_step(tmp_path: Path, step: int) -> None:
    longer, shorter = RunDirectory(tmp_path / "longer"), RunDirectory(tmp_path / "shorter")
    for run, steps in ((longer, 6), (shorter, min(step, 6))):
        run.path.mkdir()
        run.cut_back(0)  # as a run begins
        write_records(run, steps)
    (longer.probes / ".partial-000002.safetensors.7-8").write_text("killed")
    longer.cut_back(step)
    assert longer.metrics_path.read_bytes() == shorter.metrics_path.read_bytes()
    assert longer.samples_path.read_bytes() == shorter.samples_path.read_bytes()
    assert probes_of(longer.path) == probes_of(shorter.path)
    assert longer.probed_steps == [probed for probed in (0, 2, 4, 6) if probed <= step]
