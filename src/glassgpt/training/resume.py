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
) -> tuple[TrainConfig, Checkpoint | None, dict[str, Any], str | None]:
    """Find on the main rank where a run resumes, and share it with the others. Raises `UserError` as `resume` does.

    Returns the config with the changes, the checkpoint, the environment when the run began, and the hash of what was
    asked for then.
    """
    ranks.enter_phase("the verification of the checkpoint", may_take_long=True)
    point = ranks.all_gather_object(_find(run, changes, progress) if ranks.is_main else None)[0]
    checkpoint = None if point["step"] is None else _await_checkpoint(run.checkpoints / f"{point['step']:06d}")
    return TrainConfig.from_dict(point["config"]), checkpoint, point["environment"], point["request"]


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
            effect = ""
            if name == "eval_tokens":
                effect = "; the best validation loss starts over, as the two are not comparable"
            elif name in _AFFECT_DROPOUT and config.model.dropout:
                effect = " (and dropout's masks change)"
            progress.message(f"{name}: {before!r} -> {after!r} from step {done} on{effect}")
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
    """Refuse a config.toml in which a setting was edited that determines the numbers since the checkpoint."""
    # The length may change, and the text may have moved: its fingerprint shows whether it is the same.
    changed = set(config.differences(saved)) - {"steps", "epochs", "data.source"}
    if list(config.data.mixture.values()) == list(saved.data.mixture.values()):
        changed -= {"data.mixture"}
    changed = {name for name in changed if name.partition(".")[0] not in EXECUTION_SETTINGS}
    if changed:
        raise UserError(
            f"{', '.join(sorted(changed))} in {run.config_path} was changed since the last checkpoint; restore it, "
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
