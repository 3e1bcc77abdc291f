"""The figures of `docs/measured/scale.md`: tables from the formulas, and the formulas compared to real runs.

    python benchmarks/scale.py --table    # memory, bytes sent and batches of GPT-2's sizes, as Markdown
    python benchmarks/scale.py --check    # runs on 1, 2 and 4 CPU ranks, formula next to measurement: minutes, 4 GB

A check trains a model of 30M parameters under torchrun. Each rank reads its own peak of resident memory (VmHWM) during
the second and third update, minus its resident memory before the model was created (after a warm-up with a tiny model).
It also reads the bytes that it wrote to its sockets in the third update, from /proc/self/io. malloc returns every block
of 64 KiB and more at once, so that resident memory is the memory of tensors. Linux only.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from glassgpt.config.recipes import recipe
from glassgpt.config.schema import TrainConfig
from glassgpt.model.summary import ModelSummary
from glassgpt.planning.memory import Memory, bytes_sent_per_update, memory_per_rank
from kill_harness import tiny_config, write_text
from torchrun_harness import environment, torchrun

SIZES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
PROCESSES = (1, 8, 64)
STRATEGIES = ("ddp", "fsdp")
MEMORY_PARTS = ("weights", "gradients", "optimizer", "activations", "copies", "gathered", "working")
# Large blocks come from the kernel and go back to it at once.
MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_MMAP_MAX_": "1000000",
    "MALLOC_ARENA_MAX": "1",
}


def markdown(header: str, rows: list[list[str]]) -> str:
    """A table whose header names the columns, divided by |."""
    names = [name.strip() for name in header.split("|")]
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def gigabytes(count: float) -> str:
    return f"{count / 1e9:.2f}"


def setups() -> Iterator[tuple[TrainConfig, int, str]]:
    """Each recipe on each number of processes with each strategy; on one process there is one strategy."""
    for name in SIZES:
        for processes in PROCESSES:
            for strategy in STRATEGIES if processes > 1 else STRATEGIES[:1]:
                yield recipe(name, model={"vocab_size": 50257}), processes, strategy


def tables() -> dict[str, str]:
    """The tables of `docs/measured/scale.md` by name."""
    memory, sent, batches = [], [], []
    for config, processes, strategy in setups():
        name = [config.name, str(processes), strategy if processes > 1 else "single"]
        sequences, micro_steps = config.sequences_per_process(processes), config.micro_steps(processes)
        need = memory_per_rank(config, processes, strategy, "bfloat16")
        memory.append(
            [*name, *(gigabytes(getattr(need, part)) for part in MEMORY_PARTS), f"**{gigabytes(need.total)}**"]
        )
        if processes > 1:
            count = bytes_sent_per_update(config, processes, strategy, "bfloat16")
            flops = ModelSummary(config.model).training_flops_per_token * sequences * config.model.context_length
            sent.append([*name, str(micro_steps), gigabytes(count), f"{flops / count:,.0f}"])
        if strategy == "ddp":
            each = [
                sequences,
                config.micro_batch(processes),
                micro_steps,
                config.micro_batch(processes) * config.model.context_length,
                config.batch_tokens,
            ]
            batches.append([*name[:2], *(f"{number:,}" for number in each)])
    return {
        "batches": markdown(
            "recipe|GPUs|sequences per rank|per micro-batch|micro-steps|tokens per micro-batch|tokens per update",
            batches,
        ),
        "memory": markdown(f"recipe|GPUs|strategy|{'|'.join(MEMORY_PARTS)}|total", memory),
        "checkpointing": markdown("recipe|none|selective|full", [[name, *_recomputed(name)] for name in SIZES]),
        "sent": markdown("recipe|GPUs|strategy|micro-steps|GB per update|FLOP per byte", sent),
        "host": markdown("recipe|parameters|snapshot|copy for evaluation", [[name, *_of_host(name)] for name in SIZES]),
    }


def _recomputed(name: str) -> Iterator[str]:
    """Totals under FSDP on 8 GPUs, by kind of activation checkpointing."""
    for kind in ("none", "selective", "full"):
        config = recipe(name, model={"vocab_size": 50257}, activation_checkpointing=kind)
        yield gigabytes(memory_per_rank(config, 8, "fsdp", "bfloat16").total)


def _of_host(name: str) -> list[str]:
    count = ModelSummary(recipe(name, model={"vocab_size": 50257}).model).parameters
    return [f"{count:,}", gigabytes(12 * count), gigabytes(4 * count)]


# The check


def cases() -> Iterator[tuple[int, dict[str, Any]]]:
    """Ranks and settings of each run of the check."""
    for precision in ("float32", "bfloat16"):
        for ranks in (1, 2, 4):
            for strategy in STRATEGIES:
                yield ranks, {"strategy": strategy, "precision": precision}
    for more in (
        {"activation_checkpointing": "selective"},
        {"activation_checkpointing": "full"},
        {"optim": {"name": "muon"}},
    ):
        for strategy in STRATEGIES:
            yield 2, {"strategy": strategy, "precision": "bfloat16", **more}


def checked_config(text: Path, settings: dict[str, Any]) -> TrainConfig:
    """A model of 30M parameters on 8 sequences of 512 tokens per update, its vocabulary padded to 8,192."""
    return tiny_config(
        text,
        model={"n_layer": 8, "n_head": 8, "n_embd": 512, "context_length": 512, "vocab_multiple": 8192},
        sample={"count": 0},
        batch_tokens=8 * 512,
        micro_batch_size=2,
        device="cpu",
    ).override(**settings)


def check(folder: Path) -> None:
    """Print a row for each case as soon as it is measured."""
    text = write_text(folder / "text.txt", 60_000)
    memory, sent = "formula, MB|measured, MB|ratio", "sent: formula, MB|with gloo's, MB|measured, MB|ratio"
    header = f"ranks|strategy|precision|extra|micro-steps|{memory}|{sent}"
    print(markdown(header, []), end="", flush=True)
    for ranks, settings in cases():
        config = checked_config(text, settings)
        print(f"| {' | '.join(_row(config, ranks, measured(folder, config, ranks)))} |", flush=True)


def _row(config: TrainConfig, ranks: int, ranks_figures: list[dict[str, Any]]) -> list[str]:
    config = config.override(model={"vocab_size": ranks_figures[0]["vocab_size"]})
    strategy, precision = config.strategy, config.precision
    variant = "muon" if config.optim.name == "muon" else config.activation_checkpointing.replace("none", "")
    micro_steps = config.micro_steps(ranks)
    need, sent = (
        memory_per_rank(config, ranks, strategy, precision),
        bytes_sent_per_update(config, ranks, strategy, precision),
    )
    # gloo reduces and scatters by an all-reduce, which sends twice as much.
    extra = 4 * ModelSummary(config.model).parameters * (ranks - 1) / ranks * micro_steps if strategy == "fsdp" else 0
    memory, written = mean(each["memory"] for each in ranks_figures), mean(each["written"] for each in ranks_figures)
    print(
        f"  {_parts(need)}; by rank {[round(each['memory'] / 1e6, 1) for each in ranks_figures]}",
        file=sys.stderr,
        flush=True,
    )
    return [
        *(str(ranks), strategy if ranks > 1 or strategy == "fsdp" else "single", precision, variant, str(micro_steps)),
        *(f"{need.total / 1e6:.1f}", f"{memory / 1e6:.1f}", f"{need.total / memory:.3f}"),
        *(
            f"{sent / 1e6:.2f}",
            f"{(sent + extra) / 1e6:.2f}",
            f"{written / 1e6:.2f}",
            f"{(sent + extra) / written:.3f}" if sent else "",
        ),
    ]


def _parts(memory: Memory) -> str:
    return ", ".join(f"{part} {getattr(memory, part) / 1e6:.1f}" for part in MEMORY_PARTS)


def measured(folder: Path, config: TrainConfig, ranks: int) -> list[dict[str, Any]]:
    """What each rank of a run measured."""
    path = folder / "config.toml"
    path.write_text(config.to_toml(), encoding="utf-8")
    command = torchrun([str(Path(__file__)), "--train", str(path), "--out", str(folder)], ranks=ranks)
    subprocess.run(command, env=environment(folder) | MALLOC, check=True, timeout=1200)
    return [json.loads((folder / f"rank{rank}.json").read_text(encoding="utf-8")) for rank in range(ranks)]


def train(path: Path, out: Path) -> None:
    """What each rank does."""
    from glassgpt.distributed.group import process_group
    from glassgpt.training.progress import SilentProgress
    from glassgpt.training.setup import setup_training
    from glassgpt.training.step import start_update

    config = TrainConfig.from_toml(path.read_text(encoding="utf-8"))
    tiny = config.override(
        model={"n_layer": 2, "n_head": 1, "n_embd": 8, "context_length": 64, "vocab_multiple": 1}, batch_tokens=512
    )
    with process_group() as ranks:
        state = setup_training(tiny, ranks, SilentProgress())
        for state.step in range(2):
            start_update(state, 1e-4).read()
        before = psutil.Process().memory_info().rss
        state = setup_training(config, ranks, SilentProgress())
        start_update(state, 1e-4).read()
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # forget the peak: proc(5)
        for state.step in (1, 2):
            written = _of_process("io", "wchar")
            start_update(state, 1e-4).read()
        ranks_figures = {
            "memory": _of_process("status", "VmHWM") * 1024 - before,
            "written": _of_process("io", "wchar") - written,
            "vocab_size": state.config.model.vocab_size,
        }
    (out / f"rank{os.environ['RANK']}.json").write_text(json.dumps(ranks_figures), encoding="utf-8")


def _of_process(file: str, name: str) -> int:
    found = re.search(rf"^{name}:\s*(\d+)", Path(f"/proc/self/{file}").read_text(encoding="utf-8"), re.MULTILINE)
    assert found is not None
    return int(found[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the tables")
    parser.add_argument("--check", action="store_true", help="train, and print formulas next to measurements")
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.train:
        train(arguments.train, arguments.out)
    if arguments.table:
        print("\n".join(f"{name}:\n\n{table}" for name, table in tables().items()), end="")
    if arguments.check:
        with tempfile.TemporaryDirectory(prefix="glassgpt-scale-") as folder:
            check(Path(folder))


if __name__ == "__main__":
    main()
