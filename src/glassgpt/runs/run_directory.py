"""A run's directory: plain files that training writes, and everything else only reads.

    config.toml  environment.json  status.json  metrics.jsonl  samples.md  report.html
    checkpoints/NNNNNN/  probes/NNNNNN.safetensors
    edited-samples.md  if a resumed run found samples.md (or metrics.jsonl) edited by hand
    tensorboard/  wandb/  if the config's `log` asks for them

Resuming removes everything after the checkpoint that it starts from, so that the files of an interrupted run end up
equal to those of an uninterrupted one.
"""

import json
import os
import re
import shlex
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Literal

import filelock
import psutil

from glassgpt.config.schema import TrainConfig
from glassgpt.runs.environment import read_environment
from glassgpt.runs.metrics import EDITED_PREFIX, begins_as_marked, mark_of, truncate_metrics, truncate_samples
from glassgpt.utils.errors import UserError, nearby_path
from glassgpt.utils.files import (
    PARTIAL_PREFIX,
    decoded,
    explain_os_errors,
    own_file,
    read_file,
    read_object,
    remove_partials,
    user_path,
    write_atomic,
)

# How training names a step. Other names (`0000500`, `٠٠٠٥٠٠`, 200 digits) lead to another path, or to none.
STEP_NAME = re.compile(r"[0-9]{6}|[1-9][0-9]{6,14}")
# The types of what a status holds, and the page shows; values of another type are left out.
_STATUS = {"step": int, "steps": int, "processes": int, "pid": int, "host": str, "error": str, "time": str}
# Files that hold an update whose loss or gradient was not finite, with its token ids.
FAILURE_PREFIX = "nonfinite-"
_FILES = ("config.toml", "environment.json", "status.json", "metrics.jsonl", "samples.md")
_FOLDERS = ("checkpoints", "probes", "tensorboard", "wandb")
# Files of a start that was killed before it wrote the config.
_BEGUN = (".lock", "environment.json", "status.json")
State = Literal["running", "preempted", "interrupted", "failed", "finished"]


def step_paths(directory: Path, suffix: str = "") -> list[Path]:
    """The entries of a directory that are named by a step and end in `suffix`, in order of the steps."""
    paths = [path for path in directory.iterdir() if path.name.endswith(suffix)] if directory.is_dir() else []
    steps = {int(name): path for path in paths if STEP_NAME.fullmatch(name := path.name.removesuffix(suffix))}
    return [steps[step] for step in sorted(steps)]


class RunDirectory:
    """Paths and files of one run."""

    def __init__(self, path: str | Path) -> None:
        self.path = user_path(path)
        self.config_path, self.environment_path, self.status_path, self.metrics_path, self.samples_path = (
            self.path / name for name in _FILES
        )
        self.report_path = self.path / "report.html"
        self.checkpoints, self.probes, self.tensorboard, self.wandb = (self.path / name for name in _FOLDERS)
        # The config of a run that is being removed; while it exists, all other files belong to that run.
        self._removed_config_path = self.path / f"{PARTIAL_PREFIX}removed-config.toml"
        # Open files of this process in the directory: they show whether its path still leads to the same directory.
        self.open_files: list[IO[bytes]] = []

    @property
    def is_run(self) -> bool:
        """Whether a run was started here."""
        return self.config_path.is_file()

    def failure_path(self, step: int) -> Path:
        """File for the record of an update that was not finite."""
        return self.path / f"{FAILURE_PREFIX}{step:06d}.json"

    def probe_path(self, step: int) -> Path:
        """File of the snapshot of a step (`interpretability.snapshots`)."""
        return self.probes / f"{step:06d}.safetensors"

    @property
    def probed_steps(self) -> list[int]:
        """The steps that have a snapshot, in order."""
        return [int(path.stem) for path in step_paths(self.probes, ".safetensors") if path.is_file()]

    def require_run(self) -> None:
        """Raise `UserError` unless a run was started here."""
        with explain_os_errors("read", self.path):
            if not self.path.exists():
                nearby = nearby_path(str(self.path))
                remedy = f"did you mean {nearby}?" if nearby else "pass the directory of a run, such as runs/NAME"
                raise UserError(f"no run at {self.path}; {remedy}")
            if not self.is_run:
                raise UserError(f"{self.path} is not a run: it has no config.toml{self._copy_of_config()}")

    def require_free(self, overwrite: bool) -> None:
        """Raise `UserError` if a new run may not start here because of another run or other files."""
        with explain_os_errors("write", self.path):
            if self.path.exists() and not self.path.is_dir():
                raise UserError(f"{self.path} is a file; choose another --out")
            if any("\ud800" <= character <= "\udfff" for character in str(self.path)):
                raise UserError(f"{self.path} is not UTF-8, so its weights could not be read; choose another --out")
            is_taken = self.is_run or self._removed_config_path.exists()
            if is_taken and not overwrite:
                resuming = f"resume it with --resume {shlex.quote(str(self.path))}, " if self.is_run else ""
                remedy = f"{resuming}replace it with --overwrite, or choose another --out"
                raise UserError(f"there is already a run at {self.path}: {remedy}")
            names = [] if is_taken or not self.path.is_dir() else [path.name for path in self.path.iterdir()]
            if any(name not in _BEGUN and not name.startswith(PARTIAL_PREFIX) for name in names):
                raise UserError(f"{self.path} contains files that do not belong to a run; choose another --out")

    @contextmanager
    def locked(self, wait: float = 0.0) -> Iterator[None]:
        """Lock the run for this process. The lock ends with the process, even after SIGKILL.

        `wait`: seconds to wait for a process that is about to end. Raises `UserError` if another one holds the lock.
        """
        with explain_os_errors("train in", self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            lock = filelock.FileLock(self.path / ".lock")
            try:
                lock.acquire(timeout=wait)
            except filelock.Timeout:
                raise UserError(f"another process is training in {self.path}; wait, or choose another --out") from None
        try:
            with explain_os_errors("train in", self.path):
                for name in (*_FILES, f"{FAILURE_PREFIX}*"):  # by name: the folder may not be a run's
                    remove_partials(self.path, f"{name}.*")
                if odd := [path for name in _FILES if (path := self.path / name).exists() and not path.is_file()]:
                    raise UserError(f"{odd[0]} is not a regular file; remove it, or restore it from a copy")
                self.open_files = [open(self.path / ".lock", "rb")]  # noqa: SIM115
            yield
        except OSError:
            self.require_in_place()  # otherwise, this is why
            raise
        finally:
            for file in self.open_files[:1]:
                file.close()
            lock.release()

    def require_in_place(self) -> None:
        """Raise `UserError` if the directory was moved, removed or replaced since it was locked."""
        for file in (each for each in self.open_files if not each.closed):
            try:
                is_in_place = os.path.samestat(os.stat(file.name), os.fstat(file.fileno()))  # noqa: PTH116
            except (FileNotFoundError, NotADirectoryError):
                is_in_place = False
            if not is_in_place:
                what = f"the run {self.path} (or {file.name}) was moved, removed or replaced during training"
                raise UserError(f"{what}; nothing more is written. Moved: --resume its new place; removed: start over")

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Call `require_in_place` before a write, and again if it fails. Other errors of the disk say how to resume."""
        self.require_in_place()
        try:
            yield
        except (OSError, UserError) as error:
            self.require_in_place()
            if not isinstance(error.__cause__, OSError):
                raise
            remedy = f"when that is fixed, continue with --resume {shlex.quote(str(self.path))}"
            raise UserError(f"{error}; {remedy}") from error.__cause__

    def clear(self) -> None:
        """Remove a former run's files; its config is renamed first and removed last, to mark a half-removed run."""
        with explain_os_errors("replace the run in", self.path):
            if self.is_run:
                os.replace(self.config_path, self._removed_config_path)
            for name in _FOLDERS:
                if (self.path / name).exists():
                    shutil.rmtree(self.path / name)
            files = [self.path / name for name in _FILES]
            edited = (path for name in _FILES for path in self.path.glob(f"{EDITED_PREFIX}{name}*"))
            for path in (*files, self.report_path, *self.path.glob(f"{FAILURE_PREFIX}*"), *edited):
                path.unlink(missing_ok=True)
            self._removed_config_path.unlink(missing_ok=True)

    def read_config(self) -> TrainConfig:
        """The run's config. Raises `UserError` that names a copy if it is damaged."""
        path, origin = self.config_path, str(self.config_path)
        with explain_os_errors("read", path):
            try:
                return TrainConfig.from_toml(decoded(read_file(own_file(path)), origin), origin)
            except UserError as error:
                raise UserError(f"{error}{self._copy_of_config()}") from None

    def _copy_of_config(self) -> str:
        """Where a checkpoint has a copy of the config, as the end of an error; empty without one."""
        copies = [path / "config.toml" for path in step_paths(self.checkpoints) if (path / "config.toml").is_file()]
        newest = copies[-1] if copies else None
        command = shlex.join(["cp", str(newest), str(self.config_path)])
        return "" if newest is None else f"\nthe newest checkpoint has a copy: {command}"

    def write_config(self, config: TrainConfig) -> None:
        """Replace the run's config."""
        write_atomic(self.config_path, config.to_toml())

    def read_environment(self) -> dict[str, Any]:
        """Versions, device, threads and data fingerprint at the run's start, and its id. Raises `UserError`."""
        return read_environment(self.environment_path)

    def write_environment(self, environment: Mapping[str, Any]) -> None:
        """Record where and on what data the run started."""
        write_atomic(self.environment_path, json.dumps(environment, indent=1))

    def read_status(self) -> dict[str, Any]:
        """What `write_status` wrote last; empty if it cannot be read."""
        with suppress(UserError):
            status = read_object(own_file(self.status_path))
            return {name: value for name, value in status.items() if type(value) is _STATUS.get(name, type(value))}
        return {}

    @property
    def state(self) -> str | None:
        """The state in the run's status, but `stopped` if it is `running` without its process; None without a status.

        The lock is not tried: a process that starts training at that moment would find it taken.
        """
        status = self.read_status()
        state, host, pid = (status.get(name) for name in ("state", "host", "pid"))
        if not isinstance(state, str):
            return None
        # The processes of another machine are not visible.
        if state != "running" or host != socket.gethostname() or not isinstance(pid, int):
            return state
        try:
            process = psutil.Process(pid)
            is_dead = process.status() == psutil.STATUS_ZOMBIE  # and its parent has not waited for it
            # A process younger than the file only has the same number. (The clocks of files and processes differ.)
            return "stopped" if is_dead or process.create_time() > self.status_path.stat().st_mtime + 2 else state
        except (psutil.NoSuchProcess, ValueError, OverflowError):
            return "stopped"
        except (psutil.AccessDenied, OSError):
            return state

    def write_status(self, state: State, **facts: Any) -> None:
        """Write the run's status. A run whose processes were killed stays `running`, with its lock free."""
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        write_atomic(self.status_path, json.dumps({"state": state, **facts, "time": now}))

    def mark_logs(self) -> dict[str, str]:
        """The marks of the logs (`metrics.mark_of`), by which `changed_logs` notices later edits."""
        return {path.name: mark_of(path) for path in (self.metrics_path, self.samples_path)}

    def changed_logs(self, marks: Mapping[str, Any]) -> list[Path]:
        """The logs that do not begin any more as their marks say."""
        return [path for name, mark in marks.items() if not begins_as_marked(path := self.path / name, mark)]

    def cut_back(self, step: int, *, repeats_evaluation: bool = False) -> list[Path]:
        """Remove metrics, samples and probe snapshots of later steps, and what a killed process left half-written.

        repeats_evaluation: also remove the evaluation and the samples of this step. Returns copies of edited logs.
        """
        evaluated = step - 1 if repeats_evaluation else step
        copies = [truncate_metrics(self.metrics_path, step, evaluated), truncate_samples(self.samples_path, evaluated)]
        with explain_os_errors("write", self.probes):
            for later in self.probed_steps:
                if later > step:
                    self.probe_path(later).unlink()
            remove_partials(self.probes)
        return [copy for copy in copies if copy is not None]
