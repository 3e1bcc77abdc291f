"""What the page offers: the references that it was given, or every run under a folder, and what is on the disk of each now."""

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

MOST_RUNS = 500
"""Runs of a folder that are offered."""


@dataclass(frozen=True)
class Offer:
    """A model, or a run with the models of its steps. A request names it by its number."""

    name: str
    reference: str
    """What `reference.find_model` takes."""
    run: RunDirectory | None = None
    pinned: str | None = None
    """The one step of a run that was asked for: a number, or `best`."""

    def checkpoints(self) -> dict[int, Path]:
        """The kept checkpoints of a run, by their steps; of a pinned one, that alone."""
        kept = {} if self.run is None else kept_checkpoints(self.run)
        if self.pinned is None:
            return kept
        wanted = self.best_of(kept) if self.pinned == "best" else int(self.pinned)
        return {step: path for step, path in kept.items() if step == wanted}

    def best_of(self, kept: dict[int, Path]) -> int | None:
        """The step with the lowest validation loss, as the newest checkpoint knows it."""
        with suppress(UserError, OSError):
            best = Checkpoint(kept[max(kept)]).state.best_step if kept else None
            return best if best in kept else None
        return None

    def told(self, number: int) -> dict[str, Any]:
        """What the page is told of it."""
        kept = self.checkpoints()
        return {
            "id": number,
            "name": self.name,
            "kind": "model" if self.run is None else "run",
            "state": None if self.run is None else self.run.state,
            "steps": list(kept),
            "best": self.best_of(kept),
        }


def kept_checkpoints(run: RunDirectory) -> dict[int, Path]:
    """A run's checkpoints by their steps, in their order."""
    with suppress(OSError):  # removed meanwhile
        return {int(path.name): path for path in checkpoint_paths(run.checkpoints)}
    return {}


class Offers:
    """All that is offered. Numbers stay: what comes later is added at the end."""

    def __init__(self, references: Sequence[str], folder: Path | None) -> None:
        """`folder`: where every run is offered, those too that begin later. Raises `UserError` for a reference that names nothing."""
        self._folder = folder
        self._known = [find_offer(reference) for reference in references]
        self._lock = threading.Lock()
        self.refresh()

    def __getitem__(self, number: int) -> Offer:
        """Raises `UserError` for a number that was not offered."""
        if not 0 <= number < len(self._known):
            raise UserError(f"there is no offer {number}: see /api/offers")
        return self._known[number]

    def __len__(self) -> int:
        return len(self._known)

    def refresh(self) -> None:
        """Add the runs that have begun meanwhile."""
        if self._folder is None:
            return
        with self._lock:
            known = {offer.run.path for offer in self._known if offer.run is not None}
            for path in runs_below(self._folder):
                if path not in known and len(self._known) < MOST_RUNS:
                    self._known.append(Offer(str(path), str(path), RunDirectory(path)))

    def told(self) -> list[dict[str, Any]]:
        """What the page is told: all that is still there."""
        self.refresh()
        return [
            offer.told(number)
            for number, offer in enumerate(self._known)
            if offer.run is None or offer.run.path.is_dir()
        ]


def runs_below(folder: Path) -> list[Path]:
    """The runs right below a folder, the one that was written to last first."""
    with suppress(OSError):
        return sorted((path for path in folder.iterdir() if RunDirectory(path).is_run), key=_written, reverse=True)
    return []


def _written(run: Path) -> tuple[int, str]:
    """When a run's directory was changed last, as with each step's record, and its name."""
    times = [0]
    for name in ("config.toml", "metrics.jsonl", "status.json"):
        with suppress(OSError):
            times.append((run / name).stat().st_mtime_ns)
    return max(times), str(run)


def find_offer(reference: str) -> Offer:
    """What a reference names, without loading it: a model of the hub may still have to be downloaded.

    A run may be without a checkpoint yet: it can be followed. Raises `UserError` where a reference names nothing.
    """
    path = user_path(reference)
    base, _, which = reference.rpartition("@") if "@" in reference and not path.exists() else (reference, "", "")
    run = RunDirectory(base)
    if run.is_run and not (run.path / "model.safetensors").is_file():
        if not which:
            return Offer(reference, reference, run)
        if which != "best" and not which.isdecimal():
            find_model(reference)  # says what there is
        offer = Offer(reference, reference, run, which)
        if not offer.checkpoints():
            find_model(reference)
        return offer
    is_there = (path.is_file() and path.suffix in (".pt", ".pth", ".safetensors")) or any(
        (path / name).is_file() for name in ("config.json", "manifest.json")
    )
    if not is_there and find_hub_id(reference) is None:
        find_model(reference)  # says what is wrong
    return Offer(reference, reference)


def offers_for(references: Sequence[str], folder: Path = Path("runs")) -> Offers:
    """The offers of a command line: its references, or without any the runs in a folder. Raises `UserError` where there are none."""
    if references:
        return Offers(references, None)
    offers = Offers((), folder)
    if not len(offers):
        raise UserError(
            f"there is no run in {folder}/ to look into: `{program()} train` makes one, or name a model: `{program()} play gpt2` takes "
            "GPT-2 from the Hugging Face hub"
        )
    return offers
