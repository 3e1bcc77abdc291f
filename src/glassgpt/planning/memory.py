"""Memory of a run on each rank, bytes sent per update and how a batch is divided, by formulas from the config alone.

`docs/explain/memory.md` explains the formulas. `docs/measured/scale.md` shows how close they come to real runs.

Symbols: `N` tokens of a micro-batch, `C` channels, `F` feed-forward width, `V` padded vocabulary, `H` heads, `D` head
width, `K` key/value heads, `T` context, `W` ranks, `e` bytes of a number in matrix products.
"""

import bisect
import dataclasses
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace

import torch

from glassgpt.config.schema import TYPICAL_VOCAB_SIZES, TrainConfig
from glassgpt.data.dataset import open_dataset
from glassgpt.data.sources import PreparedDataset, resolve
from glassgpt.interop.references import find_model
from glassgpt.model.loss import CPU_VOCAB_BLOCK, rows_per_chunk
from glassgpt.model.summary import ModelSummary
from glassgpt.tokenizers.builtin import build_tokenizer, tokenizer_file
from glassgpt.training.optim import ELEMENTS_AT_ONCE
from glassgpt.training.setup import shape_from
from glassgpt.utils.device import available_memory
from glassgpt.utils.errors import UserError
from glassgpt.utils.formatting import format_bytes
from glassgpt.utils.hub import find_hub_id
from glassgpt.utils.launcher import launcher_number, under_torchrun

FLOAT32 = 4
# Share of the free memory that a suggested micro-batch may take: allocators, libraries and evaluation need some too.
COMFORT = 0.9
# A run is refused if it needs this much more than the free memory: real runs needed up to 8 % more than estimated.
DOUBT = 1.05
# Full-size copies of the hidden gradient that live together in the backward pass of the nonlinearity; 1 for all others.
_FEED_FORWARD_GRADIENTS = {"relu": 2, "swiglu": 2, "relu_squared": 3}


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank at one moment of an update, by purpose."""

    weights: int  # in float32; under FSDP a shard
    gradients: int  # like the weights; DDP's buckets are among them
    optimizer: int  # two moments per parameter (AdamW), or one (Muon, for the matrices of the blocks)
    activations: int = 0  # what the forward pass keeps for the backward pass, up to the result of the last block
    copies: int = 0  # the weights of the blocks as autocast casts them, kept until the backward pass has used them
    gathered: int = 0  # weights of a block or of the root that FSDP has gathered, and the buffers that it sends from
    working: int = 0  # temporary tensors: the head and the loss, or the backward pass of a block
    heap: int = 0  # what malloc and libraries hold in addition on a CPU, estimated by `plan` only

    @property
    def total(self) -> int:
        """All of them."""
        return sum(dataclasses.astuple(self))


def bytes_sent_per_update(config: TrainConfig, processes: int, strategy: str, precision: str) -> int:
    """Bytes that each rank sends in one update by ring algorithms, without evaluation."""
    # An all-gather or a reduce-scatter of n bytes sends n (W - 1) / W, an all-reduce twice that.
    summary = ModelSummary(config.model)
    if strategy == "fsdp":
        micro_steps = config.micro_steps(processes)
        syncs = micro_steps if config.fsdp_gradient_sync == "micro_step" else 1
        blocks = config.model.n_layer * summary.block_parameters
        gathers = 2 * blocks * _width(precision) + summary.root_parameters * FLOAT32
        count = micro_steps * gathers + syncs * summary.parameters * FLOAT32
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
    c, summary, micro_steps = config.model, ModelSummary(config.model), config.micro_steps(processes)
    tokens = config.micro_batch(processes) * c.context_length
    matrices, muon = _matrices(config), config.optim.name == "muon"
    sharded = strategy == "fsdp"
    shards = processes if sharded else 1
    weights = -(-summary.parameters * FLOAT32 // shards)
    # DDP's buckets always exist and are the gradients. Otherwise an update's first backward pass makes the gradients.
    earlier = weights if micro_steps > 1 or (processes > 1 and not sharded) else 0
    if sharded and config.fsdp_gradient_sync == "update" and micro_steps > 1:
        earlier = summary.parameters * FLOAT32
    state = Memory(weights, earlier, -(-FLOAT32 * (2 * summary.parameters - muon * matrices) // shards))
    kept = block_activations(config, tokens, precision, config.activation_checkpointing)
    stream, head_weight = FLOAT32 * tokens * c.n_embd, FLOAT32 * c.padded_vocab_size * c.n_embd
    # FSDP's weights are in the dtype of products already, and not kept.
    copies = 0 if sharded or _width(precision) == FLOAT32 else matrices * _width(precision)
    embedded = stream * (1 + c.embedding_norm + bool(c.dropout))  # with the input of the first block
    full = replace(state, activations=embedded + c.n_layer * kept, copies=copies)
    backward = full if config.activation_checkpointing == "none" else replace(full, copies=0)
    ended = replace(state, gradients=weights)
    in_loss, in_block, at_end = _gathered(config, processes, precision, kept) if sharded else (0, 0, 0)
    # The gradient of a tied head waits for that of the embedding, to be added to earlier gradients.
    tied = head_weight if c.tied_head and (earlier or sharded) else 0
    block_working = stream + head_weight + _block_backward(config, tokens, precision)
    # Muon holds the directions of the matrices that it handles together, and five times those of one shape (the batch,
    # filled up, orthogonalised in part, and two terms), a third of GPT-2's matrices. Fused AdamW needs nothing.
    muon_working = 8 * FLOAT32 * min(ELEMENTS_AT_ONCE, matrices) // 3
    return {
        "loss": replace(full, gathered=in_loss, working=loss_working(config, tokens, precision)),
        "head": replace(backward, gathered=in_loss, working=2 * (stream + head_weight)),
        "block": replace(backward, gathered=in_block, working=block_working),
        "embedding": replace(ended, gathered=at_end, working=tied + head_weight + 3 * stream),
        "update": replace(ended, working=muon * muon_working),
    }


def block_activations(config: TrainConfig, tokens: int, precision: str, kind: str) -> int:
    """Bytes that one block keeps for the backward pass, its result included, its input not."""
    c, e = config.model, _width(precision)
    C, F = c.n_embd, c.resolved_n_inner
    q_width, kv_width = c.n_head * c.resolved_head_dim, c.resolved_n_kv_head * c.resolved_head_dim
    if kind == "full":
        return tokens * FLOAT32 * C
    if kind == "selective":
        products = (q_width + 2 * kv_width) + q_width + C + (2 if c.activation == "swiglu" else 1) * F + C
        return tokens * (FLOAT32 * C + e * products + FLOAT32 * c.n_head + _attention_weights(config, e))
    # The inputs of both norms and their statistics, and for RMSNorm the normalised values.
    per_token = 2 * (FLOAT32 * C + 8) + (2 * FLOAT32 * C if c.norm == "rmsnorm" else 0)
    # The inputs of the matrices; q, k and v.
    hidden = {"relu": 1, "swiglu": 4}.get(c.activation, 2) * F
    per_token += e * (2 * C + q_width + 2 * kv_width + q_width + hidden) + FLOAT32 * c.n_head
    if c.position == "rope" or c.qk_norm:  # q and k are copies, not views, and the next product copies the result
        per_token += e * (q_width + kv_width + q_width)
    if c.qk_norm:
        per_token += (1 if e == FLOAT32 else 2) * FLOAT32 * (q_width + kv_width)
    if c.dropout:
        per_token += 2 * e * C
    per_token += _attention_weights(config, e) * (3 if c.dropout else 1)
    if c.attention == "sdpa" and c.window is not None:  # the keys, values and results that `WindowKernel` copies
        keys = max(c.context_length / c.window - 1, 0) * (2 * c.window + c.window_globals) / c.context_length
        width = c.resolved_head_dim * (2 * c.resolved_n_kv_head * keys + c.n_head)
        per_token += round(e * width * sum(window is not None for window in c.windows) / c.n_layer)
    return tokens * per_token


def _attention_weights(config: TrainConfig, e: int) -> int:
    """Bytes per token of one matrix of attention weights (H, T), for the kernels that form it."""
    c = config.model
    if c.attention == "explicit":
        return e * c.n_head * c.context_length
    # PyTorch's fused kernels for CPUs have no dropout: it then computes in separate steps.
    return FLOAT32 * c.n_head * c.context_length if c.dropout and config.device == "cpu" else 0


def _block_backward(config: TrainConfig, tokens: int, precision: str) -> int:
    """Bytes that the backward pass of the last block needs at its peak, beyond what the forward pass kept."""
    c, e, kind = config.model, _width(precision), config.activation_checkpointing
    copies = _FEED_FORWARD_GRADIENTS.get(c.activation, 1)
    hidden = e * c.resolved_n_inner * (copies * tokens + (c.n_embd if copies == 1 else 0))
    attention = tokens * _attention_weights(config, FLOAT32)
    everything, kept = (block_activations(config, tokens, precision, each) for each in ("none", kind))
    casts = ModelSummary(c).block_matrices * e if kind != "none" and e < FLOAT32 else 0
    return max(hidden, attention) + everything - kept + casts


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


def _gathered(config: TrainConfig, processes: int, precision: str, kept: int) -> tuple[int, int, int]:
    """Bytes that FSDP has gathered in the loss, in the backward pass of a block, and at the end."""
    summary = ModelSummary(config.model)
    root, block = summary.root_parameters * FLOAT32, summary.block_parameters * _width(precision)
    gradients = summary.block_parameters * FLOAT32
    buffer = block if processes > 1 else 0  # one process gathers nothing into a buffer first, but copies the weights
    # The gradients of the last block are sent during the backward pass of the one before, after its activations went.
    sending = max(0, gradients - kept) if config.model.n_layer > 1 else 0
    return root + buffer, root + block + buffer + sending, root + gradients


def _width(precision: str) -> int:
    """Bytes of a number in matrix products."""
    return 2 if precision in ("bfloat16", "float16") else FLOAT32


def _matrices(config: TrainConfig) -> int:
    """Elements of all matrices in the blocks."""
    return config.model.n_layer * ModelSummary(config.model).block_matrices


def with_vocabulary(config: TrainConfig, download: bool = False) -> tuple[TrainConfig, list[str]]:
    """The config with a vocabulary size, which a run takes from its data, and notes on what is assumed.

    `download`: fetch a model of the hub that the run starts from. Otherwise its shape is assumed to be that in [model].
    """
    notes = []
    init_from = config.init_from
    if init_from == "" or (init_from and not download and find_hub_id(init_from)):
        notes.append("the model has the shape in [model]; a run with --init-from takes the shape of that model")
    elif init_from is not None:  # not verified: training reads and verifies the model anyway
        config = replace(config, model=shape_from(find_model(init_from, verify=False).model_config, config.model))
    if config.model.vocab_size is not None:
        return config, notes
    kind, source = config.data.tokenizer, None
    with suppress(UserError):  # the text need not exist yet
        source = None if config.data.mixture else resolve(config.data.source)
    if isinstance(source, PreparedDataset):
        size = open_dataset(source.directory, check=False).tokenizer.vocab_size
    elif tokenizer_file(kind) is not None:
        size = build_tokenizer(kind).vocab_size
    else:
        size = TYPICAL_VOCAB_SIZES[kind]
        if kind == "characters":
            notes.append(f"the text is assumed to have {size} different characters (--model.vocab-size N changes this)")
    return config.override(model={"vocab_size": size}), notes


def largest_micro_batch(
    config: TrainConfig, processes: int, need: Callable[[TrainConfig], float], available: float
) -> int | None:
    """The largest micro-batch whose `need` fits into `available` bytes; None if not even 1 fits."""

    def fits(size: int) -> bool:
        return need(config.override(micro_batch_size=size)) <= available

    share = config.sequences_per_process(processes)
    if fits(share):  # tried first: more micro-steps than one need memory for gradients in addition
        return share
    fitting = bisect.bisect_left(range(1, share), True, key=lambda size: not fits(size))
    return -(-share // -(-share // fitting)) if fitting else None  # a batch is divided evenly


def check_memory(config: TrainConfig, processes: int, device: torch.device, precision: str) -> str | None:
    """Why an update cannot fit into the memory that is free now, with what to change; None if it may fit.

    Refuses only what certainly does not fit: on a CPU, swap counts as free, and of a compiled model only what no
    compiler can drop is counted. Call it before the model is made. `cpu_offload` is not checked.
    """
    free = available_memory(device, swap=True)
    if free is None or config.cpu_offload:
        return None
    on_cpu, checkpointing = device.type == "cpu", config.activation_checkpointing
    if config.model.vocab_size is None:  # a run to resume has one, and the model that it started from may be gone
        config = with_vocabulary(config, download=True)[0]
    config = config.override(device=device.type)
    strategies = ["single"] if processes == 1 else [config.strategy]  # those that `parallelize` may choose
    if strategies == ["auto"]:
        strategies = ["ddp"] if on_cpu else ["ddp", "fsdp"]

    def peaks(changed: TrainConfig) -> list[Memory]:
        return [memory_per_rank(changed, processes, strategy, precision) for strategy in strategies]

    def need(changed: TrainConfig) -> int:
        return min(memory.total for memory in peaks(changed))

    least = need(config)
    if config.compiles_on(device.type):  # a compiler may drop all but the results of products and of attention
        least_kept = config.override(activation_checkpointing="full" if checkpointing == "full" else "selective")
        least = min(replace(memory, copies=0, working=0).total for memory in peaks(least_kept))
    sharing = launcher_number("LOCAL_WORLD_SIZE", 1) if under_torchrun() and on_cpu else 1
    available = free / sharing
    if least <= DOUBT * available:
        return None
    owner = "each process" if sharing > 1 else "this machine" if on_cpu else "the GPU"
    problem = f"an update needs {format_bytes(least)} and {owner} has {format_bytes(available)} free"
    fitting = largest_micro_batch(config, processes, need, COMFORT * available)
    if fitting is not None:
        return f"{problem}; use --micro-batch-size {fitting}"
    suggestion = "" if checkpointing == "full" else "--activation-checkpointing full or "
    return f"{problem}, and no micro-batch size fits; use {suggestion}a smaller model"
