"""`glassgpt plan --device cpu` compared with real runs: memory and time of an update at three sizes.

    python benchmarks/plan.py                     # a Markdown table; some minutes, 5 GB
    python benchmarks/plan.py --processor-time    # on a busy machine: one thread, its time on the processor

Each size is planned in a process of its own, then trained for some updates in another, then planned again. Memory is
the peak of the process (VmHWM), interpreter and libraries included; time is the median of the updates after the second.
On a busy machine, the processor time of one thread on both sides says more. Linux only.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from glassgpt.config.recipes import recipe
from glassgpt.config.schema import TrainConfig
from glassgpt.utils.device import keep_freed_memory
from kill_harness import write_text

# Updates that are timed.
UPDATES = {"shakespeare-cpu": 60, "shakespeare-char": 3, "gpt2": 4}


def size(name: str, text: Path) -> TrainConfig:
    """The recipe on a text with few characters, its vocabulary padded to the recipe's usual size; GPT-2 with 2 x 1,024
    tokens per update.
    """
    changes: dict[str, Any] = {"model": {"vocab_multiple": 65}}
    if name == "gpt2":
        changes = {
            "model": {"vocab_multiple": 50304},
            "batch_tokens": 2048,
            "micro_batch_size": 2,
            "hellaswag_every": 0,
        }
    data = {"source": str(text), "tokenizer": "characters", "validation": "fraction"}
    return recipe(name, data=data, sample={"count": 0}, device="cpu", **changes)


def predict(config: TrainConfig, processor_time: bool) -> dict[str, float]:
    """Bytes and seconds as `glassgpt plan` estimates them."""
    from glassgpt.planning.plan import plan
    from glassgpt.planning.throughput import measured_step_time

    text = Path(config.data.source).read_text(encoding="utf-8")
    config = config.override(model={"vocab_size": len(set(text))})
    planned = plan(config)
    pace = planned.columns[0].step_time
    if processor_time:
        pace = measured_step_time(config, torch.device("cpu"), "float32", time.process_time)
    assert pace is not None
    return {"memory": planned.columns[0].memory.total, "libraries": planned.libraries, "seconds": pace}


def train(config: TrainConfig, processor_time: bool) -> dict[str, float]:
    """Bytes and seconds of real updates."""
    from glassgpt.distributed.group import Ranks
    from glassgpt.training.progress import SilentProgress
    from glassgpt.training.setup import setup_training
    from glassgpt.training.step import start_update

    clock = time.process_time if processor_time else time.perf_counter
    state, seconds = setup_training(config, Ranks(), SilentProgress()), []
    for state.step in range(UPDATES[config.name] + 2):
        begin = clock()
        start_update(state, 1e-4).read()
        seconds.append(clock() - begin)
    peak = re.search(r"^VmHWM:\s*(\d+)", Path("/proc/self/status").read_text(encoding="utf-8"), re.MULTILINE)
    assert peak is not None
    return {"memory": int(peak[1]) * 1024, "seconds": statistics.median(seconds[2:])}


def child(what: str, name: str, folder: Path, processor_time: bool) -> dict[str, float]:
    """The figures of a fresh process."""
    command = [sys.executable, __file__, name, "--child", what, "--folder", str(folder)]
    command += ["--processor-time"] * processor_time
    environment = {"GOMP_SPINCOUNT": "3000", **os.environ}  # as the command line has it
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=1200)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


# Estimates must be within these shares of the measurement.
BARS = {"memory": 0.10, "seconds": 0.25}


def report(name: str, before: dict[str, float], real: dict[str, float], after: dict[str, float]) -> bool:
    """Print the row of a size, and return whether both bars are met. Estimates of time are before and after the run."""
    memory, seconds = before["memory"] + before["libraries"], (before["seconds"] + after["seconds"]) / 2
    ratios = {"memory": memory / real["memory"], "seconds": seconds / real["seconds"]}
    met = all(abs(ratios[key] - 1) <= bar for key, bar in BARS.items())
    # The memory of libraries is measured on both sides; without it, the ratio is that of the estimate alone.
    own = before["memory"] / (real["memory"] - before["libraries"])
    cells = [
        name,
        *(f"{memory / 1e6:,.0f}", f"{real['memory'] / 1e6:,.0f}", f"{ratios['memory']:.3f}", f"{own:.3f}"),
        *(f"{before['seconds']:.4g}, {after['seconds']:.4g}", f"{real['seconds']:.4g}", f"{ratios['seconds']:.3f}"),
        "met" if met else "missed",
    ]
    print(f"| {' | '.join(cells)} |", flush=True)
    return met


def main() -> int:
    """Print the table, or in a child the figures of one process; 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", nargs="*", default=list(UPDATES), help=", ".join(UPDATES))
    parser.add_argument("--processor-time", action="store_true", help="one thread, and its time on the processor")
    parser.add_argument("--child", choices=("predict", "train"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.processor_time:
        torch.set_num_threads(1)
    if options.child:
        keep_freed_memory()
        function = {"predict": predict, "train": train}[options.child]
        print(json.dumps(function(size(options.sizes[0], options.folder / "text.txt"), options.processor_time)))
        return 0
    header = ["size", "memory estimated, MB", "measured", "ratio", "without libraries"]
    header += ["seconds per update estimated, twice", "measured", "ratio", f"bars {BARS}"]
    print(f"| {' | '.join(header)} |\n|{' --- |' * len(header)}", flush=True)
    with tempfile.TemporaryDirectory(prefix="glassgpt-plan-") as folder:
        write_text(Path(folder) / "text.txt", 60_000)
        os.environ["GLASSGPT_CACHE"] = folder
        turns = ("predict", "train", "predict")
        verdicts = [
            report(name, *(child(turn, name, Path(folder), options.processor_time) for turn in turns))
            for name in options.sizes
        ]
    return int(not all(verdicts))


if __name__ == "__main__":
    sys.exit(main())
