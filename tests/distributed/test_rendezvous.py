"""Two torchrun agents on loopback, as if on two hosts: one is killed and started again, and the run resumes."""

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

# The process waits, then becomes torchrun. Agents get their ranks in the order of their process ids, so the process
# that is started first has rank 0, even if it runs torchrun last and the other one holds the store.
_LATER = "import os, sys; sys.stdin.read(); os.execv(sys.argv[1], sys.argv[1:])"


class Host:
    """A stand-in for a host: a torchrun agent with one rank."""

    def __init__(self, folder: Path, name: str, port: int) -> None:
        rendezvous = [
            "--nnodes",
            "2",
            "--rdzv-backend",
            "c10d",
            "--rdzv-endpoint",
            f"127.0.0.1:{port}",
            "--rdzv-id",
            "a-job",
        ]
        # By default, a killed agent counts as gone only after 15 s.
        options = [*rendezvous, "--rdzv-conf", "keep_alive_interval=1"]
        train = ["-m", "glassgpt", "train", str(folder / "config.toml"), "--out", str(folder / "run")]
        command = torchrun(train, ranks=1, restarts=3, options=options)
        # Otherwise torch 2.13 announces its store only in the first round, and a host that comes back waits forever.
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

    def start_agent(self) -> None:
        """Start the agent."""
        assert self._process.stdin is not None
        self._process.stdin.close()

    @property
    def rank(self) -> int | None:
        """Return the number of its rank, or None."""
        return next(iter(live_ranks(self.agent)), None)

    def kill(self) -> None:
        """Kill the agent and its rank, like a power failure."""
        with suppress(psutil.NoSuchProcess):
            for process in [self.agent, *self.agent.children(recursive=True)]:
                process.send_signal(signal.SIGKILL)
        self._process.wait()

    def wait(self) -> int:
        """Wait for the agent and return its exit status."""
        return self._process.wait(timeout=120)


@contextmanager
def _kill_all_at_the_end(hosts: dict[str, Host]) -> Iterator[None]:
    try:
        yield
    except BaseException:
        print(
            "".join(f"--- {host.log.name}\n{host.log.read_text(errors='replace')[-3000:]}" for host in hosts.values())
        )
        raise
    finally:
        for host in hosts.values():
            host.kill()


@pytest.fixture(scope="module")
def harness() -> Iterator[Harness]:
    """Return the program that forks the ranks."""
    started = Harness()
    yield started
    started.close()


@pytest.fixture(scope="module")
def undisturbed(harness: Harness, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainConfig, Path]:
    """Return the config and the path of an undisturbed run on two ranks."""
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


@pytest.mark.parametrize("rank", [0])  # rank 1 gives the same and takes another half a minute
def test_a_run_whose_host_is_killed_and_restarted_has_the_same_bits(
    undisturbed: tuple[TrainConfig, Path], tmp_path: Path, rank: int
) -> None:
    """The killed host does not hold the rendezvous store. The other host takes over rank 0, which writes."""
    config, expected = undisturbed
    (tmp_path / "config.toml").write_text(config.to_toml(), encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run = RunDirectory(tmp_path / "run")
    hosts = {name: Host(tmp_path, name, port) for name in (("mortal", "store") if rank == 0 else ("store", "mortal"))}
    with _kill_all_at_the_end(hosts):
        hosts["store"].start_agent()
        wait_for(hosts["store"].agent, lambda: _listens(port))
        hosts["mortal"].start_agent()
        wait_for(hosts["store"].agent, lambda: bool(checkpoint_paths(run.checkpoints)))
        assert (hosts["mortal"].rank, hosts["store"].rank) == (rank, 1 - rank)
        hosts["mortal"].kill()
        assert run.read_status()["state"] == "running"
        hosts["again"] = Host(tmp_path, "again", port)
        hosts["again"].start_agent()
        assert [hosts[name].wait() for name in ("store", "again")] == [0, 0]
        log = hosts["store"].log.read_text(errors="replace")
    assert f"resuming {run.path}" in log
    status = run.read_status()
    assert (status["state"], status["step"], status["processes"], status["launch"]) == ("finished", 150, 2, "a-job")
    assert differences(expected, run.path) == []


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.parametrize("launch", ["this", "another"])
def test_restarted_ranks_wait_until_the_previous_ones_release_the_run(
    harness: Harness, undisturbed: tuple[TrainConfig, Path], tmp_path: Path, launch: str
) -> None:
    """The command here is `--resume`. A run that another job is training is refused immediately."""
    config, _ = undisturbed
    harness.run(2, "train", config=config.override(steps=5, eval_every=0).to_dict(), out=tmp_path / "run")
    run = RunDirectory(tmp_path / "run")
    run.write_status("running", launch="this")
    lock = filelock.FileLock(run.path / ".lock", thread_local=False)
    lock.acquire()
    release = threading.Timer(3.0, lock.release)
    release.start()
    harness.start(2, "resume", run=run.path, steps=10, environment={"TORCHELASTIC_RUN_ID": launch})
    results = harness.results()
    release.join()
    if launch == "this":
        assert [rank.status for rank in results] == [0, 0], results[0].errors
        assert run.read_status()["step"] == 10
    else:
        assert all(rank.status for rank in results)
        assert "another process is training in" in results[0].errors
