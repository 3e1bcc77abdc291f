"""The catalog: the runs and models that the page offers, from the command line or from a folder of runs."""

import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glassgpt.interop.references import find_model
from glassgpt.runs.checkpoint import Checkpoint, checkpoint_paths
from glassgpt.runs.run_directory import RunDirectory
from glassgpt.utils.errors import UserError, program
from glassgpt.utils.files import user_path
from glassgpt.utils.hub import find_hub_id

MAX_RUNS = 500
"""Most runs of a folder that are listed."""


@dataclass(frozen=True)
class CatalogEntry:
    """A run with its checkpoints, or a single model. Requests refer to it by its number in the catalog."""

    reference: str
    run: RunDirectory | None = None
    pinned: str | None = None
    """The only step of the run to offer: a number or `best`. None offers all."""

    def checkpoints(self) -> dict[int, Path]:
        """The run's checkpoints by step, in order; of a pinned run only that one."""
        kept = {} if self.run is None else kept_checkpoints(self.run)
        if self.pinned is None:
            return kept
        wanted = best_step(kept) if self.pinned == "best" else int(self.pinned)
        return {step: path for step, path in kept.items() if step == wanted}

    def describe(self, number: int) -> dict[str, Any]:
        """The entry as the page gets it."""
        kept, run = self.checkpoints(), self.run
        kind, state = ("model", None) if run is None else ("run", run.state)
        facts = {"id": number, "name": self.reference, "kind": kind, "state": state}
        return {**facts, "steps": list(kept), "best": best_step(kept)}


def kept_checkpoints(run: RunDirectory) -> dict[int, Path]:
    """A run's checkpoints by step, in order."""
    with suppress(OSError):  # the run was removed in the meantime
        return {int(path.name): path for path in checkpoint_paths(run.checkpoints)}
    return {}


def best_step(kept: dict[int, Path]) -> int | None:
    """The step with the lowest validation loss according to the newest checkpoint, if it is still kept."""
    with suppress(UserError):
        best = Checkpoint(kept[max(kept)]).state.best_step if kept else None
        return best if best in kept else None
    return None


class Catalog:
    """All entries. Their numbers do not change: new runs are appended."""

    def __init__(self, references: Sequence[str], folder: Path = Path("runs")) -> None:
        """The references of a command line; without any, the runs in a folder, and those that are started later.

        Raises `UserError` for a reference that names nothing, and for a folder without runs.
        """
        self._folder = None if references else folder
        self._entries = [find_entry(reference) for reference in references]
        self._lock = threading.Lock()
        self._refresh()
        if not self._entries:
            raise UserError(
                f"there is no run in {folder}/; start one with: {program()} train\n"
                f"or pass a model, such as GPT-2 of the Hugging Face Hub: {program()} play gpt2"
            )

    def __getitem__(self, number: int) -> CatalogEntry:
        if not 0 <= number < len(self._entries):
            raise UserError(f"model must be from 0 to {len(self._entries) - 1}, got {number}")
        return self._entries[number]

    def describe(self) -> list[dict[str, Any]]:
        """The entries as the page gets them, without runs that were removed."""
        self._refresh()
        entries = list(enumerate(self._entries))
        return [entry.describe(number) for number, entry in entries if entry.run is None or entry.run.path.is_dir()]

    def _refresh(self) -> None:
        """Add the folder's new runs, the one written last first."""
        if self._folder is None:
            return
        with self._lock, suppress(OSError):  # no such folder, or a run was removed in the meantime
            known = {entry.reference for entry in self._entries}
            runs = [RunDirectory(path) for path in self._folder.iterdir() if str(path) not in known]
            new = sorted((run for run in runs if run.is_run), key=_last_written, reverse=True)
            self._entries += [CatalogEntry(str(run.path), run) for run in new[: MAX_RUNS - len(known)]]


def _last_written(run: RunDirectory) -> int:
    paths = (run.config_path, run.metrics_path, run.status_path)
    return max((path.stat().st_mtime_ns for path in paths if path.exists()), default=0)


def find_entry(reference: str) -> CatalogEntry:
    """The entry for a reference. No weights are loaded, and a model of the Hub is not downloaded yet.

    A run may have no checkpoint yet: it can be followed. Raises `UserError` if the reference names nothing.
    """
    if not reference or reference.endswith("@"):
        raise UserError(f"{reference!r} is not a model reference: pass a run, RUN@STEP, a checkpoint or hf:owner/name")
    is_pinned = "@" in reference and not user_path(reference).exists()
    base, _, step = reference.rpartition("@") if is_pinned else (reference, "", "")
    run = RunDirectory(base)
    is_run = run.is_run and not (run.path / "model.safetensors").is_file()
    if step or not (is_run or find_hub_id(reference)):
        find_model(reference, verify=False)  # its error says what is wrong
    return CatalogEntry(reference, run, step or None) if is_run else CatalogEntry(reference)
