"""Whether a run fits: its memory beside the machine's, and the micro-batch that would fit.

The figures are those of `scale`, which real runs have so far exceeded by up to 8 % and never undercut (docs/scale.md).
"""

import dataclasses
import math
import os
from collections.abc import Callable, Iterator

import torch
from torch import nn

from glassgpt.config.schema import TrainConfig
from glassgpt.distributed.group import Ranks, under_torchrun
from glassgpt.model.loss import CHUNK_ELEMENTS, GPU_CHUNK_ROWS
from glassgpt.model.summary import ModelSummary
from glassgpt.planning.memory import FLOAT32, Memory, batch_a_rank, memory_a_rank, moments
from glassgpt.utils.device import available_memory
from glassgpt.utils.errors import UserError
from glassgpt.utils.formatting import format_bytes

# Share of the free memory that a proposed micro-batch may take: rounding in allocators, buffers of libraries, evaluation.
COMFORT = 0.9
# Tokens of a rank's share whose activations may weigh less than the gradients of the model.
_LIGHT = 2**16
# How far above the memory there is an update's figure must be before a run is refused.
DOUBT = 1.05


def largest_micro_batch(
    config: TrainConfig, processes: int, need: Callable[[TrainConfig], float], room: float
) -> int | None:
    """The largest micro-batch whose `need` (bytes) is within `room` (bytes), at most a rank's share; None where not even one fits.

    Of the sizes that lead to one number of micro-steps, which are as even as they can be, the smallest stands for all.
    """
    share = config.sequences_per_process(processes)

    def fits(micro_steps: int) -> bool:
        return need(config.override(micro_batch_size=-(-share // micro_steps))) <= room

    few, many = 1, share
    several_fit = share > 1 and fits(share)
    if several_fit:
        # From one sequence up by doubling, then by halves: `need` takes the longer the larger the micro-batch is.
        while few == 1 and many > 3:
            few, many = (1, many // 2) if fits(many // 2) else (many // 2, many)
        while many - few > 1:
            middle = (few + many) // 2
            few, many = (few, middle) if fits(middle) else (middle, many)
    # All at once may fit where fewer do not: no gradients of a micro-step before lie beside them.
    if (many <= 2 or share * config.model.context_length <= _LIGHT) and fits(1):
        return share
    return -(-share // many) if several_fit else None


def check_memory(
    config: TrainConfig, ranks: Ranks, device: torch.device, precision: str, model: nn.Module | None = None
) -> None:
    """Raise `UserError` where an update cannot fit into the memory that is free now, naming the micro-batch that would.

    `model` is the run's, where it is there already. Refuses only what certainly does not fit: on a CPU what swap can hold too does
    fit, and of a compiled model only what no compiler can drop is counted. Takes no time for a model that is small beside the
    machine, else up to a second. Every rank calls it.
    """
    room = available_memory(device, swap=True)
    config = config.override(device=device.type)
    # The most that any rank sees, before any has gone on: one that looked later would see less for what others have taken.
    most = float(ranks.all_gather_numbers([math.inf if room is None else room]).max())
    sharers = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if under_torchrun() and device.type == "cpu" else 1
    own = most / sharers + (sum(parameter.nbytes for parameter in model.parameters()) if model is not None else 0)
    if config.cpu_offload or at_most(config, ranks.size) <= own:
        return

    least = _surely(config, ranks.size, precision)
    if least <= DOUBT * own:
        return
    owner = "a process" if sharers > 1 else "this machine" if device.type == "cpu" else "the GPU"
    said = f"this run does not fit: an update needs {format_bytes(least)}, and {owner} has {format_bytes(own)} free"
    fitting = largest_micro_batch(
        config, ranks.size, lambda changed: _as_written(changed, ranks.size, precision), COMFORT * own
    )
    if fitting is not None:
        raise UserError(f"{said}; --micro-batch-size {fitting} fits (the training stays the same)")
    updates = [
        moments(config, ranks.size, strategy, precision)["update"] for strategy in _strategies(config, ranks.size)
    ]
    state = min(memory.weights + memory.gradients + memory.optimizer for memory in updates)
    ways = (
        "a smaller model"
        if config.activation_checkpointing == "full"
        else "--activation-checkpointing full, or a smaller model"
    )
    raise UserError(
        f"{said}; no micro-batch does: weights, gradients and optimizer alone are {format_bytes(state)}. Take {ways}"
    )


def at_most(config: TrainConfig, processes: int) -> float:
    """More bytes than an update can need, by a formula that takes no time.

    Every result of a block in float32 and twice over (for what comes and goes), with the weights of attention where the kernel may
    hold them, eight times the model, and eight chunks of logits.
    """
    model, summary = config.model, ModelSummary(config.model)
    tokens = batch_a_rank(config, processes).micro_batch * model.context_length
    attention = 4 * (model.n_head + 2 * model.resolved_n_kv_head) * model.resolved_head_dim
    if model.attention == "explicit" or model.dropout or model.window is not None:
        attention += 8 * model.n_head * model.context_length
    layer = 16 * model.n_embd + attention + 8 * model.resolved_n_inner
    chunk = model.padded_vocab_size * (GPU_CHUNK_ROWS if config.device == "cuda" else 1) + CHUNK_ELEMENTS
    return FLOAT32 * (2 * tokens * (model.n_layer * layer + 8 * model.n_embd) + 8 * summary.parameters + 8 * chunk)


def _as_written(config: TrainConfig, processes: int, precision: str) -> float:
    """Bytes that an update of uncompiled kernels needs, by the strategy that needs the least of those that may come."""
    return min(memory.total for memory in _memories(config, processes, precision))


def _surely(config: TrainConfig, processes: int, precision: str) -> float:
    """Bytes that an update needs at least, whatever a compiler makes of it: what products and attention gave must be kept."""
    if not config.compiles_on(config.device):
        return _as_written(config, processes, precision)
    if config.activation_checkpointing == "none":
        config = config.override(activation_checkpointing="selective")
    return min(
        dataclasses.replace(memory, copies=0, working=0).total for memory in _memories(config, processes, precision)
    )


def _memories(config: TrainConfig, processes: int, precision: str) -> Iterator[Memory]:
    """By each strategy that may come."""
    for strategy in _strategies(config, processes):
        yield memory_a_rank(config, processes, strategy, precision)


def _strategies(config: TrainConfig, processes: int) -> list[str]:
    if not under_torchrun():
        return ["ddp"]
    return {"auto": ["ddp"] if processes == 1 or config.device == "cpu" else ["ddp", "fsdp"]}.get(
        config.strategy, [config.strategy]
    )
