"""The recorder of a run: its metrics, samples, status, checkpoints and progress while it trains."""

import json
import math
import os
import socket
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from glassgpt.interpretability.snapshots import ProbeSnapshot, write_probe
from glassgpt.model.summary import ModelSummary
from glassgpt.runs.checkpoint import Background, Snapshot, TrainingState, prune_checkpoints, save_checkpoint
from glassgpt.runs.metrics import MetricsWriter, append_samples
from glassgpt.runs.run_directory import RunDirectory, State
from glassgpt.training.loggers import Loggers, numbers_of
from glassgpt.training.progress import Progress
from glassgpt.training.setup import TrainState
from glassgpt.utils.errors import UserError
from glassgpt.utils.files import write_atomic

# Seconds for the running save if other ranks end this process, and for the loggers if a run ends at once.
LAST_WRITE_SECONDS = 4.0


class Recorder:
    """Takes the reports of a rank, and ignores them: only the main rank has a `RunRecorder`."""

    def begin(self) -> None:
        """Open the logs: updates are about to start."""

    def step(self, record: Mapping[str, Any]) -> None:
        """Record an update. Raises the error of a save that has failed meanwhile."""

    def evaluated(self, record: Mapping[str, Any]) -> None:
        """Record an evaluation."""

    def sampled(self, samples: Sequence[str]) -> None:
        """Record samples."""

    def probed(self, snapshot: ProbeSnapshot) -> None:
        """Write a snapshot of the model's activations."""

    def save(self, snapshot: Snapshot | None, val_loss: float | None) -> None:
        """Write a checkpoint of this step while training continues. Raises the error of the save before."""

    def failed_step(self, lr: float) -> None:
        """Record an update that was not finite, with its token ids."""

    def finish(self) -> None:
        """Wait until the running save is complete. Raises its error."""

    def status(self, state: State, error: str | None = None, step: int | None = None) -> None:
        """Write the run's status. `step`: the last one saved; by default the last one done."""

    def end(self, state: State, *, hurry: bool = False, error: str | None = None, seconds: float | None = None) -> None:
        """Write the last status, wait for the running save, and close the files and the loggers.

        `hurry`: wait only a few seconds for the loggers' uploads. `seconds`: wait only this long for the save.
        """

    def fail(self, reason: str) -> None:
        """End a run that fails, with the reason in its status. Raises nothing."""


class RunRecorder(Recorder):
    """Writes the files of a run, on the main rank."""

    def __init__(self, run: RunDirectory, state: TrainState, progress: Progress, request: str | None) -> None:
        """`request`: hash of what was asked for when the run began, for its status."""
        self._run, self._state, self._progress, self._request = run, state, progress, request
        self._background = Background()
        self._ending = threading.Lock()
        self._has_ended = False
        self._loggers = Loggers(run, state.config, progress.message)

    def begin(self) -> None:
        state, config = self._state, self._state.config
        self._metrics = MetricsWriter(self._run.metrics_path)
        self._loggers.open(state.step)
        self._progress.started(self._run.path, config, str(ModelSummary(config.model)), state.step, state.steps)

    def step(self, record: Mapping[str, Any]) -> None:
        if self._metrics.is_removed:  # by now another run may have taken its place
            raise UserError(f"the run {self._run.path} was removed during training; nothing more is written there")
        self._background.check()
        self._record(record)
        self._progress.step(record)

    def evaluated(self, record: Mapping[str, Any]) -> None:
        self._record(record)
        self._progress.evaluated(record)

    def _record(self, record: Mapping[str, Any]) -> None:
        self._metrics.write(record)
        self._loggers.each(lambda logger: logger.write(int(record["step"]), dict(numbers_of(record))))

    def sampled(self, samples: Sequence[str]) -> None:
        append_samples(self._run.samples_path, self._state.step, samples)
        self._loggers.each(lambda logger: logger.write_samples(self._state.step, samples))
        self._progress.sampled(self._state.step, samples)

    def probed(self, snapshot: ProbeSnapshot) -> None:
        write_probe(self._run.probe_path(snapshot.step), snapshot)

    def save(self, snapshot: Snapshot | None, val_loss: float | None) -> None:
        assert snapshot is not None
        state, run = self._state, self._run
        self._loggers.each(lambda logger: logger.flush())
        config, tokenizer, best_step = state.config, state.data.tokenizer, state.best_step
        saved = TrainingState(
            step=state.step,
            val_loss=val_loss,
            best_step=best_step,
            best_val_loss=state.best_val_loss,
            scaler=state.scaler.state_dict() or None,
            data_fingerprint=state.data.fingerprint,
            recent=list(state.outliers.recent) or None,
            tokens_seen=state.tokens_seen,
        )

        def write() -> None:
            self._metrics.sync()  # first: a checkpoint relies on all records up to its step
            save_checkpoint(run.checkpoints, snapshot, config, tokenizer, saved)
            with self._ending:
                if not self._has_ended:  # then its last status counts, and the run may belong to another process
                    prune_checkpoints(run.checkpoints, config.keep_checkpoints, best_step)
                    self.status("running", step=saved.step)

        self._background.start(write)

    def failed_step(self, lr: float) -> None:
        step = self._state.step
        self._metrics.write({"step": step + 1, "loss": math.nan, "lr": lr})
        batch = {"step": step + 1, "lr": lr, "ids": self._state.rows(step).tolist()}
        write_atomic(self._run.failure_path(step + 1), json.dumps(batch))

    def finish(self) -> None:
        self._background.finish()

    def status(self, state: State, error: str | None = None, step: int | None = None) -> None:
        ranks, step = self._state.ranks, self._state.step if step is None else step
        process = {"host": socket.gethostname(), "pid": os.getpid(), "launch": ranks.launch_id}
        facts = {"step": step, "steps": self._state.steps, "processes": ranks.size, **process}
        optional = {} if error is None else {"error": error}
        self._run.write_status(state, **facts, request=self._request, **optional)

    def end(self, state: State, *, hurry: bool = False, error: str | None = None, seconds: float | None = None) -> None:
        with self._ending:
            self._has_ended = True
        try:
            self.status(state, error)
        finally:
            closing = threading.Thread(target=self._loggers.close, args=(state == "failed",), daemon=True)
            closing.start()
            self._close(seconds)  # meanwhile: a rank of several has few seconds for both
            closing.join(LAST_WRITE_SECONDS if hurry else None)

    def fail(self, reason: str) -> None:
        # A process without other ranks may survive, and the run's lock ends next: no save may continue without it.
        seconds = None if self._state.ranks.is_alone else LAST_WRITE_SECONDS
        with suppress(Exception):  # of two errors the first one counts
            if self._metrics.is_removed:
                self._has_ended = True
                self._close(seconds)
            else:
                self.end("failed", hurry=True, error=reason, seconds=seconds)

    def _close(self, seconds: float | None) -> None:
        """Wait for the running save, at most for some seconds, then close the metrics, which it flushes."""
        self._background.join(seconds)
        if not self._background.is_running:
            self._metrics.close()


def recorder_of(run: RunDirectory, state: TrainState, progress: Progress, request: str | None) -> Recorder:
    """Return the recorder of a rank: a `RunRecorder` on the main one."""
    return RunRecorder(run, state, progress, request) if state.ranks.is_main else Recorder()
