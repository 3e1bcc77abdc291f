"""The recorder of a run's files, on the ranks that must not write."""

from collections.abc import Callable
from pathlib import Path

import pytest

from glassgpt.distributed.group import Ranks
from glassgpt.interpretability.snapshots import take_probe
from glassgpt.runs.run_directory import RunDirectory
from glassgpt.training.progress import SilentProgress
from glassgpt.training.recorder import Recorder
from glassgpt.training.setup import environment_of, setup_training
from kill_harness import tiny_config, write_text


@pytest.mark.parametrize("rank", [0, 1])
def test_only_the_main_rank_writes(tmp_path: Path, rank: int) -> None:
    """Every method that writes is called. Each writes its own file, and on another rank nothing exists afterwards."""
    config = tiny_config(write_text(tmp_path / "text.txt"), probe={"tokens": 8})
    state = setup_training(config, Ranks(), SilentProgress())
    state.strategy.ranks = Ranks(rank, 2)
    run = RunDirectory(tmp_path / "run")
    recorder = Recorder(run, state, SilentProgress(), request=None)
    files = set[tuple[Path, int, int, int]]()

    def wrote() -> bool:
        """Return whether a file was added or changed since the last call."""
        nonlocal files
        facts = ((path, path.stat()) for path in run.path.rglob("*"))
        before, files = files, {(path, each.st_size, each.st_ino, each.st_mtime_ns) for path, each in facts}
        return files != before

    if rank == 0:
        run.path.mkdir()
        run.write_environment(environment_of(state))
    recorder.begin()
    wrote()
    calls: list[Callable[[], None]] = [
        lambda: recorder.step({"step": 1, "loss": 2.0}),
        lambda: recorder.evaluated({"step": 1, "val_loss": 2.0}),
        lambda: recorder.sampled(["text"]),
        lambda: recorder.probed(take_probe(state.strategy.full_model(), state.prompts, [], 1)),
        lambda: recorder.failed_step(),
        lambda: recorder.status("running"),
        lambda: recorder.fail("a reason"),
        lambda: recorder.end("finished"),
    ]
    for write in calls:
        write()
        assert wrote() is (rank == 0)
    recorder.save(None, None)
    recorder.finish()
    assert run.path.exists() is (rank == 0)
