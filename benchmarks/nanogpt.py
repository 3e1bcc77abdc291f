"""A recipe of glassgpt against nanoGPT's own CPU recipe: seed by seed, alternately, on the same machine and text.

    python benchmarks/nanogpt.py --nanogpt ~/nanoGPT --data input.txt --seeds 3                    # the same recipe
    python benchmarks/nanogpt.py --nanogpt ~/nanoGPT --data input.txt --seeds 3 --recipe speedrun  # the same loss
    python benchmarks/nanogpt.py --data input.txt --seeds 3 --recipe shakespeare-best              # on a CPU

Without --nanogpt only glassgpt runs. If the recipe has bars, the script prints whether they are met and exits with 1
if not. nanoGPT is your own checkout; the script runs a copy of it. Both sides are timed as whole processes, and both
models are measured on the whole validation split, in the same windows. Prints one line per run and writes JSON. Do
not use the machine otherwise. nanoGPT's prepare.py needs the package `requests`, which glassgpt[dev] installs.
"""

import argparse
import importlib.util
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import glassgpt as g

RECIPE = (
    "config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 --log_interval=1 "
    "--block_size=64 --batch_size=12 "
    "--n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0 "
    "--always_save_checkpoint=True"
)
# nanoGPT lacks an option for its seed, so its one call of manual_seed is shifted.
SHIFT_SEED = (
    "import sys, torch; s = torch.manual_seed; torch.manual_seed = lambda n: s(n + {shift}); "
    "exec(open('train.py').read())"
)


# The losses of nanoGPT's two recipes for this text (its CPU recipe's as one run reached it, its GPU recipe's as its
# README has it), and in how much of nanoGPT's time or in how many seconds they are to be reached.
BARS = {"speedrun": {"loss": 1.893, "time_ratio": 0.1}, "shakespeare-best": {"loss": 1.4697, "seconds": 600.0}}


def prepare_nanogpt(source: Path, text: Path, copy: Path) -> None:
    """A copy of nanoGPT with the text in place, encoded by its own script."""
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns(".git"))
    data = copy / "data" / "shakespeare_char"
    shutil.copy(text, data / "input.txt")
    subprocess.run([sys.executable, "prepare.py"], cwd=data, check=True, stdout=subprocess.DEVNULL)


def timed(command: list[str], cwd: Path) -> float:
    """Wall-clock seconds of a whole process; raises if it fails."""
    began = time.perf_counter()
    subprocess.run(command, cwd=cwd, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def nanogpt_loss(copy: Path, out: Path) -> float:
    """Loss of nanoGPT's last checkpoint on its whole validation split, in non-overlapping windows."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", copy / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    saved = torch.load(out / "ckpt.pt", weights_only=True)
    model = module.GPT(module.GPTConfig(**saved["model_args"]))
    model.load_state_dict(saved["model"])
    model.eval()
    ids = torch.from_numpy(np.fromfile(copy / "data/shakespeare_char/val.bin", dtype=np.uint16).astype(np.int64))
    return mean_loss(lambda x, y: model(x, y)[1], ids, saved["model_args"]["block_size"])


def glassgpt_loss(run: Path, text: Path) -> float:
    """Loss of a run's last checkpoint on the same split, in the same windows, also in float32."""
    model, tokenizer = g.load(str(run), device="cpu")
    assert tokenizer is not None
    whole = text.read_text(encoding="utf-8")
    ids = torch.from_numpy(tokenizer.encode(whole[int(len(whole) * 0.9) :]))  # as nanoGPT's prepare.py divides it
    return mean_loss(model, ids, model.config.context_length)


@torch.no_grad()
def mean_loss(loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], ids: torch.Tensor, length: int) -> float:
    """Mean loss per token, in windows of this length."""
    total = 0.0
    for start in range(0, len(ids) - 1, length):
        window = ids[start : start + length + 1][None]
        total += loss(window[:, :-1], window[:, 1:]).item() * (window.shape[1] - 1)
    return total / (len(ids) - 1)


def nanogpt_run(copy: Path, out: Path, shift: int) -> dict[str, float]:
    """Train and measure nanoGPT's side."""
    command = [sys.executable, "-c", SHIFT_SEED.format(shift=shift), *RECIPE.split(), f"--out_dir={out}"]
    return {"nanogpt_seconds": timed(command, copy), "nanogpt_loss": nanogpt_loss(copy, out)}


def glassgpt_run(recipe: str, text: Path, work: Path, seed: int) -> dict[str, float]:
    """Train and measure glassgpt's side. Its time includes preparing the text and its own evaluation."""
    run = work / f"glassgpt-{seed}"
    os.environ["GLASSGPT_CACHE"] = str(work / f"cache-{seed}")
    command = [
        sys.executable,
        "-m",
        "glassgpt",
        "train",
        recipe,
        "--data",
        str(text),
        "--out",
        str(run),
        "--seed",
        str(seed),
    ]
    return {"glassgpt_seconds": timed(command, work), "glassgpt_loss": glassgpt_loss(run, text)}


def is_met(recipe: str, summary: dict[str, float]) -> bool:
    """Whether means and medians meet the recipe's bars; prints each bar."""
    met = True
    for name, bar in BARS.get(recipe, {}).items():
        measured = summary.get(name if name == "time_ratio" else f"glassgpt_{name}")
        verdict = (
            "not measured"
            if measured is None
            else f"{measured:.4f}, bar {bar}: {'met' if measured <= bar else 'missed'}"
        )
        print(f"{name} {verdict}")
        met &= measured is not None and measured <= bar
    return met


def main() -> int:
    """Run both sides alternately and print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", type=Path, help="your copy of nanoGPT")
    parser.add_argument("--data", type=Path, required=True, help="tinyshakespeare, as nanoGPT's input.txt")
    parser.add_argument(
        "--recipe",
        default="shakespeare-cpu",
        help="of glassgpt (default: %(default)s; speedrun is to reach the same loss sooner)",
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        copy = work / "nanoGPT"
        if arguments.nanogpt is not None:
            prepare_nanogpt(arguments.nanogpt, arguments.data, copy)
        for shift in range(arguments.seeds):
            row: dict[str, float] = {"seed": 1337 + shift}
            if arguments.nanogpt is not None:
                row |= nanogpt_run(copy, work / f"nanogpt-{shift}", shift)
            row |= glassgpt_run(arguments.recipe, arguments.data.resolve(), work, 1337 + shift)
            rows.append(row)
            print(
                "  ".join(f"{key} {value:.4f}" for key, value in row.items() if key != "seed"),
                f" seed {row['seed']}",
                flush=True,
            )
    summary = {key: statistics.mean(row[key] for row in rows) for key in rows[0] if key.endswith("loss")}
    summary |= {key: statistics.median(row[key] for row in rows) for key in rows[0] if key.endswith("seconds")}
    if arguments.nanogpt is not None:
        summary["time_ratio"] = statistics.median(row["glassgpt_seconds"] / row["nanogpt_seconds"] for row in rows)
    versions = {"python": platform.python_version(), "torch": torch.__version__, "cores": os.cpu_count()}
    print("mean loss, median seconds, median ratio glassgpt / nanoGPT:", json.dumps(summary))
    if arguments.json:
        arguments.json.write_text(json.dumps({"summary": summary, "runs": rows, "versions": versions}, indent=1) + "\n")
    return int(not is_met(arguments.recipe, summary))


if __name__ == "__main__":
    sys.exit(main())
