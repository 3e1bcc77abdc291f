"""What a run needs: memory by component, the largest micro-batch that fits, tokens/s and hours.

A GPU is judged by its data sheet and named assumptions, this machine by a short measurement.
"""

import dataclasses
import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial

import torch

from glassgpt.config.schema import TYPICAL_VOCAB_SIZES, DataConfig, TrainConfig
from glassgpt.data.dataset import open_dataset
from glassgpt.data.sources import PreparedDataset, resolve
from glassgpt.interop.references import find_model
from glassgpt.model.summary import ModelSummary
from glassgpt.planning.memory import Memory, RankBatch, batch_per_rank, largest_micro_batch, memory_per_rank
from glassgpt.planning.throughput import (
    ASSUMED_SHARE,
    BETWEEN_HOSTS,
    GPUS_PER_HOST,
    StepTime,
    estimated_step_time,
    link_bandwidth,
    measured_step_time,
)
from glassgpt.tokenizers.builtin import build_tokenizer, tokenizer_file
from glassgpt.training.setup import shape_from
from glassgpt.utils.device import (
    available_memory,
    device_name,
    find_device,
    find_precision,
    memory_used,
    require_kernel,
)
from glassgpt.utils.errors import UserError, did_you_mean
from glassgpt.utils.formatting import format_bytes, format_duration
from glassgpt.utils.gpu_specs import GPUS, Gpu
from glassgpt.utils.hub import find_hub_id

# Of a GPU's memory: the CUDA context with the buffers of cuBLAS and NCCL, and the share that the allocator wastes.
CONTEXT = 1e9
FRAGMENTED = 0.05
# On a CPU glibc keeps freed blocks (`keep_freed_memory`): 18 to 26 % of activations and working memory at the sizes of
# shakespeare-char. oneDNN and others have buffers of 10 to 13 MB, larger ones for larger matrices (docs/scale.md).
HEAP = 0.2
BUFFERS = 30e6
# Seconds of a pass on a GPU below which its host may not start kernels fast enough: hundreds of kernels, some
# microseconds each.
SHORT_PASS = 0.01
_LABELS = {"working": "logits and working", "copies": "copies for products", "gathered": "gathered by FSDP"}


@dataclass(frozen=True)
class Column:
    """What a run needs with one strategy, with the recipe's micro-batch or the largest that fits."""

    strategy: str  # single, ddp or fsdp
    batch: RankBatch
    memory: Memory  # on each rank, at the peak of an update
    heap: int  # bytes that malloc and libraries hold in addition, on a CPU
    largest: int | None  # the largest micro-batch that fits; None if none does
    step_time: StepTime | None  # None if the run does not fit
    steps: int | None  # updates of the run; None if that depends on its data

    @property
    def total(self) -> int:
        """Bytes on each rank, without the code of libraries."""
        return self.memory.total + self.heap

    @property
    def tokens_per_second(self) -> float | None:
        """All ranks together."""
        return None if self.step_time is None else self.batch.tokens / self.step_time.seconds

    @property
    def seconds(self) -> float | None:
        """All updates of the run, without evaluations, samples and checkpoints."""
        return None if self.step_time is None or self.steps is None else self.steps * self.step_time.seconds


@dataclass(frozen=True)
class Plan:
    """A run on a machine, and what was assumed."""

    title: str
    parameters: int
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
    if gpus < 1:
        raise UserError(f"--gpus must be at least 1, got {gpus}")
    if config.cpu_offload:
        raise UserError("plan cannot estimate --cpu-offload; leave it out to see what fsdp needs without it")
    config, assumptions = _with_vocabulary(config)
    if config.context_start is not None or config.batch_start is not None:
        assumptions.append("updates at their final size; the early, smaller ones need less")
    config.sequences_per_process(gpus)
    gpu = GPUS.get(config.device.lower())
    if gpu is not None:
        return _on_paper(config, gpu, gpus, assumptions)
    if gpus > 1:
        raise UserError(f"--gpus {gpus} needs --device with the name of a GPU: {', '.join(GPUS)}")
    return _measured(config, _device_here(config.device), assumptions)


def _device_here(name: str) -> torch.device:
    if name in ("auto", "here"):
        return find_device()
    if name != "cpu" and not name.startswith(("cuda", "mps")):
        known = ["here", "cpu", "cuda", *GPUS]
        raise UserError(f"unknown device {name!r}{did_you_mean(name, known)} (devices: {', '.join(known)})")
    return find_device(name)


def _with_vocabulary(config: TrainConfig) -> tuple[TrainConfig, list[str]]:
    """The config with a vocabulary size, which a run takes from its data."""
    notes = []
    init_from = config.init_from
    if init_from == "" or (init_from and find_hub_id(init_from)):
        notes.append("the model has the shape in [model]; a run with --init-from takes the shape of that model")
    elif init_from is not None:
        config = dataclasses.replace(
            config, model=shape_from(find_model(init_from, verify=False).model_config, config.model)
        )
    if config.model.vocab_size is not None:
        return config, notes
    kind = config.data.tokenizer
    prepared = _prepared_dataset(config.data)
    if prepared is not None:
        return config.override(model={"vocab_size": open_dataset(prepared.directory).tokenizer.vocab_size}), notes
    size = build_tokenizer(kind).vocab_size if tokenizer_file(kind) is not None else TYPICAL_VOCAB_SIZES[kind]
    if kind == "characters":
        notes.append(f"the text is assumed to have {size} different characters (--model.vocab-size N changes this)")
    return config.override(model={"vocab_size": size}), notes


def _prepared_dataset(data: DataConfig) -> PreparedDataset | None:
    """The prepared dataset that the config names, if it does. A text that does not exist yet is not an error here."""
    try:
        source = None if data.mixture else resolve(data.source)
    except UserError:
        return None
    return source if isinstance(source, PreparedDataset) else None


def _on_paper(config: TrainConfig, gpu: Gpu, gpus: int, assumptions: Sequence[str]) -> Plan:
    precision = config.precision
    if precision in ("auto", "native"):
        precision = "float32" if gpu.peak("bfloat16") is None else "bfloat16"
    peak = gpu.peak(precision)
    if peak is None:
        raise UserError(f"the {gpu.name} does not support {precision}; leave --precision out to use what it supports")
    available = (1 - FRAGMENTED) * gpu.memory - CONTEXT
    columns = []
    for strategy in ("ddp", "fsdp") if gpus > 1 else ("single",):
        step_time = partial(estimated_step_time, gpu=gpu, processes=gpus, strategy=strategy, precision=precision)
        columns.append(_column(config, gpus, strategy, precision, available, step_time))
    title = f"{config.name} on {gpus} x {gpu.name} of {gpu.memory / 1e9:.0f} GB, {precision}"
    notes = [*_gpu_assumptions(gpu, gpus, precision, peak), *_warnings(config, gpus, columns), *assumptions]
    return Plan(title, ModelSummary(config.model).parameters, 0, available, columns, notes)


def _measured(config: TrainConfig, device: torch.device, assumptions: Sequence[str]) -> Plan:
    config = config.override(device=device.type)
    precision = find_precision(config.precision, device)
    require_kernel(config.model.attention, device)
    libraries = _libraries() if device.type == "cpu" else 0
    free = available_memory(device)
    if free is None:
        raise UserError(f"the free memory of {device.type} is unknown; use --device cpu or the name of a GPU")
    available = free if device.type == "cpu" else (1 - FRAGMENTED) * free
    step_time = partial(measured_step_time, device=device, precision=precision)
    column = _column(config, 1, "single", precision, available, step_time)
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    on_cpu = [f"memory: malloc is assumed to hold {HEAP:.0%} of activations and working memory unused"]
    wasted = "" if device.type == "cpu" else f", less {FRAGMENTED:.0%} that an allocator wastes"
    notes = [
        *(on_cpu if device.type == "cpu" else []),
        "time: passes and updates were measured now, while other programs ran",
        f"available: the memory that is free now{wasted}",
        _UPDATES_ONLY,
        *_warnings(config, 1, [column]),
        *assumptions,
    ]
    title = f"{config.name} here ({device_name(device)}{threads}), {precision}"
    return Plan(title, ModelSummary(config.model).parameters, libraries, available, [column], notes)


def _libraries() -> int:
    """Resident bytes of a training process before its model is made: this process, with what training imports."""
    importlib.import_module("glassgpt.training.run")
    return memory_used(torch.device("cpu"))


def _column(
    config: TrainConfig,
    processes: int,
    strategy: str,
    precision: str,
    available: float,
    step_time: Callable[[TrainConfig], StepTime],
) -> Column:
    """With the config's micro-batch if it fits, otherwise with the largest that does."""

    def need(changed: TrainConfig) -> float:
        memory = memory_per_rank(changed, processes, strategy, precision)
        return memory.total + _heap(memory, changed.device)

    largest = largest_micro_batch(config, processes, need, available)
    if need(config) > available:
        config = config.override(micro_batch_size=largest or 1)
    memory, batch = memory_per_rank(config, processes, strategy, precision), batch_per_rank(config, processes)
    seconds = None if largest is None else step_time(config)
    return Column(strategy, batch, memory, _heap(memory, config.device), largest, seconds, config.steps)


def _heap(memory: Memory, device: str) -> int:
    return int(HEAP * (memory.activations + memory.working) + BUFFERS) if device == "cpu" else 0


_UPDATES_ONLY = "hours: updates only; evaluations, samples and checkpoints add to this"


def _gpu_assumptions(gpu: Gpu, gpus: int, precision: str, peak: float) -> Iterator[str]:
    yield (
        f"time: products at {ASSUMED_SHARE:.0%} of the data sheet's {peak / 1e12:,.0f} TFLOP/s in {precision}; "
        "the best published figures of GPT-2's sizes are close to that, narrow models (below 768) reach less"
    )
    if gpus > 1:
        per_host = f", {GPUS_PER_HOST} GPUs per host, {BETWEEN_HOSTS / 1e9:.0f} GB/s for each between hosts"
        hosts = "" if gpus <= GPUS_PER_HOST else per_host
        rate = link_bandwidth(gpu, gpus) / 1e9
        yield f"network: each GPU sends {rate:.0f} GB/s{hosts}; it overlaps with computation"
    wasted = f"{FRAGMENTED:.0%} that an allocator wastes and {CONTEXT / 1e9:.0f} GB for the CUDA context"
    yield f"available: the data sheet's memory less {wasted}"
    yield "memory: of eager kernels; torch.compile, on by default on GPUs, should need less"
    yield _UPDATES_ONLY


def _warnings(config: TrainConfig, processes: int, columns: Sequence[Column]) -> Iterator[str]:
    """What a reader of the table might miss."""
    requested = batch_per_rank(config, processes).micro_batch
    if any(column.largest is not None and column.batch.micro_batch < requested for column in columns):
        yield f"micro-batch: the recipe's {requested} sequences do not fit; the largest that fits was used"
    passes = [c.step_time.seconds / c.batch.micro_steps for c in columns if c.step_time is not None]
    if config.device.lower() in GPUS and passes and min(passes) < SHORT_PASS:
        yield "time: passes this short are limited by starting kernels, which is not counted: expect more"


def _table(plan: Plan) -> Iterator[str]:
    columns = plan.columns
    batch = columns[0].batch
    yield _row("parameters", [f"{plan.parameters:,}"])
    yield _row("batch", [f"{batch.tokens:,} tokens per update, {batch.sequences:,} sequences per rank"])
    yield _row("", [column.strategy for column in columns])
    yield _row("micro-batch", [f"{c.batch.micro_steps} x {c.batch.micro_batch}" for c in columns])
    for component in fields(Memory):
        sizes = [getattr(column.memory, component.name) for column in columns]
        if any(sizes):
            yield _row(f"  {_LABELS.get(component.name, component.name)}", [format_bytes(size) for size in sizes])
    if plan.libraries:
        yield _row("  malloc and buffers", [format_bytes(column.heap) for column in columns])
        yield _row("  libraries", [format_bytes(plan.libraries) for _ in columns])
    yield _row("memory per rank", [format_bytes(column.total + plan.libraries) for column in columns])
    yield _row("  available", [format_bytes(plan.available + plan.libraries) for _ in columns])
    yield _row("largest micro-batch", [str(column.largest or "does not fit") for column in columns])
    yield _row("time per step", ["-" if c.step_time is None else f"{c.step_time.seconds:,.3g} s" for c in columns])
    yield _row("tokens/s", ["-" if c.tokens_per_second is None else f"{c.tokens_per_second:,.0f}" for c in columns])
    yield _row("the run" if columns[0].steps is None else f"{columns[0].steps:,} steps", [_length(c) for c in columns])


def _row(name: str, cells: Sequence[str]) -> str:
    return f"{name:<21} {''.join(f'{cell:>14}' for cell in cells) if len(cells) > 1 else cells[0]}".rstrip()


def _length(column: Column) -> str:
    if column.steps is None:
        return "unknown; give --steps N (plan does not read the text)"
    if column.seconds is None:
        return "-"
    return format_duration(column.seconds) if column.seconds < 3600 else f"{column.seconds / 3600:,.1f} hours"
