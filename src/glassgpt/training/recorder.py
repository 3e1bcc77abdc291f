"""What a run writes and shows while it goes on: metrics, samples, status, checkpoints, progress. The first rank's alone."""

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
from glassgpt.training.loggers import Logs
from glassgpt.training.progress import Progress
from glassgpt.training.setup import TrainState
from glassgpt.utils.errors import UserError
from glassgpt.utils.files import write_atomic

# Seconds that the save at hand gets when training fails, and the log targets where a run ends at once.
LAST_WRITE = 4.0


class Recorder:
    """Of a rank that is not the first: writes nothing. The methods are those of `RunRecorder`."""

    def begin(self) -> None:
        """Updates are about to begin, or to go on."""

    def step(self, record: Mapping[str, Any]) -> None:
        """One update is done. Raises what went wrong in a save meanwhile."""

    def evaluated(self, record: Mapping[str, Any]) -> None:
        """The model was evaluated."""

    def sampled(self, samples: Sequence[str]) -> None:
        """The model wrote samples."""

    def probed(self, snapshot: ProbeSnapshot) -> None:
        """The model was looked into."""

    def save(self, snapshot: Snapshot | None, val_loss: float | None) -> None:
        """Write a checkpoint of this step while training goes on. Raises what went wrong in the save before."""

    def failed_step(self, lr: float) -> None:
        """Put a step that was not finite on record, with its token ids."""

    def finish(self, timeout: float | None = None) -> None:
        """Wait until all is written, or for so many seconds. Raises what went wrong in the last save."""

    def status(self, state: State, error: str | None = None) -> None:
        """Say how the run stands."""

    def fail(self, reason: str) -> None:
        """The end of a run that fails: give the save at hand a few seconds, and say why. Raises nothing: of two errors the first counts."""

    def close(self) -> None:
        """Close what is open."""

    def close_logs(self, failed: bool = False) -> None:
        """Close the log targets: last of all, since an upload may take its time. Raises nothing."""

    def hurry_logs(self, failed: bool) -> None:
        """Close the log targets where there is no time: what takes longer than a few seconds is left behind. Raises nothing."""


class RunRecorder(Recorder):
    """Of the first rank."""

    def __init__(self, run: RunDirectory, trainer: TrainState, progress: Progress, request: str | None) -> None:
        """`request`: what was asked for when the run was begun, for its status."""
        self._run = run
        self._trainer = trainer
        self._progress = progress
        self._request = request
        self._background = Background()
        self._logs = Logs(run, trainer.config, progress.message)

    def begin(self) -> None:
        trainer = self._trainer
        self._metrics = MetricsWriter(self._run.metrics_path)
        self._logs.open(trainer.step)
        self._progress.started(
            self._run.path, trainer.config, str(ModelSummary(trainer.config.model)), trainer.step, trainer.steps
        )

    def step(self, record: Mapping[str, Any]) -> None:
        if self._metrics.is_removed:  # by now another run may be in its place
            raise UserError(
                f"the run {self._run.path} was removed while it was training; nothing more is written there"
            )
        self._background.check()
        self._metrics.write(record)
        self._logs.record(record)
        self._progress.step(record)

    def evaluated(self, record: Mapping[str, Any]) -> None:
        self._metrics.write(record)
        self._logs.record(record)
        self._progress.evaluated(record)

    def sampled(self, samples: Sequence[str]) -> None:
        append_samples(self._run.samples_path, self._trainer.step, samples)
        self._logs.sampled(self._trainer.step, samples)
        self._progress.sampled(self._trainer.step, samples)

    def probed(self, snapshot: ProbeSnapshot) -> None:
        write_probe(self._run.probe_path(snapshot.step), snapshot)

    def save(self, snapshot: Snapshot | None, val_loss: float | None) -> None:
        assert snapshot is not None
        trainer, run = self._trainer, self._run
        self._logs.flush()
        config, tokenizer, best_step = trainer.config, trainer.data.tokenizer, trainer.best_step
        state = TrainingState(
            step=trainer.step,
            val_loss=val_loss,
            best_step=best_step,
            best_val_loss=trainer.best_val_loss,
            scaler=trainer.scaler.state_dict() or None,
            data_fingerprint=trainer.data.fingerprint,
            recent=list(trainer.outliers.recent) or None,
            tokens_seen=trainer.tokens_seen,
        )

        def write() -> None:
            self._metrics.sync()  # first: a checkpoint counts on all records up to its step
            save_checkpoint(run.checkpoints, snapshot, config, tokenizer, state)
            prune_checkpoints(run.checkpoints, config.keep_checkpoints, best_step)
            self._write_status("running", state.step)

        self._background.start(write)

    def failed_step(self, lr: float) -> None:
        trainer = self._trainer
        self._metrics.write({"step": trainer.step + 1, "loss": math.nan, "lr": lr})
        ids = trainer.rows().tolist()
        write_atomic(
            self._run.failure_path(trainer.step + 1), json.dumps({"step": trainer.step + 1, "lr": lr, "ids": ids})
        )

    def finish(self, timeout: float | None = None) -> None:
        self._background.finish(timeout)

    def status(self, state: State, error: str | None = None) -> None:
        self._write_status(state, self._trainer.step, error)

    def _write_status(self, state: State, step: int, error: str | None = None) -> None:
        ranks = self._trainer.ranks
        facts = {"step": step, "steps": self._trainer.steps, "processes": ranks.size}
        told = {"launch": ranks.launch_id, "request": self._request} | ({} if error is None else {"error": error})
        self._run.write_status(state, **facts, host=socket.gethostname(), pid=os.getpid(), **told)

    def fail(self, reason: str) -> None:
        if self._metrics.is_removed:
            return
        with suppress(Exception):
            self.finish(LAST_WRITE)
        with suppress(Exception):
            self.status("failed", reason)
        with suppress(Exception):
            self.close()
        self.hurry_logs(failed=True)

    def close(self) -> None:
        self._metrics.close()

    def close_logs(self, failed: bool = False) -> None:
        self._logs.close(failed)

    def hurry_logs(self, failed: bool) -> None:
        closing = threading.Thread(
            target=self.close_logs, args=(failed,), daemon=True
        )  # an upload might take longer than there is time
        closing.start()
        closing.join(LAST_WRITE)
