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
        kept = self.checkpoints()
        return {
            "id": number,
            "name": self.reference,
            "kind": "model" if self.run is None else "run",
            "state": None if self.run is None else self.run.state,
            "steps": list(kept),
            "best": best_step(kept),
        }


def kept_checkpoints(run: RunDirectory) -> dict[int, Path]:
    """A run's checkpoints by step, in order."""
    with suppress(OSError):  # the run was removed in the meantime
        return {int(path.name): path for path in checkpoint_paths(run.checkpoints)}
    return {}


def best_step(kept: dict[int, Path]) -> int | None:
    """The step with the lowest validation loss according to the newest checkpoint, if it is still kept."""
    with suppress(UserError, OSError):
        best = Checkpoint(kept[max(kept)]).state.best_step if kept else None
        return best if best in kept else None
    return None


class Catalog:
    """All entries. Their numbers do not change: new runs are appended."""

    def __init__(self, references: Sequence[str], folder: Path | None = None) -> None:
        """`folder`: list all its runs, later ones too. Raises `UserError` for a reference that names nothing."""
        self._folder = folder
        self._entries = [find_entry(reference) for reference in references]
        self._lock = threading.Lock()
        self.refresh()

    def __getitem__(self, number: int) -> CatalogEntry:
        if not 0 <= number < len(self._entries):
            raise UserError(f"model must be from 0 to {len(self._entries) - 1}, got {number}")
        return self._entries[number]

    def __len__(self) -> int:
        return len(self._entries)

    def refresh(self) -> None:
        """Add the folder's new runs, the one written last first."""
        if self._folder is None:
            return
        with self._lock:
            known = {entry.reference for entry in self._entries}
            new = [path for path in find_runs(self._folder) if str(path) not in known]
            self._entries += [CatalogEntry(str(path), RunDirectory(path)) for path in new][: MAX_RUNS - len(known)]

    def describe(self) -> list[dict[str, Any]]:
        """The entries as the page gets them, without runs that were removed."""
        self.refresh()
        entries = list(enumerate(self._entries))
        return [entry.describe(number) for number, entry in entries if entry.run is None or entry.run.path.is_dir()]


def find_runs(folder: Path) -> list[Path]:
    """The runs directly below a folder, the one written last first."""
    with suppress(OSError):
        return sorted((path for path in folder.iterdir() if RunDirectory(path).is_run), key=_last_written, reverse=True)
    return []


def _last_written(run: Path) -> tuple[int, str]:
    times = [0]
    for name in ("config.toml", "metrics.jsonl", "status.json"):
        with suppress(OSError):
            times.append((run / name).stat().st_mtime_ns)
    return max(times), str(run)


def find_entry(reference: str) -> CatalogEntry:
    """The entry for a reference. Nothing is loaded: a model of the Hub may still have to be downloaded.

    A run may have no checkpoint yet: it can be followed. Raises `UserError` if the reference names nothing.
    """
    if not reference or reference.endswith("@"):
        raise UserError(f"{reference!r} is not a model reference: pass a run, RUN@STEP, a checkpoint or hf:owner/name")
    path = user_path(reference)
    base, _, which = reference.rpartition("@") if "@" in reference and not path.exists() else (reference, "", "")
    run = RunDirectory(base)
    if run.is_run and not (run.path / "model.safetensors").is_file():
        entry = CatalogEntry(reference, run, which or None)
        is_step = which in ("", "best") or which.isdecimal()
        if not is_step or (which and not entry.checkpoints()):
            find_model(reference, verify=False)  # its error lists the steps
        return entry
    is_file = path.is_file() and path.suffix in (".pt", ".pth", ".safetensors")
    is_directory = any((path / name).is_file() for name in ("config.json", "manifest.json"))
    if not is_file and not is_directory and find_hub_id(reference) is None:
        find_model(reference, verify=False)  # its error says what is wrong
    return CatalogEntry(reference)


def create_catalog(references: Sequence[str], folder: Path = Path("runs")) -> Catalog:
    """The catalog of a command line: its references, or the runs in a folder. Raises `UserError` if it is empty."""
    catalog = Catalog(references, None if references else folder)
    if not len(catalog):
        raise UserError(
            f"there is no run in {folder}/; start one with: {program()} train\n"
            f"or pass a model, such as GPT-2 of the Hugging Face Hub: {program()} play gpt2"
        )
    return catalog
