"""How much of a small model's update is matrix products: the update and its products, timed alternately.

    GOMP_SPINCOUNT=3000 python benchmarks/overhead.py                       # as the command line sets it
    GOMP_SPINCOUNT=3000 python benchmarks/overhead.py --recipe speedrun     # another recipe

The products are those of one recorded call of glassgpt's `start_update`, forward and backward: the same operators
on tensors of the same shapes and strides, one after the other. Fused attention (two products and a softmax) counts as
products; its share is printed. The rest of the update is the overhead: norms, activations, the loss, clipping, the
optimizer, the batch, and the calls themselves. Prints Markdown: medians, fastest and slowest. Keep the machine idle
meanwhile.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from glassgpt.config.recipes import recipe
from glassgpt.distributed.group import Ranks
from glassgpt.training.progress import SilentProgress
from glassgpt.training.setup import setup_training
from glassgpt.training.step import start_update
from glassgpt.utils.device import cpu_name, keep_freed_memory
from kill_harness import write_text

PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "baddbmm", "matmul", "linear", "_addmm_activation")
ATTENTION = ("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention_for_cpu_backward")
# At most this share of an update may be overhead.
BAR = 0.35
Call = Callable[[], object]


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the calls of some operators, to repeat them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.products: list[Call] = []
        self.attention: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        if name in PRODUCTS or name in ATTENTION:
            calls = self.attention if name in ATTENTION else self.products
            calls.append(lambda: func(*args, **kwargs))
        return func(*args, **kwargs)


def seconds(calls: list[Call]) -> float:
    """Seconds that the calls take, one after the other."""
    begin = time.perf_counter()
    with torch.no_grad():
        for call in calls:
            call()
    return time.perf_counter() - begin


def main() -> int:
    """Print the table; 1 if the overhead is above the bar."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="shakespeare-cpu")
    parser.add_argument("--rounds", type=int, default=200)
    options = parser.parse_args()
    keep_freed_memory()  # as the command line does
    times: dict[str, list[float]] = {"update": [], "products": [], "attention": []}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["GLASSGPT_CACHE"] = folder
        write_text(Path(folder) / "text.txt", 60_000)
        data = {"source": str(Path(folder) / "text.txt"), "tokenizer": "characters", "validation": "fraction"}
        config = recipe(options.recipe, data=data, model={"vocab_multiple": 65}, sample={"count": 0}, device="cpu")
        config = config.override(context_start=None, batch_start=None)  # updates as they are in the end
        state = setup_training(config, Ranks(), SilentProgress())
        with _Recorder() as recorder:
            start_update(state, 1e-4).read()
        for state.step in range(1, options.rounds + 21):  # the first 20 warm up
            begin = time.perf_counter()
            start_update(state, 1e-4).read()
            times["update"].append(time.perf_counter() - begin)
            times["products"].append(seconds(recorder.products))
            times["attention"].append(seconds(recorder.attention))
    found = {name: [1e3 * each for each in series[20:]] for name, series in times.items()}
    whole = statistics.median(found["update"])
    print(
        f"{options.recipe}, {cpu_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"{options.rounds} rounds\n"
    )
    print("| what | ms, median (fastest – slowest) | share of the update |\n| --- | --- | --- |")
    for name, count in (("update", 1), ("products", len(recorder.products)), ("attention", len(recorder.attention))):
        median = statistics.median(found[name])
        spread = f"{median:.2f} ({min(found[name]):.2f} – {max(found[name]):.2f})"
        print(f"| {name} ({count}) | {spread} | {median / whole:.0%} |")
    overhead = 1 - sum(statistics.median(found[name]) for name in ("products", "attention")) / whole
    print(f"\noverhead {overhead:.1%}, bar {BAR:.0%}: {'met' if overhead < BAR else 'missed'}")
    return int(overhead >= BAR)


if __name__ == "__main__":
    sys.exit(main())
