"""Two agents of torchrun on loopback, as on two hosts: one dies and comes back, and the run resumes."""

import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import filelock
import psutil
import pytest

from glassgpt.config.schema import TrainConfig
from glassgpt.runs.checkpoint import checkpoint_paths
from glassgpt.runs.run_directory import RunDirectory
from kill_harness import differences, tiny_config, write_text
from rank_harness import Harness
from torchrun_harness import environment, live_ranks, torchrun, wait_for

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

# Waits, then becomes torchrun: agents get their ranks in the order of their process ids, so the one that is started
# first has rank 0, even if it comes last and the other one holds the store.
_LATER = "import os, sys; sys.stdin.read(); os.execv(sys.argv[1], sys.argv[1:])"


class Host:
    """Stands in for a host: an agent of torchrun with one rank."""

    def __init__(self, folder: Path, name: str, port: int) -> None:
        meeting = [
            "--nnodes",
            "2",
            "--rdzv-backend",
            "c10d",
            "--rdzv-endpoint",
            f"127.0.0.1:{port}",
            "--rdzv-id",
            "a-job",
        ]
        # By default it takes 15 s until an agent that is gone counts as gone.
        options = [*meeting, "--rdzv-conf", "keep_alive_interval=1"]
        train = ["-m", "glassgpt", "train", str(folder / "config.toml"), "--out", str(folder / "run")]
        command = torchrun(train, ranks=1, restarts=3, options=options)
        # Without it torch 2.13 announces its store in the first round only, and a host that comes back waits forever.
        variables = {**environment(folder), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        self.log = folder / f"{name}.log"
        with open(self.log, "wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _LATER, *command],
                env=variables,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self.agent = psutil.Process(self._process.pid)

    def go(self) -> None:
        """Start the agent."""
        assert self._process.stdin is not None
        self._process.stdin.close()

    @property
    def rank(self) -> int | None:
        """The number of its rank, or None."""
        return next(iter(live_ranks(self.agent)), None)

    def die(self) -> None:
        """Kill the agent and its rank, as a power failure does."""
        with suppress(psutil.NoSuchProcess):
            for process in [self.agent, *self.agent.children(recursive=True)]:
                process.send_signal(signal.SIGKILL)
        self._process.wait()

    def ended(self) -> int:
        """Wait for the agent; returns its exit status."""
        return self._process.wait(timeout=120)


@contextmanager
def _nothing_left(hosts: dict[str, Host]) -> Iterator[None]:
    try:
        yield
    except BaseException:
        print(
            "".join(f"--- {host.log.name}\n{host.log.read_text(errors='replace')[-3000:]}" for host in hosts.values())
        )
        raise
    finally:
        for host in hosts.values():
            host.die()


@pytest.fixture(scope="module")
def harness() -> Iterator[Harness]:
    """The program that forks ranks."""
    started = Harness()
    yield started
    started.close()


@pytest.fixture(scope="module")
def quiet(harness: Harness, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainConfig, Path]:
    """An undisturbed run on two ranks."""
    folder = tmp_path_factory.mktemp("quiet")
    config = tiny_config(
        write_text(folder / "text.txt"),
        name="rendezvous",
        model={"dropout": 0.1},
        steps=150,
        checkpoint_every=5,
        eval_every=50,
    )
    harness.run(2, "train", config=config.to_dict(), out=folder / "run")
    return config, folder / "run"


@pytest.mark.parametrize("rank", [0])  # with 1 it is the same, and another half a minute
def test_a_host_dies_and_comes_back_and_the_run_ends_with_the_same_bits(
    quiet: tuple[TrainConfig, Path], tmp_path: Path, rank: int
) -> None:
    """The host that dies does not hold the store of the rendezvous. The other one takes over rank 0, and writes."""
    config, undisturbed = quiet
    (tmp_path / "config.toml").write_text(config.to_toml(), encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run = RunDirectory(tmp_path / "run")
    hosts = {name: Host(tmp_path, name, port) for name in (("mortal", "store") if rank == 0 else ("store", "mortal"))}
    with _nothing_left(hosts):
        hosts["store"].go()
        wait_for(hosts["store"].agent, lambda: _listens(port))
        hosts["mortal"].go()
        wait_for(hosts["store"].agent, lambda: bool(checkpoint_paths(run.checkpoints)))
        assert (hosts["mortal"].rank, hosts["store"].rank) == (rank, 1 - rank)
        hosts["mortal"].die()
        assert run.read_status()["state"] == "running"
        hosts["again"] = Host(tmp_path, "again", port)
        hosts["again"].go()
        assert [hosts[name].ended() for name in ("store", "again")] == [0, 0]
        log = hosts["store"].log.read_text(errors="replace")
    assert f"resuming {run.path}" in log
    status = run.read_status()
    assert (status["state"], status["step"], status["processes"], status["launch"]) == ("finished", 150, 2, "a-job")
    assert differences(undisturbed, run.path) == []


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.parametrize("launch", ["this", "another"])
def test_restarted_ranks_wait_until_the_previous_ones_release_the_run(
    harness: Harness, quiet: tuple[TrainConfig, Path], tmp_path: Path, launch: str
) -> None:
    """Also if the command has `--resume`. A run that another job is training is refused at once."""
    config, _ = quiet
    harness.run(2, "train", config=config.override(steps=5, eval_every=0).to_dict(), out=tmp_path / "run")
    run = RunDirectory(tmp_path / "run")
    run.write_status("running", launch="this")
    lock = filelock.FileLock(run.path / ".lock", thread_local=False)
    lock.acquire()
    letting_go = threading.Timer(3.0, lock.release)
    letting_go.start()
    harness.start(2, "resume", run=run.path, steps=10, environment={"TORCHELASTIC_RUN_ID": launch})
    ended = harness.results()
    letting_go.join()
    if launch == "this":
        assert [rank.status for rank in ended] == [0, 0], ended[0].errors
        assert run.read_status()["step"] == 10
    else:
        assert all(rank.status for rank in ended)
        assert "another process is training in" in ended[0].errors
