"""Start-up time: import, help texts, loading a model; against Python and torch alone, alternately.

    python benchmarks/start.py --rounds 7

Each measurement is a whole process, with files cached. The model is GPT-2 small with random weights as a safetensors
file (498 MB in float32): `open` loads it, `open, first token` also computes one token. Prints Markdown: medians,
fastest and slowest.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from glassgpt import GPT, ModelConfig
from glassgpt.interop.hf_models import export_hf
from glassgpt.utils.device import cpu_name


def commands(model: Path) -> dict[str, list[str]]:
    """What is timed, by name."""
    load = f"import glassgpt as g; model, _ = g.load({str(model)!r})"
    token = "list(g.generate(model, None, [1], max_new_tokens=1, temperature=0))"
    return {
        "python alone": ["-c", "pass"],
        "import glassgpt": ["-c", "import glassgpt"],
        "glassgpt --help": ["-m", "glassgpt", "--help"],
        "glassgpt train --help": ["-m", "glassgpt", "train", "--help"],
        "import torch": ["-c", "import torch"],
        "glassgpt info, GPT-2 small": ["-m", "glassgpt", "info", str(model)],
        "open": ["-c", load],
        "open, first token": ["-c", f"{load}; {token}"],
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        shape = ModelConfig(vocab_size=50257, context_length=1024, n_layer=12, n_head=12, n_embd=768)
        export_hf(GPT.create(shape, seed=0), None, Path(scratch) / "model")
        timed = commands(Path(scratch) / "model")
        seconds: dict[str, list[float]] = {name: [] for name in timed}
        for _ in range(1 + options.rounds):
            for name, command in timed.items():
                begin = time.perf_counter()
                subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
                seconds[name].append(time.perf_counter() - begin)
    print(f"{cpu_name()}, Python {sys.version.split()[0]}, {options.rounds} rounds after a warm-up\n")
    print("| what | s, median (fastest – slowest) |\n| --- | --- |")
    for name, times in seconds.items():
        print(f"| {name} | {statistics.median(times[1:]):.2f} ({min(times[1:]):.2f} – {max(times[1:]):.2f}) |")


if __name__ == "__main__":
    main()
