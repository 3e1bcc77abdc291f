"""Find the point at which a run resumes: its newest valid checkpoint, and its config with the changes asked for."""

import shlex
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
# Random numbers depend on the device and its kernels, and on how a batch is cut.
_AFFECT_DROPOUT = ("micro_batch_size", "device", "compile", "compile_backend")


def find_resume_point(
    run: RunDirectory, ranks: Ranks, changes: Mapping[str, Any], progress: Progress
) -> tuple[TrainConfig, Checkpoint | None, dict[str, Any]]:
    """Find on the main rank where a run resumes, and share it with the others. Raises `UserError` as `resume` does.

    Returns the config with the changes, the checkpoint, and the environment when the run began.
    """
    ranks.enter_phase("the verification of the checkpoint", may_take_long=True)
    found = ranks.all_gather_object(_find(run, changes, progress) if ranks.is_main else None)[0]
    config, step, environment = found
    checkpoint = None if step is None else _await_checkpoint(run.checkpoints / f"{step:06d}")
    return TrainConfig.from_dict(config), checkpoint, environment


def _find(run: RunDirectory, changes: Mapping[str, Any], progress: Progress) -> tuple[dict[str, Any], int | None, Any]:
    """The changed config, the step of the checkpoint and the environment, as JSON values."""
    environment, config = run.read_environment(), run.read_config()
    checkpoint = latest_checkpoint(run.checkpoints, progress.message)
    done, saved = (0, config) if checkpoint is None else (checkpoint.state.step, checkpoint.config)
    changed = config.override(**changes)  # which refuses unknown names and wrong values
    _require_same_numerics(run, changes, changed, saved)
    steps = changes.get("steps")
    if steps is not None and steps != config.steps:
        if steps <= done:
            raise UserError(f"the run {run.path} is already at step {done}: --steps must be larger")
        progress.message(f"from step {done} on, the schedule is that of a run of {steps} steps")
    for name, (before, after) in changed.differences(saved).items():
        if name.partition(".")[0] in EXECUTION_SETTINGS:
            effect = ""
            if name == "eval_tokens":
                effect = "; the best validation loss starts over, as the two are not comparable"
            elif name in _AFFECT_DROPOUT and config.model.dropout:
                effect = " (and dropout's masks change)"
            progress.message(f"{name}: {before!r} -> {after!r} from step {done} on{effect}")
    _require_texts(run, config.data)
    require_loggers(changed.log)
    return changed.to_dict(), None if checkpoint is None else done, environment


def _require_same_numerics(
    run: RunDirectory, changes: Mapping[str, Any], changed: TrainConfig, saved: TrainConfig
) -> None:
    """Refuse a setting that determines the numbers and was changed since the checkpoint, now or in config.toml."""
    # The length may change, and the text may have moved: its fingerprint shows whether it is the same.
    may_change = {"steps", "epochs", "data.source"}
    if list(changed.data.mixture.values()) == list(saved.data.mixture.values()):
        may_change.add("data.mixture")
    fixed = [name for name in changed.differences(saved) if name.partition(".")[0] not in EXECUTION_SETTINGS]
    if name := next((name for name in fixed if name != "steps" and name.partition(".")[0] in changes), None):
        raise UserError(f"{name} determines the numbers of a run, so --resume cannot change it; start a new run")
    if edited := sorted(set(fixed) - may_change):
        raise UserError(
            f"{', '.join(edited)} in {run.config_path} was changed since the last checkpoint; restore it, "
            f"or start a new run with --init-from {shlex.quote(str(run.path))}"
        )


def _require_texts(run: RunDirectory, data: DataConfig) -> None:
    try:
        for source in data.sources:
            resolve(source)
    except UserError as error:
        moved = f"if the text has moved, write its new place into {run.config_path} as data.source or in data.mixture"
        raise UserError(f"{str(error).splitlines()[0]}\n{moved}") from None


def _await_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint that the main rank has verified; other hosts may see it later on a network file system."""
    give_up = time.monotonic() + SETTLING_SECONDS
    while not (path / "manifest.json").is_file():
        if time.monotonic() > give_up:
            raise UserError(f"{path} is missing on this host: a run needs a directory that all hosts share")
        time.sleep(0.5)
    return Checkpoint(path)


def warn_of_changed_environment(before: Mapping[str, Any], now: Mapping[str, Any], progress: Progress) -> None:
    """Name everything that can change the bits."""
    changed = [f"{key} was {before.get(key)}, is {now[key]}" for key in now if before.get(key) != now[key]]
    if changed:
        progress.message(f"warning: bits may differ, as the environment has changed: {'; '.join(changed)}")
