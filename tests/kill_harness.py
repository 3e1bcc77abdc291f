"""Tiny runs for the tests, and a harness that kills a run by SIGKILL repeatedly and compares the finished run with an
uninterrupted one.

    python tests/kill_harness.py --kills 20

One process imports torch and forks the training processes, because a new interpreter would take 2 s per resume. That is
safe as long as the parent has never started torch's thread pool, so it does not train and runs on one thread.
`tests/training/test_resume.py` and `benchmarks/resume_kills.py` run this file as a program.
"""

import argparse
import io
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
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch._dynamo  # training would import it later, which takes a second in each forked child

from forking import fork, wait_until
from glassgpt.config.schema import TrainConfig
from glassgpt.data.prepare import prepare
from glassgpt.runs.checkpoint import checkpoint_paths
from glassgpt.runs.run_directory import RunDirectory
from glassgpt.training.progress import Progress
from glassgpt.training.run import resume, train
from glassgpt.utils.files import sha256_of

# Keys of a record that may differ between two equal runs, because they depend on time or on the machine.
MEASURED = ("seconds", "tokens_per_second", "peak_share", "memory_bytes")
SENTENCE = "the quick brown fox jumps over a lazy dog while my big sphinx of quartz judges every vow\n"


def write_text(path: Path, characters: int = 4000, seed: int = 0) -> Path:
    """Write a text of this many characters; all seeds use the same words, and so the same characters. Return `path`."""
    draw, words = random.Random(seed), SENTENCE.split(" ")
    path.write_text(" ".join(draw.choice(words) for _ in range(characters))[:characters], encoding="utf-8", newline="")
    return path


def tiny_config(text: Path, **changes: Any) -> TrainConfig:
    """Return the config of ten updates of 64 tokens in two micro-batches, for a model of 1 layer and width 16."""
    base = {
        "model": {"n_layer": 1, "n_head": 2, "n_embd": 16, "context_length": 16},
        "data": {"source": str(text)},
        "optim": {"lr": 1e-2, "warmup_steps": 2},
        "sample": {"count": 1, "max_new_tokens": 8, "prompt": "the"},
        "steps": 10,
        "batch_tokens": 64,
        "micro_batch_size": 2,
        "eval_every": 5,
        "checkpoint_every": 5,
        "device": "cpu",
    }
    return TrainConfig.from_dict(base).override(**changes)


class Quiet(Progress):
    """Progress that prints nothing and collects the messages in `messages`."""

    def __init__(self) -> None:
        super().__init__(stream=io.StringIO())
        self.messages: list[str] = []

    def message(self, text: str) -> None:
        """Collect the message."""
        self.messages.append(text)


def records_of(run: Path) -> list[dict[str, Any]]:
    """Return the records of a run's metrics."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def records_without_measurements(run: Path) -> list[dict[str, Any]]:
    """Return the records of a run's metrics without the keys in `MEASURED`."""
    return [{key: value for key, value in record.items() if key not in MEASURED} for record in records_of(run)]


def differences(one: Path, other: Path) -> list[str]:
    """Return the names of files in which two finished runs differ, apart from the keys in `MEASURED`."""
    ends = [checkpoint_paths(run / "checkpoints")[-1] for run in (one, other)]
    names = ("model.safetensors", "optimizer.safetensors", "state.json", "tokenizer.json", "config.toml")
    differing = [name for name in names if (ends[0] / name).read_bytes() != (ends[1] / name).read_bytes()]
    if [p.name for p in checkpoint_paths(one / "checkpoints")] != [
        p.name for p in checkpoint_paths(other / "checkpoints")
    ]:
        differing.append("the checkpoints kept")
    if records_without_measurements(one) != records_without_measurements(other):
        differing.append("metrics.jsonl")
    if (one / "samples.md").read_bytes() != (other / "samples.md").read_bytes():
        differing.append("samples.md")
    if probes_of(one) != probes_of(other):
        differing.append("probes")
    return differing


def probes_of(run: Path) -> dict[str, bytes]:
    """Return the bytes of a run's probe snapshots by file name."""
    return {path.name: path.read_bytes() for path in (run / "probes").glob("*")}


def edit_state(checkpoint: Path, **changes: Any) -> None:
    """Change a checkpoint's state, and its hash in the manifest."""
    state, manifest = (json.loads((checkpoint / name).read_text()) for name in ("state.json", "manifest.json"))
    (checkpoint / "state.json").write_text(json.dumps({**state, **changes}))
    manifest["sha256"]["state.json"] = sha256_of(checkpoint / "state.json")
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def slow_disk(seconds: float = 0.002) -> None:
    """Make each fsync take `seconds` longer in this process, because on a RAM disk a save is too short to hit."""
    flush = os.fsync

    def slow_flush(file: int) -> None:
        time.sleep(seconds)
        flush(file)

    mock.patch("os.fsync", slow_flush).start()


@contextmanager
def fast_training() -> Iterator[None]:
    """Make tiny runs about ten times as fast: use one thread, do not flush files, do not measure the CPU's peak."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    # Without a kill, flushing makes no difference. Measuring the peak takes 0.3 s per start.
    try:
        with (
            mock.patch("os.fsync", return_value=None),
            mock.patch("glassgpt.training.setup.peak_flops", return_value=1e9),
        ):
            yield
    finally:
        torch.set_num_threads(threads)


def _train_or_resume(config: TrainConfig, run: Path) -> None:
    if RunDirectory(run).is_run:
        resume(run, progress=Quiet())
    else:
        train(config, run, progress=Quiet())


def _partials(folder: Path) -> set[tuple[str, int, int]]:
    """Return name, inode and change time of each partial file, to distinguish leftovers of different kills."""
    partials = set()
    for path in folder.glob(".partial-[0-9]*"):
        if not path.with_name(path.name.removeprefix(".partial-")).exists():
            try:
                status = path.stat()
            except FileNotFoundError:  # it was renamed meanwhile, so it is complete
                continue
            partials.add((path.name, status.st_ino, status.st_ctime_ns))
    return partials


class Killer:
    """Starts a training process and kills it at a chosen moment."""

    def __init__(self, config: TrainConfig, run: Path, draw: random.Random) -> None:
        self.config, self.run, self.draw = config, run, draw
        self.kills = self.in_save = self.in_probe = self.before_config = 0
        self.folders = {"save": run / "checkpoints", "probe": run / "probes"}
        self.steps: list[int] = []

    def kill_once(self, kind: str) -> None:
        """Train or resume, and kill the process: `start` soon after its start, `step` at any time after a new
        checkpoint, `save` or `probe` also after a save or a probe snapshot has begun."""
        known, before = {kind: _partials(folder) for kind, folder in self.folders.items()}, self._last_step()
        child = fork(self._train)
        if kind == "start":
            wait_until(child, self.run.exists)
            self._sleep(0.04)
        else:
            wait_until(child, lambda: self._last_step() > before)
            if kind in self.folders:
                seen = _partials(self.folders[kind])
                wait_until(child, lambda: bool(_partials(self.folders[kind]) - seen))
            self._sleep({"save": 0.02, "probe": 0.001}.get(kind, 0.1))
        os.kill(child, signal.SIGKILL)
        if not os.WIFSIGNALED(os.waitpid(child, 0)[1]):
            raise SystemExit(f"training ended after {self.kills} kills: too few steps, or an error above")
        self.kills += 1
        self.in_save += bool(_partials(self.folders["save"]) - known["save"])
        self.in_probe += bool(_partials(self.folders["probe"]) - known["probe"])
        self.before_config += not RunDirectory(self.run).is_run
        self.steps.append(self._last_step())

    def _train(self) -> None:
        slow_disk()
        # Measuring the peak takes 0.3 s per start.
        mock.patch("glassgpt.training.setup.peak_flops", return_value=None).start()
        _train_or_resume(self.config, self.run)

    def _last_step(self) -> int:
        paths = checkpoint_paths(self.run / "checkpoints")
        return int(paths[-1].name) if paths else 0

    def _sleep(self, longest: float) -> None:
        time.sleep(self.draw.uniform(0, longest))


def finish(action: Callable[[], object]) -> None:
    """Run `action` to its end in a child process."""

    def in_child() -> None:
        with fast_training():
            action()

    _, status = os.waitpid(fork(in_child), 0)
    if status:
        raise SystemExit("training failed: see the traceback above")


def harness(folder: Path, kills: int, seed: int) -> dict[str, Any]:
    """Kill a run at least `kills` times, a quarter of them inside a save and a tenth inside a snapshot; let it finish,
    and compare it with an uninterrupted run."""
    torch.set_num_threads(1)
    os.environ["GLASSGPT_CACHE"] = str(folder / "cache")
    config = tiny_config(
        write_text(folder / "text.txt"),
        model={"dropout": 0.1},
        optim={"name": "muon"},  # both optimizers at once: Muon on the matrices, AdamW on the rest
        steps=5 * kills,
        eval_every=3,
        checkpoint_every=2,
    )
    prepare(config.data)
    uninterrupted, run = folder / "uninterrupted", folder / "killed"
    finish(lambda: train(config, uninterrupted, progress=Quiet()))
    killer = Killer(config, run, random.Random(seed))
    for _ in range(2):
        killer.kill_once("start")  # before the run has a config or soon after
    while killer.kills < kills or killer.in_save < kills // 4 or killer.in_probe < kills // 10:
        for kind in killer.draw.sample(["start", "step", "step", "save", "save", "probe"], k=6):
            killer.kill_once(kind)
    finish(lambda: _train_or_resume(config, run))
    left_behind = [path.name for path in run.rglob(".partial-*")]
    return {
        "seed": seed,
        "kills": killer.kills,
        "in_save": killer.in_save,
        "in_probe": killer.in_probe,
        "before_config": killer.before_config,
        "steps": killer.steps,
        "left_behind": left_behind,
        "differences": differences(uninterrupted, run),
    }


def main() -> int:
    """Print the outcome as a line of JSON; return 1 if files differ or partial files were left behind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, help="seed of the moments and delays (default: random; it is printed)")
    arguments = parser.parse_args()
    seed = arguments.seed if arguments.seed is not None else random.SystemRandom().randrange(10**6)
    print(f"seed of the moments and delays: {seed}", flush=True)
    folder = Path(tempfile.mkdtemp(prefix="glassgpt-kills-"))
    try:
        outcome = harness(folder, arguments.kills, seed)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(outcome))
    return 1 if outcome["differences"] or outcome["left_behind"] else 0


if __name__ == "__main__":
    sys.exit(main())
