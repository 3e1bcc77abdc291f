"""Kill `prepare` by SIGKILL again and again, and compare the final dataset with that of an undisturbed process.

    python tests/prepare_harness.py --kills 9

Four files of different types become a few dozen shards, in place of an older dataset, by 1, 2 or 3 workers, in three
ways: plain, with --deduplicate, and with the first shard for validation. `tests/data/test_prepare_failures.py` and
`benchmarks/prepare_kills.py` run this file as a program. Linux and macOS only, since it forks.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from forking import fork, wait_until
from glassgpt.config.schema import DataConfig
from glassgpt.data.dataset import read_manifest, verify
from glassgpt.data.prepare import prepare

WAYS: tuple[dict[str, Any], ...] = ({}, {"deduplicate": True}, {"validation": "first_shard"})
# In this order in each round, which ends when the dataset is there.
KINDS = ("start", "shard", "between", "publish")
# Seconds that a worker may outlive its parent: it ends when it notices.
LINGER = 5.0
# Run by each worker as it starts: on a RAM disk nothing takes long enough for a kill to hit it.
SLOW_DISK = """
import os, time
unlink = os.unlink
def slow_unlink(*arguments, **names):
    time.sleep(0.001)
    unlink(*arguments, **names)
os.fsync, os.unlink = lambda descriptor: time.sleep(0.002), slow_unlink
"""


def write_texts(folder: Path, draw: random.Random) -> Path:
    """A folder with text, JSON lines, CSV and parquet, some documents of which repeat earlier ones."""
    import pyarrow
    from pyarrow import parquet

    words = "the quick brown fox jumps over a lazy dog while my big sphinx of quartz judges every vow".split(" ")
    texts = [" ".join(draw.choice(words) for _ in range(draw.randrange(5, 120))) for _ in range(240)]
    texts[200:220] = texts[20:40]
    folder.mkdir()
    (folder / "e.txt").write_text("\n".join(texts[:60]), encoding="utf-8")
    (folder / "b.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in texts[60:130]), encoding="utf-8"
    )
    (folder / "c.csv").write_text(
        "text\n" + "".join(json.dumps(text.replace("\n", " ")) + "\n" for text in texts[130:180])
    )
    parquet.write_table(pyarrow.table({"text": texts}), folder / "d.parquet")
    return folder


def contents(directory: Path) -> dict[str, bytes]:
    """The bytes of each file."""
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@dataclass
class Killer:
    """Starts `prepare`, kills it at a chosen kind of moment, and watches what a kill must not touch."""

    config: DataConfig
    out: Path
    draw: random.Random
    outcome: dict[str, Any]
    stamps: set[tuple[int, int]] = field(default_factory=set)
    """Inode and time of each shard that was finished at a kill, except within a document larger than a shard."""

    @property
    def work(self) -> Path:
        """The directory in which the dataset is built."""
        return self.out.with_name(f".partial-{self.out.name}")

    def finished(self) -> set[str]:
        """The names of the finished shards, without suffix."""
        return self._stems(".json")

    def _stems(self, suffix: str) -> set[str]:
        """The files of a suffix, without it."""
        try:
            names = os.listdir(self.work)
        except FileNotFoundError:
            return set()
        return {
            name.removesuffix(suffix)
            for name in names
            if name.endswith(suffix) and name.startswith(("train-", "validation-"))
        }

    def kill_once(self, kind: str) -> bool:
        """Whether it was alive to be killed; its files are checked in either case."""
        before, workers = self.finished(), self.draw.choice((1, 2, 3))
        child = fork(lambda: self._prepare(workers))
        moments: dict[str, Callable[[], bool]] = {
            "start": self.work.exists,
            "shard": lambda: bool(self.finished() - before),
            "between": lambda: bool(self._stems(".idx") - self.finished()),
            "publish": (self.work / "manifest.json").exists,
        }
        wait_until(child, moments[kind])
        time.sleep(self.draw.uniform(0, {"start": 0.3, "shard": 0.1, "between": 0.002, "publish": 0.02}[kind]))
        os.kill(child, signal.SIGSTOP)  # so that it does not start another worker meanwhile
        started = psutil.Process(child).children(recursive=True)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        self._see_workers_end(started)
        if status == signal.SIGKILL:
            self._count()
        elif status:
            raise SystemExit("preparing failed: see above")
        return status == signal.SIGKILL

    def finish(self) -> None:
        """Let it end, and check that finished files are unchanged."""
        _, status = os.waitpid(fork(lambda: self._prepare(self.draw.choice((1, 2, 3)))), 0)
        if status:
            raise SystemExit("preparing failed: see above")
        self.see_end()

    def see_end(self) -> None:
        """Compare the stamps of the shards, and look for leftover files."""
        stamps = {(path.stat().st_ino, path.stat().st_mtime_ns) for path in self.out.glob("*.bin")}
        self.outcome["rewritten"] += len(self.stamps - stamps)
        self.outcome["left_behind"] += [
            path.name for path in self.out.parent.iterdir() if path.name not in (self.out.name, ".out.lock")
        ]
        verify(self.out)

    def _prepare(self, workers: int) -> None:
        exec(SLOW_DISK, {})
        prepare(self.config, self.out, workers=workers)

    def _count(self) -> None:
        finished, publishing = self.finished(), read_manifest(self.work) is not None
        begun = self._stems(".bin")
        indexed = self._stems(".idx")
        self.outcome["kills"] += 1
        self.outcome["within"] += bool(finished) and not publishing
        self.outcome["between_files"] += bool(indexed - finished) and not publishing
        self.outcome["publishing"] += publishing
        self.outcome["shards"].append(len(finished))
        for name in finished & begun:
            if json.loads((self.work / f"{name}.json").read_bytes())["is_split"]:
                continue
            status = (self.work / f"{name}.bin").stat()
            self.stamps.add((status.st_ino, status.st_mtime_ns))

    def _see_workers_end(self, workers: list[psutil.Process]) -> None:
        begin = time.monotonic()
        while (alive := any(_is_alive(worker) for worker in workers)) and time.monotonic() < begin + LINGER:
            time.sleep(0.005)
        self.outcome["orphans"] += alive
        self.outcome["slowest_end"] = max(self.outcome["slowest_end"], round(time.monotonic() - begin, 3))


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@contextmanager
def slow_workers(folder: Path) -> Iterator[None]:
    """Make the disk slow for every Python that is started meanwhile."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(SLOW_DISK)
    known = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(folder), *([known] if known else [])])
    yield


def harness(folder: Path, kills: int, seed: int) -> dict[str, Any]:
    """Kill at least this often, a quarter of it between the first finished shard and the end."""
    draw = random.Random(seed)
    os.environ["GLASSGPT_CACHE"] = str(folder / "cache")
    source = write_texts(folder / "texts", draw)
    ways = [DataConfig(source=str(source), tokenizer="bytes", shard_tokens=5000, **way) for way in WAYS]
    quiet: list[dict[str, bytes]] = []
    for number, config in enumerate(ways):
        prepare(config, folder / f"quiet-{number}", workers=1)
        quiet.append(contents(folder / f"quiet-{number}"))
    outcome: dict[str, Any] = {"seed": seed, "kills": 0, "within": 0, "between_files": 0, "publishing": 0, "shards": []}
    outcome |= {"rewritten": 0, "orphans": 0, "slowest_end": 0.0, "left_behind": [], "differences": []}
    rounds = 0
    with slow_workers(folder / "slow"):
        while (
            outcome["kills"] < kills or outcome["within"] < kills / 4 or not outcome["publishing"] or rounds < len(ways)
        ):
            way = rounds % len(ways)
            rounds += 1
            out = folder / f"round-{rounds}" / "out"
            shutil.copytree(folder / f"quiet-{way - 1 if way else 2}", out)  # an older one, to be replaced
            _round(Killer(ways[way], out, draw, outcome))
            outcome["differences"] += [
                name for name, content in contents(out).items() if quiet[way].get(name) != content
            ]
            outcome["differences"] += sorted(quiet[way].keys() - contents(out).keys())
            shutil.rmtree(out.parent)
    return outcome


def _round(killer: Killer) -> None:
    """Kill once at each kind of moment, then let it end."""
    for kind in KINDS:
        if not killer.kill_once(kind):
            return killer.see_end()
    killer.finish()


def main() -> int:
    """Print the outcome as a line of JSON; the exit status is 0 if it is right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=9)
    parser.add_argument("--seed", type=int, help="of the kinds and delays (default: another one each time, printed)")
    arguments = parser.parse_args()
    seed = arguments.seed if arguments.seed is not None else random.SystemRandom().randrange(10**6)
    print(f"seed of the kinds and delays: {seed}", flush=True)
    folder = Path(tempfile.mkdtemp(prefix="glassgpt-kills-"))
    try:
        outcome = harness(folder, arguments.kills, seed)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(outcome))
    return 1 if any(outcome[key] for key in ("rewritten", "orphans", "left_behind", "differences")) else 0


if __name__ == "__main__":
    sys.exit(main())
