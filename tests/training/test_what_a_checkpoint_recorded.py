"""A resumed run compares what it finds with what its checkpoint recorded; a run that is moved meanwhile stops."""

import errno
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from glassgpt.config.schema import TrainConfig
from glassgpt.interop.references import find_checkpoint, load
from glassgpt.runs import checkpoint as checkpoint_module
from glassgpt.runs.checkpoint import checkpoint_paths, latest_checkpoint, open_checkpoint
from glassgpt.runs.metrics import read_metrics
from glassgpt.runs.run_directory import RunDirectory
from glassgpt.training.run import resume, train
from glassgpt.utils.errors import UserError
from kill_harness import Quiet, differences, fast_training, tiny_config, write_text


@pytest.fixture(autouse=True)
def fast() -> Iterator[None]:
    with fast_training():
        yield


class StopError(Exception):
    """Stops a run in the middle."""


class At(Quiet):
    """Calls an action after an update."""

    def __init__(self, step: int, action: Callable[[], object]) -> None:
        super().__init__()
        self.at, self.action = step, action

    def step(self, record: Any) -> None:
        if record["step"] == self.at:
            self.action()


def stop() -> None:
    raise StopError


def config_of(text: Path, **changes: Any) -> TrainConfig:
    return tiny_config(text, **{"eval_every": 2, "checkpoint_every": 2, "keep_checkpoints": 9, **changes})


@pytest.fixture(scope="module")
def stopped_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the checkpoints 2, 4 and 6, stopped after update 7."""
    folder = tmp_path_factory.mktemp("stopped")
    with fast_training(), pytest.raises(StopError):
        train(config_of(write_text(folder / "text.txt")), folder / "run", progress=At(7, stop))
    return folder / "run"


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory, stopped_run: Path) -> Path:
    """The same run, never stopped."""
    with fast_training():
        config = config_of(stopped_run.parent / "text.txt")
        return train(config, tmp_path_factory.mktemp("finished") / "run", progress=Quiet())


@pytest.fixture
def run(stopped_run: Path, tmp_path: Path) -> Path:
    """A copy of the stopped run, as a whole: it has another place, and the same id."""
    return Path(shutil.copytree(stopped_run, tmp_path / "copy"))


def as_version_0_2_wrote_it(run: Path) -> None:
    """Remove what earlier versions did not write."""
    environment = json.loads((run / "environment.json").read_text())
    (run / "environment.json").write_text(json.dumps({k: v for k, v in environment.items() if k != "run_id"}))
    for path in checkpoint_paths(run / "checkpoints"):
        manifest = json.loads((path / "manifest.json").read_text())
        for name in ("environment.json", "logs.json"):
            (path / name).unlink()
            del manifest["sha256"][name]
        (path / "manifest.json").write_text(json.dumps(manifest))


def warnings_of(run: Path) -> list[str]:
    """Resume a run to its end, and return what it warned of."""
    progress = Quiet()
    resume(run, progress=progress)
    return [message for message in progress.messages if "warning" in message or "damaged" in message]


# --- checkpoints in the wrong place -----------------------------------------------------------------------------------


def swap(run: Path, other: Path) -> None:
    folder = run / "checkpoints"
    (folder / "000006").rename(folder / "aside")
    (folder / "000004").rename(folder / "000006")
    (folder / "aside").rename(folder / "000004")


def copy_under_a_newer_name(run: Path, other: Path) -> None:
    shutil.rmtree(run / "checkpoints" / "000006")
    shutil.copytree(run / "checkpoints" / "000002", run / "checkpoints" / "000008")


def take_from_another_run(run: Path, other: Path) -> None:
    shutil.copytree(other / "checkpoints" / "000010", run / "checkpoints" / "000010")


@pytest.mark.parametrize("mistake", [copy_under_a_newer_name, take_from_another_run])
def test_a_checkpoint_of_another_step_or_run_is_set_aside(
    run: Path, finished_run: Path, mistake: Callable[[Path, Path], None]
) -> None:
    mistake(run, finished_run)
    wrong = checkpoint_paths(run / "checkpoints")[-1]
    for reference in (f"{run}@{int(wrong.name)}", wrong):
        with pytest.raises(UserError, match=wrong.name):
            load(reference)
    progress = Quiet()
    resume(run, progress=progress)
    assert any(str(wrong) in message and "trying the one before" in message for message in progress.messages)
    assert (wrong.parent / f"damaged-{wrong.name}").is_dir()
    assert [name for name in differences(run, finished_run) if name != "the checkpoints kept"] == []


def test_checkpoints_with_swapped_names_are_not_used(run: Path, finished_run: Path) -> None:
    swap(run, finished_run)
    warnings: list[str] = []
    found = latest_checkpoint(run / "checkpoints", warnings.append)
    assert found is not None
    assert found.path.name == "000002"
    assert ["000004" in warning and "000006" in warning for warning in warnings] == [True, True]  # what it is
    assert find_checkpoint(run).path.name == "000002"


def test_a_checkpoint_outside_of_a_run_and_an_older_version_s_are_accepted(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run / "checkpoints" / "000004", tmp_path / "mine"))
    assert open_checkpoint(copy).state.step == 4
    as_version_0_2_wrote_it(run)
    assert open_checkpoint(run / "checkpoints" / "000006").state.step == 6
    write_text(tmp_path / "text.txt")
    train(config_of(tmp_path / "text.txt", init_from=str(copy), steps=1), tmp_path / "tuned", progress=Quiet())


@pytest.mark.parametrize("name", ["environment.json", "logs.json"])
@pytest.mark.parametrize("content", [None, "{", "{}"])
def test_a_damaged_file_that_only_resuming_needs_does_not_stop_generation(
    run: Path, name: str, content: str | None
) -> None:
    path = run / "checkpoints" / "000006" / name
    path.unlink() if content is None else path.write_text(content)
    load(path.parent)
    assert find_checkpoint(run).path == path.parent
    with pytest.raises(UserError, match=name):
        open_checkpoint(path.parent)


def test_a_run_of_version_0_2_resumes_without_a_warning(run: Path, finished_run: Path) -> None:
    as_version_0_2_wrote_it(run)
    environment = json.loads((run / "environment.json").read_text())
    del environment["variables"]
    (run / "environment.json").write_text(json.dumps(environment))
    assert warnings_of(run) == []
    assert differences(run, finished_run) == []


# --- logs -------------------------------------------------------------------------------------------------------------


def test_an_unchanged_log_gives_no_warning(run: Path, finished_run: Path) -> None:
    assert warnings_of(run) == []
    assert differences(run, finished_run) == []


def half(content: bytes) -> bytes:
    return content[: content.index(b"\n", len(content) // 3) + 1]


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.md"])
@pytest.mark.parametrize(
    "change",
    [half, lambda content: None, lambda content: content.replace(b"0", b"1", 1)],
    ids=["cut", "deleted", "edited"],
)
def test_a_log_that_was_changed_is_reported(
    run: Path, name: str, change: Callable[[bytes], bytes | None], finished_run: Path
) -> None:
    changed = change((run / name).read_bytes())
    (run / name).unlink()
    if changed is not None:
        (run / name).write_bytes(changed)
    first = warnings_of(run)[0]
    assert name in first
    assert "step 6" in first
    assert set(differences(run, finished_run)) <= {name}
    assert [record["step"] for record in read_metrics(run / "metrics.jsonl").training][-4:] == [7, 8, 9, 10]


def test_notes_in_the_samples_are_kept_in_a_copy(run: Path, finished_run: Path) -> None:
    edited = (run / "samples.md").read_bytes().replace(b"\n## Step 000004", b"\nI like these.\n\n## Step 000004", 1)
    (run / "samples.md").write_bytes(edited)
    warnings = warnings_of(run)
    assert len(warnings) == 2
    assert "edited-samples.md" in warnings[1]
    assert (run / "edited-samples.md").read_bytes() == edited
    assert differences(run, finished_run) == []


@pytest.mark.parametrize(
    ("name", "added"),
    [
        ("metrics.jsonl", b"hello\n"),
        ("metrics.jsonl", b"hello"),
        ("metrics.jsonl", b'{"step": 11, "loss": "bad"}\n'),
        ("samples.md", b"I like these.\n"),
        ("samples.md", b"I like these."),
    ],
)
def test_lines_added_to_the_end_of_a_log_are_kept_in_a_copy(
    run: Path, name: str, added: bytes, finished_run: Path
) -> None:
    edited = (run / name).read_bytes() + added
    (run / name).write_bytes(edited)
    (warning,) = warnings_of(run)
    assert f"edited-{name}" in warning
    assert (run / f"edited-{name}").read_bytes() == edited
    assert differences(run, finished_run) == []


def test_a_replaced_line_of_the_metrics_is_kept_in_a_copy(run: Path) -> None:
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    edited = b"".join([*lines[:2], b"hello\n", *lines[3:]])
    (run / "metrics.jsonl").write_bytes(edited)
    assert len(warnings_of(run)) == 2
    assert (run / "edited-metrics.jsonl").read_bytes() == edited
    assert (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)[:6] == [*lines[:2], *lines[3:7]]


# --- config.toml ------------------------------------------------------------------------------------------------------


def test_a_number_of_steps_edited_in_the_config_is_reported_or_refused(run: Path) -> None:
    config = (run / "config.toml").read_text()
    (run / "config.toml").write_text(config.replace("steps = 10", "steps = 12"))
    progress = Quiet()
    resume(run, progress=progress)
    (message,) = [message for message in progress.messages if "schedule" in message]
    assert all(part in message for part in ("step 6", "12 steps", "config.toml"))
    (run / "config.toml").write_text(config.replace("steps = 10", "steps = 5"))
    with pytest.raises(UserError, match=r"step 12.*config\.toml"):
        resume(run, progress=Quiet())


def test_a_damaged_config_names_its_copy(run: Path) -> None:
    (run / "config.toml").write_text("[model\n")
    copy = run / "checkpoints" / "000006" / "config.toml"
    with pytest.raises(UserError, match=r"config\.toml") as error:
        resume(run, progress=Quiet())
    assert f"cp {copy} {run / 'config.toml'}" in str(error.value)
    shutil.copyfile(copy, run / "config.toml")
    copy.write_text("[model\n")
    with pytest.raises(UserError, match="damaged") as error:
        open_checkpoint(copy.parent)
    assert str(run / "config.toml") in str(error.value)


# --- a run that is moved or removed while it trains -------------------------------------------------------------------


def training_until_error(text: Path, run: Path, progress: Quiet) -> str:
    with pytest.raises(UserError) as error:
        train(config_of(text), run, progress=progress)
    return str(error.value)


@pytest.mark.parametrize("step", [1, 4])
def test_a_run_that_is_moved_stops_and_continues_in_its_new_place(
    tmp_path: Path, text: Path, step: int, finished_run: Path
) -> None:
    run, moved = tmp_path / "run", tmp_path / "moved"
    assert str(run) in training_until_error(text, run, At(step, lambda: run.rename(moved)))
    assert not run.exists()
    assert warnings_of(moved) == []
    assert differences(moved, finished_run) == ["config.toml"]  # which has the text's path


def test_a_run_that_is_moved_during_a_save_stops(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, moved, write = tmp_path / "run", tmp_path / "moved", checkpoint_module.write_tensors

    def write_and_move(path: Path, *arguments: Any, **options: Any) -> None:
        write(path, *arguments, **options)
        if path.parent.name == ".partial-000004" and run.exists():
            run.rename(moved)

    monkeypatch.setattr(checkpoint_module, "write_tensors", write_and_move)
    assert str(run) in training_until_error(text, run, Quiet())
    assert not run.exists()
    assert find_checkpoint(moved).path.name == "000002"
    assert RunDirectory(moved).read_status()["step"] == 2


def test_a_run_that_is_replaced_by_a_link_to_its_new_place_goes_on(tmp_path: Path, text: Path) -> None:
    run, moved = tmp_path / "run", tmp_path / "moved"

    def move() -> None:
        while not (run / "checkpoints" / "000002").exists():  # a save that found no directory would stop the run
            time.sleep(0.01)
        run.rename(moved)
        run.symlink_to(moved)

    train(config_of(text), run, progress=At(3, move))
    assert checkpoint_paths(moved / "checkpoints")[-1].name == "000010"


@pytest.mark.parametrize("moment", ["between saves", "during a save"])
def test_a_run_that_another_process_recreates_is_left_alone(
    tmp_path: Path, text: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, write = tmp_path / "run", checkpoint_module.write_tensors

    def write_and_recreate(path: Path, *arguments: Any, **options: Any) -> None:
        write(path, *arguments, **options)
        if moment == "during a save" and path.name == "optimizer.safetensors":
            recreate()

    def recreate() -> None:
        shutil.rmtree(run)
        run.mkdir()
        for name in (".lock", "config.toml", "metrics.jsonl", "status.json"):
            (run / name).write_text("another run's")

    monkeypatch.setattr(checkpoint_module, "write_tensors", write_and_recreate)
    training_until_error(text, run, At(1 if moment == "between saves" else 99, recreate))
    assert sorted(path.name for path in run.iterdir()) == [".lock", "config.toml", "metrics.jsonl", "status.json"]
    assert {path.read_text() for path in run.iterdir()} == {"another run's"}


# --- the ends of a run ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("step", "saved"), [(1, 0), (3, 2)])
def test_the_status_of_an_interrupted_run_has_the_last_step_that_was_saved(
    tmp_path: Path, text: Path, step: int, saved: int
) -> None:
    """A second Ctrl-C raises KeyboardInterrupt without a save."""

    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config_of(text), tmp_path / "run", progress=At(step, interrupt))
    status = RunDirectory(tmp_path / "run").read_status()
    assert (status["state"], status["step"]) == ("interrupted", saved)
    assert [int(path.name) for path in checkpoint_paths(tmp_path / "run" / "checkpoints")] == ([saved] if saved else [])


def test_a_full_disk_names_the_way_to_continue(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(path: Path, *arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint_module, "write_tensors", fill)
    message = training_until_error(text, tmp_path / "run", Quiet())
    assert all(part in message for part in ("000002", "disk is full", f"--resume {tmp_path / 'run'}"))
