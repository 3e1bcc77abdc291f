"""Memory of a run on each rank, bytes sent per update and how a batch is divided, by formulas from the config alone.

`docs/scale.md` explains the formulas and shows how close they come to real runs.

Symbols: `N` tokens of a micro-batch, `C` channels, `F` feed-forward width, `V` padded vocabulary, `H` heads, `D` head
width, `K` key/value heads, `T` context, `W` ranks, `e` bytes of a number in matrix products.
"""

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from glassgpt.config.schema import TYPICAL_VOCAB_SIZES, TrainConfig
from glassgpt.distributed.group import under_torchrun
from glassgpt.model.loss import CPU_VOCAB_BLOCK, rows_per_chunk
from glassgpt.model.summary import ModelSummary
from glassgpt.training.optim import ELEMENTS_AT_ONCE
from glassgpt.utils.device import available_memory
from glassgpt.utils.formatting import format_bytes

FLOAT32 = 4
# Share of the free memory that a suggested micro-batch may take: allocators round up, libraries have buffers,
# evaluation needs some.
COMFORT = 0.9
# A run is refused if it needs this much more than the free memory. Real runs have needed up to 8 % more than the
# formulas, never less.
DOUBT = 1.05
# An update with one micro-step keeps no earlier gradients, so up to this many tokens it may need less than one with
# more micro-steps.
LIGHT_TOKENS = 2**16
# Full-size copies of the hidden gradient that live together in the backward pass of the nonlinearity; 1 for all others.
_FEED_FORWARD_GRADIENTS = {"relu": 2, "swiglu": 2, "relu_squared": 3}


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank at one moment of an update, by purpose."""

    weights: int  # in float32; under FSDP a shard
    gradients: int  # like the weights; DDP's buckets are among them
    optimizer: int  # two moments per parameter (AdamW), or one (Muon, for the matrices of the blocks)
    activations: int  # what the forward pass keeps for the backward pass, up to the result of the last block
    copies: int  # the weights of the blocks as autocast casts them, kept until the backward pass has used them
    gathered: int  # weights of a block or of the root that FSDP has gathered, and the buffers that it sends from
    working: int  # temporary tensors: the head and the loss, or the backward pass of a block

    @property
    def total(self) -> int:
        """All of them."""
        return sum(dataclasses.astuple(self))


@dataclass(frozen=True)
class RankBatch:
    """How the sequences of an update are divided."""

    sequences: int  # on each rank
    micro_steps: int  # forward and backward passes per update, on each rank
    micro_batch: int  # sequences in the largest of them
    tokens: int  # per update, all ranks together


def batch_per_rank(config: TrainConfig, processes: int) -> RankBatch:
    """How an update is divided. Raises `UserError` if the processes cannot share the batch evenly."""
    sequences, micro_steps = config.sequences_per_process(processes), config.micro_steps(processes)
    return RankBatch(sequences, micro_steps, -(-sequences // micro_steps), config.batch_tokens)


def bytes_sent_per_update(config: TrainConfig, processes: int, strategy: str, precision: str) -> int:
    """Bytes that each rank sends in one update by ring algorithms, without evaluation.

    An all-gather or a reduce-scatter of n bytes sends n (W - 1) / W, an all-reduce twice that.
    """
    summary, blocks = ModelSummary(config.model), _block_parameters(config)
    if strategy == "fsdp":
        root = summary.parameters - blocks
        micro_steps = batch_per_rank(config, processes).micro_steps
        syncs = micro_steps if config.fsdp_gradient_sync == "micro_step" else 1
        count = micro_steps * (2 * blocks * _width(precision) + root * FLOAT32) + syncs * summary.parameters * FLOAT32
    else:
        count = 2 * summary.parameters * FLOAT32
    if config.optim.name == "muon":
        count += (2 if strategy == "fsdp" else 1) * _matrices(config) * FLOAT32
    return count * (processes - 1) // processes


def memory_per_rank(config: TrainConfig, processes: int, strategy: str, precision: str) -> Memory:
    """Memory on one rank at the peak of an update, from the second update on. See `moments`."""
    return max(moments(config, processes, strategy, precision).values(), key=lambda memory: memory.total)


def moments(config: TrainConfig, processes: int, strategy: str, precision: str) -> dict[str, Memory]:
    """The moments at which the memory of an update can peak.

    `loss`: all activations exist. `head`, `block`, `embedding`: the backward passes of the head, of the last block and,
    with all gradients and no activations, of the embedding. `update`: the optimizer. `strategy` is single, ddp or fsdp.
    Not counted: the device's context, buffers of libraries and collectives, what the allocator reserves, evaluation,
    `cpu_offload`.
    """
    c, summary, batch = config.model, ModelSummary(config.model), batch_per_rank(config, processes)
    tokens, kind = batch.micro_batch * c.context_length, config.activation_checkpointing
    sharded = strategy == "fsdp"
    shards = processes if sharded else 1
    weights = -(-summary.parameters * FLOAT32 // shards)
    # DDP's buckets always exist and are the gradients. Otherwise an update's first backward pass makes the gradients.
    earlier = weights if batch.micro_steps > 1 or (processes > 1 and not sharded) else 0
    if sharded and config.fsdp_gradient_sync == "update" and batch.micro_steps > 1:
        earlier = summary.parameters * FLOAT32
    state = Memory(weights, earlier, -(-_optimizer_moments(config) // shards), 0, 0, 0, 0)
    kept = block_activations(config, tokens, precision, kind)
    stream, head_weight = FLOAT32 * tokens * c.n_embd, FLOAT32 * c.padded_vocab_size * c.n_embd
    # FSDP's weights are in the dtype of products already, and not kept.
    copies = 0 if sharded or _width(precision) == FLOAT32 else _matrices(config) * _width(precision)
    embedded = stream * (1 + c.embedding_norm + bool(c.dropout))  # with the input of the first block
    full = replace(state, activations=embedded + c.n_layer * kept, copies=copies)
    backward, ended = full if kind == "none" else replace(full, copies=0), replace(state, gradients=weights)
    gathered = _gathered(config, processes, precision, kept) if sharded else dict.fromkeys(("loss", "block", "last"), 0)
    # The gradient of a tied head waits for that of the embedding, to be added to earlier gradients.
    tied = head_weight if c.tied_head and (earlier or sharded) else 0
    block_working = stream + head_weight + _block_backward(config, tokens, precision)
    return {
        "loss": replace(full, gathered=gathered["loss"], working=loss_working(config, tokens, precision)),
        "head": replace(backward, gathered=gathered["loss"], working=2 * (stream + head_weight)),
        "block": replace(backward, gathered=gathered["block"], working=block_working),
        "embedding": replace(ended, gathered=gathered["last"], working=tied + head_weight + 3 * stream),
        "update": replace(ended, working=_optimizer_working(config)),
    }


def block_activations(config: TrainConfig, tokens: int, precision: str, kind: str) -> int:
    """Bytes that one block keeps for the backward pass, its result included, its input not."""
    c, e = config.model, _width(precision)
    C, F = c.n_embd, c.resolved_n_inner
    q_width, kv_width = c.n_head * c.resolved_head_dim, c.resolved_n_kv_head * c.resolved_head_dim
    if kind == "full":
        return tokens * FLOAT32 * C
    products = (q_width + 2 * kv_width) + q_width + C + (2 if c.activation == "swiglu" else 1) * F + C
    if kind == "selective":
        return tokens * (FLOAT32 * C + e * products + FLOAT32 * c.n_head + _attention_weights(config, e))
    # The inputs of both norms and their statistics, and for RMSNorm the normalised values; the inputs of the matrices;
    # q, k and v.
    per_token = 2 * (FLOAT32 * C + 8) + (2 * FLOAT32 * C if c.norm == "rmsnorm" else 0)
    hidden = {"relu": 1, "swiglu": 4}.get(c.activation, 2) * F
    per_token += e * (2 * C + q_width + 2 * kv_width + q_width + hidden) + FLOAT32 * c.n_head
    if (
        c.position == "rope" or c.qk_norm
    ):  # q and k are not views of the projection, and the result is copied for the next one
        per_token += e * (q_width + kv_width + q_width)
    if c.qk_norm:
        per_token += (1 if e == FLOAT32 else 2) * FLOAT32 * (q_width + kv_width)
    if c.dropout:
        per_token += 2 * e * C
    per_token += _attention_weights(config, e) * (3 if c.dropout else 1) + _window_copies(config, e)
    return tokens * per_token


def _attention_weights(config: TrainConfig, e: int) -> int:
    """Bytes per token of one matrix of attention weights (H, T), for the kernels that form it."""
    c = config.model
    if c.attention == "explicit":
        return e * c.n_head * c.context_length
    # PyTorch's fused kernels for CPUs have no dropout: it then computes in separate steps.
    return FLOAT32 * c.n_head * c.context_length if c.dropout and config.device == "cpu" else 0


def _window_copies(config: TrainConfig, e: int) -> int:
    """Bytes per token of the keys, values and results that `WindowKernel` copies, in an average layer."""
    c = config.model
    if c.attention != "sdpa" or c.window is None:
        return 0
    keys = max(c.context_length / c.window - 1, 0) * (2 * c.window + c.window_globals) / c.context_length
    width = c.resolved_head_dim * (2 * c.resolved_n_kv_head * keys + c.n_head)
    return round(e * width * sum(window is not None for window in c.windows) / c.n_layer)


def _block_backward(config: TrainConfig, tokens: int, precision: str) -> int:
    """Bytes that the backward pass of the last block needs at its peak, beyond what the forward pass kept."""
    c, e, kind = config.model, _width(precision), config.activation_checkpointing
    copies = _FEED_FORWARD_GRADIENTS.get(c.activation, 1)
    hidden = e * c.resolved_n_inner * (copies * tokens + (c.n_embd if copies == 1 else 0))
    attention = tokens * _attention_weights(config, FLOAT32)
    recomputed = block_activations(config, tokens, precision, "none") - block_activations(
        config, tokens, precision, kind
    )
    casts = _matrices(config) // c.n_layer * e if kind != "none" and e < FLOAT32 else 0
    return max(hidden, attention) + recomputed + casts


def loss_working(config: TrainConfig, tokens: int, precision: str) -> int:
    """Bytes of the final norm, the head and the loss in the forward pass, which forms the gradients too."""
    c, e, device = config.model, _width(precision), "cpu" if config.device == "cpu" else "cuda"
    C, V = c.n_embd, c.padded_vocab_size
    dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(precision, torch.float32)
    logits = V * min(tokens, rows_per_chunk(dtype, device, V))
    count = tokens * (2 * FLOAT32 * C + 8) + FLOAT32 * V * C + FLOAT32 * logits * (3 if c.logit_softcap else 1)
    if e < FLOAT32:
        return count + e * (tokens + V) * C + e * logits
    return count + FLOAT32 * C * (min(CPU_VOCAB_BLOCK, V) if device == "cpu" else V)


def _gathered(config: TrainConfig, processes: int, precision: str, kept: int) -> dict[str, int]:
    """Bytes that FSDP has gathered in the loss, in the backward pass of a block, and at the end."""
    summary = ModelSummary(config.model)
    root = (summary.parameters - _block_parameters(config)) * FLOAT32
    block = summary.block_parameters * _width(precision)
    buffer = block if processes > 1 else 0  # one process gathers nothing into a buffer first, but copies the weights
    # The gradients of the last block are being sent while the block before goes backward, without the activations of
    # the last.
    sending = max(0, summary.block_parameters * FLOAT32 - kept) if config.model.n_layer > 1 else 0
    return {
        "loss": root + buffer,
        "block": root + block + buffer + sending,
        "last": root + summary.block_parameters * FLOAT32,
    }


def _width(precision: str) -> int:
    """Bytes of a number in matrix products."""
    return 2 if precision in ("bfloat16", "float16") else FLOAT32


def _block_parameters(config: TrainConfig) -> int:
    return config.model.n_layer * ModelSummary(config.model).block_parameters


def _matrices(config: TrainConfig) -> int:
    """Elements of all matrices in the blocks."""
    summary = ModelSummary(config.model)
    return config.model.n_layer * (summary.attention_weights + summary.feed_forward_weights)


def _optimizer_moments(config: TrainConfig) -> int:
    one_less = _matrices(config) if config.optim.name == "muon" else 0
    return FLOAT32 * (2 * ModelSummary(config.model).parameters - one_less)


def _optimizer_working(config: TrainConfig) -> int:
    """Fused AdamW needs nothing; Muon needs the directions of the matrices that it handles together, and work space.

    The work space is five times the matrices of one shape: the batch, filled up, orthogonalised in part, and two terms.
    A third of GPT-2's matrices have one shape.
    """
    return 8 * FLOAT32 * min(ELEMENTS_AT_ONCE, _matrices(config)) // 3 if config.optim.name == "muon" else 0


def largest_micro_batch(
    config: TrainConfig, processes: int, need: Callable[[TrainConfig], float], available: float
) -> int | None:
    """The largest micro-batch whose `need` fits into `available` bytes; None if not even 1 fits."""
    share = config.sequences_per_process(processes)
    sizes = sorted({-(-share // steps) for steps in range(1, share + 1)}, reverse=True)
    return next((size for size in sizes if need(config.override(micro_batch_size=size)) <= available), None)


def check_memory(config: TrainConfig, processes: int, device: torch.device, precision: str) -> str | None:
    """Why an update cannot fit into the memory that is free now, with what to change; None if it may fit.

    Refuses only what certainly does not fit: on a CPU, swap counts as free, and of a compiled model only what no
    compiler can drop is counted. Call it before the model is made. `cpu_offload` is not checked.
    """
    free = available_memory(device, swap=True)
    if free is None or config.cpu_offload:
        return None
    config = config.override(device=device.type)
    if config.model.vocab_size is None:
        config = config.override(model={"vocab_size": TYPICAL_VOCAB_SIZES[config.data.tokenizer]})
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if under_torchrun() and device.type == "cpu" else 1
    available = free / sharing
    least = min(_least(config, processes, strategy, precision) for strategy in _strategies(config, processes))
    if least <= DOUBT * available:
        return None

    def need(changed: TrainConfig) -> float:
        return min(memory_per_rank(changed, processes, s, precision).total for s in _strategies(config, processes))

    owner = "each process" if sharing > 1 else "this machine" if device.type == "cpu" else "the GPU"
    problem = f"an update needs {format_bytes(least)} and {owner} has {format_bytes(available)} free"
    fitting = largest_micro_batch(config, processes, need, COMFORT * available)
    if fitting is not None:
        return f"{problem}; use --micro-batch-size {fitting}"
    checkpointing = "" if config.activation_checkpointing == "full" else "--activation-checkpointing full or "
    return f"{problem}, and no micro-batch size fits; use {checkpointing}a smaller model"


def _least(config: TrainConfig, processes: int, strategy: str, precision: str) -> int:
    """Bytes that an update needs at least: a compiler may drop all but the results of products and of attention."""
    if not config.compiles_on(config.device):
        return memory_per_rank(config, processes, strategy, precision).total
    if config.activation_checkpointing == "none":
        config = config.override(activation_checkpointing="selective")
    return replace(memory_per_rank(config, processes, strategy, precision), copies=0, working=0).total


def _strategies(config: TrainConfig, processes: int) -> list[str]:
    """The strategies that `parallelize` may choose."""
    if processes == 1:
        return ["single"]
    auto = ["ddp"] if config.device == "cpu" else ["ddp", "fsdp"]
    return auto if config.strategy == "auto" else [config.strategy]
