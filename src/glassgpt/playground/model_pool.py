"""The runs and models that the page offers (`Catalog`), those in memory, and the one thread that computes with them.

Requests are computed one at a time: PyTorch uses all cores for each, and hooks on a model are not thread-safe.
"""

import asyncio
import math
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Generator, Hashable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from glassgpt.config.schema import TrainConfig
from glassgpt.interop.references import find_model, load_model
from glassgpt.interpretability.capture import ActivationCache
from glassgpt.interpretability.neurons import NeuronSearch
from glassgpt.model.gpt import GPT
from glassgpt.playground.security import BusyError
from glassgpt.runs.checkpoint import Checkpoint, checkpoint_paths
from glassgpt.runs.run_directory import RunDirectory
from glassgpt.tokenizers.builtin import Tokenizer
from glassgpt.utils.errors import UserError, program
from glassgpt.utils.files import user_path
from glassgpt.utils.hub import find_hub_id
from glassgpt.utils.threads import in_background

T = TypeVar("T")

MAX_RUNS = 500  # runs of a folder that are listed
MAX_MODELS = 3  # in memory: two to compare, and the one before
MAX_WAITING = 24  # requests that wait for a thread; the page sends a few at once
MAX_LOADING = 2
MAX_STREAMS = 4  # texts generated at once: each has a key/value cache
CACHE_BYTES = 1 << 30  # memory for captures; one of 1,024 tokens by GPT-2 takes half of it
TURN_SECONDS = 0.03  # how long a long computation runs before other requests have their turn


@dataclass(frozen=True)
class CatalogEntry:
    """A run with its checkpoints, or a single model. Requests refer to it by its number in the catalog."""

    reference: str
    run: RunDirectory | None = None
    pinned: str | None = None  # the only step of the run to offer: a number or `best`; None offers all

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
        kind, state = ("model", None) if self.run is None else ("run", self.run.state)
        steps = {"steps": list(kept), "best": best_step(kept)}
        return {"id": number, "name": self.reference, "kind": kind, "state": state, **steps}


def kept_checkpoints(run: RunDirectory) -> dict[int, Path]:
    """A run's checkpoints by step, in order."""
    with suppress(OSError):  # the run was removed in the meantime
        return {int(path.name): path for path in checkpoint_paths(run.checkpoints)}
    return {}


def best_step(kept: dict[int, Path]) -> int | None:
    """The step with the lowest validation loss according to the newest readable checkpoint, if it is still kept."""
    for step in sorted(kept, reverse=True):
        with suppress(UserError, FileNotFoundError):
            best = Checkpoint(kept[step]).state.best_step
            return best if best in kept else None
    return None


class Catalog:
    """All entries. Their numbers do not change: new runs are appended."""

    def __init__(self, references: Sequence[str], folder: Path = Path("runs")) -> None:
        """Without references: the runs in a folder, also those that start later. Raises `UserError` if it has none."""
        self._folder = None if references else folder
        self._entries = [find_entry(reference) for reference in references]
        self._lock = threading.Lock()
        self._refresh()
        if not self._entries:
            raise UserError(
                f"{folder}/ has no runs; start one with: {program()} train\n"
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
    """A reference's entry; no weights are loaded. A run may have no checkpoint yet. Raises `UserError`."""
    if not reference or reference.endswith("@"):
        raise UserError(f"{reference!r} is not a model reference: pass a run, RUN@STEP, a checkpoint or hf:owner/name")
    is_pinned = "@" in reference and not user_path(reference).exists()
    base, _, step = reference.rpartition("@") if is_pinned else (reference, "", "")
    run = RunDirectory(base)
    is_run = run.is_run and not (run.path / "model.safetensors").is_file()
    if step or not (is_run or find_hub_id(reference)):
        find_model(reference, verify=False)  # its error says what is wrong
    return CatalogEntry(reference, run, step or None) if is_run else CatalogEntry(reference)


class CaptureCache:
    """The captures used last, within a memory limit. For one thread."""

    def __init__(self, max_bytes: int = CACHE_BYTES) -> None:
        self._max_bytes = max_bytes
        self._kept: OrderedDict[tuple[weakref.ref[Any], Hashable], tuple[ActivationCache, int]] = OrderedDict()

    def get(self, loaded: "LoadedModel", key: Hashable, compute: Callable[[], ActivationCache]) -> ActivationCache:
        """The capture of a model under a key, computed if needed. The newest is kept whatever its size."""
        for dead in [kept for kept in self._kept if kept[0]() is None]:
            del self._kept[dead]
        place = (weakref.ref(loaded), key)
        if place not in self._kept:
            cache = compute()
            self._kept[place] = (cache, size_in_bytes(cache))
        self._kept.move_to_end(place)
        while len(self._kept) > 1 and sum(size for _, size in self._kept.values()) > self._max_bytes:
            self._kept.popitem(last=False)
        return self._kept[place][0]


def size_in_bytes(cache: ActivationCache) -> int:
    """Memory of a capture. Tensors that share storage count once."""
    tensors = [value for part in (cache, *cache.layers) for value in vars(part).values() if isinstance(value, Tensor)]
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model in memory."""

    name: str
    step: int | None  # of the run's checkpoint
    model: GPT
    tokenizer: Tokenizer | None
    load_seconds: float
    captures: CaptureCache
    config: TrainConfig | None = None  # of its run
    data_fingerprint: str | None = None  # of the data that the run began with
    searches: dict[Hashable, NeuronSearch] = field(default_factory=dict)  # by what was searched; for one thread

    @property
    def vocab_size(self) -> int:
        """The ids that can be generated: some models have rows beyond their tokenizer's vocabulary."""
        size = self.model.vocab_size
        return size if self.tokenizer is None else min(size, self.tokenizer.vocab_size)


# Number in the catalog, step, and a stamp that changes when another checkpoint of that step replaces the first.
ModelKey = tuple[int, int | None, Hashable]


class ModelPool:
    """Loads models of a catalog and computes with them, for the requests of one event loop."""

    def __init__(self, catalog: Catalog, device: torch.device) -> None:
        self.catalog = catalog
        self.device = device
        self.waiting = 0  # requests that wait for the computing thread, the one it works for included
        self.streams = 0  # texts being generated
        self.executor = ThreadPoolExecutor(1, "glassgpt-compute", torch.set_grad_enabled, (False,))
        self._captures = CaptureCache()
        self._models: OrderedDict[ModelKey, asyncio.Future[LoadedModel]] = OrderedDict()

    async def get(self, number: int, step: int | None) -> LoadedModel:
        """An entry's model (of a run, that of a step; None: the newest). Raises `UserError` and `BusyError`."""
        entry = self.catalog[number]
        kept = await asyncio.to_thread(entry.checkpoints)
        step = max(kept, default=None) if step is None else step
        key: ModelKey = (number, step, _stamp(kept[step]) if step in kept else None)
        if step is not None and step not in kept:
            in_memory = [key for key in self._models if key[:2] == (number, step)]
            if not in_memory:
                steps = ", ".join(map(str, kept)) or "none"
                raise UserError(f"{entry.reference} has no checkpoint of step {step} (any more); it has {steps}")
            key = in_memory[-1]  # a pruned checkpoint's model stays usable while in memory
        if key not in self._models:
            self._load(key, entry)
        self._models.move_to_end(key)
        return await asyncio.shield(self._models[key])  # this client may leave while another waits for the same model

    def _load(self, key: ModelKey, entry: CatalogEntry) -> None:
        """Start to load a model, in the place of those that were used longest ago."""
        ready = [key for key, loading in self._models.items() if loading.done()]
        if len(self._models) - len(ready) >= MAX_LOADING:
            raise BusyError("other models are loading")
        for oldest in ready[: max(0, len(self._models) - MAX_MODELS + 1)]:
            del self._models[oldest]

        def load() -> LoadedModel:
            begin, step = time.perf_counter(), key[1]
            reference = entry.reference if entry.run is None or step is None else f"{entry.run.path}@{step}"
            loaded = load_model(reference, self.device)
            seconds = time.perf_counter() - begin
            fingerprint = None if loaded.state is None else loaded.state.data_fingerprint
            own = (entry.reference, step, loaded.model, loaded.tokenizer, seconds, self._captures)
            return LoadedModel(*own, loaded.config, fingerprint)

        def forget_failure(loading: "asyncio.Future[LoadedModel]") -> None:
            failed = loading.cancelled() or loading.exception() is not None
            if failed and self._models.get(key) is loading:  # so that the next request tries again
                del self._models[key]

        self._models[key] = asyncio.wrap_future(in_background(load, "glassgpt-load"))  # may download
        self._models[key].add_done_callback(forget_failure)

    async def compute(self, work: Callable[[], T], max_waiting: float = MAX_WAITING) -> T:
        """The result of a computation. If the client leaves before its turn, it never starts. Raises `BusyError`."""
        if self.waiting >= max_waiting:
            raise BusyError("too many requests are waiting")
        self.waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self.executor, work)
        finally:
            self.waiting -= 1

    async def stream(self, generator: Generator[T]) -> AsyncGenerator[list[T]]:
        """What a generator yields, `TURN_SECONDS` at a time: others have a turn in between. Raises `BusyError`."""
        if self.streams >= MAX_STREAMS:
            raise BusyError("too many texts are being generated")
        self.streams += 1
        try:
            while part := await self.compute(lambda: take(generator, TURN_SECONDS), max_waiting=math.inf):
                yield part
        finally:
            self.streams -= 1
            self.executor.submit(generator.close)  # also if the client left


def take(items: Iterable[T], seconds: float) -> list[T]:
    """What an iterator yields in that time, at least one item; empty at its end."""
    part = []
    end = time.perf_counter() + seconds
    for item in items:
        part.append(item)
        if time.perf_counter() >= end:
            break
    return part


def _stamp(checkpoint: Path) -> Hashable:
    with suppress(OSError):  # it was pruned in the meantime
        status = checkpoint.stat()
        return status.st_ino, status.st_mtime_ns
    return None
