"""Kill `prepare` by SIGKILL repeatedly, and compare the final dataset with that of an undisturbed process.

    python tests/prepare_harness.py --kills 9

1, 2 or 3 workers prepare four files of different types as a few dozen shards, which replace an older dataset. There
are three configs: the default, with --deduplicate, and with the first shard for validation.
`tests/data/test_prepare_failures.py` and `benchmarks/prepare_kills.py` run this file as a program. It works on Linux
and macOS only, since it forks.
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
from glassgpt.data.dataset import verify
from glassgpt.data.prepare import prepare

CONFIG_CHANGES: tuple[dict[str, Any], ...] = ({}, {"deduplicate": True}, {"validation": "first_shard"})
# The moments of the kills, in this order in each round. A round ends when the dataset is complete.
MOMENTS = ("start", "shard", "between", "publish")
# Seconds that a worker may outlive its killed parent.
LINGER = 5.0
# Each process runs this as it starts: on a RAM disk, file operations are too short for a kill to hit them.
SLOW_DISK = """
import os, time
unlink = os.unlink
def slow_unlink(*arguments, **names):
    time.sleep(0.001)
    unlink(*arguments, **names)
os.fsync, os.unlink = lambda descriptor: time.sleep(0.002), slow_unlink
"""


def write_texts(folder: Path, draw: random.Random) -> Path:
    """Write text, JSON Lines, CSV and Parquet files, some documents of which repeat earlier ones; return the folder."""
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
    """Return the bytes of each file by its name."""
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@dataclass
class Killer:
    """Starts `prepare`, kills it at a chosen moment, and checks that finished shards stay unchanged."""

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
        """Return the names of the finished shards, without suffix."""
        return self._stems(".json")

    def _stems(self, suffix: str) -> set[str]:
        """Return the names of the split's files that have this suffix, without the suffix."""
        try:
            names = os.listdir(self.work)
        except FileNotFoundError:
            return set()
        return {
            name.removesuffix(suffix)
            for name in names
            if name.endswith(suffix) and name.startswith(("train-", "validation-"))
        }

    def kill_once(self, moment: str) -> bool:
        """Start `prepare` and kill it at this moment. Return False if it ended before the kill."""
        before, workers = self.finished(), self.draw.choice((1, 2, 3))
        child = fork(lambda: self._prepare(workers))
        conditions: dict[str, Callable[[], bool]] = {
            "start": self.work.exists,
            "shard": lambda: bool(self.finished() - before),
            "between": lambda: bool(self._stems(".idx") - self.finished()),
            "publish": (self.work / "manifest.json").exists,
        }
        wait_until(child, conditions[moment])
        time.sleep(self.draw.uniform(0, {"start": 0.3, "shard": 0.1, "between": 0.002, "publish": 0.02}[moment]))
        os.kill(child, signal.SIGSTOP)  # so that it does not start another worker meanwhile
        started = psutil.Process(child).children(recursive=True)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        self._wait_for_workers_to_end(started)
        if status == signal.SIGKILL:
            self._count()
        elif status:
            raise SystemExit("preparing failed: see above")
        return status == signal.SIGKILL

    def finish(self) -> None:
        """Run `prepare` to its end, and check that finished files are unchanged."""
        _, status = os.waitpid(fork(lambda: self._prepare(self.draw.choice((1, 2, 3)))), 0)
        if status:
            raise SystemExit("preparing failed: see above")
        self.check_result()

    def check_result(self) -> None:
        """Compare the stamps of the shards, look for leftover files, and verify the dataset."""
        stamps = {(path.stat().st_ino, path.stat().st_mtime_ns) for path in self.out.glob("*.bin")}
        self.outcome["rewritten"] += len(self.stamps - stamps)
        self.outcome["left_behind"] += [
            path.name for path in self.out.parent.iterdir() if path.name not in (self.out.name, ".out.lock")
        ]
        verify(self.out)

    def _prepare(self, workers: int) -> None:
        exec(SLOW_DISK, {})
        prepare(self.config, self.out, workers=workers, overwrite=True)

    def _count(self) -> None:
        finished, publishing = self.finished(), (self.work / "manifest.json").exists()
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

    def _wait_for_workers_to_end(self, workers: list[psutil.Process]) -> None:
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
    """Make the disk slow for every Python process that starts inside this context."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(SLOW_DISK)
    previous = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(folder), *([previous] if previous else [])])
    yield


def harness(folder: Path, kills: int, seed: int) -> dict[str, Any]:
    """Kill `prepare` at least `kills` times, a quarter of them between the first finished shard and publication."""
    draw = random.Random(seed)
    os.environ["GLASSGPT_CACHE"] = str(folder / "cache")
    source = write_texts(folder / "texts", draw)
    configs = [
        DataConfig(source=str(source), tokenizer="bytes", shard_tokens=5000, **changes) for changes in CONFIG_CHANGES
    ]
    expected: list[dict[str, bytes]] = []
    for number, config in enumerate(configs):
        prepare(config, folder / f"expected-{number}", workers=1)
        expected.append(contents(folder / f"expected-{number}"))
    outcome: dict[str, Any] = {"seed": seed, "kills": 0, "within": 0, "between_files": 0, "publishing": 0, "shards": []}
    outcome |= {"rewritten": 0, "orphans": 0, "slowest_end": 0.0, "left_behind": [], "differences": []}
    rounds = 0
    with slow_workers(folder / "slow"):
        while (
            outcome["kills"] < kills
            or outcome["within"] < kills / 4
            or not outcome["publishing"]
            or rounds < len(configs)
        ):
            index = rounds % len(configs)
            rounds += 1
            out = folder / f"round-{rounds}" / "out"
            # An older dataset, which is replaced.
            shutil.copytree(folder / f"expected-{index - 1 if index else 2}", out)
            _round(Killer(configs[index], out, draw, outcome))
            outcome["differences"] += [
                name for name, content in contents(out).items() if expected[index].get(name) != content
            ]
            outcome["differences"] += sorted(expected[index].keys() - contents(out).keys())
            shutil.rmtree(out.parent)
    return outcome


def _round(killer: Killer) -> None:
    """Kill `prepare` once at each moment, then run it to its end."""
    for moment in MOMENTS:
        if not killer.kill_once(moment):
            return killer.check_result()
    killer.finish()


def main() -> int:
    """Print the outcome as a line of JSON; return 1 if files differ or were rewritten, or something was left."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=9)
    parser.add_argument("--seed", type=int, help="seed of the workers and delays (default: random; it is printed)")
    arguments = parser.parse_args()
    seed = arguments.seed if arguments.seed is not None else random.SystemRandom().randrange(10**6)
    print(f"seed of the workers and delays: {seed}", flush=True)
    folder = Path(tempfile.mkdtemp(prefix="glassgpt-kills-"))
    try:
        outcome = harness(folder, arguments.kills, seed)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(outcome))
    return 1 if any(outcome[key] for key in ("rewritten", "orphans", "left_behind", "differences")) else 0


if __name__ == "__main__":
    sys.exit(main())
