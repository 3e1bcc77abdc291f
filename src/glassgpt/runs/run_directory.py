"""A run's directory: plain files that the trainer writes and everybody else only reads.

    config.toml  environment.json  status.json  metrics.jsonl  samples.md  checkpoints/NNNNNN/  probes/NNNNNN.safetensors  report.html
    tensorboard/  wandb/  where the config's `log` asks for them

Whatever lies behind the checkpoint that a run goes on from is cut off when it is resumed, so that the files of an
interrupted run end up equal to those of one that ran through.
"""

import json
import os
import re
import shlex
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import filelock
import psutil

from glassgpt.config.schema import TrainConfig
from glassgpt.runs.metrics import truncate_metrics, truncate_samples
from glassgpt.utils.errors import UserError, nearby_path
from glassgpt.utils.files import PARTIAL_PREFIX, explain_os_errors, remove_partials, user_path, write_atomic

_SNAPSHOT_NAME = re.compile(r"\d{6,}\.safetensors")
# A step whose loss or gradient was not finite, with its token ids.
FAILURE_PREFIX = "nonfinite-"
# What a start that was killed leaves before there is a config.
_BEGUN = (".lock", "environment.json", "status.json")
State = Literal["running", "preempted", "interrupted", "failed", "finished"]


class RunDirectory:
    """Paths and files of one run."""

    def __init__(self, path: str | Path) -> None:
        self.path = user_path(path)
        self.config_path = self.path / "config.toml"
        self.environment_path = self.path / "environment.json"
        self.status_path = self.path / "status.json"
        self.metrics_path = self.path / "metrics.jsonl"
        self.samples_path = self.path / "samples.md"
        self.report_path = self.path / "report.html"
        self.checkpoints = self.path / "checkpoints"
        self.probes = self.path / "probes"
        self.tensorboard = self.path / "tensorboard"
        self.wandb = self.path / "wandb"
        # The config of a run that is being removed: while it is there, whatever else is here was that run's.
        self._removed_config_path = self.path / f"{PARTIAL_PREFIX}removed-config.toml"

    @property
    def is_run(self) -> bool:
        """Whether a run was started here."""
        return self.config_path.is_file()

    def failure_path(self, step: int) -> Path:
        """Where a step that was not finite is put on record."""
        return self.path / f"{FAILURE_PREFIX}{step:06d}.json"

    def probe_path(self, step: int) -> Path:
        """Where what was seen of the model at a step is kept (`probe.snapshot`)."""
        return self.probes / f"{step:06d}.safetensors"

    @property
    def probed_steps(self) -> list[int]:
        """The steps that such a snapshot is there of, in their order."""
        if not self.probes.is_dir():
            return []
        return sorted(int(path.stem) for path in self.probes.iterdir() if _SNAPSHOT_NAME.fullmatch(path.name))

    def require_run(self) -> None:
        """Raise `UserError` unless a run was started here."""
        with explain_os_errors("read", self.path):
            if not self.path.is_dir():
                nearby = nearby_path(str(self.path))
                raise UserError(f"there is no run at {self.path}{f'; did you mean {nearby}?' if nearby else ''}")
            if not self.is_run:
                raise UserError(f"{self.path} is not a run: it has no config.toml")

    def require_free(self, overwrite: bool) -> None:
        """Raise `UserError` if a new run may not be started here: there is one already, or foreign files."""
        with explain_os_errors("write", self.path):
            if self.path.exists() and not self.path.is_dir():
                raise UserError(f"{self.path} is a file; choose another --out")
            if self.is_run and not overwrite:
                ways = f"go on with --resume {shlex.quote(str(self.path))}, replace it with --overwrite, or choose another --out"
                raise UserError(f"there is already a run at {self.path}: {ways}")
            if self._removed_config_path.exists() and not overwrite:
                raise UserError(
                    f"{self.path} holds what is left of a run; replace it with --overwrite, or choose another --out"
                )
            if self.is_run or self._removed_config_path.exists() or not self.path.is_dir():
                return
            if any(
                path.name not in _BEGUN and not path.name.startswith(PARTIAL_PREFIX) for path in self.path.iterdir()
            ):
                raise UserError(f"{self.path} holds files that are no run's; choose another --out")

    @contextmanager
    def locked(self, wait: float = 0.0) -> Iterator[None]:
        """Hold the run for this process; the lock goes with the process, even by SIGKILL. Raises `UserError` if it is taken.

        `wait`: seconds to wait for a process that is about to end.
        """
        with explain_os_errors("train in", self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            lock = filelock.FileLock(self.path / ".lock")
            try:
                lock.acquire(timeout=wait)
            except filelock.Timeout:
                raise UserError(
                    f"another process is training in {self.path}; wait for it, or choose another --out"
                ) from None
            for written in (
                self.config_path,
                self.environment_path,
                self.status_path,
                self.metrics_path,
                self.samples_path,
            ):
                remove_partials(self.path, f"{written.name}.*")  # what a killed one left: the folder may not be a run's
            remove_partials(self.path, f"{FAILURE_PREFIX}*")
        try:
            yield
        finally:
            lock.release()

    def clear(self) -> None:
        """Remove a former run's files. The config goes aside first and away last, so that a half-removed run is known for one."""
        with explain_os_errors("replace the run in", self.path):
            if self.is_run:
                os.replace(self.config_path, self._removed_config_path)
            for folder in (self.checkpoints, self.probes, self.tensorboard, self.wandb):
                if folder.exists():
                    shutil.rmtree(folder)
            for path in (
                self.metrics_path,
                self.samples_path,
                self.environment_path,
                self.status_path,
                self.report_path,
            ):
                path.unlink(missing_ok=True)
            for path in self.path.glob(f"{FAILURE_PREFIX}*"):
                path.unlink()
            self._removed_config_path.unlink(missing_ok=True)

    def read_config(self) -> TrainConfig:
        """The run's config."""
        try:
            with explain_os_errors("read", self.config_path):
                text = self.config_path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise UserError(f"{self.config_path} is not UTF-8 text") from None
        return TrainConfig.from_toml(text, origin=str(self.config_path))

    def write_config(self, config: TrainConfig) -> None:
        """Replace the run's config."""
        write_atomic(self.config_path, config.to_toml())

    def read_environment(self) -> dict[str, Any]:
        """Versions, device, threads and data fingerprint at the run's start."""
        try:
            environment: dict[str, Any] = json.loads(self.environment_path.read_text(encoding="utf-8"))
            missing = {"threads", "data_fingerprint"} - environment.keys()
        except (OSError, ValueError, AttributeError) as error:
            raise UserError(
                f"{self.environment_path} cannot be read ({error}); the run cannot be resumed exactly"
            ) from None
        if missing:
            raise UserError(
                f"{self.environment_path} lacks {', '.join(sorted(missing))}; the run cannot be resumed exactly"
            )
        return environment

    def write_environment(self, environment: Mapping[str, Any]) -> None:
        """Record where and on what data the run started."""
        write_atomic(self.environment_path, json.dumps(environment, indent=1))

    def read_status(self) -> dict[str, Any]:
        """What `write_status` wrote last; empty where nothing can be read."""
        try:
            status = json.loads(self.status_path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        return status if isinstance(status, dict) else {}

    @property
    def state(self) -> str | None:
        """How the run stands: what its status says, `stopped` where that is running and its process no more; None without a status.

        The lock would tell, too, but only by being taken, and a trainer that starts at that moment would find it taken.
        """
        status = self.read_status()
        state, host, pid = (status.get(name) for name in ("state", "host", "pid"))
        if not isinstance(state, str):
            return None
        if (
            state != "running" or host != socket.gethostname() or not isinstance(pid, int)
        ):  # another machine's processes cannot be seen
            return state
        try:
            process = psutil.Process(pid)
            if process.status() == psutil.STATUS_ZOMBIE:  # dead, and its parent has not asked
                return "stopped"
            # A process that is younger than what it wrote has but the same number. (Clocks of files and processes differ a little.)
            return state if process.create_time() <= self.status_path.stat().st_mtime + 2 else "stopped"
        except (psutil.NoSuchProcess, ValueError, OverflowError):
            return "stopped"
        except (psutil.AccessDenied, OSError):
            return state

    def write_status(self, state: State, **facts: Any) -> None:
        """Tell how the run stands. A run whose processes were killed stays `running`: then nobody holds its lock."""
        write_atomic(
            self.status_path,
            json.dumps({"state": state, **facts, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}),
        )

    def cut_back(self, step: int) -> None:
        """Remove metrics, samples and probe snapshots of later steps, and what a killed process left half-written."""
        truncate_metrics(self.metrics_path, step)
        truncate_samples(self.samples_path, step)
        with explain_os_errors("write", self.probes):
            for later in self.probed_steps:
                if later > step:
                    self.probe_path(later).unlink()
            remove_partials(self.probes)
