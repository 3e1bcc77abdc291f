"""A training step of GPT-2 small (124M) on a CPU, compared to nanoGPT's, alternately: tokens/s and peak memory.

    python benchmarks/step.py --nanogpt PATH --rounds 5 --json step.json

Both sides: 2 x 1,024 random tokens of GPT-2's vocabulary per update, AdamW, clipping, biases, random weights, the same
number of threads, and one process for each side (glassgpt's with GOMP_SPINCOUNT=3000, as its command line sets it;
nanoGPT has no such setting). nanoGPT's side does what its train.py does on a CPU: float32 (its `ctx` is empty there),
`torch.optim.AdamW` by its `configure_optimizers`, both sequences at once. glassgpt's side is `start_update` with
recipe gpt2, in float32 and in `native` precision, with and without activation checkpointing. Without --nanogpt, only
glassgpt runs. Prints Markdown: medians, fastest and slowest, the largest resident memory of each process, and whether
the bars are met. Linux only. Keep the machine idle meanwhile.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from contender import Contender, serve

# glassgpt is imported inside functions, so that nanoGPT's process does not hold it in memory.
GPT2_IDS = 50257
SEQUENCES, LENGTH, VOCABULARY = 2, 1024, 50304
# At least this many times its tokens/s, at most this share of its memory.
FASTER, SMALLER = 1.2, 0.65
SETTINGS = [("float32", "none"), ("float32", "full"), ("native", "none"), ("native", "selective")]


def nanogpt_step(path: Path) -> Callable[[], object]:
    sys.path.insert(0, str(path))
    from model import GPT, GPTConfig  # type: ignore[import-not-found, attr-defined, unused-ignore]

    torch.manual_seed(1337)
    shape = GPTConfig(
        block_size=LENGTH, vocab_size=VOCABULARY, n_layer=12, n_head=12, n_embd=768, dropout=0.0, bias=True
    )
    model = GPT(shape)
    optimizer = model.configure_optimizers(weight_decay=0.1, learning_rate=6e-4, betas=(0.9, 0.95), device_type="cpu")
    x, y = torch.randint(GPT2_IDS, (2, SEQUENCES, LENGTH))

    def step() -> object:
        _, loss = model(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def glassgpt_step(folder: Path, precision: str, checkpointing: str) -> Callable[[], object]:
    from glassgpt.config.recipes import recipe
    from glassgpt.distributed.group import Ranks
    from glassgpt.training.progress import SilentProgress
    from glassgpt.training.setup import setup_training
    from glassgpt.training.step import start_update
    from glassgpt.utils.device import keep_freed_memory

    keep_freed_memory()  # as the command line does
    os.environ["GLASSGPT_CACHE"] = str(folder)
    data = {"source": str(folder / "tokens")}
    changes: dict[str, Any] = {
        "model": {"vocab_multiple": 128},
        "sample": {"count": 0},
        "hellaswag_every": 0,
        "device": "cpu",
    }
    changes |= {"batch_tokens": SEQUENCES * LENGTH, "precision": precision, "activation_checkpointing": checkpointing}
    state = setup_training(recipe("gpt2", data=data, micro_batch_size=SEQUENCES, **changes), Ranks(), SilentProgress())

    def step() -> object:
        start_update(state, 6e-4).read()
        state.step += 1
        return None

    return step


def main() -> int:
    """Print the table; 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", type=Path, help="a copy of nanoGPT")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        torch.set_num_threads(options.threads)
        who, where, checkpointing = options.serve
        serve(nanogpt_step(Path(where)) if who == "nanoGPT" else glassgpt_step(Path(where), who, checkpointing))
        return 0
    from gpu import write_tokens

    from glassgpt.utils.device import cpu_name

    with tempfile.TemporaryDirectory() as scratch, ExitStack() as running:
        write_tokens(Path(scratch) / "tokens", 2**18)
        sides = {"nanoGPT": ("nanoGPT", str(options.nanogpt), "none")} if options.nanogpt else {}
        for precision, checkpointing in SETTINGS:
            sides[f"glassgpt, {precision}, checkpointing {checkpointing}"] = (precision, scratch, checkpointing)
        print(
            f"{cpu_name()}, {options.threads} threads, torch {torch.__version__}, "
            f"{options.rounds} rounds after a warm-up\n"
        )
        contenders = {}
        for name, side in sides.items():
            # As glassgpt's command line sets it; nanoGPT has no such setting.
            environment = {**os.environ, **({"GOMP_SPINCOUNT": "3000"} if name != "nanoGPT" else {})}
            command = [__file__, "--threads", str(options.threads), "--serve", *side]
            contenders[name] = running.enter_context(Contender(command, environment))
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(1 + options.rounds):
            for name, contender in contenders.items():
                seconds[name].append(contender.seconds())
        found = {name: {"seconds": seconds[name][1:], "peak": contenders[name].peak} for name in contenders}
    missed = print_table(found)
    if options.json is not None:
        options.json.write_text(
            json.dumps({"torch": torch.__version__, "threads": options.threads, "sides": found}, indent=1) + "\n"
        )
    return int(missed)


def print_table(found: dict[str, dict[str, Any]]) -> bool:
    """Print each side's row. Returns whether none of glassgpt's sides meets both bars."""
    print(
        "| side | s per step, median (fastest – slowest) | tokens/s | of nanoGPT's | peak memory, GB | of nanoGPT's |"
    )
    print("| --- | --- | --- | --- | --- | --- |")
    base = found.get("nanoGPT")
    met: list[str] = []
    for name, side in found.items():
        median = statistics.median(side["seconds"])
        spread = f"{median:.2f} ({min(side['seconds']):.2f} – {max(side['seconds']):.2f})"
        faster = smaller = "-"
        if base is not None and side is not base:
            ratios = statistics.median(base["seconds"]) / median, side["peak"] / base["peak"]
            faster, smaller = (f"{ratio:.2f}" for ratio in ratios)
            met += [name] if ratios[0] >= FASTER and ratios[1] <= SMALLER else []
        rate, peak = SEQUENCES * LENGTH / median, side["peak"] / 1e9
        print(f"| {name} | {spread} | {rate:,.0f} | {faster} | {peak:.2f} | {smaller} |")
    if base is not None:
        verdict = f"met by {'; '.join(met)}" if met else "missed"
        print(f"\n{FASTER} times nanoGPT's tokens/s (float32) and {SMALLER} of its memory: {verdict}")
    return base is not None and not met


if __name__ == "__main__":
    sys.exit(main())
