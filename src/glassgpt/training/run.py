"""Start a run, or resume one, and take it to its end."""

import hashlib
import os
import secrets
import shlex
import signal
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from glassgpt.config.schema import EXECUTION_SETTINGS, TrainConfig
from glassgpt.config.validation import flatten
from glassgpt.data.sources import resolve as resolve_source
from glassgpt.distributed.group import Ranks, process_group, require_same
from glassgpt.runs.checkpoint import Checkpoint, latest_checkpoint, set_aside_later_checkpoints
from glassgpt.runs.run_directory import RunDirectory
from glassgpt.training.interrupts import Interrupts
from glassgpt.training.loggers import require_loggers
from glassgpt.training.loop import training_loop
from glassgpt.training.progress import Progress, SilentProgress
from glassgpt.training.recorder import Recorder
from glassgpt.training.setup import TrainState, environment_of, setup_training
from glassgpt.training.step import NonFiniteError
from glassgpt.utils.arguments import check_arguments
from glassgpt.utils.device import matmul_precision
from glassgpt.utils.errors import UserError, program
from glassgpt.utils.files import explain_os_errors
from glassgpt.utils.launcher import launcher_number, under_torchrun

# Seconds that the processes of a lost host need to release a run, and that another host's files need to become visible.
SETTLING_SECONDS = 60.0
# Random numbers depend on the device and its kernels, and on how a batch is cut.
_AFFECT_DROPOUT = ("micro_batch_size", "device", "compile", "compile_backend")


@check_arguments
def train(
    config: TrainConfig, out: str | Path | None = None, *, overwrite: bool = False, progress: Progress | None = None
) -> Path:
    """Train a new run in the directory `out` (default: `runs/NAME`) and return it.

    Raises `UserError` before anything is written if config, data or machine do not fit or the directory is taken
    (`overwrite` replaces a run), and if the loss stops being finite. Ctrl-C saves a checkpoint, then raises
    `KeyboardInterrupt`; SIGTERM and SIGHUP save, then raise `SystemExit(0)`. Under `torchrun` every rank calls it; if
    torchrun restarts the ranks, the run that they began is resumed. Whether it fits into memory is not checked.
    """
    run = RunDirectory(out if out is not None else Path("runs") / config.name)
    with _job(run, progress, "train", config.to_dict()) as job:
        is_restart = job.ranks.is_main and _is_restart(run, config, overwrite, job.ranks)
        if job.ranks.all_gather_object(is_restart)[0]:
            job.progress.message(f"resuming {run.path}, which this torchrun job began")
            job.resume({})
        else:
            job.train(config, overwrite)
    return run.path


@check_arguments
def resume(run: str | Path, *, steps: int | None = None, progress: Progress | None = None, **execution: Any) -> Path:
    """Resume a run from its newest valid checkpoint, as if it had never stopped; return its directory.

    With other `steps` the schedule from the checkpoint on is that of a run of that length. `execution`: settings of
    `ExecutionConfig` by name (`micro_batch_size=4, sample={"count": 0}`), which change losses as described there. The
    run keeps its precision, and with other `eval_tokens` its best validation loss starts over. A finished run is left
    as it is. Raises `UserError` for a directory that is not a run, for changed data, for a changed setting that
    determines the numbers, for a device that lacks the precision, and if no checkpoint passes verification.
    """
    directory, changes = RunDirectory(run), execution if steps is None else {**execution, "steps": steps}
    with _job(directory, progress, "train --resume", changes) as job:
        if job.ranks.is_main:
            directory.require_run()
        job.resume(changes)
    return directory.path


@dataclass
class _Job:
    """One rank's part in the training of a run."""

    run: RunDirectory
    ranks: Ranks
    progress: Progress
    until_the_end: ExitStack
    stopped_by: int | None = None  # the signal that stopped the run before its end

    def lock(self, wait: float = 0.0) -> None:
        if self.ranks.is_main:
            self.until_the_end.enter_context(self.run.locked(wait))

    def train(self, config: TrainConfig, overwrite: bool) -> None:
        run, ranks = self.run, self.ranks
        if ranks.is_main:
            run.require_free(overwrite)
            require_loggers(config.log)
        state = setup_training(config, ranks, self.progress)
        recorder = Recorder(run, state, self.progress, _request_of(config))
        self.lock()
        if ranks.is_main:
            run.require_free(overwrite)  # again: another process may have been faster
            run.clear()
            run.write_environment({**environment_of(state), "run_id": secrets.token_hex(8)})
            recorder.status("running")  # with launch and request, which `_is_restart` looks for
            run.write_config(state.config)
            run.cut_back(0)
        self.run_to_end(state, recorder)

    def resume(self, changes: Mapping[str, Any]) -> None:
        run, ranks, progress = self.run, self.ranks, self.progress
        # After a restart by torchrun, what is left of the former ranks may need a moment to end.
        is_restart = ranks.launch_id is not None and run.read_status().get("launch") == ranks.launch_id
        self.lock(SETTLING_SECONDS if is_restart else 0.0)
        config, checkpoint, before = _find_resume_point(run, ranks, changes, progress)
        # Sums depend on the number of threads, so restore it. With another number of processes, keep torchrun's.
        if before.get("processes", 1) == ranks.size:
            self.until_the_end.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(before["threads"])
        state = setup_training(config, ranks, progress, checkpoint, before)
        now = environment_of(state)
        before.setdefault("variables", "")  # which version 0.2 did not record
        changed = [(key, before.get(key), now[key]) for key in now if before.get(key) != now[key]]
        if text := "; ".join(f"{key} was {old or 'not set'}, is {new or 'not set'}" for key, old, new in changed):
            progress.message(f"warning: bits may differ, as the environment has changed: {text}")
        status = run.read_status()
        recorder = Recorder(run, state, progress, status.get("request"))
        if state.step >= state.steps and state.pending_evaluation is None:
            if status.get("state") != "finished":  # perhaps killed before this was written
                recorder.status("finished")
            progress.message(f"{run.path} is finished at step {state.step}; --steps N extends it")
            return
        if checkpoint is None:
            progress.message(f"{run.path} has no checkpoint: it starts again at step 0")
        if ranks.is_main:
            for log in run.changed_logs(checkpoint.logs if checkpoint is not None else {}):
                progress.message(f"warning: {log} was edited, cut or removed since the checkpoint of step {state.step}")
            step, is_pending = -1 if checkpoint is None else state.step, state.pending_evaluation is not None
            for copy in run.cut_back(step, repeats_evaluation=is_pending):
                progress.message(f"warning: a log had lines that training did not write; its copy with them is {copy}")
            run.write_environment(before)
            run.write_config(config)
            set_aside_later_checkpoints(run.checkpoints, state.step, progress.message)
            recorder.status("running")
        self.run_to_end(state, recorder)

    def run_to_end(self, state: TrainState, recorder: Recorder) -> None:
        """Train until the last step is saved, or the step of a signal."""
        run, ranks = self.run, self.ranks
        ranks.enter_phase("the opening of the logs", may_take_long=True)
        recorder.begin()
        ranks.on_failure = recorder.fail
        try:
            interrupts = Interrupts(repeats_mean_quit=not under_torchrun(), announces=ranks.is_main)
            self.until_the_end.enter_context(interrupts)
            ranks.stop_signal = lambda: interrupts.signal or 0
            with matmul_precision(state.precision):
                self.stopped_by = training_loop(state, recorder)
                ranks.enter_phase("the last save, and the end of the logs", may_take_long=True)
                recorder.finish()
        except NonFiniteError as error:
            state.step = error.step - 1
            recorder.failed_step()
            # Wait until that is written: every rank fails here, and the first one to announce it ends the others.
            ranks.all_gather_numbers([0])
            batch = run.failure_path(error.step)
            raise UserError(f"{error}; its batch is in {batch}. Try a lower --optim.lr") from None
        except (KeyboardInterrupt, SystemExit):  # a second Ctrl-C: a running save is completed, no other one begins
            recorder.end("interrupted", hurry=True)
            raise
        ranks.on_failure = lambda reason: None  # all is written: losing a rank now is not a failure of the run
        if self.stopped_by is None:
            recorder.end("finished")
            self.progress.finished(run.path)
            return
        recorder.end("interrupted" if self.stopped_by == signal.SIGINT else "preempted")
        command = "torchrun … -m glassgpt" if under_torchrun() else program()
        resume_command = f"{command} train --resume {shlex.quote(str(run.path))}"
        done = f"at step {state.step} and saved" if state.step else "before the first update was complete"
        self.progress.message(f"stopped {done}; resume with: {resume_command}")


@contextmanager
def _job(run: RunDirectory, progress: Progress | None, command: str, settings: Mapping[str, Any]) -> Iterator[_Job]:
    """Connect the ranks; if a signal stopped the run, raise the exception that ends the process.

    Raises `UserError` if the ranks were not all given the same `command`, run and `settings`.
    """
    # A failure is recorded before the run's lock ends: then another process may resume it.
    with ExitStack() as until_the_end, process_group() as ranks:
        facts = {"version of the code": _hash_of_code(), "torch": torch.__version__, "command": command}
        require_same(ranks, {**facts, "run directory": run.path, **dict(flatten(settings))})
        job = _Job(run, ranks, (progress or Progress()) if ranks.is_main else SilentProgress(), until_the_end)
        yield job
    if job.stopped_by is not None:
        # Under torchrun any other exit code is a failure, after which it restarts the ranks.
        raise KeyboardInterrupt if job.stopped_by == signal.SIGINT and not under_torchrun() else SystemExit(0)


def _hash_of_code() -> str:
    """Hash of this package's own files: ranks with other commits installed may have the same version number."""
    files = sorted(Path(__file__).parents[1].rglob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def _find_resume_point(
    run: RunDirectory, ranks: Ranks, changes: Mapping[str, Any], progress: Progress
) -> tuple[TrainConfig, Checkpoint | None, dict[str, Any]]:
    """Find the changed config, the checkpoint and the environment of the start, on the main rank, and share them."""
    ranks.enter_phase("the verification of the checkpoint", may_take_long=True)
    with explain_os_errors("read", run.path):
        found = ranks.all_gather_object(_find(run, changes, progress) if ranks.is_main else None)[0]
    config, step, environment = found
    if step is None:
        return TrainConfig.from_dict(config), None, environment
    path, give_up = run.checkpoints / f"{step:06d}", time.monotonic() + SETTLING_SECONDS
    while not (path / "manifest.json").is_file():  # other hosts may see it later on a network file system
        if time.monotonic() > give_up:
            raise UserError(f"{path} is missing on this host: a run needs a directory that all hosts share")
        time.sleep(0.5)
    return TrainConfig.from_dict(config), Checkpoint(path), environment


def _find(run: RunDirectory, changes: Mapping[str, Any], progress: Progress) -> tuple[dict[str, Any], int | None, Any]:
    """The changed config, the step of the checkpoint and the environment, as JSON values."""
    config, checkpoint = run.read_config(), latest_checkpoint(run.checkpoints, progress.message)
    environment = _environment_at_start(run, checkpoint, progress)
    done, saved = (0, config) if checkpoint is None else (checkpoint.state.step, checkpoint.config)
    changed = config.override(**changes)  # which refuses unknown names and wrong values
    _require_same_numerics(run, changes, changed, saved)
    if (changed.steps, changed.epochs) != (saved.steps, saved.epochs):
        where = "--steps" if "steps" in changes else f"steps in {run.config_path}"
        if changed.steps is not None and changed.steps <= done:
            raise UserError(f"the run {run.path} is already at step {done}: {where} must be larger")
        length = f"{changed.epochs} epochs" if changed.steps is None else f"{changed.steps} steps"
        edited = "" if "steps" in changes else f", as in {run.config_path}"
        progress.message(f"from step {done} on, the schedule is that of a run of {length}{edited}")
    for name, (before, after) in changed.differences(saved).items():
        if name.partition(".")[0] in EXECUTION_SETTINGS:
            effect = ""
            if name == "eval_tokens":
                effect = "; the best validation loss starts over, as the two are not comparable"
            elif name in _AFFECT_DROPOUT and config.model.dropout:
                effect = " (and dropout's masks change)"
            progress.message(f"{name}: {before!r} -> {after!r} from step {done} on{effect}")
    try:
        for source in config.data.sources:
            resolve_source(source)
    except UserError as error:
        moved = f"if the text has moved, write its new place into {run.config_path} as data.source or in data.mixture"
        raise UserError(f"{str(error).splitlines()[0]}\n{moved}") from None
    require_loggers(changed.log)
    return changed.to_dict(), None if checkpoint is None else done, environment


def _environment_at_start(run: RunDirectory, checkpoint: Checkpoint | None, progress: Progress) -> dict[str, Any]:
    """What the run recorded when it began. The checkpoint's copy counts: it is verified, unlike the run's own file."""
    copy = None if checkpoint is None else checkpoint.environment
    try:
        own = run.read_environment()
    except UserError as error:
        if copy is None:
            raise UserError(f"{error}; the run cannot be resumed without it: restore it from a copy") from None
        progress.message(f"warning: {error}; the newest checkpoint's copy of it is used")
        return copy
    if copy is not None and own != copy:
        edited = ", ".join(sorted(key for key in own | copy if own.get(key) != copy.get(key)))
        where = f"{edited} in {run.environment_path}"
        progress.message(f"warning: {where} changed; the newest checkpoint's copy of that file is used")
    return own if copy is None else copy


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
    if edited := ", ".join(sorted(set(fixed) - may_change)):
        remedy = f"restore it, or start a new run with --init-from {shlex.quote(str(run.path))}"
        raise UserError(f"{edited} in {run.config_path} was changed since the last checkpoint; {remedy}")


def _request_of(config: TrainConfig) -> str:
    """Hash of what was asked for: a restart resumes a run only for the same request."""
    return hashlib.sha256(config.to_toml().encode()).hexdigest()[:16]


def _is_restart(run: RunDirectory, config: TrainConfig, overwrite: bool, ranks: Ranks) -> bool:
    """Whether an earlier attempt of the same torchrun job began this run. Raises `UserError` if that is unclear."""
    with explain_os_errors("read", run.path):
        if ranks.launch_id is None or not run.is_run:
            return False
    status, restarts = run.read_status(), launcher_number("TORCHELASTIC_RESTART_COUNT")
    if not status and restarts:
        raise UserError(f"{run.status_path} is unreadable, so a restart looks like a new run; use --resume {run.path}")
    own = (socket.gethostname(), os.getpid())  # which began it in an earlier call
    same_job = (status.get("launch"), status.get("request")) == (ranks.launch_id, _request_of(config))
    if not same_job or own == (status.get("host"), status.get("pid")):
        return False
    if overwrite and not restarts:
        remedy = "choose another id to --overwrite the run, or leave out --overwrite to resume it"
        raise UserError(f"a torchrun job with this --rdzv-id began {run.path}: {remedy}")
    return True
