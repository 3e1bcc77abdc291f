"""Kill ranks under `torchrun --max-restarts` by SIGKILL repeatedly, and compare the finished run with an uninterrupted
one.

    python tests/torchrun_harness.py --ranks 3 --kills 20

The harness kills a rank at a random moment, inside a save, or inside an evaluation. Then torchrun restarts all ranks,
and they resume automatically. `tests/distributed/test_distributed.py` and `benchmarks/rank_kills.py` run this file as a
program.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from kill_harness import differences, slow_disk, tiny_config, write_text

MOMENTS = ("step", "save", "evaluation")


def torchrun(
    arguments: Sequence[str], *, ranks: int, restarts: int = 0, options: Sequence[str] = ("--standalone",)
) -> list[str]:
    """Return the command that starts `ranks` processes of this interpreter on this machine."""
    launcher = [sys.executable, "-m", "torch.distributed.run", *options, "--nproc-per-node", str(ranks)]
    return [*launcher, "--max-restarts", str(restarts), *arguments]


def environment(folder: Path) -> dict[str, str]:
    """Return environment variables with a cache in `folder`, the loopback interface, and one thread per rank."""
    return {**os.environ, "GLASSGPT_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


def live_ranks(agent: psutil.Process) -> dict[int, psutil.Process]:
    """Return the living processes that torchrun has started, by rank."""
    processes = {}
    for child in agent.children():
        try:
            processes[int(child.environ()["RANK"])] = child
        except (psutil.Error, KeyError):
            continue
    return processes


class Killer:
    """Kills ranks of torchrun at a chosen moment, and counts kills and lost steps."""

    def __init__(self, run: Path, ranks: int, draw: random.Random) -> None:
        self.run, self.ranks, self.draw = run, ranks, draw
        self.kills: dict[str, int] = dict.fromkeys(MOMENTS, 0)
        self.hits: dict[str, int] = dict.fromkeys(MOMENTS[1:], 0)
        """Kills that interrupted a save or an evaluation."""
        self.lost: list[tuple[int, int]] = []
        """Pairs of the saved step and the earlier step from which the ranks resumed; should be empty."""

    def saved_step(self) -> int:
        """Return the step of the newest checkpoint, or 0."""
        return max((int(path.name) for path in (self.run / "checkpoints").glob("[0-9]*")), default=0)

    def status(self) -> dict[str, Any]:
        """Return the content of status.json, or an empty dict."""
        try:
            return json.loads((self.run / "status.json").read_text())  # type: ignore[no-any-return]
        except (OSError, ValueError):
            return {}

    def records(self) -> int:
        """Return the number of lines in metrics.jsonl."""
        try:
            return (self.run / "metrics.jsonl").read_bytes().count(b"\n")
        except OSError:
            return 0

    def kill_once(self, agent: psutil.Process, moment: str) -> None:
        """Kill a rank after the run has saved a new checkpoint, and wait until the ranks run again."""
        earlier_time, saved = self.status().get("time"), self.saved_step()
        wait_for(agent, lambda: self.saved_step() > saved and len(live_ranks(agent)) == self.ranks)
        if moment == "save":
            earlier = set((self.run / "checkpoints").glob(".partial-0*"))
            wait_for(agent, lambda: bool(set((self.run / "checkpoints").glob(".partial-0*")) - earlier))
        elif moment == "evaluation":
            wait_for(agent, lambda: _is_evaluating(self.run))
        time.sleep(self.draw.uniform(0, {"step": 0.2, "save": 0.02, "evaluation": 0.02}[moment]))
        victims = live_ranks(agent)
        saved = self.saved_step()
        rank = 0 if moment == "save" else self.draw.choice(sorted(victims))  # only rank 0 saves
        os.kill(victims[rank].pid, signal.SIGKILL)
        self.kills[moment] += 1
        if moment == "evaluation":
            self.hits[moment] += _is_evaluating(self.run)
        elif moment == "save":
            self.hits[moment] += any((self.run / "checkpoints").glob(".partial-0*"))
        status = self.status()
        wait_for(
            agent,
            lambda: (
                self.status().get("pid") not in (None, status.get("pid")) and self.status().get("state") == "running"
            ),
        )
        resumed_from = int(self.status()["step"])
        if resumed_from < saved:
            self.lost.append((saved, resumed_from))
        assert earlier_time is None or self.status()["time"] >= earlier_time


def _is_evaluating(run: Path) -> bool:
    """Return whether the last record is the training record of a step whose evaluation is not recorded yet."""
    try:
        record = json.loads((run / "metrics.jsonl").read_bytes().splitlines()[-1])
    except (OSError, IndexError, ValueError):
        return False
    return "loss" in record and record["step"] % EVAL_EVERY == 0


def wait_for(agent: psutil.Process, happens: Callable[[], bool], limit: float = 90.0) -> None:
    """Return as soon as `happens()` is true. Raise `SystemExit` if torchrun has ended or after `limit` seconds."""
    give_up = time.monotonic() + limit
    while not happens():
        if not agent.is_running() or agent.status() == psutil.STATUS_ZOMBIE:
            raise SystemExit("torchrun ended unexpectedly: too few steps, or an error above")
        if time.monotonic() > give_up:
            raise SystemExit(f"nothing happened for {limit:.0f} s")
        time.sleep(0.002)


EVAL_EVERY = 6


def _write_config(folder: Path, steps: int) -> Path:
    """Write the config of a run with short steps, both optimizers, dropout and gradient accumulation."""
    config = tiny_config(
        write_text(folder / "text.txt", 60_000),
        model={"dropout": 0.1, "n_layer": 3, "n_embd": 96, "n_head": 4, "context_length": 64},
        optim={"name": "muon", "lr": 2e-3},
        steps=steps,
        batch_tokens=64 * 12,
        micro_batch_size=2,
        eval_every=EVAL_EVERY,
        eval_tokens=4096,
        checkpoint_every=4,
    )
    path = folder / "config.toml"
    path.write_text(config.to_toml(), encoding="utf-8")
    return path


def harness(
    folder: Path, ranks: int, kills: int, strategy: str, seed: int, progress: Callable[[str], None]
) -> dict[str, Any]:
    """Kill ranks of a run, let it finish, and compare it with an uninterrupted run."""
    config = _write_config(folder, steps=30 + 15 * kills)
    uninterrupted, run = folder / "uninterrupted", folder / "killed"
    draw = random.Random(seed)

    def start(out: Path, restarts: int) -> subprocess.Popen[bytes]:
        command = [str(Path(__file__)), "--train", str(config), "--out", str(out), "--strategy", strategy]
        log = open(folder / f"{out.name}.log", "wb")  # noqa: SIM115
        return subprocess.Popen(
            torchrun(command, ranks=ranks, restarts=restarts),
            env=environment(folder),
            stdout=log,
            stderr=subprocess.STDOUT,
        )

    if start(uninterrupted, 0).wait() != 0:
        raise SystemExit((folder / "uninterrupted.log").read_text())
    killer = Killer(run, ranks, draw)
    process = start(run, kills + 2)
    begin = time.monotonic()
    try:
        agent = psutil.Process(process.pid)
        moments = [MOMENTS[i % len(MOMENTS)] for i in range(kills)]
        draw.shuffle(moments)
        for number, moment in enumerate(moments, start=1):
            killer.kill_once(agent, moment)
            step = killer.status()["step"]
            progress(
                f"{time.monotonic() - begin:4.0f} s  kill {number} of {kills} ({moment}), resumed from step {step}"
            )
        status = process.wait()
    except BaseException:
        print((folder / "killed.log").read_text(errors="replace")[-6000:], file=sys.stderr)
        process.terminate()
        process.wait()
        raise
    return {
        "ranks": ranks,
        "strategy": strategy,
        "seed": seed,
        "kills": killer.kills,
        "hits": killer.hits,
        "seconds": time.monotonic() - begin,
        "status": status,
        "state": killer.status().get("state"),
        "steps_lost": killer.lost,
        "left_behind": [path.name for path in run.rglob(".partial-*")],
        "differences": differences(uninterrupted, run),
    }


def _train(config: Path, out: Path, strategy: str) -> None:
    """Train as `glassgpt train` does, on a disk slow enough that a kill can interrupt a save. Each rank runs this."""
    from glassgpt.config.schema import TrainConfig
    from glassgpt.training.run import train

    slow_disk()
    settings: Mapping[str, Any] = {"strategy": strategy}
    train(TrainConfig.from_toml(config.read_text(encoding="utf-8")).override(**settings), out)


def main() -> int:
    """Print the outcome as a line of JSON; return 0 if the run finished equal to the uninterrupted one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=3)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--strategy", choices=("ddp", "fsdp"), default="ddp")
    parser.add_argument("--seed", type=int, help="seed of the moments and delays (default: random; it is printed)")
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.train:
        _train(arguments.train, arguments.out, arguments.strategy)
        return 0
    seed = arguments.seed if arguments.seed is not None else random.SystemRandom().randrange(10**6)
    print(f"seed of the moments and delays: {seed}", flush=True)
    folder = Path(tempfile.mkdtemp(prefix="glassgpt-ranks-"))
    try:
        outcome = harness(
            folder,
            arguments.ranks,
            arguments.kills,
            arguments.strategy,
            seed,
            lambda line: print(line, file=sys.stderr, flush=True),
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(outcome))
    good = outcome["status"] == 0 and outcome["state"] == "finished"
    return 0 if good and not (outcome["differences"] or outcome["left_behind"] or outcome["steps_lost"]) else 1


if __name__ == "__main__":
    sys.exit(main())
