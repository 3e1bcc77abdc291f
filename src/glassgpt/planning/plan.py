"""What a run will need before it begins: memory by part, the micro-batch that fits, tokens/s and hours, for each strategy.

For a GPU by its data sheet and named assumptions; for this machine by short timings.
"""

import dataclasses
import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import torch

from glassgpt.config.schema import TYPICAL_VOCAB_SIZES, DataConfig, TrainConfig
from glassgpt.data.dataset import open_dataset
from glassgpt.data.sources import PreparedDataset, resolve
from glassgpt.interop.references import find_model
from glassgpt.model.summary import ModelSummary
from glassgpt.planning.memory import Batch, Memory, batch_a_rank, memory_a_rank
from glassgpt.planning.memory_check import largest_micro_batch
from glassgpt.planning.throughput import (
    ASSUMED_SHARE,
    BETWEEN_HOSTS,
    GPUS_A_HOST,
    StepTime,
    assumed_step_time,
    link,
    measured_step_time,
)
from glassgpt.tokenizers.builtin import build_tokenizer, tokenizer_file
from glassgpt.training.setup import shape_from
from glassgpt.utils.device import (
    GPUS,
    Gpu,
    available_memory,
    device_name,
    find_device,
    find_precision,
    memory_used,
    require_kernel,
)
from glassgpt.utils.errors import UserError, did_you_mean
from glassgpt.utils.formatting import format_bytes, format_duration
from glassgpt.utils.hub import find_hub_id

# Of a GPU's memory: the device's context and the buffers of cuBLAS and NCCL; and the share that an allocator wastes.
CONTEXT = 1e9
FRAGMENTED = 0.05
# Of a process on a CPU: glibc's heap lies between blocks in use, for training keeps what it frees (`keep_freed_memory`). Measured as a
# share of activations and working memory, 18 to 26 % at shakespeare-char's sizes; to the byte nothing where each block is given back.
# And the buffers of oneDNN and its like, 10 to 13 MB (docs/scale.md), and more for larger matrices.
HEAP = 0.2
BUFFERS = 30e6
# Seconds of a forward and backward pass on a GPU below which its host may not start kernels in time: hundreds, some microseconds each.
SHORT_PASS = 0.01
_LABELS = {"working": "logits and working", "copies": "copies for products", "gathered": "gathered by FSDP"}


@dataclass(frozen=True)
class Column:
    """What a run needs by one strategy, with the recipe's micro-batch or, where that does not fit, the largest that does."""

    strategy: str
    """single, ddp or fsdp."""
    batch: Batch
    memory: Memory
    """On each rank, at an update's fullest moment."""
    heap: int
    """Bytes that malloc holds besides, on a CPU."""
    largest: int | None
    """The largest micro-batch that fits, None where none does."""
    pace: StepTime | None
    """Of one update, None where it does not fit."""
    steps: int | None
    """Updates of the run, None where its length is known only with its data."""

    @property
    def total(self) -> int:
        """Bytes on each rank, those of libraries left out."""
        return self.memory.total + self.heap

    @property
    def tokens_per_second(self) -> float | None:
        """All ranks together."""
        return None if self.pace is None else self.batch.tokens / self.pace.seconds

    @property
    def seconds(self) -> float | None:
        """All updates of the run; evaluations, samples and checkpoints come on top."""
        return None if self.pace is None or self.steps is None else self.steps * self.pace.seconds


@dataclass(frozen=True)
class Plan:
    """A run on a machine, and what was assumed."""

    title: str
    parameters: int
    libraries: int
    """Bytes of interpreter and libraries that share the memory with the run: on a CPU only."""
    room: float
    """Bytes that the run may take on each rank."""
    columns: Sequence[Column]
    assumptions: Sequence[str]

    def __str__(self) -> str:
        return "\n".join([self.title, "", *_table(self), "", *(f"- {line}" for line in self.assumptions)])


def plan(config: TrainConfig, gpus: int = 1) -> Plan:
    """Plan a run on `config.device`: a name of `hardware.GPUS`, or a device of this machine, which is timed for some seconds.

    `auto` and `here` stand for the best device of this machine. Raises `UserError` for a device that nobody knows or that lacks the
    precision, and for GPUs that cannot share the batch.
    """
    if gpus < 1:
        raise UserError(f"--gpus must be at least 1, got {gpus}")
    if config.cpu_offload:
        raise UserError(
            "plan does not know what --cpu-offload leaves on a GPU; without it, it tells what fsdp needs there"
        )
    config, assumptions = _with_vocabulary(config)
    if config.context_start is not None or config.batch_start is not None:
        assumptions.append(
            "updates are taken as they become; the early ones, smaller or of shorter sequences, take less"
        )
    config.sequences_per_process(gpus)
    gpu = GPUS.get(config.device.lower())
    if gpu is not None:
        return _on_paper(config, gpu, gpus, assumptions)
    if gpus > 1:
        raise UserError(
            f"--gpus {gpus} is for a GPU by its name (--device {', '.join(GPUS)}): this machine's device is timed by itself"
        )
    return _measured(config, _device_here(config.device), assumptions)


def _device_here(name: str) -> torch.device:
    if name in ("auto", "here"):
        return find_device()
    if name != "cpu" and not name.startswith(("cuda", "mps")):
        known = ["here", "cpu", "cuda", *GPUS]
        raise UserError(f"there is no device {name!r}{did_you_mean(name, known)} (devices: {', '.join(known)})")
    return find_device(name)


def _with_vocabulary(config: TrainConfig) -> tuple[TrainConfig, list[str]]:
    """The config with the size of its vocabulary, which a run learns from its data."""
    said = []
    if config.init_from == "" or (config.init_from and find_hub_id(config.init_from)):
        said.append(
            "the model has the shape in [model]; a run with --init-from takes that of the model that it goes on from"
        )
    elif config.init_from is not None:
        config = dataclasses.replace(config, model=shape_from(find_model(config.init_from).model_config, config.model))
    if config.model.vocab_size is not None:
        return config, said
    kind = config.data.tokenizer
    prepared = _prepared(config.data)
    if prepared is not None:
        return config.override(model={"vocab_size": open_dataset(prepared.directory).tokenizer.vocab_size}), said
    size = build_tokenizer(kind).vocab_size if tokenizer_file(kind) is not None else TYPICAL_VOCAB_SIZES[kind]
    if kind == "characters":
        said.append(f"the text has {size} different characters (--model.vocab-size N for another number)")
    return config.override(model={"vocab_size": size}), said


def _prepared(data: DataConfig) -> PreparedDataset | None:
    """The dataset that the text is prepared as already, if it is. A text that is not there yet is no mistake here."""
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
        raise UserError(f"the {gpu.name} has no {precision}; leave --precision out, which takes what it has")
    room = (1 - FRAGMENTED) * gpu.memory - CONTEXT
    columns = []
    for strategy in ("ddp", "fsdp") if gpus > 1 else ("single",):
        fitted, largest = _fitted(config, gpus, strategy, precision, room)
        pace = assumed_step_time(fitted, gpu, gpus, strategy, precision) if largest is not None else None
        columns.append(_column(fitted, gpus, strategy, precision, largest, pace))
    title = f"{config.name} on {gpus} x {gpu.name} of {gpu.memory / 1e9:.0f} GB, {precision}"
    said = [*_assumed(gpu, gpus, precision, peak), *_shortcomings(config, gpus, columns), *assumptions]
    return Plan(title, ModelSummary(config.model).parameters, 0, room, columns, said)


def _measured(config: TrainConfig, device: torch.device, assumptions: Sequence[str]) -> Plan:
    config = config.override(device=device.type)
    precision = find_precision(config.precision, device)
    require_kernel(config.model.attention, device)
    libraries = _libraries() if device.type == "cpu" else 0
    free = available_memory(device)
    if free is None:
        raise UserError(f"the memory of {device.type} cannot be asked for: give --device cpu, or a GPU's name")
    # What this process holds itself is libraries, which a run has too.
    room = free if device.type == "cpu" else (1 - FRAGMENTED) * free
    fitted, largest = _fitted(config, 1, "single", precision, room)
    pace = measured_step_time(fitted, device, precision) if largest is not None else None
    column = _column(fitted, 1, "single", precision, largest, pace)
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    on_cpu = [f"memory: malloc is taken to hold {HEAP:.0%} of activations and working memory unused; an estimate"]
    said = [
        *(on_cpu if device.type == "cpu" else []),
        "time: blocks, embedding with head and loss, and the optimizer were timed now, one by one; what else runs here counts",
        f"room: what is free now{'' if device.type == 'cpu' else f', less {FRAGMENTED:.0%} for what an allocator wastes'}",
        *_always(),
        *_shortcomings(config, 1, [column]),
        *assumptions,
    ]
    title = f"{config.name} here ({device_name(device)}{threads}), {precision}"
    return Plan(title, ModelSummary(config.model).parameters, libraries, room, [column], said)


def _libraries() -> int:
    """Bytes that a process which trains has resident before its model is made: this one's, with all that training imports."""
    importlib.import_module("glassgpt.training.loop")
    return memory_used(torch.device("cpu"))


def _fitted(
    config: TrainConfig, processes: int, strategy: str, precision: str, room: float
) -> tuple[TrainConfig, int | None]:
    """The config with a micro-batch that fits, if there is one, and the largest that does."""

    def need(changed: TrainConfig) -> float:
        memory = memory_a_rank(changed, processes, strategy, precision)
        return memory.total + _heap(memory, changed.device)

    largest = largest_micro_batch(config, processes, need, room)
    if need(config) <= room:
        return config, max(largest or 1, batch_a_rank(config, processes).micro_batch)
    return config.override(micro_batch_size=largest or 1), largest


def _column(
    config: TrainConfig, processes: int, strategy: str, precision: str, largest: int | None, pace: StepTime | None
) -> Column:
    memory = memory_a_rank(config, processes, strategy, precision)
    return Column(
        strategy, batch_a_rank(config, processes), memory, _heap(memory, config.device), largest, pace, config.steps
    )


def _heap(memory: Memory, device: str) -> int:
    return int(HEAP * (memory.activations + memory.working) + BUFFERS) if device == "cpu" else 0


def _assumed(gpu: Gpu, gpus: int, precision: str, peak: float) -> Iterator[str]:
    yield (
        f"time: products at {ASSUMED_SHARE:.0%} of the data sheet's {peak / 1e12:,.0f} TFLOP/s in {precision}; the best published figures "
        "of GPT-2's sizes are near that, and narrow models (below 768) reach less"
    )
    if gpus > 1:
        hosts = (
            ""
            if gpus <= GPUS_A_HOST
            else f", {GPUS_A_HOST} GPUs a host and {BETWEEN_HOSTS / 1e9:.0f} GB/s for each between hosts"
        )
        yield f"network: {link(gpu, gpus) / 1e9:.0f} GB/s sent by each GPU{hosts}, hidden behind computing where that takes longer"
    yield f"room: the data sheet's memory less {FRAGMENTED:.0%} that an allocator wastes and {CONTEXT / 1e9:.0f} GB for the CUDA context"
    yield "memory: of eager kernels; torch.compile, on by default on GPUs, should keep less"
    yield from _always()


def _shortcomings(config: TrainConfig, processes: int, columns: Sequence[Column]) -> Iterator[str]:
    """What a reader of the table might miss."""
    asked = batch_a_rank(config, processes).micro_batch
    if any(column.largest is not None and column.batch.micro_batch < asked for column in columns):
        yield f"micro-batch: {asked} sequences, as the recipe has it, do not fit; the largest that does was taken"
    passes = [column.pace.seconds / column.batch.micro_steps for column in columns if column.pace is not None]
    if config.device.lower() in GPUS and passes and min(passes) < SHORT_PASS:
        yield "time: passes as short as these are bound by starting their kernels, which is not counted: they will take longer"


def _always() -> Iterator[str]:
    yield "hours: updates only; evaluations, samples and checkpoints come on top"


def _table(plan: Plan) -> Iterator[str]:
    columns = plan.columns
    yield _row("parameters", [f"{plan.parameters:,}"])
    yield _row(
        "batch", [f"{columns[0].batch.tokens:,} tokens an update, {columns[0].batch.sequences:,} sequences a rank"]
    )
    yield _row("", [column.strategy for column in columns])
    yield _row("micro-batch", [f"{c.batch.micro_steps} x {c.batch.micro_batch}" for c in columns])
    for part in fields(Memory):
        sizes = [getattr(column.memory, part.name) for column in columns]
        if any(sizes):
            yield _row(f"  {_LABELS.get(part.name, part.name)}", [format_bytes(size) for size in sizes])
    if plan.libraries:
        yield _row("  malloc and buffers", [format_bytes(column.heap) for column in columns])
        yield _row("  libraries", [format_bytes(plan.libraries) for _ in columns])
    yield _row("memory a rank", [format_bytes(column.total + plan.libraries) for column in columns])
    yield _row("  room", [format_bytes(plan.room + plan.libraries) for _ in columns])
    yield _row("largest micro-batch", [str(column.largest or "does not fit") for column in columns])
    yield _row("a step", ["-" if c.pace is None else f"{c.pace.seconds:,.3g} s" for c in columns])
    yield _row("tokens/s", ["-" if c.tokens_per_second is None else f"{c.tokens_per_second:,.0f}" for c in columns])
    steps = columns[0].steps
    name = "the run" if steps is None else f"{steps:,} steps"
    yield _row(name, [_long(column) for column in columns])


def _row(name: str, cells: Sequence[str]) -> str:
    return f"{name:<21} {''.join(f'{cell:>14}' for cell in cells) if len(cells) > 1 else cells[0]}".rstrip()


def _long(column: Column) -> str:
    if column.steps is None:
        return "give --steps N (the text is not read)"
    if column.seconds is None:
        return "-"
    return format_duration(column.seconds) if column.seconds < 3600 else f"{column.seconds / 3600:,.1f} hours"
