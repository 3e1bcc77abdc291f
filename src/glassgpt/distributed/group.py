"""The processes of a run: their ranks, what they exchange, and how they end together.

`torchrun` starts the processes; `process_group` connects them (NCCL between GPUs, gloo for tensors in host memory).
Training code is the same for one process, for which these methods do nothing. Shapes: `W` ranks.
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
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import psutil
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, but torch 2.13 does not list it
from torch.distributed.distributed_c10d import PrefixStore

from glassgpt.distributed.watchdog import PERIOD, Status, Watchdog, end_process, hang_timeout, print_error
from glassgpt.utils.device import find_device
from glassgpt.utils.errors import RankError, UserError
from glassgpt.utils.formatting import one_line
from glassgpt.utils.launcher import launcher_number, under_torchrun

SHUTDOWN_SECONDS = 6.0  # that a failed rank may take to report its failure and to finish a write
CONNECT_SECONDS = 600  # within which all ranks must connect
PATIENT_SECONDS = 15  # after which the first missing rank is named


class StoppedError(Exception):
    """A signal stops the run before an update or an evaluation is complete. All ranks raise it at the same place."""

    def __init__(self, signal: int) -> None:
        super().__init__(f"stopped by signal {signal}")
        self.signal = signal


class Ranks:
    """The ranks of a run. `Ranks()` is a process that trains alone; `process_group` connects several."""

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0, launch_id: str | None = None) -> None:
        self.rank, self.size = rank, size
        self.local_rank = local_rank  # among the processes of this host
        self.launch_id = launch_id  # of one call of torchrun, also after a restart; None without torchrun
        # Called with the reason if a failure on any rank ends this one; maybe in another thread.
        self.on_failure: Callable[[str], None] = lambda reason: None
        # The number of the signal that asks this rank to stop; 0 if there is none.
        self.stop_signal: Callable[[], int] = lambda: 0
        self._places: list[tuple[str, int]] = []  # host name and local rank of each rank
        self._watchdog: Watchdog | None = None
        self._store: PrefixStore | None = None  # the watchdog's
        self._status = Status(f"{socket.gethostname()}, process {os.getpid()}")

    @classmethod
    def connect(cls) -> "Ranks":
        """Connect to the other processes that torchrun started."""
        if "LOCAL_RANK" not in os.environ:
            variables = "under srun $SLURM_LOCALID, under mpirun $OMPI_COMM_WORLD_LOCAL_RANK"
            remedy = f"set it to the number of this process on its host ({variables}), or use torchrun"
            raise UserError(f"RANK and WORLD_SIZE are set, but LOCAL_RANK is not: {remedy}")
        rank, size, local_rank = map(launcher_number, ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        if max(rank, local_rank) >= size:
            raise RankError(f"RANK = {rank} and LOCAL_RANK = {local_rank} must be less than WORLD_SIZE = {size}")
        ranks = cls(rank, size, local_rank, launch_id())
        if not dist.is_initialized():  # a second run in one process uses the group of the first
            base = connect_to_store(holds_store(rank))
            store = PrefixStore(agree_on_prefix(base, rank, size), base)
            # The watchdog finds hangs and names the missing rank, so PyTorch's own timeout comes later.
            timeout = timedelta(seconds=max(1800.0, 20 * hang_timeout()))
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
            atexit.register(dist.destroy_process_group)
        ranks._store = PrefixStore(ranks.all_gather_object(uuid.uuid4().hex)[0], connect_to_store(False))
        ranks._watchdog = Watchdog(
            ranks._store, rank, size, lambda: ranks._status, lambda reason: ranks.on_failure(reason)
        )
        # Also waits until each rank has reported its status.
        ranks._places = ranks.all_gather_object([socket.gethostname(), local_rank])
        ranks._watchdog.start()
        return ranks

    @property
    def is_main(self) -> bool:
        """Whether this rank is the one that writes the run directory."""
        return self.rank == 0

    @property
    def is_alone(self) -> bool:
        """Whether no launcher started this process, so that it may outlive a failed run."""
        return self._watchdog is None

    def device(self, name: str) -> torch.device:
        """The device of that name; with several GPUs, this rank's. Raises `UserError` if it is not available."""
        if self._watchdog is None:
            return find_device(name)
        if name not in ("auto", "cpu", "cuda"):
            raise UserError(f"device {name!r} is for one process; with several, use auto, cuda or cpu")
        if name == "cpu" or not torch.cuda.is_available():
            return find_device("cpu" if name == "auto" else name)  # MPS has no collectives
        if self.local_rank >= torch.cuda.device_count():
            raise UserError(f"this host has {torch.cuda.device_count()} GPUs; lower --nproc-per-node of torchrun")
        device = find_device(f"cuda:{self.local_rank}")
        torch.cuda.set_device(device)
        return device

    def slice_of(self, count: int) -> slice:
        """This rank's slice of `count` rows, which the ranks share evenly."""
        rows = count // self.size
        return slice(self.rank * rows, (self.rank + 1) * rows)

    def all_gather(self, rows: Tensor) -> Tensor:
        """Rows (n, ...) of each rank, concatenated: (W n, ...)."""
        if self.size == 1:
            return rows
        table = rows.new_empty((self.size * rows.shape[0], *rows.shape[1:]))
        dist.all_gather_single(table, rows.contiguous())
        return table

    def all_gather_numbers(self, values: Sequence[float] | npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """The numbers (n,) of each rank as (W, n), on all of them. Sums over them have the same bits everywhere."""
        return self.all_gather(torch.from_numpy(np.array(values, dtype=np.float64))[None]).numpy()

    def all_gather_object(self, value: Any) -> list[Any]:
        """The JSON value of each rank (W,), in the order of ranks, on all of them."""
        if self.size == 1:
            return [value]
        text = json.dumps(value).encode()
        longest = int(self.all_gather_numbers([len(text)]).max())
        padded = bytearray(text.ljust(longest))  # JSON allows spaces at the end
        table = self.all_gather(torch.frombuffer(padded, dtype=torch.uint8)[None]).numpy()
        return [json.loads(row.tobytes()) for row in table]

    def enter_phase(self, name: str, *, may_take_long: bool = False) -> None:
        """Report what this rank does next. `may_take_long`: other ranks may wait for it without limit."""
        phases = self._status.phases + 1
        self._status = replace(self._status, phases=phases, heartbeats=0, phase=name, may_take_long=may_take_long)

    def heartbeat(self) -> None:
        """Report progress within the phase."""
        self._status = replace(self._status, heartbeats=self._status.heartbeats + 1)

    def update_completed(self) -> None:
        """Report that an update is complete: the first one may take longer than later ones."""
        self._status = replace(self._status, has_updated=True)

    def stop_if_asked(self) -> None:
        """Raise `StoppedError` on all ranks if any of them has a `stop_signal`. Every rank must call this."""
        if signal := int(self.all_gather_numbers([self.stop_signal()]).max()):
            raise StoppedError(signal)

    @contextmanager
    def main_process_first(self, name: str) -> Iterator[None]:
        """One process of each host runs the block first; the others follow, and use its results."""
        self.enter_phase(name, may_take_long=True)
        if self._store is None:
            yield
            return
        marks = {rank: f"mark/{name}/{rank}" for rank, (_, local_rank) in enumerate(self._places) if local_rank == 0}
        of_host = [mark for rank, mark in marks.items() if self._places[rank][0] == self._places[self.rank][0]]
        while self.local_rank and not self._store.check(of_host):  # a collective would time out
            time.sleep(PERIOD / 4)
        yield
        if self.local_rank == 0:
            self._store.set(marks[self.rank], "1")
        while not self._store.check([*marks.values()]):
            time.sleep(PERIOD / 4)

    def finish(self) -> None:
        """Wait until all ranks have finished their common work."""
        self.enter_phase("the end", may_take_long=True)
        self.all_gather_numbers([0])

    def fail(self, error: Exception) -> NoReturn:
        """Announce an exception, which ends all ranks, and raise it. Ends silently if another rank failed first."""
        if self._watchdog is None:
            self.on_failure(first_line(error))
            raise error
        # A collective fails when another rank ends, under gloo with a plain RuntimeError: it is lost or announces why.
        may_be_echo = isinstance(error, dist.DistError) or type(error) is RuntimeError
        lost = self._watchdog.lost_ranks(wait=3 * PERIOD) if may_be_echo else []
        cause = f"lost the connection to {', '.join(lost)}, which was killed or whose host is down" if lost else None
        reason = f"rank {self.rank} of {self.size} ({socket.gethostname()}): {cause or first_line(error)}"
        first = self._watchdog.announce(reason)
        # Nothing may keep a failed rank from ending: neither a thread, nor a disk, nor a GPU that waits for the others.
        timer = threading.Timer(SHUTDOWN_SECONDS, end_process)
        timer.daemon = True
        timer.start()
        self.on_failure(first.reason)
        if first.rank != self.rank:
            end_process()
        self._watchdog.stop()
        if holds_store(self.rank):
            time.sleep(2 * PERIOD)  # the other ranks read in this process's store why they end
        if lost or isinstance(error, UserError):
            raise RankError(reason) from error
        print_error(reason)
        raise error


@contextmanager
def process_group() -> Iterator[Ranks]:
    """The ranks of a run: those that torchrun started, or this process alone.

    An exception in the block on one rank ends all processes within seconds; its message names the rank.
    """
    try:
        ranks = Ranks.connect() if under_torchrun() else Ranks()
    except RuntimeError as error:
        name = f"rank {os.environ['RANK']} ({socket.gethostname()})"
        raise RankError(f"{name} cannot connect to the other ranks: {first_line(error)}") from error
    try:
        yield ranks
        ranks.finish()
    except Exception as error:
        ranks.fail(error)
    finally:
        if ranks._watchdog is not None:
            ranks._watchdog.stop()


def first_line(error: BaseException) -> str:
    """An exception in one line; the whole text of a `UserError`."""
    if isinstance(error, UserError):
        return str(error)
    return ": ".join([type(error).__name__, *str(error).splitlines()[:1]])


def require_same(ranks: Ranks, facts: Mapping[str, Any]) -> None:
    """Raise `UserError`, which names the rank, if a fact such as the version of the code differs."""
    texts = {name: str(value) for name, value in facts.items()}
    (main_host, main), *others = ranks.all_gather_object([socket.gethostname(), texts])
    for rank, (host, own) in enumerate(others, 1):
        if fact := next((name for name in {**main, **own} if own.get(name) != main.get(name)), None):
            values = " and ".join(one_line(each.get(fact, "not given"), 40) for each in (own, main))
            where = f"rank {rank} ({host}) and rank 0 ({main_host})"
            raise UserError(f"{where} differ in {fact}: {values}; it must be the same on all ranks")


def holds_store(rank: int) -> bool:
    """Whether this process, rather than torchrun, holds the store by which the ranks find each other."""
    return rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


def connect_to_store(is_holder: bool) -> TCPStore:
    """A connection to the store by which the ranks find each other; `is_holder`: to a new store in this process."""
    address, port = os.environ.get("MASTER_ADDR"), launcher_number("MASTER_PORT")
    if not address or not 0 < port < 1 << 16:
        raise UserError("RANK is set, but MASTER_ADDR and MASTER_PORT are not an address and a port: use torchrun")
    if is_holder:
        try:
            socket.getaddrinfo(address, port)
        except OSError as error:
            raise UserError(f"MASTER_ADDR = {address!r} is unknown on this host: {error.strerror}") from None
    timeout = timedelta(seconds=CONNECT_SECONDS)
    return TCPStore(address, port, is_master=is_holder, wait_for_workers=False, timeout=timeout)


def agree_on_prefix(store: TCPStore, rank: int, size: int) -> str:
    """A name that the ranks of this start share, and no earlier start of theirs.

    torchrun 2.13 keeps its store when it restarts the ranks, so that they would find the addresses of the dead ones in
    it (pytorch/pytorch#135712). So each rank sends a new word, and rank 0 answers the latest of each with the name.
    """
    word = uuid.uuid4().hex
    hello = f"hello/{size}"  # a rank with another WORLD_SIZE does not connect
    if rank > 0:
        store.set(f"{hello}/{rank}", word)
        name: str = store.get(f"welcome/{word}").decode()
        store.set(f"there/{name}/{rank}", "1")
        return name
    start, missing, is_announced = time.monotonic(), list(range(1, size)), False
    while missing:
        for other in missing:
            if store.check([f"{hello}/{other}"]):
                store.set(f"welcome/{store.get(f'{hello}/{other}').decode()}", word)
        missing = [other for other in missing if not store.check([f"there/{word}/{other}"])]
        seconds = time.monotonic() - start
        if missing and seconds > CONNECT_SECONDS:
            raise UserError(f"rank {missing[0]} of {size} did not connect within {CONNECT_SECONDS} s; see its log")
        if missing and seconds > PATIENT_SECONDS and not is_announced:
            is_announced = True
            print(f"glassgpt: waiting for rank {missing[0]} of {size} to connect", file=sys.stderr, flush=True)
        time.sleep(0.01)
    return word


def launch_id() -> str | None:
    """An id of this call of torchrun, the same after a restart of its processes; None without torchrun."""
    run_id = os.environ.get("TORCHELASTIC_RUN_ID")
    if run_id != "none":
        return run_id
    run_id = f"{socket.gethostname()}:{os.getppid()}"  # no id given: torchrun is the parent of the processes, and stays
    with suppress(psutil.Error):  # outside this container
        run_id += f":{psutil.Process(os.getppid()).create_time()}"
    return run_id
