"""Where models are held and computed with: one piece of work after the other, in a thread that nothing else computes in.

PyTorch uses all cores for each piece, and hooks on a model know nothing of threads: two at once would be no faster, and would mix.
"""

import asyncio
import queue
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Generator, Hashable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from glassgpt.interop.references import load_source, read_reference
from glassgpt.interpretability.capture import ActivationCache
from glassgpt.model.gpt import GPT
from glassgpt.playground.catalog import Offer, Offers
from glassgpt.playground.security import BusyError
from glassgpt.runs.checkpoint import open_checkpoint
from glassgpt.tokenizers.builtin import Tokenizer
from glassgpt.utils.errors import UserError

T = TypeVar("T")

MOST_MODELS = 3
"""Models held at once: two to compare, and one that was looked at before."""
MOST_WAITING = 24
"""Questions that wait or are worked on; the page asks a few at once."""
MOST_LOADING = 2
MOST_STREAMS = 4
"""Texts written at once: each holds a cache of keys and values."""
CAPTURED_BYTES = 1 << 30
"""Of captures kept. One of 1,024 tokens by GPT-2 takes half of it."""
TURN = 0.03
"""Seconds that a text is written before others have their turn."""


class Worker:
    """A thread that does one piece of work after the other, for the requests of one event loop."""

    def __init__(self, name: str) -> None:
        self.waiting = 0
        """Requests that wait or are worked for."""
        self._work: queue.SimpleQueue[tuple[Future[object], Callable[[], object]] | None] = queue.SimpleQueue()
        # A daemon: nobody who ends the program wants to wait for a download.
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, work: Callable[[], T]) -> "Future[T]":
        """The future result; cancelled before its turn comes, it is never begun."""
        future: Future[T] = Future()
        self._work.put((future, work))  # type: ignore[arg-type]
        return future

    async def ask(self, work: Callable[[], T]) -> T:
        """The result of a piece of work, when its turn has come. Raises `BusyError` where too many wait already."""
        if self.waiting >= MOST_WAITING:
            raise BusyError("too many questions wait for an answer")
        return await self.turn(work)

    async def turn(self, work: Callable[[], T]) -> T:
        """The same for one who has had a turn before."""
        self.waiting += 1
        try:
            return await asyncio.wrap_future(self.submit(work))
        finally:
            self.waiting -= 1

    def close(self, timeout: float) -> None:
        """End behind what is at hand, which is waited for so many seconds."""
        self._work.put(None)
        self._thread.join(timeout)

    def _run(self) -> None:
        while (item := self._work.get()) is not None:
            future, work = item
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(work())
                except BaseException as error:
                    future.set_exception(error)
            del item, future, work  # what they hold is not to live until the next one


@dataclass(frozen=True, eq=False)
class Held:
    """A model in memory."""

    name: str
    step: int | None
    """The step of a run that it is of."""
    model: GPT
    tokenizer: Tokenizer | None
    seconds: float
    """Time that loading took."""

    @property
    def vocab_size(self) -> int:
        """The ids that may be drawn: makers pad their models' vocabularies, and what has no text is never written."""
        return (
            self.model.vocab_size if self.tokenizer is None else min(self.model.vocab_size, self.tokenizer.vocab_size)
        )


class Captures:
    """The last captures, within a bound of memory. Of one thread."""

    def __init__(self, most_bytes: int = CAPTURED_BYTES) -> None:
        self._most_bytes = most_bytes
        self._kept: OrderedDict[tuple[weakref.ref[Held], Hashable], tuple[ActivationCache, int]] = OrderedDict()

    def get(self, held: Held, question: Hashable, make: Callable[[], ActivationCache]) -> ActivationCache:
        """The one of a model and a question, made where it is not there. The newest is kept whatever its size."""
        for dropped in [key for key in self._kept if key[0]() is None]:
            del self._kept[dropped]
        key = (weakref.ref(held), question)
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key][0]
        seen = make()
        self._kept[key] = (seen, bytes_of(seen))
        while len(self._kept) > 1 and sum(size for _, size in self._kept.values()) > self._most_bytes:
            self._kept.popitem(last=False)
        return seen


def bytes_of(seen: ActivationCache) -> int:
    """Memory of a capture: many of its tensors are views of each other's."""
    tensors = [value for part in (seen, *seen.layers) for value in vars(part).values() if isinstance(value, Tensor)]
    storages = {storage.data_ptr(): storage.nbytes() for storage in (tensor.untyped_storage() for tensor in tensors)}
    return sum(storages.values())


@dataclass
class _Place:
    """Where a model is held, or will be: a checkpoint that was replaced by another of the same step has another stamp."""

    stamp: Hashable
    loading: "asyncio.Future[Held]" = field(repr=False)


class Workshop:
    """Models and computations, for the requests of one event loop."""

    def __init__(self, offers: Offers, device: torch.device) -> None:
        self.offers = offers
        self.device = device
        self.captures = Captures()
        self.computing = Worker("glassgpt-compute")
        """For all that runs a model."""
        self.reading = Worker("glassgpt-read")
        """For what takes its time on the disk."""
        self._loading = Worker("glassgpt-load")
        self._held: OrderedDict[tuple[int, int | None], _Place] = OrderedDict()
        self._streams = 0

    async def held(self, number: int, step: int | None) -> Held:
        """The model of an offer, loaded if need be: of a run, that of a step, None for its newest.

        Raises `UserError` where there is no such thing, `BusyError` where too many are being loaded.
        """
        offer = self.offers[number]
        kept = await asyncio.to_thread(offer.checkpoints)
        if step is None and kept:
            step = max(kept)
        place = self._held.get((number, step))
        stamp = _stamp(kept[step]) if step in kept else None
        if place is not None and stamp not in (None, place.stamp):
            place = None
        if place is None:
            place = self._load(number, offer, step, kept, stamp)
        self._held.move_to_end((number, step))
        return await asyncio.shield(place.loading)  # who asked first may be gone; another may wait for the same

    def _load(self, number: int, offer: Offer, step: int | None, kept: dict[int, Path], stamp: Hashable) -> _Place:
        _require_step(offer, step, kept)
        if sum(not place.loading.done() for place in self._held.values()) >= MOST_LOADING:
            raise BusyError("other models are being loaded")
        key = (number, step)
        self._held.pop(key, None)
        self._make_room(MOST_MODELS - 1)
        work = self._loading.submit(lambda: load(offer, step, kept, self.device))
        place = self._held[key] = _Place(stamp, asyncio.ensure_future(asyncio.wrap_future(work)))

        def forget(loading: "asyncio.Future[Held]") -> None:
            failed = loading.cancelled() or loading.exception() is not None
            if failed and self._held.get(key) is place:  # so that it can be tried anew
                del self._held[key]
            self._make_room(MOST_MODELS)  # of those that were loaded side by side

        place.loading.add_done_callback(forget)
        return place

    def _make_room(self, most: int) -> None:
        """Let go of the models that were asked for longest ago, until there are no more than so many but for those being loaded."""
        ready = [key for key, place in self._held.items() if place.loading.done()]
        for key in ready[: max(0, len(self._held) - most)]:
            del self._held[key]

    async def compute_in_turns(self, make: Callable[[], Generator[None, None, T]]) -> T:
        """The result of a long piece of work, which yields where others may have their turn. Raises `BusyError`."""
        steps = await self.computing.ask(make)
        while (result := await self.computing.turn(lambda: _step(steps))) is None:
            pass
        return result[0]

    async def stream(self, make: Callable[[], Generator[T, None, None]]) -> AsyncIterator[list[T]]:
        """What an iterator gives, a turn's worth at a time, others' work in between. It is closed where it is left, too.

        Raises `BusyError`, and what `make` and the iterator raise.
        """
        if self._streams >= MOST_STREAMS:
            raise BusyError("too many texts are being written")
        self._streams += 1
        try:
            items = await self.computing.ask(make)
            try:
                while part := await self.computing.turn(lambda: take(items, TURN)):
                    yield part
            finally:
                self.computing.submit(items.close)
        finally:
            self._streams -= 1

    def close(self, timeout: float = 5.0) -> None:
        """End the threads, behind what is being computed."""
        self.computing.close(timeout)
        self.reading.close(0.0)
        self._loading.close(0.0)


def _step(steps: Generator[None, None, T]) -> tuple[T] | None:
    """One step of a long piece of work, and its result at its end."""
    try:
        next(steps)
    except StopIteration as end:
        return (end.value,)
    return None


def take(items: Iterable[T], seconds: float) -> list[T]:
    """What an iterator gives in that time, one thing at least; empty at its end."""
    part = []
    until = time.perf_counter() + seconds
    for item in items:
        part.append(item)
        if time.perf_counter() >= until:
            break
    return part


def _stamp(checkpoint: Path) -> Hashable:
    try:
        status = checkpoint.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def _require_step(offer: Offer, step: int | None, kept: dict[int, Path]) -> None:
    if offer.run is None and step is not None:
        raise UserError(f"{offer.name} is one model and has no steps")
    if offer.run is not None and not kept:
        raise UserError(f"{offer.name} has no checkpoint yet: its first is written at its first evaluation or save")
    if offer.run is not None and step not in kept:
        raise UserError(
            f"{offer.name} has no checkpoint of step {step}, or no more; it has {', '.join(map(str, kept))}"
        )


def load(offer: Offer, step: int | None, kept: dict[int, Path], device: torch.device) -> Held:
    """Load the model of an offer: of a run, that of one of its kept steps. Raises `UserError` where that cannot be done."""
    begin = time.perf_counter()
    if offer.run is None:
        model, tokenizer = read_reference(offer.reference, lambda source: load_source(source, device))
    else:
        assert step is not None
        try:
            model, tokenizer = load_source(open_checkpoint(kept[step], for_training=False), device)
        except FileNotFoundError:
            raise UserError(f"checkpoint {step} of {offer.name} was removed meanwhile: take a newer one") from None
    return Held(offer.name, step, model, tokenizer, time.perf_counter() - begin)
