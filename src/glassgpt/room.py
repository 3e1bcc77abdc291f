"""Whether a run fits: its memory beside the machine's, and the micro-batch that would fit.

The figures are those of `scale`, which real runs have so far exceeded by up to 8 % and never undercut (docs/scale.md).
"""

import dataclasses
import math
import os
from collections.abc import Callable

import torch
from torch import nn

from .config import TrainConfig
from .distributed.ranks import Ranks, launched
from .errors import UserError
from .hardware import available_memory
from .loss import CHUNK_ELEMENTS
from .scale import FLOAT32, Memory, batch_a_rank, memory_a_rank
from .summary import ModelSummary

# Share of the free memory that a proposed micro-batch may take: rounding in allocators, buffers of libraries, evaluation.
COMFORT = 0.9
# Sequences that may fit at once although one of several does not: more would weigh more than the gradients.
_FEW = 4
# How far above the memory there is an update's figure must be before a run is refused.
DOUBT = 1.05


def largest_micro_batch(config: TrainConfig, processes: int, need: Callable[[TrainConfig], float], room: float) -> int | None:
    """The largest micro-batch whose `need` (bytes) is within `room` (bytes), at most a rank's share; None where not even one fits.

    Of the sizes that lead to one number of micro-steps, which are as even as they can be, the smallest stands for all.
    """
    share = config.share_of_batch(processes)

    def fits(micro_steps: int) -> bool:
        return need(config.override(micro_batch_size=-(-share // micro_steps))) <= room

    few, many = 0, share
    if fits(share):
        # From one sequence up by doubling, then by halves: `need` takes the longer the larger the micro-batch is.
        while many > 1 and few == 0:
            few, many = (0, many // 2) if fits(many // 2) else (many // 2, many)
        while many - few > 1:
            middle = (few + many) // 2
            few, many = (few, middle) if fits(middle) else (middle, many)
        return share if many <= 3 and fits(1) else -(-share // many)
    # In a single micro-step no gradients lie beside the activations.
    return share if share <= _FEW and fits(1) else None


def require_room(config: TrainConfig, ranks: Ranks, device: torch.device, precision: str, model: nn.Module | None = None) -> None:
    """Raise `UserError` where an update cannot fit into the memory that is free now, naming the micro-batch that would.

    `model` is the run's, where it is there already. Refuses only what certainly does not fit: on a CPU what swap can hold too does
    fit, and of a compiled model only what no compiler can drop is counted. Takes no time for a model that is small beside the
    machine, else up to a second. Every rank calls it.
    """
    room = available_memory(device, swap=True)
    # The most that any rank sees, before any has gone on: one that looked later would see less for what others have taken.
    most = float(ranks.numbers([math.inf if room is None else room]).max())
    sharers = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if launched() and device.type == "cpu" else 1
    own = most / sharers + (sum(parameter.nbytes for parameter in model.parameters()) if model is not None else 0)
    if config.cpu_offload or at_most(config, ranks.size) <= own:
        return

    def need(changed: TrainConfig) -> float:
        return _surely(changed, ranks.size, device, precision)

    least = need(config)
    if least <= DOUBT * own:
        return
    owner = "a process" if sharers > 1 else "this machine" if device.type == "cpu" else "the GPU"
    said = f"this run does not fit: an update needs {in_bytes(least)}, and {owner} has {in_bytes(own)} free"
    fitting = largest_micro_batch(config, ranks.size, need, COMFORT * own)
    if fitting is not None:
        raise UserError(f"{said}; --micro-batch-size {fitting} fits (the training stays the same)")
    state = (12 if config.optim.name == "muon" else 16) * ModelSummary(config.model).parameters
    ways = "a smaller model" if config.activation_checkpointing == "full" else "--activation-checkpointing full, or a smaller model"
    raise UserError(f"{said}; no micro-batch does: weights, gradients and optimizer alone are {in_bytes(state)}. Take {ways}")


def in_bytes(count: float) -> str:
    """A number of bytes as GB (10^9) or MB."""
    return f"{count / 1e9:,.2f} GB" if count >= 1e8 else f"{count / 1e6:,.1f} MB"


def at_most(config: TrainConfig, processes: int) -> float:
    """More bytes than an update can need, by a formula that takes no time.

    Every result of a block in float32 and twice over (for what comes and goes), with the weights of attention where the kernel may
    hold them, eight times the model, and eight chunks of logits.
    """
    model, summary = config.model, ModelSummary(config.model)
    tokens = batch_a_rank(config, processes).micro_batch * model.context_length
    attention = 4 * (model.n_head + 2 * model.kv_heads) * model.head_width
    if model.attention == "explicit" or model.dropout or model.window is not None:
        attention += 8 * model.n_head * model.context_length
    layer = 16 * model.n_embd + attention + 8 * model.inner_width
    chunk = max(model.padded_vocab_size, CHUNK_ELEMENTS)
    return FLOAT32 * (2 * tokens * (model.n_layer * layer + 8 * model.n_embd) + 8 * summary.parameters + 8 * chunk)


def _surely(config: TrainConfig, processes: int, device: torch.device, precision: str) -> float:
    """Bytes that an update needs at least, by the strategy that needs the least of those that may come."""
    strategies = {"auto": ["ddp"] if processes == 1 or device.type == "cpu" else ["ddp", "fsdp"]}.get(config.strategy, [config.strategy])
    if not launched():
        strategies = ["ddp"]
    compiled = config.compile == "on" or (config.compile == "auto" and device.type == "cuda")
    # A compiler chooses what to keep: at least what products and attention gave.
    if compiled and config.activation_checkpointing == "none":
        config = config.override(activation_checkpointing="selective")
    needs = [memory_a_rank(config, processes, strategy, precision) for strategy in strategies]
    return min(_kept(memory).total if compiled else memory.total for memory in needs)


def _kept(memory: Memory) -> Memory:
    return dataclasses.replace(memory, copies=0, working=0)
