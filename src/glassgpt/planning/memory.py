"""A run's size on paper: memory a rank, bytes sent a step, and how a batch is divided, from the config alone.

Weights, gradients and optimizer are counted. What autograd keeps is measured, but of tensors without storage: one block and the
head run forward and backward in PyTorch's fake mode, in which a ledger sees each tensor come and go, so that every slot, kernel
and kind of recomputation is as the code has it. `docs/scale.md` gives the same as formulas.

Shapes: `B` sequences in a micro-batch, `T` time, `C` channels, `W` ranks.
"""

import dataclasses
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from glassgpt.config.model import ModelConfig
from glassgpt.config.schema import TrainConfig
from glassgpt.model.activation_checkpointing import checkpoint_activations
from glassgpt.model.attention import SDPAKernel, Span, spans
from glassgpt.model.gpt import GPT, Block
from glassgpt.model.loss import cross_entropy
from glassgpt.model.summary import ModelSummary
from glassgpt.training.optim import ELEMENTS_AT_ONCE
from glassgpt.utils.device import autocast

FLOAT32 = 4


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank at one moment of an update, by what they are for."""

    weights: int
    """In float32: all of them, or under FSDP a share."""
    gradients: int
    """In float32, as the weights; DDP's buckets among them."""
    optimizer: int
    """Two moments a parameter (AdamW), or one (Muon, for the matrices of the blocks)."""
    activations: int
    """What the forward pass keeps for the backward pass, up to the last block's result."""
    copies: int
    """The blocks' weights as autocast casts them, kept beside the float32 ones until the backward pass has used them."""
    gathered: int
    """Weights of a whole block or of the root that FSDP has gathered, and the buffers it sends from."""
    working: int
    """What comes and goes at this moment: the head and the loss, or the backward pass through a block."""

    @property
    def total(self) -> int:
        """All of them."""
        return sum(dataclasses.astuple(self))


@dataclass(frozen=True)
class Batch:
    """How an update's sequences are divided."""

    sequences: int
    """On each rank."""
    micro_steps: int
    """Forward and backward passes an update, on each rank."""
    micro_batch: int
    """Sequences in the largest of them."""
    tokens: int
    """An update, all ranks together."""


def batch_a_rank(config: TrainConfig, processes: int) -> Batch:
    """The batch arithmetic of `train_step`. Raises `UserError` where the processes do not divide the batch."""
    sequences, micro_steps = config.sequences_per_process(processes), config.micro_steps(processes)
    return Batch(sequences, micro_steps, -(-sequences // micro_steps), config.batch_tokens)


def bytes_sent_a_step(config: TrainConfig, processes: int, strategy: str, precision: str) -> int:
    """Bytes that each rank sends in one update, by ring algorithms; an evaluation and the few numbers beside them left out.

    An all-gather or a reduce-scatter of n bytes sends n (W - 1) / W, an all-reduce twice that.
    """
    summary, blocks = ModelSummary(config.model), _block_parameters(config.model)
    if strategy == "fsdp":
        root = summary.parameters - blocks
        each = 2 * blocks * _width(precision) + root * FLOAT32 + summary.parameters * FLOAT32
        gathered = each * batch_a_rank(config, processes).micro_steps
    else:
        gathered = 2 * summary.parameters * FLOAT32
    if config.optim.name == "muon":
        gathered += (2 if strategy == "fsdp" else 1) * _matrices(config.model) * FLOAT32
    return gathered * (processes - 1) // processes


def memory_a_rank(config: TrainConfig, processes: int, strategy: str, precision: str) -> Memory:
    """Memory at the fullest moment of an update on one rank, from the second update on. See `moments`."""
    return max(moments(config, processes, strategy, precision).values(), key=lambda memory: memory.total)


def moments(config: TrainConfig, processes: int, strategy: str, precision: str) -> dict[str, Memory]:
    """The moments at which an update's memory can be fullest: `loss`, `head`, `block`, `embedding` and `update`.

    In the loss, all activations are there; behind it go backward the head, the last block and (with all gradients there, and no
    activations) the embedding; at last the optimizer works. `strategy` is ddp or fsdp; any other is the model by itself, in one process.
    Not counted: the device's context, libraries' and collectives' own buffers, what the allocator holds in reserve, evaluation;
    and `cpu_offload` is not known here.
    """
    batch = batch_a_rank(config, processes)
    # Chunks of the loss are larger on a GPU, which is what a run without a device is taken to have.
    device = config.device if config.device in ("cpu", "mps") else "cuda"
    head = _trace_head(config.model, batch.micro_batch, precision, device)
    blocks = _blocks(config, batch.micro_batch, precision, strategy, device)
    if strategy == "fsdp":
        return _sharded_moments(config, processes, batch, precision, head, blocks)
    return _whole_moments(config, processes, batch, precision, head, blocks)


def _whole_moments(
    config: TrainConfig, processes: int, batch: Batch, precision: str, head: "_Head", blocks: Sequence["_Passage"]
) -> dict[str, Memory]:
    summary = ModelSummary(config.model)
    all_gradients = summary.parameters * FLOAT32
    # DDP's buckets are there at all times, and are the gradients; else a micro-step before this one has left all of them.
    present = all_gradients if processes > 1 or batch.micro_steps > 1 else 0
    memory = Memory(all_gradients, present, _moments_of_optimizer(config), 0, 0, 0, 0)
    activations = head.embedded + sum(block.kept for block in blocks)
    copies = _copies(config.model, precision)
    full = dataclasses.replace(memory, activations=activations, copies=copies)
    backward = full if config.activation_checkpointing == "none" else dataclasses.replace(full, copies=0)
    last = dataclasses.replace(memory, gradients=max(present, all_gradients))
    # A tied head's gradient waits for that of the embedding, to be added to what is there.
    tied = head.gradient if config.model.tied_head else 0
    return {
        "loss": dataclasses.replace(full, working=head.loss),
        "head": dataclasses.replace(backward, working=head.backward),
        "block": dataclasses.replace(backward, working=head.left + blocks[-1].backward),
        "embedding": dataclasses.replace(last, working=tied + head.embedding if present else head.embedding),
        "update": dataclasses.replace(memory, gradients=all_gradients, working=_working_of_optimizer(config)),
    }


def _sharded_moments(
    config: TrainConfig, processes: int, batch: Batch, precision: str, head: "_Head", blocks: Sequence["_Passage"]
) -> dict[str, Memory]:
    summary = ModelSummary(config.model)
    share = -(-summary.parameters * FLOAT32 // processes)
    block, root = summary.block_parameters, (summary.parameters - _block_parameters(config.model)) * FLOAT32
    # On one process nothing is gathered into a buffer first; the weights are copied all the same.
    buffer = block * _width(precision) if processes > 1 else 0
    unsharded = block * _width(precision)
    memory = Memory(share, share, -(-_moments_of_optimizer(config) // processes), 0, 0, root, 0)
    present = share if batch.micro_steps > 1 else 0  # an update's first backward pass makes them
    full = dataclasses.replace(
        memory, gradients=present, activations=head.embedded + sum(passage.kept for passage in blocks)
    )
    # The last block's gradients are being sent when the one before it goes backward: without the last one's activations.
    sending = max(0, block * FLOAT32 - blocks[-1].kept) if len(blocks) > 1 else 0
    return {
        "loss": dataclasses.replace(full, gathered=root + buffer, working=head.loss),
        "head": dataclasses.replace(full, gathered=root + buffer, working=head.backward),
        "block": dataclasses.replace(
            full, gathered=root + unsharded + buffer + sending, working=head.left + blocks[-1].backward
        ),
        "embedding": dataclasses.replace(
            memory, gathered=root + block * FLOAT32, working=head.gradient + head.embedding
        ),
        "update": dataclasses.replace(memory, gathered=0, working=_working_of_optimizer(config)),
    }


def _width(precision: str) -> int:
    """Bytes of a number in matrix products."""
    return 2 if precision in ("bfloat16", "float16") else FLOAT32


def _block_parameters(model: ModelConfig) -> int:
    return model.n_layer * ModelSummary(model).block_parameters


def _matrices(model: ModelConfig) -> int:
    """Elements of all matrices in the blocks."""
    summary = ModelSummary(model)
    return model.n_layer * (summary.attention_weights + summary.feed_forward_weights)


def _copies(model: ModelConfig, precision: str) -> int:
    """Bytes of the blocks' matrices in the dtype of matrix products, where that is not their own."""
    return _matrices(model) * _width(precision) if _width(precision) < FLOAT32 else 0


def _moments_of_optimizer(config: TrainConfig) -> int:
    one_less = _matrices(config.model) if config.optim.name == "muon" else 0
    return FLOAT32 * (2 * ModelSummary(config.model).parameters - one_less)


def _working_of_optimizer(config: TrainConfig) -> int:
    """AdamW is fused and needs nothing. Muon: the directions of the matrices that it handles together, and five times those of a shape.

    A third of GPT-2's matrices have one shape. The five are the batch, filled up and orthogonalised in part, and two terms beside it.
    """
    return 8 * FLOAT32 * min(ELEMENTS_AT_ONCE, _matrices(config.model)) // 3 if config.optim.name == "muon" else 0


# ----------------------------------------------------------------------------------------- measured of tensors without storage


@dataclass(frozen=True)
class _Passage:
    """Bytes of one block: what it keeps (its result included), and the most that its backward pass holds above all that is kept."""

    kept: int
    backward: int


@dataclass(frozen=True)
class _Head:
    """Bytes around the blocks; `embedded` is the first block's input and what the embedding keeps.

    `loss` and `backward` are the most in the final norm, head and loss, forward and backward; `left` stays from there on, the
    head's `gradient` included; `embedding` is the most in the embedding's backward pass, with the gradient that comes to it.
    """

    embedded: int
    loss: int
    backward: int
    left: int
    gradient: int
    embedding: int


class _Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the storages that come into being inside, for as long as they live."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0
        self.peak = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for storage in _storages((args, kwargs)):
            self._seen.add(storage)  # from outside, where this is its first sight
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            if storage not in self._seen:
                self._seen.add(storage)
                self.bytes += storage.nbytes()
                weakref.finalize(storage, self._gone, storage.nbytes())
        self.peak = max(self.peak, self.bytes)
        return result

    def _gone(self, count: int) -> None:
        self.bytes -= count

    def most(self, function: Callable[[], object]) -> int:
        """The most bytes while a function runs."""
        self.peak = self.bytes
        function()
        return self.peak


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _casting(precision: str) -> AbstractContextManager[Any]:
    return autocast(torch.device("cpu"), precision)


def _blocks(config: TrainConfig, batch: int, precision: str, strategy: str, device: str) -> list[_Passage]:
    model = config.model
    if (
        model.attention == "flex"
    ):  # whose backward pass no CPU has: like the fused kernel it keeps q, k, v, its result and a number a row
        model = dataclasses.replace(model, attention="sdpa", window=None, window_globals=0, window_pattern="S")
    kind, is_sharded = config.activation_checkpointing, strategy == "fsdp"
    return [_trace_block(model, span, batch, precision, kind, is_sharded, device) for span in spans(model)]


@lru_cache
def _trace_block(
    model: ModelConfig, span: Span, batch: int, precision: str, kind: str, is_sharded: bool, device: str
) -> _Passage:
    """One block in a micro-batch (B, T, C). Sharded, its weights are gathered in the dtype of products, and nobody casts them."""
    copies = 0 if is_sharded or kind != "none" else _copies(model, precision) // model.n_layer
    with FakeTensorMode():
        with _default_dtype(torch.bfloat16 if is_sharded and precision == "bfloat16" else torch.float32):
            block = Block(model, span)
        if device == "cuda" and isinstance(block.attention.kernel, SDPAKernel):
            # A GPU's fused kernels draw it anew; a CPU's refuse it, and the formula in their place keeps all weights.
            block.attention.kernel.dropout = 0.0
        if not is_sharded:
            _drop_gradients(block)
        checkpoint_activations(block, kind)
        x = torch.empty(batch, model.context_length, model.n_embd, requires_grad=True)
        positions, gradient = torch.arange(model.context_length), torch.empty_like(x)
        with _Ledger() as ledger:
            with _casting(precision):
                result = block(x, positions)
            kept = ledger.bytes
            most = ledger.most(lambda: result.backward(gradient))
    return _Passage(kept - copies, most - kept)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """The dtype of parameters that are made inside: in fake mode they cannot be converted afterwards."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _drop_gradients(module: nn.Module) -> None:
    """As if each gradient were added to one that is there."""

    def drop(parameter: Tensor) -> None:
        parameter.grad = None

    for parameter in module.parameters():
        parameter.register_post_accumulate_grad_hook(drop)  # type: ignore[no-untyped-call]


@lru_cache
def _trace_head(model: ModelConfig, batch: int, precision: str, device: str) -> _Head:
    shape = dataclasses.replace(model, n_layer=1, window=None, window_globals=0, window_pattern="S")
    with FakeTensorMode():
        gpt = GPT(shape)
        gpt.blocks = nn.ModuleList()
        ids = torch.zeros(batch, model.context_length, dtype=torch.int64)
        positions = torch.arange(model.context_length)
        with _Ledger() as ledger:
            with _casting(precision):
                embedded = gpt.dropout(gpt.embedding_norm(gpt.positions(gpt.embedding(ids), positions)))
            kept, gradient = ledger.bytes, torch.empty_like(embedded)
            embedding = ledger.most(lambda: embedded.backward(gradient))
        gpt.zero_grad()
        return _Head(kept, *_trace_loss(gpt, ids, precision, device), embedding)


def _trace_loss(gpt: GPT, ids: Tensor, precision: str, device: str) -> tuple[int, int, int, int]:
    """Final norm, head and loss, forward and backward: the most in each, what is left, and the head's gradient in that."""
    x = torch.empty(*ids.shape, gpt.config.n_embd, requires_grad=True)

    def forward() -> Tensor:
        with _casting(precision):
            return cross_entropy(gpt.norm(x), gpt.head.weight, ids, gpt.vocab_size, gpt.config.logit_softcap, device)

    losses: list[Tensor] = []
    with _Ledger() as ledger:
        loss = ledger.most(lambda: losses.append(forward()))
        backward = ledger.most(lambda: losses.pop().backward())  # type: ignore[no-untyped-call]
        left = ledger.bytes
    return loss, backward, left, gpt.head.weight.numel() * FLOAT32
