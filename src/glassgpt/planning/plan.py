"""What a run needs: memory by component, the largest micro-batch that fits, tokens/s and hours."""

import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace

import torch

from glassgpt.config.schema import TrainConfig
from glassgpt.model.summary import ModelSummary
from glassgpt.planning import throughput
from glassgpt.planning.memory import Memory, largest_micro_batch, memory_per_rank, with_vocabulary
from glassgpt.utils import device as hardware
from glassgpt.utils.errors import UserError, did_you_mean
from glassgpt.utils.formatting import format_bytes, format_duration
from glassgpt.utils.gpu_specs import GPUS, Gpu

# Of a GPU's memory: the CUDA context with the buffers of cuBLAS and NCCL, and the share that the allocator wastes.
CONTEXT = 1e9
FRAGMENTED = 0.05
# On a CPU glibc keeps freed blocks (`keep_freed_memory`): 18 to 26 % of activations and working memory at the sizes of
# shakespeare-char. oneDNN and others have buffers of 10 to 13 MB, larger ones for larger matrices; see
# docs/measured/scale.md.
HEAP = 0.2
BUFFERS = 30e6
# Seconds of a pass on a GPU below which its host may not start the hundreds of kernels fast enough.
SHORT_PASS = 0.01
_LABELS = {
    "copies": "copies for products",
    "gathered": "gathered by FSDP",
    "working": "logits and working",
    "heap": "malloc and buffers",
}


@dataclass(frozen=True)
class Column:
    """What a run needs with one strategy, with the recipe's micro-batch or the largest that fits."""

    strategy: str  # single, ddp or fsdp
    config: TrainConfig  # with that micro-batch
    memory: Memory  # on each rank, at the peak of an update
    largest: int | None  # the largest micro-batch that fits; None if none does
    step_time: float | None  # seconds of an update; None if the run does not fit


@dataclass(frozen=True)
class Plan:
    """A run on a machine, and what was assumed."""

    title: str
    config: TrainConfig
    gpus: int
    libraries: int  # bytes of interpreter and libraries that share the memory with the run, on a CPU
    available: float  # bytes that the run may take on each rank
    columns: Sequence[Column]
    assumptions: Sequence[str]

    def __str__(self) -> str:
        return "\n".join([self.title, "", *_table(self), "", *(f"- {line}" for line in self.assumptions)])


def plan(config: TrainConfig, gpus: int = 1) -> Plan:
    """Plan a run on `config.device`: a name of `gpu_specs.GPUS`, or a device of this machine, which is measured.

    `auto` and `here` are the best device of this machine. Raises `UserError` for an unknown device, one that lacks the
    precision, or GPUs that cannot share the batch evenly.
    """
    if config.cpu_offload:
        raise UserError("plan cannot estimate --cpu-offload; leave it out to see what fsdp needs without it")
    config, notes = with_vocabulary(config)
    if config.context_start is not None or config.batch_start is not None:
        notes.append("updates at their final size; the early, smaller ones need less")
    requested = config.micro_batch(gpus)
    name, gpu = config.device, GPUS.get(config.device.lower())
    known = ["here", "cpu", "cuda", *GPUS]
    if gpu is None and gpus > 1:
        raise UserError(f"--gpus {gpus} needs --device with the name of a GPU: {', '.join(GPUS)}")
    if gpu is None and not name.startswith(("auto", "here", "cpu", "cuda", "mps")):
        raise UserError(f"unknown device {name!r}{did_you_mean(name, known)} (devices: {', '.join(known)})")
    estimate = _measured(config) if gpu is None else _on_paper(config, gpu, gpus)
    warnings = ["hours: updates only; evaluations, samples and checkpoints add to this"]
    columns = [column for column in estimate.columns if column.step_time is not None]
    if any(column.config.micro_batch(gpus) < requested for column in columns):
        warnings.append(f"micro-batch: the recipe's {requested} sequences do not fit; the largest that fits was used")
    if gpu and any(c.step_time / c.config.micro_steps(gpus) < SHORT_PASS for c in columns if c.step_time):
        warnings.append("time: passes this short are limited by starting kernels, which is not counted: expect more")
    return replace(estimate, assumptions=[*estimate.assumptions, *warnings, *notes])


def _on_paper(config: TrainConfig, gpu: Gpu, gpus: int) -> Plan:
    precision = config.precision
    if precision in ("auto", "native"):
        precision = "bfloat16" if "bfloat16" in gpu.peaks else "float32"
    if precision not in gpu.peaks:
        raise UserError(f"the {gpu.name} does not support {precision}; leave --precision out to use what it supports")
    available = (1 - FRAGMENTED) * gpu.memory - CONTEXT
    strategies = ("ddp", "fsdp") if gpus > 1 else ("single",)
    columns = [_column(config, gpu, gpus, strategy, precision, available) for strategy in strategies]
    network = []
    if gpus > 1:
        per_host, between = throughput.GPUS_PER_HOST, throughput.BETWEEN_HOSTS / 1e9
        hosts = f", {per_host} GPUs per host, {between:.0f} GB/s for each between hosts" if gpus > per_host else ""
        rate = throughput.link_bandwidth(gpu, gpus) / 1e9
        network = [f"network: each GPU sends {rate:.0f} GB/s{hosts}; it overlaps with computation"]
    peak = f"{gpu.peaks[precision] / 1e12:,.0f} TFLOP/s in {precision}"
    context = f"{FRAGMENTED:.0%} that an allocator wastes and {CONTEXT / 1e9:.0f} GB for the CUDA context"
    assumptions = [
        f"time: products at {throughput.ASSUMED_SHARE:.0%} of the data sheet's {peak}; the best published figures of "
        "GPT-2's sizes are close to that, narrow models (below 768) reach less",
        *network,
        f"available: the data sheet's memory less {context}",
        "memory: of eager kernels; torch.compile, on by default on GPUs, should need less",
    ]
    title = f"{config.name} on {gpus} x {gpu.name} of {gpu.memory / 1e9:.0f} GB, {precision}"
    return Plan(title, config, gpus, 0, available, columns, assumptions)


def _measured(config: TrainConfig) -> Plan:
    device = hardware.find_device("auto" if config.device == "here" else config.device)
    config = config.override(device=device.type)
    precision = hardware.find_precision(config.precision, device)
    hardware.require_kernel(config.model.attention, device)
    libraries, threads, assumptions, unused = 0, "", [], f", less {FRAGMENTED:.0%} that an allocator wastes"
    if device.type == "cpu":
        importlib.import_module("glassgpt.training.run")  # a training process has at least this process's libraries
        libraries, threads, unused = hardware.memory_used(device), f", {torch.get_num_threads()} threads", ""
        assumptions = [f"memory: malloc is assumed to hold {HEAP:.0%} of activations and working memory unused"]
    free = hardware.available_memory(device)
    if free is None:
        raise UserError(f"the free memory of {device.type} is unknown; use --device cpu or the name of a GPU")
    available = free if device.type == "cpu" else (1 - FRAGMENTED) * free
    column = _column(config, device, 1, "single", precision, available)
    assumptions += [
        "time: passes and updates were measured now, while other programs ran",
        f"available: the memory that is free now{unused}",
    ]
    title = f"{config.name} here ({hardware.device_name(device)}{threads}), {precision}"
    return Plan(title, config, 1, libraries, available, [column], assumptions)


def _column(
    config: TrainConfig, target: Gpu | torch.device, processes: int, strategy: str, precision: str, available: float
) -> Column:
    """With the config's micro-batch if it fits, otherwise with the largest that does."""

    def need(changed: TrainConfig) -> Memory:
        memory = memory_per_rank(changed, processes, strategy, precision)
        heap = HEAP * (memory.activations + memory.working) + BUFFERS
        return replace(memory, heap=int(heap)) if changed.device == "cpu" else memory

    largest = largest_micro_batch(config, processes, lambda changed: need(changed).total, available)
    if need(config).total > available:
        config = config.override(micro_batch_size=largest or 1)
    if largest is None:
        seconds = None
    elif isinstance(target, Gpu):
        seconds = throughput.estimated_step_time(config, target, processes, strategy, precision)
    else:
        seconds = throughput.measured_step_time(config, target, precision)
    return Column(strategy, config, need(config), largest, seconds)


def _table(plan: Plan) -> Iterator[str]:
    columns, config, gpus = plan.columns, plan.config, plan.gpus
    yield _row("parameters", [f"{ModelSummary(config.model).parameters:,}"])
    sequences = config.sequences_per_process(gpus)
    yield _row("batch", [f"{config.batch_tokens:,} tokens per update, {sequences:,} sequences per rank"])
    yield _row("", [column.strategy for column in columns])
    yield _row("micro-batch", [f"{c.config.micro_steps(gpus)} x {c.config.micro_batch(gpus)}" for c in columns])
    for component in fields(Memory):
        sizes = [getattr(column.memory, component.name) for column in columns]
        if any(sizes):
            yield _row(f"  {_LABELS.get(component.name, component.name)}", [format_bytes(size) for size in sizes])
    if plan.libraries:
        yield _row("  libraries", [format_bytes(plan.libraries)])
    yield _row("memory per rank", [format_bytes(column.memory.total + plan.libraries) for column in columns])
    yield _row("  available", [format_bytes(plan.available + plan.libraries) for _ in columns])
    yield _row("largest micro-batch", [str(column.largest or "does not fit") for column in columns])
    times = [column.step_time for column in columns]
    yield _row("time per step", ["-" if seconds is None else f"{seconds:,.3g} s" for seconds in times])
    yield _row("tokens/s", ["-" if seconds is None else f"{config.batch_tokens / seconds:,.0f}" for seconds in times])
    if config.steps is None:
        yield _row("the run", ["unknown; give --steps N (plan does not read the text)"])
    else:
        runs = ["-" if seconds is None else _hours(config.steps * seconds) for seconds in times]
        yield _row(f"{config.steps:,} steps", runs)


def _row(name: str, cells: Sequence[str]) -> str:
    return f"{name:<21} {''.join(f'{cell:>14}' for cell in cells) if len(cells) > 1 else cells[0]}".rstrip()


def _hours(seconds: float) -> str:
    return format_duration(seconds) if seconds < 3600 else f"{seconds / 3600:,.1f} hours"
