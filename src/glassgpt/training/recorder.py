"""The recorder of a run: its metrics, samples, status, checkpoints and progress while it trains."""

import json
import math
import os
import socket
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from typing import Any

from glassgpt.interpretability.snapshots import ProbeSnapshot, write_probe
from glassgpt.model.summary import ModelSummary
from glassgpt.runs.checkpoint import LOGS_FILE, Snapshot, TrainingState, prune_checkpoints, save_checkpoint
from glassgpt.runs.environment import ENVIRONMENT_FILE
from glassgpt.runs.metrics import MetricsWriter, append_samples
from glassgpt.runs.run_directory import RunDirectory, State
from glassgpt.training.loggers import Loggers, numbers_of
from glassgpt.training.optim import lr_at
from glassgpt.training.progress import Progress
from glassgpt.training.setup import TrainState
from glassgpt.utils.files import finite, write_atomic
from glassgpt.utils.threads import in_background

# Seconds for the running save if other ranks end this process, and for the loggers if a run ends at once.
LAST_WRITE_SECONDS = 4.0


class Recorder:
    """Writes the files of a run. Every rank has one; on all ranks but the main one, its methods do nothing."""

    def __init__(self, run: RunDirectory, state: TrainState, progress: Progress, request: str | None) -> None:
        """`request`: hash of what was asked for when the run began, for its status."""
        self.run, self.state, self._progress, self._request = run, state, progress, request
        self._saved_step = state.step
        self._is_main = state.ranks.is_main
        self._saving: Future[None] = Future()
        self._saving.set_result(None)
        self._ending = threading.Lock()
        self._has_ended = False

    def begin(self) -> None:
        """Open the logs: updates are about to start."""
        if not self._is_main:
            return
        state, config = self.state, self.state.config
        self._environment = self.run.read_environment()
        self._metrics = MetricsWriter(self.run.metrics_path)
        self.run.open_files.append(self._metrics.file)
        self._loggers = Loggers(self.run, config, state.step, self._progress.message)
        self._progress.started(self.run.path, config, str(ModelSummary(config.model)), state.step, state.steps)

    def step(self, record: Mapping[str, Any]) -> None:
        """Record an update. Raises the error of a save that has failed meanwhile."""
        if not self._is_main:
            return
        if self._saving.done():
            self._saving.result()
        self._record(record)
        self._progress.step(record)

    def evaluated(self, record: Mapping[str, Any]) -> None:
        """Record an evaluation."""
        if not self._is_main:
            return
        self._record(record)
        self._progress.evaluated(record)

    def _record(self, record: Mapping[str, Any]) -> None:
        with self.run.writing():
            self._metrics.write(record)
        self._loggers.each(lambda logger: logger.write(int(record["step"]), dict(numbers_of(record))))

    def sampled(self, samples: Sequence[str]) -> None:
        """Record samples."""
        if not self._is_main:
            return
        with self.run.writing():
            append_samples(self.run.samples_path, self.state.step, samples)
        self._loggers.each(lambda logger: logger.write_samples(self.state.step, samples))
        self._progress.sampled(self.state.step, samples)

    def probed(self, snapshot: ProbeSnapshot) -> None:
        """Write a snapshot of the model's activations."""
        if not self._is_main:
            return
        with self.run.writing():
            write_probe(self.run.probe_path(snapshot.step), snapshot)

    def save(self, snapshot: Snapshot | None, val_loss: float | None) -> None:
        """Write a checkpoint of this step while training continues. Raises as `finish` does."""
        if snapshot is None:  # on all ranks but the main one
            return
        self.finish()
        self._loggers.each(lambda logger: logger.flush())
        state, directory = self.state, self.run.checkpoints
        config, tokenizer, norms = state.config, state.data.tokenizer, state.pending_evaluation
        if norms is not None:  # of an update that float16 has skipped, some are not finite
            norms = {name: norm for name, norm in norms.items() if math.isfinite(norm)}
        saved = TrainingState(
            step=state.step,
            val_loss=finite(val_loss),
            best_step=state.best_step,
            best_val_loss=state.best_val_loss,
            scaler=state.scaler.state_dict() or None,
            data_fingerprint=state.data.fingerprint,
            recent=list(state.outliers.recent) or None,
            tokens_seen=state.tokens_seen,
            pending_evaluation=norms,
        )
        about_run = {ENVIRONMENT_FILE: self._environment, LOGS_FILE: self.run.mark_logs()}

        def write() -> None:
            with self.run.writing():
                self._metrics.sync()  # first: a checkpoint relies on all records up to its step
            with self.run.writing():
                save_checkpoint(directory, snapshot, config, tokenizer, saved, about_run)
            self._saved_step = saved.step
            with self._ending:
                if not self._has_ended:  # then its last status counts, and the run may belong to another process
                    with self.run.writing():
                        prune_checkpoints(directory, config.keep_checkpoints, saved.best_step)
                    self.status("running")

        self._saving = in_background(write, "glassgpt-save")

    def failed_step(self) -> None:
        """Record that the next update was not finite, with its token ids."""
        if not self._is_main:
            return
        step = self.state.step
        lr = lr_at(step, self.state.steps, self.state.config.optim)
        batch = {"step": step + 1, "lr": lr, "ids": self.state.rows(step).tolist()}
        with self.run.writing():
            self._metrics.write({"step": step + 1, "loss": math.nan, "lr": lr})
            write_atomic(self.run.failure_path(step + 1), json.dumps(batch))

    def finish(self) -> None:
        """Wait until the running save is complete. Raises its error."""
        self._saving.result()

    def status(self, state: State, error: str | None = None) -> None:
        """Write the run's status. Its step is the last one that was saved."""
        if not self._is_main:
            return
        facts: dict[str, Any] = {"step": self._saved_step, "steps": self.state.steps}
        facts |= {"processes": self.state.ranks.size, "host": socket.gethostname(), "pid": os.getpid()}
        facts |= {"launch": self.state.ranks.launch_id, "request": self._request}
        with self.run.writing():
            self.run.write_status(state, **facts, **({} if error is None else {"error": error}))

    def end(self, state: State, *, hurry: bool = False, error: str | None = None) -> None:
        """Write the last status, complete the running save, and close all. `hurry`: wait only briefly for uploads."""
        if not self._is_main:
            return
        with self._ending:
            self._has_ended = True
        before = self._saved_step
        try:
            self.status(state, error)
        finally:
            closing = in_background(lambda: self._loggers.close(state == "failed"), "glassgpt-logs")
            self._close(has_failed=state == "failed")  # meanwhile: a rank of several has few seconds for both
            wait([closing], LAST_WRITE_SECONDS if hurry else None)
        if self._saved_step > before:  # by the save that was running
            self.status(state, error)

    def fail(self, reason: str) -> None:
        """End a run that fails, with the reason in its status. Raises nothing: of two errors the first one counts."""
        if not self._is_main:
            return
        with suppress(Exception):
            self.end("failed", hurry=True, error=reason)

    def _close(self, *, has_failed: bool) -> None:
        """Wait for the running save, then close the metrics, which it flushes."""
        # A rank of several ends soon, too. A process of its own may survive, but no save may continue without the lock.
        wait([self._saving], LAST_WRITE_SECONDS if has_failed and not self.state.ranks.is_alone else None)
        if self._saving.done():
            self._metrics.close()
