"""Where a run resumes: its newest valid checkpoint, its config with the changes asked for, and what has changed
since."""

import shlex
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from glassgpt.config.schema import EXECUTION_SETTINGS, DataConfig, TrainConfig
from glassgpt.data.sources import resolve
from glassgpt.distributed.group import Ranks
from glassgpt.runs.checkpoint import Checkpoint, latest_checkpoint
from glassgpt.runs.run_directory import RunDirectory
from glassgpt.training.loggers import require_loggers
from glassgpt.training.progress import Progress
from glassgpt.utils.errors import UserError

# Seconds that the processes of a lost host need to release a run, and that another host's files need to become visible.
SETTLING_SECONDS = 60.0


@dataclass(frozen=True)
class ResumePoint:
    """What a resumed run starts from."""

    config: TrainConfig
    environment: dict[str, Any]
    """As recorded when the run began."""
    checkpoint: Checkpoint | None
    request: str | None
    """Hash of what was asked for when the run began."""


def find_resume_point(run: RunDirectory, ranks: Ranks, changes: Mapping[str, Any], progress: Progress) -> ResumePoint:
    """Where a run resumes, found by the main rank and shared with the others. Raises `UserError` as `resume` does."""
    found = ranks.all_gather_object(_find(run, changes, progress) if ranks.is_main else None)[0]
    checkpoint = None if found["step"] is None else _await_checkpoint(run.checkpoints / f"{found['step']:06d}")
    return ResumePoint(TrainConfig.from_dict(found["config"]), found["environment"], checkpoint, found["request"])


def _find(run: RunDirectory, changes: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    environment, config = run.read_environment(), run.read_config()
    checkpoint = latest_checkpoint(run.checkpoints, progress.message)
    done = checkpoint.state.step if checkpoint is not None else 0
    changed = _with_changes(config, changes)
    steps = changes.get("steps")
    if steps is not None and steps != config.steps:
        if steps <= done:
            raise UserError(f"the run {run.path} is already at step {done}: --steps must be larger")
        progress.message(f"from step {done} on, the schedule is that of a run of {steps} steps")
    saved = checkpoint.config if checkpoint is not None else config
    _require_same_numerics(run, config, saved)
    for name, (before, after) in changed.differences(saved).items():
        if name.partition(".")[0] in EXECUTION_SETTINGS:
            progress.message(f"{name}: {before!r} -> {after!r} from step {done} on{_consequence(name, config)}")
    _require_texts(run, config.data)
    require_loggers(changed.log)
    return {
        "config": changed.to_dict(),
        "environment": environment,
        "step": done if checkpoint is not None else None,
        "request": run.read_status().get("request"),
    }


def _with_changes(config: TrainConfig, changes: Mapping[str, Any]) -> TrainConfig:
    """The config with changed settings. Raises `UserError` for a setting that determines the numbers."""
    changed = config.override(**changes)  # which refuses unknown names and wrong values
    fixed = [name for name in changes if name not in (*EXECUTION_SETTINGS, "steps")]
    if fixed:
        name = next((each for each in changed.differences(config) if each.partition(".")[0] in fixed), fixed[0])
        raise UserError(f"{name} determines the numbers of a run, so --resume cannot change it; start a new run")
    return changed


def _require_same_numerics(run: RunDirectory, config: TrainConfig, saved: TrainConfig) -> None:
    """Refuse a config.toml in which a setting was edited that determines the numbers since the checkpoint.

    The length may change, and the text may have moved: its fingerprint shows whether it is the same.
    """
    changed = set(config.differences(saved)) - {"steps", "epochs", "data.source"}
    if list(config.data.mixture.values()) == list(saved.data.mixture.values()):
        changed -= {"data.mixture"}
    changed = {name for name in changed if name.partition(".")[0] not in EXECUTION_SETTINGS}
    if changed:
        raise UserError(
            f"{', '.join(sorted(changed))} in {run.config_path} was changed since the last checkpoint; restore it, "
            f"or start a new run with --init-from {shlex.quote(str(run.path))}"
        )


def _consequence(name: str, config: TrainConfig) -> str:
    masks = name == "micro_batch_size" and config.model.dropout
    return " (dropout's masks depend on it, so losses change by more than rounding)" if masks else ""


def _require_texts(run: RunDirectory, data: DataConfig) -> None:
    try:
        for source in data.sources:
            resolve(source)
    except UserError as error:
        moved = f"if the text has moved, write its new place into {run.config_path} as data.source or in data.mixture"
        raise UserError(f"{str(error).splitlines()[0]}\n{moved}") from None


def _await_checkpoint(path: Path) -> Checkpoint:
    """A checkpoint that the main rank has verified; other hosts may see it later on a network file system."""
    give_up = time.monotonic() + SETTLING_SECONDS
    while not (path / "manifest.json").is_file():
        if time.monotonic() > give_up:
            raise UserError(f"{path} is missing on this host: a run needs a directory that all hosts share")
        time.sleep(0.5)
    return Checkpoint(path)


@contextmanager
def keep_threads(count: int) -> Iterator[None]:
    """Compute with this many threads inside the block: another count sums in another order, with other bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def warn_of_changed_environment(before: Mapping[str, Any], now: Mapping[str, Any], progress: Progress) -> None:
    """Name everything that can change the bits."""
    changed = [f"{key} was {before.get(key)}, is {now[key]}" for key in now if before.get(key) != now[key]]
    if changed:
        progress.message(
            f"warning: the environment differs from the run's first one, so bits may differ: {'; '.join(changed)}"
        )
