"""Recipe `induction` on seeds 0 to 4: the score of its induction head, what ablation does, and the time.

    python benchmarks/induction.py

Each run is a process of its own with two threads; times are of whole processes. The text is generated and prepared
before. For each seed, prints the best induction score of any head with its layer and head, the mean probability of
repeated tokens, what it falls to without that head and without the head that matters most among the others, CPU seconds
(user and system) and wall-clock seconds. Exits with 1 if a score is below 0.4, if another head matters more, or if a
run takes more than 60 s.
"""

import argparse
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import glassgpt as g
from glassgpt.data.prepare import prepare
from glassgpt.interpretability.head_scores import HEAD_TYPES, head_scores
from induction_harness import ablate_each_head

COLUMNS = ("seed", "score", "layer, head", "probability", "without it", "without another", "CPU, s", "wall, s")


def train(seed: int, out: Path) -> tuple[float, float]:
    """CPU and wall-clock seconds of a process that trains the recipe."""
    command = [sys.executable, "-m", "glassgpt", "train", "induction", "--seed", str(seed), "--out", str(out)]
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "2"})
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall


def measure(seed: int, out: Path) -> tuple[list[str], bool]:
    """The cells of a seed's row, and whether it is within the limits."""
    cpu, wall = train(seed, out)
    model, _ = g.load(out)
    scores = head_scores(model)[HEAD_TYPES.index("induction")]
    before, after = ablate_each_head(model)
    best = int(scores.argmax())
    others = after.flatten()[torch.arange(after.numel()) != best]
    layer, head = divmod(best, scores.shape[1])
    probabilities = (before, after.flatten()[best].item(), others.min().item())
    cells = [str(seed), f"{scores.max():.3f}", f"{layer}, {head}", *(f"{p:.3f}" for p in probabilities)]
    is_within = bool(scores.max() >= 0.4 and after.argmin() == best and wall <= 60)
    return [*cells, f"{cpu:.1f}", f"{wall:.1f}"], is_within


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    config = g.recipe("induction")
    prepare(config.data)
    print(
        f"{config.steps} steps, torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}\n"
    )
    print(f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}", flush=True)
    are_within = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(options.seeds):
            cells, is_within = measure(seed, Path(folder) / str(seed))
            print(f"| {' | '.join(cells)} |", flush=True)
            are_within.append(is_within)
    return int(not all(are_within))


if __name__ == "__main__":
    sys.exit(main())
