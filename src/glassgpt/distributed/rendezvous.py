"""How the ranks of a run find each other, also after torchrun has restarted them."""

import os
import socket
import time
import uuid
from datetime import timedelta

import psutil
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, but torch 2.13 does not list it

from glassgpt.utils.errors import UserError

# Seconds within which all ranks must connect.
CONNECT_SECONDS = 600


def holds_store(rank: int) -> bool:
    """Whether this process, rather than torchrun, holds the store by which the ranks find each other."""
    return rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


def connect(is_holder: bool) -> TCPStore:
    """A connection to the store by which the ranks find each other; `is_holder`: to a new store in this process."""
    try:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    except (KeyError, ValueError):
        raise UserError("RANK is set, but MASTER_ADDR and MASTER_PORT are not: use torchrun") from None
    timeout = timedelta(seconds=CONNECT_SECONDS)
    return TCPStore(address, port, is_master=is_holder, wait_for_workers=False, timeout=timeout)


def agree_on_prefix(store: TCPStore, rank: int, size: int) -> str:
    """A name that the ranks of this start share, and no earlier start of theirs.

    torchrun 2.13 keeps its store when it restarts the ranks, so that they would find the addresses of the dead ones in
    it (pytorch/pytorch#135712). Each rank therefore sends a new word, and rank 0 answers the latest word of each with
    the name.
    """
    word = uuid.uuid4().hex
    if rank > 0:
        store.set(f"hello/{rank}", word)
        name: str = store.get(f"welcome/{word}").decode()
        store.set(f"there/{name}/{rank}", "1")
        return name
    deadline, missing = time.monotonic() + CONNECT_SECONDS, list(range(1, size))
    while missing:
        for other in missing:
            if store.check([f"hello/{other}"]):
                store.set(f"welcome/{store.get(f'hello/{other}').decode()}", word)
        missing = [other for other in missing if not store.check([f"there/{word}/{other}"])]
        if time.monotonic() > deadline:
            raise UserError(f"rank {missing[0]} of {size} did not connect within {CONNECT_SECONDS} s; see its log")
        time.sleep(0.01)
    return word


def launch_id() -> str | None:
    """An id of this call of torchrun, the same after a restart of its processes; None without torchrun."""
    run_id = os.environ.get("TORCHELASTIC_RUN_ID")
    if run_id != "none":
        return run_id
    parent = os.getppid()  # a rendezvous without an id: the parent of the processes is torchrun, and stays
    try:
        return f"{socket.gethostname()}:{parent}:{psutil.Process(parent).create_time()}"
    except psutil.Error:  # outside this container
        return f"{socket.gethostname()}:{parent}"
