"""Start a run, or resume one, and take it to its end.

`train` and `resume` differ in where the state comes from; both then hold the run's lock, catch signals, and run
`training_loop`.
"""

import hashlib
import os
import shlex
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from glassgpt.config.schema import TrainConfig
from glassgpt.distributed.group import Ranks, process_group, under_torchrun
from glassgpt.runs.checkpoint import set_aside_later_checkpoints
from glassgpt.runs.run_directory import RunDirectory
from glassgpt.training.interrupts import Interrupts
from glassgpt.training.loggers import require_loggers
from glassgpt.training.loop import training_loop
from glassgpt.training.optim import lr_at
from glassgpt.training.progress import Progress, SilentProgress
from glassgpt.training.recorder import Recorder, recorder_of
from glassgpt.training.resume import SETTLING_SECONDS, find_resume_point, warn_of_changed_environment
from glassgpt.training.setup import TrainState, environment_of, setup_training
from glassgpt.training.step import NonFiniteError
from glassgpt.utils.device import matmul_precision
from glassgpt.utils.errors import UserError, program
from glassgpt.utils.files import explain_os_errors


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
    with _interrupts() as interrupts, process_group() as ranks:
        progress = (progress or Progress()) if ranks.is_main else SilentProgress()
        is_restart = ranks.is_main and _is_restart(run, config, overwrite, ranks)
        if ranks.all_gather_object(is_restart)[0]:
            progress.message(f"resuming {run.path}, which this torchrun job began")
            stopped_by = _resume(run, ranks, progress, interrupts, {}, wait=SETTLING_SECONDS)
        else:
            stopped_by = _train(config, run, overwrite, ranks, progress, interrupts)
    return _end(run, stopped_by)


def resume(run: str | Path, *, steps: int | None = None, progress: Progress | None = None, **execution: Any) -> Path:
    """Resume a run from its newest valid checkpoint, as if it had never stopped; return its directory.

    With other `steps` the schedule from the checkpoint on is that of a run of that length. `execution`: settings of
    `ExecutionConfig` by name (`micro_batch_size=4, sample={"count": 0}`), which change losses as described there. The
    run keeps its precision, and with other `eval_tokens` its best validation loss starts over. A finished run is left
    as it is. Raises `UserError` for a directory that is not a run, for changed data, for a changed setting that
    determines the numbers, for a device that lacks the precision, and if no checkpoint passes verification.
    """
    directory = RunDirectory(run)
    with _interrupts() as interrupts, process_group() as ranks:
        if ranks.is_main:
            directory.require_run()
        # After a restart by torchrun, what is left of the former ranks may need a moment to end.
        is_restart = ranks.launch_id is not None and directory.read_status().get("launch") == ranks.launch_id
        wait = SETTLING_SECONDS if is_restart else 0.0
        changes = execution if steps is None else {**execution, "steps": steps}
        progress = (progress or Progress()) if ranks.is_main else SilentProgress()
        stopped_by = _resume(directory, ranks, progress, interrupts, changes, wait)
    return _end(directory, stopped_by)


def _train(
    config: TrainConfig, run: RunDirectory, overwrite: bool, ranks: Ranks, progress: Progress, interrupts: Interrupts
) -> int | None:
    if ranks.is_main:
        run.require_free(overwrite)
        require_loggers(config.log)
    state = setup_training(config, ranks, progress)
    recorder = recorder_of(run, state, progress, _request_of(config))
    with _lock(run, ranks):
        if ranks.is_main:
            run.require_free(overwrite)  # again: another process may have been faster
            run.clear()
            run.write_environment(environment_of(state))
            recorder.status("running")  # with launch and request, which `_is_restart` looks for
            run.write_config(state.config)
            run.cut_back(0)
        return _run_to_end(run, state, recorder, progress, interrupts)


def _resume(
    run: RunDirectory, ranks: Ranks, progress: Progress, interrupts: Interrupts, changes: dict[str, Any], wait: float
) -> int | None:
    with _lock(run, ranks, wait), ExitStack() as stack:
        config, checkpoint, environment, request = find_resume_point(run, ranks, changes, progress)
        # Sums depend on the number of threads, so restore it. With another number of processes, keep torchrun's.
        if environment.get("processes", 1) == ranks.size:
            stack.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(environment["threads"])
        state = setup_training(config, ranks, progress, checkpoint, environment)
        warn_of_changed_environment(environment, environment_of(state), progress)
        recorder = recorder_of(run, state, progress, request)
        if state.step >= state.steps:
            if run.read_status().get("state") != "finished":  # perhaps killed before this was written
                recorder.status("finished")
            progress.message(f"{run.path} is finished at step {state.step}; --steps N extends it")
            return None
        if checkpoint is None:
            progress.message(f"{run.path} has no checkpoint: it starts again at step 0")
        if ranks.is_main:
            run.cut_back(state.step if checkpoint is not None else -1)
            run.write_config(config)
            set_aside_later_checkpoints(run.checkpoints, state.step, progress.message)
            recorder.status("running")
        return _run_to_end(run, state, recorder, progress, interrupts)


def _run_to_end(
    run: RunDirectory, state: TrainState, recorder: Recorder, progress: Progress, interrupts: Interrupts
) -> int | None:
    """Train until the last step is saved, or the step of a signal, which is returned."""
    state.ranks.enter_phase("the opening of the logs", may_take_long=True)
    recorder.begin()
    state.ranks.on_failure(recorder.fail)
    try:
        interrupts.catch()
        with matmul_precision(state.precision):
            stopped_by = training_loop(state, recorder, interrupts)
            state.ranks.enter_phase("the last save, and the end of the logs", may_take_long=True)
            recorder.finish()
    except NonFiniteError as error:
        raise _record_failure(error, run, state, recorder) from None
    except (KeyboardInterrupt, SystemExit):  # a second Ctrl-C: a running save is completed, no other one begins
        recorder.end("interrupted", hurry=True)
        raise
    state.ranks.on_failure(lambda reason: None)  # all is written: losing a rank now is not a failure of the run
    recorder.end("finished" if stopped_by is None else "interrupted" if stopped_by == signal.SIGINT else "preempted")
    if stopped_by is None:
        progress.finished(run.path)
        return None
    command = "torchrun … -m glassgpt" if under_torchrun() else program()
    resume_command = f"{command} train --resume {shlex.quote(str(run.path))}"
    progress.message(f"stopped at step {state.step} and saved; resume with: {resume_command}")
    return stopped_by


def _record_failure(error: NonFiniteError, run: RunDirectory, state: TrainState, recorder: Recorder) -> UserError:
    """Record the batch of an update that was not finite. Returns the error to raise."""
    state.step = error.step - 1
    recorder.failed_step(lr_at(state.step, state.steps, state.config.optim))
    # Wait until that is written: every rank fails here, and the first one to announce it ends the others.
    state.ranks.all_gather_numbers([0])
    return UserError(f"{error}; its batch is in {run.failure_path(error.step)}. Try a lower --optim.lr")


def _end(run: RunDirectory, stopped_by: int | None) -> Path:
    """The run's directory; if a signal stopped the run, raise the exception that ends the process."""
    if stopped_by is None:
        return run.path
    # Under torchrun any other exit code is a failure, after which it restarts the ranks.
    raise KeyboardInterrupt if stopped_by == signal.SIGINT and not under_torchrun() else SystemExit(0)


def _request_of(config: TrainConfig) -> str:
    """Hash of what was asked for: a restart resumes a run only for the same request."""
    return hashlib.sha256(config.to_toml().encode()).hexdigest()[:16]


def _is_restart(run: RunDirectory, config: TrainConfig, overwrite: bool, ranks: Ranks) -> bool:
    """Whether an earlier attempt of the same torchrun job began this run. Raises `UserError` if that is unclear."""
    with explain_os_errors("read", run.path):
        if ranks.launch_id is None or not run.is_run:
            return False
    status, restarts = run.read_status(), int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if not status and restarts:
        raise UserError(f"{run.status_path} is unreadable, so a restart looks like a new run; use --resume {run.path}")
    own = (socket.gethostname(), os.getpid())  # which began it in an earlier call
    same_job = (status.get("launch"), status.get("request")) == (ranks.launch_id, _request_of(config))
    if not same_job or own == (status["host"], status["pid"]):
        return False
    if overwrite and not restarts:
        raise UserError(
            f"a torchrun job with this --rdzv-id began {run.path}: choose another id to --overwrite the run, "
            "or leave out --overwrite to resume it"
        )
    return True


@contextmanager
def _lock(run: RunDirectory, ranks: Ranks, wait: float = 0.0) -> Iterator[None]:
    """Lock the run on the main rank. A failure is recorded before the lock ends: then another process may resume."""
    with run.locked(wait) if ranks.is_main else nullcontext():
        try:
            yield
        except Exception as error:
            ranks.fail(error)


def _interrupts() -> Interrupts:
    is_alone = not under_torchrun()
    return Interrupts(repeats_mean_quit=is_alone, announces=is_alone or os.environ["RANK"] == "0")
