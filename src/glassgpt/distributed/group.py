"""The processes of a run: who they are, what they tell each other, and how they end together.

`torchrun` starts them and tells each one its rank; `process_group` makes them a group (NCCL between GPUs, gloo for all that lies in the
host's memory). A process by itself is a group of one, whose methods do nothing, so that training reads the same for 1 and for 64.

Shapes: `W` ranks.
"""

import atexit
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import psutil
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from glassgpt.distributed.watchdog import PERIOD, Watch, end_process, patience
from glassgpt.utils.device import find_device
from glassgpt.utils.errors import RankError, UserError

# Seconds that a rank with an exception may take to say it, and to end the write at hand.
LAST_WORDS = 6.0
# Seconds in which all ranks have to come, from the first to the last one that is started.
MEETING = 600


class Ranks:
    """One process by itself. The methods are those of `DistributedRanks`."""

    rank = 0
    size = 1
    local_rank = 0
    """Among the processes of this host."""
    _tell: Callable[[str], None] = staticmethod(lambda reason: None)
    launch_id: str | None = None
    """What the processes of one `torchrun` have in common, also behind a restart; None without torchrun."""

    @property
    def is_main(self) -> bool:
        """Whether this rank is the one that writes the run's directory."""
        return self.rank == 0

    @property
    def name(self) -> str:
        """Which process this is, for a message."""
        return f"rank {self.rank} of {self.size} ({socket.gethostname()})"

    def device(self, name: str) -> torch.device:
        """The device of that name; of several GPUs this rank's own. Raises `UserError` where there is none."""
        return find_device(name)

    def slice_of(self, count: int) -> slice:
        """This rank's part of `count` rows, which the ranks divide evenly."""
        rows = count // self.size
        return slice(self.rank * rows, (self.rank + 1) * rows)

    def all_gather_object(self, value: Any) -> list[Any]:
        """The JSON value of each rank (W,), in the order of the ranks, on all of them."""
        return [value]

    def all_gather_numbers(self, values: Sequence[float] | npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """The numbers (n,) of each rank as (W, n), on all of them. Sums over them are the same bits everywhere."""
        return np.asarray(values, dtype=np.float64)[None]

    def enter_phase(self, place: str, *, may_take_long: bool = False) -> None:
        """Say where this rank is, for the report of a hang. `may_take_long`: others may wait for it for as long as it takes."""

    def heartbeat(self) -> None:
        """Say that this rank goes on at its place."""

    @contextmanager
    def main_process_first(self, place: str) -> Iterator[None]:
        """One process of each host goes through the block alone; the others follow, and find what it has made."""
        yield

    def all_gather(self, rows: Tensor) -> Tensor:
        """Rows (n, ...) of each rank, as many on each, one behind the other: (W n, ...)."""
        return rows

    def finish(self) -> None:
        """The end of the work that the ranks have in common: each may go its way."""

    def shutdown(self) -> None:
        """This rank goes its way, whatever the others do."""

    def on_failure(self, tell: Callable[[str], None]) -> None:
        """Have `tell` called with the reason when an exception here, or another rank's failure, ends this rank; maybe in another thread."""
        self._tell = tell

    def fail(self, error: Exception) -> NoReturn:
        """The end by an exception: tell it, and raise it again."""
        self._tell(first_line(error))
        raise error


class DistributedRanks(Ranks):
    """The ranks that torchrun has started, this process among them."""

    def __init__(self) -> None:
        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.local_rank = int(os.environ.get("LOCAL_RANK", 0))
        self.launch_id = _launch_id()
        if not dist.is_initialized():  # a process's second run goes on with the group of its first
            store = _connect(_holds_store(self.rank))
            start = _meet(store, self.rank, self.size)
            # A hang is found by the watch below, which names the missing rank; PyTorch's own limit comes after it.
            limit = timedelta(seconds=max(1800.0, 3 * patience()))
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            dist.init_process_group(
                backend, store=PrefixStore(start, store), rank=self.rank, world_size=self.size, timeout=limit
            )
            atexit.register(dist.destroy_process_group)
        run = self.all_gather_object(uuid.uuid4().hex)[0]
        self._watch = Watch(PrefixStore(run, _connect(holds=False)), self.rank, self.size)
        self.all_gather_object(None)  # all have shown themselves
        self._watch.start()

    def device(self, name: str) -> torch.device:
        if name not in ("auto", "cpu", "cuda"):
            raise UserError(
                f"device {name!r} is for one process; under torchrun each takes its own GPU: use auto, cuda or cpu"
            )
        if name == "cpu" or not torch.cuda.is_available():
            return find_device("cpu" if name == "auto" else name)  # MPS has no collectives
        if self.local_rank >= torch.cuda.device_count():
            raise UserError(
                f"there are {torch.cuda.device_count()} GPUs on this host; give torchrun no more --nproc-per-node"
            )
        device = find_device(f"cuda:{self.local_rank}")
        torch.cuda.set_device(device)
        return device

    def all_gather_object(self, value: Any) -> list[Any]:
        text = json.dumps(value).encode()
        lengths = self.all_gather_numbers([len(text)])[:, 0].astype(int).tolist()
        own = torch.zeros(max(lengths), dtype=torch.uint8)
        own[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        table = self.all_gather(own[None]).numpy()
        return [json.loads(row[:length].tobytes()) for row, length in zip(table, lengths, strict=True)]

    def all_gather_numbers(self, values: Sequence[float] | npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        own = torch.from_numpy(np.array(values, dtype=np.float64))
        return self.all_gather(own[None]).numpy()

    def all_gather(self, rows: Tensor) -> Tensor:
        table = rows.new_empty((self.size * rows.shape[0], *rows.shape[1:]))
        dist.all_gather_single(table, rows.contiguous())
        return table

    def enter_phase(self, place: str, *, may_take_long: bool = False) -> None:
        self._watch.place(place, may_take_long)

    def heartbeat(self) -> None:
        self._watch.tick()

    @contextmanager
    def main_process_first(self, place: str) -> Iterator[None]:
        self.enter_phase(place, may_take_long=True)
        host, hosts = os.environ.get("GROUP_RANK", "0"), int(os.environ.get("GROUP_WORLD_SIZE", "1"))
        if self.local_rank:
            self._wait_for_mark(f"{place}/{host}")
        yield
        if self.local_rank == 0:
            self._watch.mark(f"{place}/{host}")
        for other in range(hosts):
            self._wait_for_mark(f"{place}/{other}")

    def _wait_for_mark(self, key: str) -> None:
        while not self._watch.is_marked(key):  # no collective, which would give up: this may take hours
            time.sleep(PERIOD / 4)

    def on_failure(self, tell: Callable[[str], None]) -> None:
        self._watch.tell = tell

    def finish(self) -> None:
        self.enter_phase("the end", may_take_long=True)
        self.all_gather_numbers([0])
        self.shutdown()

    def shutdown(self) -> None:
        self._watch.stop()

    def fail(self, error: Exception) -> NoReturn:
        """Tell all ranks of an exception, which ends them; raise it again, or end silently where another rank's came first."""
        is_broken = _is_broken_connection(error)
        if is_broken:  # perhaps the echo of a failure that is about to be announced
            lost = self._watch.lost(wait=3 * PERIOD)
            reason = f"{self.name}: lost the connection to {', '.join(lost) or 'another rank'}, which was killed or whose host is gone"
        else:
            reason = f"{self.name}: {first_line(error)}"
        first = self._watch.announce(reason)
        # Nothing may keep a failed rank from ending: not a thread, nor a disk, nor a GPU that waits for the others.
        bomb = threading.Timer(LAST_WORDS, end_process)
        bomb.daemon = True
        bomb.start()
        self._watch.tell(first.reason)
        if first.by != self.rank:
            end_process()
        self._watch.stop()
        if _holds_store(self.rank):
            time.sleep(2 * PERIOD)  # the store is this process's own: the others are to read in it why they end
        if is_broken or isinstance(error, UserError):
            raise RankError(reason) from error
        print(f"glassgpt: error: {reason}", file=sys.stderr, flush=True)
        raise error


def under_torchrun() -> bool:
    """Whether torchrun, or something like it, has started this process as one of several or of one."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


@contextmanager
def process_group() -> Iterator[Ranks]:
    """The ranks of a run, for as long as they work together: those that torchrun started, or this process alone.

    An exception that leaves the block on one rank ends the processes of all within seconds; the first one is told with its rank.
    """
    try:
        ranks = DistributedRanks() if under_torchrun() else Ranks()
    except RuntimeError as error:
        raise RankError(
            f"rank {os.environ['RANK']} ({socket.gethostname()}) cannot join the others: {first_line(error)}"
        ) from error
    try:
        yield ranks
        ranks.finish()
    except Exception as error:
        ranks.fail(error)
    except KeyboardInterrupt:
        ranks.shutdown()
        raise


def _holds_store(rank: int) -> bool:
    """Whether the store by which the ranks find each other is this process's, and not torchrun's."""
    return rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


def _connect(holds: bool) -> TCPStore:
    """A connection to the store; `holds`: to a new one, of this process."""
    try:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    except (KeyError, ValueError):
        raise UserError("RANK is set, but not MASTER_ADDR and MASTER_PORT: start the processes with torchrun") from None
    return TCPStore(address, port, is_master=holds, wait_for_workers=False, timeout=timedelta(seconds=MEETING))


def _meet(store: TCPStore, rank: int, size: int) -> str:
    """A name that the ranks of this start have in common, and no earlier start of theirs.

    torchrun 2.13 keeps its store when it starts the ranks again, so that they would find the addresses of the dead ones in it
    (pytorch/pytorch#135712). Each rank therefore says a new word, and the first one gives the name to who said it last.
    """
    word = uuid.uuid4().hex
    if rank > 0:
        store.set(f"hello/{rank}", word)
        name: str = store.get(f"welcome/{word}").decode()
        store.set(f"there/{name}/{rank}", "1")
        return name
    give_up, missing = time.monotonic() + MEETING, list(range(1, size))
    while missing:
        for other in missing:
            if store.check([f"hello/{other}"]):
                store.set(f"welcome/{store.get(f'hello/{other}').decode()}", word)
        missing = [other for other in missing if not store.check([f"there/{word}/{other}"])]
        if time.monotonic() > give_up:
            raise UserError(
                f"rank {missing[0]} of {size} has not come within {MEETING} s: see what it says on its own host"
            )
        time.sleep(0.01)
    return word


def _launch_id() -> str | None:
    """What this call of torchrun has and no other one, the same behind a restart of the processes; None without torchrun."""
    run_id = os.environ.get("TORCHELASTIC_RUN_ID")
    if run_id != "none":
        return run_id
    try:
        agent = psutil.Process(
            os.getppid()
        )  # a rendezvous without a name: the processes' parent is torchrun, and stays
    except psutil.Error:  # outside of this container
        return f"{socket.gethostname()}:{os.getppid()}"
    return f"{socket.gethostname()}:{agent.pid}:{agent.create_time()}"


def first_line(error: BaseException) -> str:
    """An exception in a line; of a `UserError` all that it says."""
    text = str(error)
    if isinstance(error, UserError):
        return text
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


def _is_broken_connection(error: BaseException) -> bool:
    """Whether a collective failed, which is the echo of another rank's end."""
    # By its text: gloo's errors are plain RuntimeErrors.
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def require_same(ranks: Ranks, facts: Mapping[str, Any]) -> None:
    """Raise `UserError` that names the rank in which a fact differs from the first rank's: another version of the code or the data."""
    told = ranks.all_gather_object({**facts, "host": socket.gethostname()})
    for rank, own in enumerate(told):
        for what in facts:
            if own[what] != told[0][what]:
                raise UserError(
                    f"rank {rank} ({own['host']}) has another {what} than rank 0 ({told[0]['host']}): they must be the same"
                )
