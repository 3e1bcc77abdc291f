"""This machine's limits and how near training and generation come to them: the figures of `glassgpt bench`."""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from .config import TrainConfig, recipe
from .distributed.strategies import Strategy
from .generation import generate
from .hardware import GPUS, autocast, available_memory, cpu_name, find_precision, matmul_precision, peak_flops
from .model import GPT
from .optim import build_optimizers
from .scale import memory_a_rank
from .summary import ModelSummary

# Width of the matrices whose product gives a GPU's peak; a CPU's is measured by `peak_flops`.
_GPU_WIDTH = 8192
# GPT-2's embedding: a product with a vector reads 154 MB, several times a CPU's cache. A GPU's may hold it, so there it is 16 times.
_ROWS, _COLUMNS = 50304, 768
_NEW_TOKENS = 32


@dataclass(frozen=True)
class Figure:
    """A measured figure beside its limit."""

    name: str
    value: float
    unit: str
    limit: float | None = None
    """In the same unit, None where nothing tells it."""
    of: str = ""
    """Where the limit is from."""

    def __str__(self) -> str:
        line = f"{self.name:<34}{_short(self.value):>10} {self.unit}"
        return line if self.limit is None else f"{line:<60}{self.value / self.limit:>5.0%} of {_short(self.limit)} ({self.of})"

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {key: value for key, value in asdict(self).items() if key != "name"}


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def measure(device: torch.device) -> Iterator[Figure]:
    """Measure a device for a minute or two; yields each figure as soon as it is there.

    Training and generation are those of random weights, which take as long as any others. GPT-2 is left out where it does not fit.
    """
    gpu = device.type == "cuda"
    yield from _peaks(device)
    bandwidth = yield from _bandwidth(device)
    precision = find_precision("auto", device)
    peak = _peak(device, precision)
    for config in _trainings(device):
        if not _fits(config, device, precision):
            continue
        rate = config.batch_tokens / _step_seconds(config, device, precision)
        limit = peak / ModelSummary(config.model).training_flops_per_token
        yield Figure(f"training, {config.name}, {precision}", rate, "tokens/s", limit, f"the peak in {precision}")
    gpt2 = _gpt2(device)
    if _fits(gpt2, device, precision):
        rate, weights = _generation(gpt2, device)
        yield Figure("generation, gpt2, batch 1, float32", rate, "tokens/s", bandwidth / weights, "bandwidth / bytes of weights")
    yield Figure("processes' threads" if not gpu else "GPUs", torch.cuda.device_count() if gpu else torch.get_num_threads(), "")


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def _seconds(function: Callable[[], object], device: torch.device, budget: float = 0.5) -> float:
    """The quickest of at least three calls, behind one that warms up."""
    best, begin, calls = float("inf"), time.perf_counter(), -1
    while calls < 3 or time.perf_counter() - begin < budget:
        start = time.perf_counter()
        function()
        _wait(device)
        best = best if calls < 0 else min(best, time.perf_counter() - start)
        calls += 1
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
