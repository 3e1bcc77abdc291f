"""This machine's limits, and how near training and generation come to them: the figures of `glassgpt bench`."""

import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from glassgpt.config.recipes import recipe
from glassgpt.config.schema import TrainConfig
from glassgpt.data.batches import Batches
from glassgpt.data.dataset import TokenStream
from glassgpt.data.training_data import TrainingData
from glassgpt.distributed.strategies import Strategy
from glassgpt.generation.generate import generate
from glassgpt.model.gpt import GPT
from glassgpt.model.summary import ModelSummary
from glassgpt.planning.memory import FLOAT32, memory_a_rank
from glassgpt.training.loop import train_step
from glassgpt.training.optim import OutlierWatch, build_optimizers
from glassgpt.training.setup import TrainState, judge_on_device
from glassgpt.utils.device import (
    GPUS,
    available_memory,
    find_precision,
    matmul_precision,
    measure_peak_flops,
    peak_flops,
)

# Numbers that are copied and read: 154 MB of them, several times a CPU's cache; for a GPU 16 times as many.
_NUMBERS = 50304 * 768
# Seconds in which a short thing is repeated, and updates; of these at least so many.
_REPEATING, _UPDATING = 0.5, 2.0
_STEPS = 3
# Tokens of a text.
_TOKENS = 68


@dataclass(frozen=True)
class Figure:
    """A measured figure beside its limit."""

    name: str
    value: float
    unit: str
    limit: float | None = None
    """In the same unit; None where the figure is a limit itself, or nothing tells it."""
    of: str = ""
    """What the limit is."""

    def __str__(self) -> str:
        line = f"{self.name:<36}{_short(self.value):>8} {self.unit:<9}"
        return (
            line.rstrip()
            if self.limit is None
            else f"{line} {self.value / self.limit:>4.0%} of {_short(self.limit)}, {self.of}"
        )

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            key: value
            for key, value in asdict(self).items()
            if key != "name" and (self.limit is not None or key in ("value", "unit"))
        }


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def measure(device: torch.device) -> Iterator[Figure]:
    """Measure a CPU or a CUDA device, a minute or two; yields each figure as soon as it is there.

    Weights are random, which takes as long as any others. GPT-2 is left out where it does not fit into the free memory.
    """
    peaks: dict[str, float] = {}
    for precision in ("float32", "bfloat16"):
        peaks[precision] = measure_peak_flops(precision, device)
        sheet = peak_flops(device, precision) if device.type == "cuda" else None
        yield Figure(
            f"matrix products, {precision}",
            peaks[precision] / 1e12,
            "TFLOP/s",
            sheet and sheet / 1e12,
            "the data sheet's",
        )
    for name, bandwidth in zip(("memory, a copy", "memory, reading"), _bandwidths(device), strict=True):
        yield Figure(name, bandwidth / 1e9, "GB/s", _sheet_bandwidth(device), "the data sheet's")
    precision = find_precision("auto", device)
    peak = (peak_flops(device, precision) if device.type == "cuda" else None) or peaks[precision]
    for config in trainings(device):
        if _fits(config, device, precision):
            limit = peak / ModelSummary(config.model).training_flops_per_token
            rate = config.batch_tokens / _seconds_of_update(config, device, precision)
            yield Figure(
                f"training, {config.name}, {precision}",
                rate,
                "tokens/s",
                limit,
                "if all time were products at the peak",
            )
    gpt2 = trainings(device)[-1]
    if _fits(gpt2, device, precision):
        # Read anew on both sides of it: what the memory gives changes with what else runs on the host.
        before, written, behind = _bandwidths(device)[1], _written(gpt2, device), _bandwidths(device)[1]
        limit = (before + behind) / 2 / (FLOAT32 * ModelSummary(gpt2.model).parameters)
        yield Figure("generation, gpt2, float32, batch 1", written, "tokens/s", limit, "each reads all weights once")


def trainings(device: torch.device) -> list[TrainConfig]:
    """The recipe for CPUs, of which a step is short, and GPT-2 in updates that a CPU does in seconds."""
    sequences = 16 if device.type == "cuda" else 1
    small = recipe("shakespeare-cpu", model={"vocab_size": 65})
    gpt2 = recipe("gpt2", model={"vocab_size": 50257}, batch_tokens=1024 * sequences, micro_batch_size=sequences)
    return [small, gpt2]


def _fits(config: TrainConfig, device: torch.device, precision: str) -> bool:
    room = available_memory(device)
    return room is None or memory_a_rank(config.override(device=device.type), 1, "single", precision).total < 0.9 * room


def _bandwidths(device: torch.device) -> tuple[float, float]:
    """Bytes/s of a copy, which are read and written; and of a sum, which are read, as writing reads weights."""
    numbers = torch.ones(_NUMBERS * (16 if device.type == "cuda" else 1), device=device)
    other = torch.empty_like(numbers)
    return 2 * numbers.nbytes / _quickest(lambda: other.copy_(numbers), device), numbers.nbytes / _quickest(
        numbers.sum, device
    )


def _sheet_bandwidth(device: torch.device) -> float | None:
    """In GB/s, where the device's name and memory are those of one data sheet."""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    return next(
        (gpu.bandwidth / 1e9 for gpu in GPUS.values() if gpu.is_meant(properties.name, properties.total_memory)), None
    )


def _quickest(function: Callable[[], object], device: torch.device) -> float:
    """Seconds of the quickest call within `_REPEATING`, behind one that warms up."""
    function()
    best, begin = math.inf, time.perf_counter()
    while time.perf_counter() - begin < _REPEATING:
        best = min(best, _timed(function, device))
    return best


def _timed(function: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def _seconds_of_update(config: TrainConfig, device: torch.device, precision: str) -> float:
    """The median of some updates by `train_step` on random tokens, behind one that warms up. Each is waited for, which a GPU's run
    does not do.
    """
    strategy = Strategy(GPT.create(config.model, config.seed, device))
    if device.type == "cuda":
        strategy.compile(config.compile_backend)
    optimizers, scaler = (
        build_optimizers(strategy, config.optim, precision),
        torch.amp.GradScaler(device.type, enabled=False),
    )
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, 2**20, dtype=np.uint16)
    batches = Batches([TokenStream([tokens])], config.model.context_length, config.batch_size, config.seed)
    nothing, steps = TrainingData((), ()), config.steps or 1  # the batches are there already
    trainer = TrainState(
        config, nothing, batches, steps, device, precision, strategy, optimizers, scaler, OutlierWatch(0)
    )
    if device.type == "cuda":
        judge_on_device(trainer)
    times: list[float] = []
    with matmul_precision(precision):
        train_step(trainer, config.optim.lr)
        begin = time.perf_counter()
        while len(times) < _STEPS or time.perf_counter() - begin < _UPDATING:
            trainer.step += 1
            times.append(_timed(lambda: train_step(trainer, config.optim.lr), device))
    return statistics.median(times)


def _written(config: TrainConfig, device: torch.device) -> float:
    """Tokens/s of one text, from its fifth token on: the first one's time goes to the prompt, the next ones warm up."""
    model = GPT.create(config.model, config.seed, device)
    pieces = generate(model, None, [0], max_new_tokens=_TOKENS)
    for _ in range(4):
        next(pieces)
    begin = time.perf_counter()
    count = sum(1 for _ in pieces)  # each is drawn on the CPU, so none is still being computed
    return count / (time.perf_counter() - begin)
