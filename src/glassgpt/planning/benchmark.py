"""This machine's limits, and how close training and generation come to them: the figures of `glassgpt bench`."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from glassgpt.config.recipes import recipe
from glassgpt.config.schema import TrainConfig
from glassgpt.generation.generate import generate
from glassgpt.model.gpt import GPT
from glassgpt.model.summary import ModelSummary
from glassgpt.planning.memory import FLOAT32, memory_per_rank
from glassgpt.planning.throughput import measured_step_time
from glassgpt.utils.device import available_memory, fastest_call, find_precision, measure_peak_flops, peak_flops
from glassgpt.utils.gpu_specs import find_gpu

# Numbers that are copied and read: 154 MB, several times a CPU's cache; 16 times as many on a GPU.
_NUMBERS = 50304 * 768
# Seconds for which a short operation is repeated.
_REPEAT_SECONDS = 0.5


@dataclass(frozen=True)
class Figure:
    """A measured figure and its limit, in the same unit."""

    name: str
    value: float
    unit: str
    limit: float | None = None  # None if the figure is a limit itself, or the limit is unknown
    limit_name: str = ""

    def __str__(self) -> str:
        line = f"{self.name:<36}{_short(self.value):>8} {self.unit:<9}"
        if self.limit is None:
            return line.rstrip()
        return f"{line} {self.value / self.limit:>4.0%} of {_short(self.limit)}, {self.limit_name}"

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        limit = {} if self.limit is None else {"limit": self.limit, "of": self.limit_name}
        return {"value": self.value, "unit": self.unit, **limit}


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def measure(device: torch.device) -> Iterator[Figure]:
    """Measure a CPU or a CUDA device for a minute or two; yields each figure as soon as it is measured."""
    peaks: dict[str, float] = {}
    for precision in ("float32", "bfloat16"):
        measured = measure_peak_flops(precision, device)
        sheet = peak_flops(device, precision) if device.type == "cuda" else None
        peaks[precision] = sheet or measured
        limit = None if sheet is None else sheet / 1e12
        yield Figure(f"matrix products, {precision}", measured / 1e12, "TFLOP/s", limit, "the data sheet's")
    properties = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    gpu = find_gpu(properties.name, properties.total_memory) if properties else None
    limit = None if gpu is None else gpu.bandwidth / 1e9
    for name, bandwidth in zip(("memory, a copy", "memory, reading"), _bandwidths(device), strict=True):
        yield Figure(name, bandwidth / 1e9, "GB/s", limit, "the data sheet's")
    precision, configs, free = find_precision("auto", device), training_configs(device), available_memory(device)
    for config in configs:
        on_device = config.override(device=device.type)
        if free is not None and memory_per_rank(on_device, 1, "single", precision).total >= 0.9 * free:
            continue
        summary = ModelSummary(config.model)
        limit = peaks[precision] / summary.training_flops_per_token
        rate = config.batch_tokens / measured_step_time(config, device, precision)
        name = f"training, {config.name}, {precision}"
        yield Figure(name, rate, "tokens/s", limit, "if all time were products at the peak")
        if config is configs[-1]:
            # Bandwidth is measured before and after: it changes with what else runs on the host.
            before, rate, after = _bandwidths(device)[1], _generation_rate(config, device), _bandwidths(device)[1]
            limit = (before + after) / 2 / (FLOAT32 * summary.parameters)
            yield Figure("generation, gpt2, float32, batch 1", rate, "tokens/s", limit, "each reads all weights once")


def training_configs(device: torch.device) -> list[TrainConfig]:
    """The recipe for CPUs, with short steps, and GPT-2 with updates that a CPU finishes in seconds."""
    sequences = 16 if device.type == "cuda" else 1
    small = recipe("shakespeare-cpu", model={"vocab_size": 65})
    gpt2 = recipe("gpt2", model={"vocab_size": 50257}, batch_tokens=1024 * sequences, micro_batch_size=sequences)
    return [small, gpt2]


def _bandwidths(device: torch.device) -> tuple[float, float]:
    """Bytes/s of a copy, which reads and writes; and of a sum, which reads, as generation reads weights."""
    numbers = torch.ones(_NUMBERS * (16 if device.type == "cuda" else 1), device=device)
    other = torch.empty_like(numbers)
    copying = fastest_call(lambda: other.copy_(numbers), device, _REPEAT_SECONDS)
    return 2 * numbers.nbytes / copying, numbers.nbytes / fastest_call(numbers.sum, device, _REPEAT_SECONDS)


def _generation_rate(config: TrainConfig, device: torch.device) -> float:
    """Tokens/s of one text from its fifth token on: the first includes the prompt, the next ones warm up."""
    tokens = generate(GPT.create(config.model, config.seed, device), None, [0], max_new_tokens=68)
    for _ in range(4):
        next(tokens)
    begin = time.perf_counter()
    count = sum(1 for _ in tokens)  # each is sampled on the CPU, so none is still being computed
    return count / (time.perf_counter() - begin)
