"""A run on paper against what PyTorch keeps and makes: real tensors on the CPU, and the page in docs/."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from glassgpt.config.model import ModelConfig
from glassgpt.config.recipes import recipe
from glassgpt.config.schema import TrainConfig
from glassgpt.model.activation_checkpointing import checkpoint_activations
from glassgpt.model.attention import spans
from glassgpt.model.gpt import GPT, Block
from glassgpt.model.loss import cross_entropy
from glassgpt.model.summary import ModelSummary
from glassgpt.planning.memory import (
    Memory,
    _trace_block,
    _trace_head,
    batch_a_rank,
    bytes_sent_a_step,
    memory_a_rank,
    moments,
)
from glassgpt.training.optim import build_adamw
from glassgpt.utils.device import autocast
from glassgpt.utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

B, T, C, H = 2, 24, 32, 4
BASE: dict[str, Any] = {"vocab_size": 65, "context_length": T, "n_layer": 3, "n_head": H, "n_embd": C}
SHAPES: list[dict[str, Any]] = [
    {},
    {"attention": "explicit"},
    {"bias": False, "norm": "rmsnorm", "position": "rope", "qk_norm": True, "activation": "swiglu", "n_kv_head": 2},
    {"activation": "relu_squared", "n_inner": 40, "head_dim": 6},
    {"window": 8, "window_globals": 2},
    {"dropout": 0.1, "activation": "silu", "norm": "rmsnorm", "norm_weight": False},
]
EACH = pytest.mark.parametrize("changes", SHAPES, ids=str)
PRECISION = pytest.mark.parametrize("precision", ["float32", "bfloat16"])


def config(model: dict[str, Any] | None = None, **changes: Any) -> TrainConfig:
    return TrainConfig(
        model=ModelConfig(**(BASE | (model or {}))), steps=1, batch_tokens=8 * T, micro_batch_size=B
    ).override(**changes)


class Saved:
    """The storages that autograd saves inside, each once, parameters left out: what PyTorch's own hooks see."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._parameters = {p.untyped_storage().data_ptr() for p in module.parameters()}
        self._kept: dict[int, Tensor] = {}

    def pack(self, tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in self._parameters and tensor.numel():
            self._kept[place] = tensor
        return tensor

    def count(self, *, less: Tensor | None = None) -> int:
        """Bytes, without those of one more tensor."""
        left_out = set() if less is None else {less.untyped_storage().data_ptr()}
        return sum(tensor.untyped_storage().nbytes() for place, tensor in self._kept.items() if place not in left_out)


@EACH
@PRECISION
def test_a_block_keeps_what_autograd_saves(changes: dict[str, Any], precision: str) -> None:
    """By PyTorch's hooks on real tensors. The result, which the next block keeps, stands for the input, which this one does."""
    shape = config(changes).model
    model = GPT.create(shape, 0)
    block, x = model.blocks[0], torch.randn(B, T, C, requires_grad=True)
    saved = Saved(block)
    with (
        torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda kept: kept),
        autocast(torch.device("cpu"), precision),
    ):
        result = block(x, torch.arange(T))
    matrices = sum(p.numel() for p in block.parameters() if p.ndim == 2)
    casts = 2 * matrices if precision == "bfloat16" else 0
    passage = _trace_block(shape, spans(shape)[0], B, precision, "none", False, "cpu")
    assert passage.kept - result.nbytes == saved.count(less=x) - casts


@PRECISION
def test_gpt2s_block_keeps_what_the_page_says(precision: str) -> None:
    """B T (8 C + 14 e C + 4 H + 16) bytes; recomputed in full only its input, selectively what products and attention give."""
    e = 2 if precision == "bfloat16" else 4
    shape = recipe("gpt2", model={"vocab_size": 50257}).model
    kept = {
        kind: _trace_block(shape, spans(shape)[0], 4, precision, kind, False, "cpu").kept
        for kind in ("none", "selective", "full")
    }
    tokens = 4 * 1024
    assert kept["none"] == tokens * (8 * 768 + 14 * e * 768 + 4 * 12 + 16)
    assert kept["selective"] == tokens * (4 * 768 + 10 * e * 768 + 4 * 12)
    assert kept["full"] == tokens * 4 * 768


@pytest.mark.parametrize("name", ["gpt2", "gpt2-xl"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@PRECISION
def test_the_loss_takes_what_the_page_says(name: str, device: str, precision: str) -> None:
    """To 0.1 %: targets, and columns of a number a row, are not in the formula."""
    shape = recipe(name, model={"vocab_size": 50257}).model
    N, C, V = 2 * 1024, shape.n_embd, 50304
    logits = 2**24 // V * V if device == "cpu" else N * V
    products = 4 * logits + 4 * (4096 if device == "cpu" else V) * C
    if precision == "bfloat16":
        products = 2 * (N + V) * C + 6 * logits
    assert _trace_head(shape, 2, precision, device).loss == pytest.approx(
        N * (8 * C + 8) + 4 * V * C + products, rel=1e-3
    )


@pytest.mark.parametrize("kind", ["none", "selective", "full"])
@PRECISION
def test_fake_tensors_live_as_long_as_real_ones(kind: str, precision: str) -> None:
    """The same ledger over real tensors: what is kept, and the most in the backward pass. Recomputation hides from hooks, not from this."""
    from glassgpt.planning.memory import _drop_gradients, _Ledger

    shape = config({"bias": False}).model
    block, x = Block(shape, spans(shape)[0]), torch.randn(B, T, C, requires_grad=True)
    _drop_gradients(block)
    checkpoint_activations(block, kind)
    positions, gradient = torch.arange(T), torch.zeros(B, T, C)
    with _Ledger() as ledger:
        with autocast(torch.device("cpu"), precision):
            result = block(x, positions)
        kept = ledger.bytes
        most = ledger.most(lambda: result.backward(gradient)) - kept
    casts = (
        2 * sum(p.numel() for p in block.parameters() if p.ndim == 2)
        if precision == "bfloat16" and kind == "none"
        else 0
    )
    passage = _trace_block(shape, spans(shape)[0], B, precision, kind, False, "cpu")
    assert (passage.kept, passage.backward) == (kept - casts, most)


@pytest.mark.parametrize(
    "changes", [{}, {"tied_head": False, "logit_softcap": 5.0, "embedding_norm": True, "position": "none"}], ids=str
)
def test_the_head_keeps_its_two_gradients(changes: dict[str, Any]) -> None:
    """By PyTorch's hooks: behind the loss the gradients of hidden states and head are kept, and that of the head is left at the end."""
    shape = config(changes).model
    model, ids = GPT.create(shape, 0), torch.zeros(B, T, dtype=torch.int64)
    x, saved = torch.randn(B, T, C, requires_grad=True), Saved(model)
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda kept: kept):
        cross_entropy(model.norm(x), model.head.weight, ids, 65)
    head = _trace_head(shape, B, "float32", "cpu")
    weight = 4 * 65 * C
    assert weight + 4 * B * T * C < saved.count(less=x) < head.loss
    assert head.gradient == weight
    assert head.left == 4 * B * T * C + weight + sum(p.nbytes for p in model.norm.parameters())
    assert head.embedded >= 4 * B * T * C
    assert head.embedding >= weight


@EACH
def test_the_static_parts_are_the_models(changes: dict[str, Any]) -> None:
    run = config(changes)
    model = GPT.create(run.model, 0)
    optimizer = build_adamw(list(model.parameters()), run.optim)
    sum(p.sum() for p in model.parameters()).backward()  # type: ignore[union-attr]
    optimizer.step()
    moments_of_adamw = sum(
        t.nbytes for state in optimizer.state.values() for name, t in state.items() if name != "step"
    )
    need = memory_a_rank(run, 1, "ddp", "float32")
    assert need.weights == sum(p.nbytes for p in model.parameters())
    assert need.gradients == sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    assert need.optimizer == moments_of_adamw


def test_muon_keeps_one_moment_of_a_matrix() -> None:
    run = config()
    summary = ModelSummary(run.model)
    matrices = run.model.n_layer * (summary.attention_weights + summary.feed_forward_weights)
    need = [
        memory_a_rank(run.override(optim={"name": name}), 1, "ddp", "float32").optimizer for name in ("adamw", "muon")
    ]
    assert need[0] - need[1] == 4 * matrices


def test_one_rank_is_the_model_by_itself() -> None:
    """FSDP of one rank holds what DDP of one holds, and a copy of what it would gather."""
    run = config()
    ddp, fsdp = (memory_a_rank(run, 1, strategy, "float32") for strategy in ("ddp", "fsdp"))
    assert dataclasses.replace(fsdp, gathered=0) == ddp
    assert fsdp.gathered > 0 == ddp.gathered
    assert bytes_sent_a_step(run, 1, "ddp", "float32") == bytes_sent_a_step(run, 1, "fsdp", "float32") == 0


def test_ranks_share_what_fsdp_shards_and_ddp_holds_whole() -> None:
    run = config()
    one, ddp, fsdp = (memory_a_rank(run, *how, "float32") for how in ((1, "ddp"), (4, "ddp"), (2, "fsdp")))
    assert (ddp.weights, ddp.optimizer) == (one.weights, one.optimizer)
    assert ddp.gradients == one.gradients  # which are the buckets, also of several micro-steps
    assert memory_a_rank(run, 2, "ddp", "float32").gradients == one.gradients
    for part in ("weights", "gradients", "optimizer"):
        assert 2 * getattr(fsdp, part) == pytest.approx(getattr(one, part), abs=16)


def test_the_first_backward_pass_makes_the_gradients() -> None:
    """Of one micro-step there are none at the fullest moment, but for DDP's buckets; at the end there are."""
    run = config()
    for strategy, expected in (("ddp", 1), ("fsdp", 0)):
        every = moments(run, 4, strategy, "float32")
        assert every["loss"].gradients == expected * every["loss"].weights
        assert every["embedding"].gradients == every["update"].gradients == every["loss"].weights


def test_the_total_is_the_sum_at_the_fullest_moment() -> None:
    assert Memory(1, 2, 4, 8, 16, 32, 64).total == 127
    for strategy in ("ddp", "fsdp"):
        for run in (config(), config(optim={"name": "muon"}), config(activation_checkpointing="full")):
            every = moments(run, 2, strategy, "bfloat16")
            assert memory_a_rank(run, 2, strategy, "bfloat16").total == max(memory.total for memory in every.values())


def test_bytes_sent_by_hand() -> None:
    """GPT-2 small, 8 ranks: 124,475,904 parameters, of which 7,087,872 in each block; 4 micro-steps of 16 sequences."""
    run = recipe("gpt2", model={"vocab_size": 50257})
    P, blocks = 124_475_904, 12 * 7_087_872
    assert batch_a_rank(run, 8).micro_steps == 4
    assert bytes_sent_a_step(run, 8, "ddp", "bfloat16") == 2 * 4 * P * 7 // 8
    assert bytes_sent_a_step(run, 8, "fsdp", "bfloat16") == 4 * (2 * 2 * blocks + 4 * (P - blocks) + 4 * P) * 7 // 8
    assert bytes_sent_a_step(run, 8, "fsdp", "float32") == 4 * (2 * 4 * blocks + 4 * (P - blocks) + 4 * P) * 7 // 8


@pytest.mark.parametrize(
    ("processes", "micro_batch_size", "expected"), [(1, 16, (8, 1, 8)), (2, 3, (4, 2, 2)), (1, 3, (8, 3, 3))]
)
def test_batches_are_divided_as_the_update_divides_them(
    processes: int, micro_batch_size: int, expected: tuple[int, int, int]
) -> None:
    """As `tensor_split`, which makes the parts as even as it can."""
    batch = batch_a_rank(config(micro_batch_size=micro_batch_size), processes)
    assert (batch.sequences, batch.micro_steps, batch.micro_batch) == expected
    assert len(torch.zeros(batch.sequences).tensor_split(batch.micro_steps)[0]) == batch.micro_batch
    assert batch.tokens == 8 * T


def test_a_batch_that_the_ranks_do_not_divide() -> None:
    with pytest.raises(UserError, match="cannot share evenly"):
        memory_a_rank(config(), 3, "ddp", "float32")


def test_the_pages_tables_are_the_codes() -> None:
    from scale import tables  # benchmarks/scale.py

    page = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    for name, table in tables().items():
        assert table in page, f"docs/scale.md has another table {name}: python benchmarks/scale.py --table"


@PRECISION
def test_on_a_gpu_attention_with_dropout_keeps_no_weights(precision: str) -> None:
    """Its fused kernels draw what is dropped anew; a CPU's do not know dropout, and the formula that takes their place keeps all."""
    config = recipe("gpt2", model={"vocab_size": 50257}, batch_tokens=2 * 1024)
    kept = {
        (device, dropout): memory_a_rank(
            config.override(device=device, model={"dropout": dropout}), 1, "ddp", precision
        ).activations
        for device in ("cpu", "cuda")
        for dropout in (0.0, 0.1)
    }
    weights = 12 * 2 * 12 * 1024**2  # layers, sequences, heads, T x T
    residual = 3 * 12 * 2 * 1024 * 768 * 4  # what dropout on the residual stream keeps, at most
    assert kept["cpu", 0.1] > kept["cpu", 0.0] + 2 * weights
    assert kept["cuda", 0.0] < kept["cuda", 0.1] < kept["cuda", 0.0] + residual
