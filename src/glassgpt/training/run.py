"""Start a run, or resume one, and take it to its end.

`train` and `resume` differ in where the state comes from; both then hold the run's lock, catch signals, and run
`training_loop`.
"""

import hashlib
import os
import shlex
import signal
import socket
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
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
from glassgpt.training.progress import Progress, SilentProgress
from glassgpt.training.recorder import Recorder
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
    with _start_job(run, progress) as job:
        is_restart = job.ranks.is_main and _is_restart(run, config, overwrite, job.ranks)
        if job.ranks.all_gather_object(is_restart)[0]:
            job.progress.message(f"resuming {run.path}, which this torchrun job began")
            stopped_by = job.resume({})
        else:
            stopped_by = job.train(config, overwrite)
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
    with _start_job(directory, progress) as job:
        if job.ranks.is_main:
            directory.require_run()
        stopped_by = job.resume(execution if steps is None else {**execution, "steps": steps})
    return _end(directory, stopped_by)


@dataclass(frozen=True)
class _Job:
    """One rank's part in the training of a run. Its methods return the signal that stopped the run before its end."""

    run: RunDirectory
    ranks: Ranks
    progress: Progress
    interrupts: Interrupts

    def train(self, config: TrainConfig, overwrite: bool) -> int | None:
        run, ranks = self.run, self.ranks
        if ranks.is_main:
            run.require_free(overwrite)
            require_loggers(config.log)
        state = setup_training(config, ranks, self.progress)
        recorder = Recorder(run, state, self.progress, _request_of(config))
        with self.locked():
            if ranks.is_main:
                run.require_free(overwrite)  # again: another process may have been faster
                run.clear()
                run.write_environment(environment_of(state))
                recorder.status("running")  # with launch and request, which `_is_restart` looks for
                run.write_config(state.config)
                run.cut_back(0)
            return self.run_to_end(state, recorder)

    def resume(self, changes: Mapping[str, Any]) -> int | None:
        run, ranks, progress = self.run, self.ranks, self.progress
        # After a restart by torchrun, what is left of the former ranks may need a moment to end.
        is_restart = ranks.launch_id is not None and run.read_status().get("launch") == ranks.launch_id
        with self.locked(SETTLING_SECONDS if is_restart else 0.0), ExitStack() as stack:
            config, checkpoint, environment = find_resume_point(run, ranks, changes, progress)
            # Sums depend on the number of threads, so restore it. With another number of processes, keep torchrun's.
            if environment.get("processes", 1) == ranks.size:
                stack.callback(torch.set_num_threads, torch.get_num_threads())
                torch.set_num_threads(environment["threads"])
            state = setup_training(config, ranks, progress, checkpoint, environment)
            warn_of_changed_environment(environment, environment_of(state), progress)
            status = run.read_status()
            recorder = Recorder(run, state, progress, status.get("request"))
            if state.step >= state.steps:
                if status.get("state") != "finished":  # perhaps killed before this was written
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
            return self.run_to_end(state, recorder)

    @contextmanager
    def locked(self, wait: float = 0.0) -> Iterator[None]:
        """Lock the run on the main rank. A failure is recorded before the lock ends, so that others may resume."""
        with self.run.locked(wait) if self.ranks.is_main else nullcontext():
            try:
                yield
            except Exception as error:
                self.ranks.fail(error)

    def run_to_end(self, state: TrainState, recorder: Recorder) -> int | None:
        """Train until the last step is saved, or the step of a signal."""
        run, ranks = self.run, self.ranks
        ranks.enter_phase("the opening of the logs", may_take_long=True)
        recorder.begin()
        ranks.on_failure(recorder.fail)
        try:
            self.interrupts.catch()
            with matmul_precision(state.precision):
                stopped_by = training_loop(state, recorder, self.interrupts)
                ranks.enter_phase("the last save, and the end of the logs", may_take_long=True)
                recorder.finish()
        except NonFiniteError as error:
            state.step = error.step - 1
            recorder.failed_step()
            # Wait until that is written: every rank fails here, and the first one to announce it ends the others.
            ranks.all_gather_numbers([0])
            where = f"its batch is in {run.failure_path(error.step)}"
            raise UserError(f"{error}; {where}. Try a lower --optim.lr") from None
        except (KeyboardInterrupt, SystemExit):  # a second Ctrl-C: a running save is completed, no other one begins
            recorder.end("interrupted", hurry=True)
            raise
        ranks.on_failure(lambda reason: None)  # all is written: losing a rank now is not a failure of the run
        if stopped_by is None:
            recorder.end("finished")
            self.progress.finished(run.path)
            return None
        recorder.end("interrupted" if stopped_by == signal.SIGINT else "preempted")
        command = "torchrun … -m glassgpt" if under_torchrun() else program()
        resume_command = f"{command} train --resume {shlex.quote(str(run.path))}"
        self.progress.message(f"stopped at step {state.step} and saved; resume with: {resume_command}")
        return stopped_by


@contextmanager
def _start_job(run: RunDirectory, progress: Progress | None) -> Iterator[_Job]:
    is_alone = not under_torchrun()
    interrupts = Interrupts(repeats_mean_quit=is_alone, announces=is_alone or os.environ["RANK"] == "0")
    with interrupts, process_group() as ranks:
        yield _Job(run, ranks, (progress or Progress()) if ranks.is_main else SilentProgress(), interrupts)


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
