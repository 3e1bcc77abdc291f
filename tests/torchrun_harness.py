"""Kills ranks under `torchrun --max-restarts` by SIGKILL, again and again, and compares the end with a run that nobody
disturbed.

    python tests/torchrun_harness.py --ranks 3 --kills 20

A rank is killed at a random moment between two steps, inside a save, or inside an evaluation; torchrun starts all of
them again, and they go on by themselves. `tests/test_distributed.py` and `benchmarks/rank_kills.py` run this file as a
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

KINDS = ("step", "save", "evaluation")


def torchrun(
    arguments: Sequence[str], *, ranks: int, restarts: int = 0, options: Sequence[str] = ("--standalone",)
) -> list[str]:
    """The command that starts `ranks` processes of this interpreter, on loopback."""
    launcher = [sys.executable, "-m", "torch.distributed.run", *options, "--nproc-per-node", str(ranks)]
    return [*launcher, "--max-restarts", str(restarts), *arguments]


def environment(folder: Path) -> dict[str, str]:
    """The variables of a run that keeps to its own folder, loopback and one thread a rank."""
    return {**os.environ, "GLASSGPT_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


def live_ranks(agent: psutil.Process) -> dict[int, psutil.Process]:
    """The ranks that torchrun has started and that live, by their number."""
    found = {}
    for child in agent.children():
        try:
            found[int(child.environ()["RANK"])] = child
        except (psutil.Error, KeyError):
            continue
    return found


class Killer:
    """Starts torchrun, and kills one of its ranks at one of three kinds of moment."""

    def __init__(self, run: Path, ranks: int, draw: random.Random) -> None:
        self.run, self.ranks, self.draw = run, ranks, draw
        self.kills: dict[str, int] = dict.fromkeys(KINDS, 0)
        self.hits: dict[str, int] = dict.fromkeys(KINDS[1:], 0)
        """Kills that were seen to leave a save, or an evaluation, half done."""
        self.lost: list[tuple[int, int]] = []
        """Steps that had been saved, and the earlier ones that the ranks went on from."""

    def saved_step(self) -> int:
        """The newest checkpoint."""
        return max((int(path.name) for path in (self.run / "checkpoints").glob("[0-9]*")), default=0)

    def status(self) -> dict[str, Any]:
        try:
            return json.loads((self.run / "status.json").read_text())  # type: ignore[no-any-return]
        except (OSError, ValueError):
            return {}

    def records(self) -> int:
        """Lines of the metrics."""
        try:
            return (self.run / "metrics.jsonl").read_bytes().count(b"\n")
        except OSError:
            return 0

    def kill_once(self, agent: psutil.Process, kind: str) -> None:
        """Kill a rank once the run has gone on, and wait until the ranks are at work again."""
        began, saved = self.status().get("time"), self.saved_step()
        wait_for(agent, lambda: self.saved_step() > saved and len(live_ranks(agent)) == self.ranks)
        if kind == "save":
            known = set((self.run / "checkpoints").glob(".partial-0*"))
            wait_for(agent, lambda: bool(set((self.run / "checkpoints").glob(".partial-0*")) - known))
        elif kind == "evaluation":
            wait_for(agent, lambda: _is_evaluating(self.run))
        time.sleep(self.draw.uniform(0, {"step": 0.2, "save": 0.02, "evaluation": 0.02}[kind]))
        victims = live_ranks(agent)
        saved = self.saved_step()
        rank = 0 if kind == "save" else self.draw.choice(sorted(victims))  # the first one writes
        os.kill(victims[rank].pid, signal.SIGKILL)
        self.kills[kind] += 1
        if kind == "evaluation":
            self.hits[kind] += _is_evaluating(self.run)
        elif kind == "save":
            self.hits[kind] += any((self.run / "checkpoints").glob(".partial-0*"))
        status = self.status()
        wait_for(
            agent,
            lambda: (
                self.status().get("pid") not in (None, status.get("pid")) and self.status().get("state") == "running"
            ),
        )
        gone_on_from = int(self.status()["step"])
        if gone_on_from < saved:
            self.lost.append((saved, gone_on_from))
        assert began is None or self.status()["time"] >= began


def _is_evaluating(run: Path) -> bool:
    """Whether the last record is of a step that is evaluated, and not yet the evaluation."""
    try:
        record = json.loads((run / "metrics.jsonl").read_bytes().splitlines()[-1])
    except (OSError, IndexError, ValueError):
        return False
    return "loss" in record and record["step"] % EVAL_EVERY == 0


def wait_for(agent: psutil.Process, happens: Callable[[], bool], limit: float = 90.0) -> None:
    """Return as soon as something happens. Raises `SystemExit` where torchrun has ended, or nothing happens for
    long."""
    give_up = time.monotonic() + limit
    while not happens():
        if not agent.is_running() or agent.status() == psutil.STATUS_ZOMBIE:
            raise SystemExit("torchrun ended by itself: too few steps, or an error above")
        if time.monotonic() > give_up:
            raise SystemExit(f"nothing happened for {limit:.0f} s")
        time.sleep(0.002)


EVAL_EVERY = 6


def _write_config(folder: Path, steps: int) -> Path:
    """A run of short steps; both optimizers, dropout and accumulation."""
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
    """Kill ranks of a run, let it end, and compare it with a quiet one."""
    config = _write_config(folder, steps=30 + 15 * kills)
    quiet, run = folder / "quiet", folder / "killed"
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

    if start(quiet, 0).wait() != 0:
        raise SystemExit((folder / "quiet.log").read_text())
    killer = Killer(run, ranks, draw)
    process = start(run, kills + 2)
    begin = time.monotonic()
    try:
        agent = psutil.Process(process.pid)
        kinds = [KINDS[i % len(KINDS)] for i in range(kills)]
        draw.shuffle(kinds)
        for number, kind in enumerate(kinds, start=1):
            killer.kill_once(agent, kind)
            step = killer.status()["step"]
            progress(f"{time.monotonic() - begin:4.0f} s  kill {number} of {kills} ({kind}), resumed from step {step}")
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
        "differences": differences(quiet, run),
    }


def _train(config: Path, out: Path, strategy: str) -> None:
    """What each rank does: as `glassgpt train`, on a disk slow enough for a save to be hit."""
    from glassgpt.config.schema import TrainConfig
    from glassgpt.training.run import train

    slow_disk()
    settings: Mapping[str, Any] = {"strategy": strategy}
    train(TrainConfig.from_toml(config.read_text(encoding="utf-8")).override(**settings), out)


def main() -> int:
    """Print the outcome as a line of JSON; the exit status says whether all is as it should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=3)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--strategy", choices=("ddp", "fsdp"), default="ddp")
    parser.add_argument("--seed", type=int, help="of the kinds and delays (default: another one each time, printed)")
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.train:
        _train(arguments.train, arguments.out, arguments.strategy)
        return 0
    seed = arguments.seed if arguments.seed is not None else random.SystemRandom().randrange(10**6)
    print(f"seed of the kinds and delays: {seed}", flush=True)
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
