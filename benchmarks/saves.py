"""How long a checkpoint delays training: written in the background and in the foreground, alternately in one run.

    python benchmarks/saves.py                                              # GPT-2's size, one process
    torchrun --standalone --nproc-per-node 2 benchmarks/saves.py --strategy fsdp

A stall is the time that the training loop waits: for the gathering of weights and moments to the first rank, the
copy, and in the foreground the writing and hashing too. The steps after a save share the machine with the writing
thread: their times are printed next to those of undisturbed steps.
"""

import argparse
import functools
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

from glassgpt.config.recipes import recipe
from glassgpt.distributed.group import process_group
from glassgpt.runs.checkpoint import Snapshot, TrainingState, save_checkpoint, take_snapshot
from glassgpt.training.progress import SilentProgress
from glassgpt.training.setup import TrainState, setup_training
from glassgpt.training.step import start_update
from glassgpt.utils.threads import in_background


def timed_step(state: TrainState) -> float:
    """Seconds per update."""
    begin = time.perf_counter()
    start_update(state, 1e-4).read()
    state.step += 1
    return time.perf_counter() - begin


def main() -> int:
    """Print the medians on the first rank."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="gpt2")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6, help="between two saves")
    parser.add_argument("--strategy", choices=("auto", "ddp", "fsdp"), default="auto")
    parser.add_argument("--folder", type=Path, help="where to write (default: the system's folder for temporary files)")
    arguments = parser.parse_args()
    config = recipe(
        arguments.recipe,
        steps=10_000,
        batch_tokens=256,
        micro_batch_size=1,
        strategy=arguments.strategy,
        data={"source": "python-docs", "tokenizer": "bytes", "validation": "fraction"},
        model={
            "context_length": 128,
            "vocab_size": None,
            "vocab_multiple": 50304,
        },  # GPT-2's size without its vocabulary's file
        sample={"count": 0},
        hellaswag_every=0,
    )
    folder = Path(tempfile.mkdtemp(prefix="glassgpt-saves-", dir=arguments.folder))
    found: dict[str, list[float]] = {
        name: [] for name in ("copy", "foreground", "background", "writing", "step", "step while writing")
    }
    with process_group() as ranks:
        state = setup_training(config, ranks, SilentProgress())
        writing = in_background(lambda: None, "save")

        def write(snapshot: Snapshot) -> None:
            begin = time.perf_counter()
            saved = TrainingState(step=state.step)
            save_checkpoint(folder, snapshot, state.config, state.data.tokenizer, saved)
            found["writing"].append(time.perf_counter() - begin)

        timed_step(state)
        for _ in range(arguments.rounds):
            for way in ("foreground", "background"):
                found["step"].append(timed_step(state))
                begin = time.perf_counter()
                snapshot = take_snapshot(state.strategy, state.optimizers)
                found["copy"].append(time.perf_counter() - begin)
                if snapshot is not None:
                    writing = in_background(functools.partial(write, snapshot), "save")
                    if way == "foreground":
                        writing.result()
                ranks.all_gather_numbers([0])  # the others wait for the first
                found[way].append(time.perf_counter() - begin)
                written = len(found["writing"])
                for _ in range(arguments.steps if way == "background" else 0):
                    seconds = timed_step(state)
                    found[
                        "step while writing" if len(found["writing"]) == written and ranks.is_main else "step"
                    ].append(seconds)
                writing.result()
        if ranks.is_main:
            size = sum(p.numel() for p in state.strategy.model.parameters()) / 1e6
            print(
                f"{size:.0f}M parameters, {state.strategy.name} on {ranks.size}; medians of {arguments.rounds} rounds"
            )
            for name, values in found.items():
                if values:
                    spread = f"({min(values):.2f} to {max(values):.2f}, {len(values)} times)"
                    print(f"  {name:<20} {statistics.median(values):7.2f} s   {spread}")
            ratio = statistics.median(found["foreground"]) / statistics.median(found["background"])
            print(f"  foreground / background: {ratio:.1f}")
    shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
