"""Activation checkpointing: the same loss and gradients to the last bit, computed again and kept in less memory."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from glassgpt.config.model import ModelConfig
from glassgpt.model.activation_checkpointing import checkpoint_activations
from glassgpt.model.gpt import GPT

SHAPE = ModelConfig(
    n_layer=3, n_head=4, n_kv_head=2, n_embd=32, context_length=16, vocab_size=50, position="rope", qk_norm=True
)
VARIANTS = [SHAPE, ModelConfig(n_layer=3, n_head=2, n_embd=32, context_length=16, vocab_size=50, dropout=0.2, window=5)]


class Counted(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operators that run inside."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: dict[str, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[str(function)] = self.calls.get(str(function), 0) + 1
        return function(*args, **(kwargs or {}))


def passes(config: ModelConfig, kind: str) -> tuple[Tensor, list[Tensor | None], dict[str, int]]:
    """The loss, the gradients and the operators of a forward and backward pass."""
    model = GPT.create(config, seed=1)
    names = [name for name, _ in model.named_parameters()]
    for block in model.blocks:
        checkpoint_activations(block, kind)
    assert [name for name, _ in model.named_parameters()] == names  # no wrapper
    ids = torch.randint(0, 50, (2, 17), generator=torch.Generator().manual_seed(2))
    torch.manual_seed(3)
    with Counted() as counted:
        loss = model(ids[:, :-1], ids[:, 1:])
        loss.backward()
    return loss.detach(), [p.grad for p in model.parameters()], counted.calls


@pytest.mark.parametrize("kind", ["selective", "full"])
@pytest.mark.parametrize("config", VARIANTS, ids=["modern", "dropout and windows"])
def test_loss_and_gradients_stay_the_same_bits(config: ModelConfig, kind: str) -> None:
    loss, gradients, _ = passes(config, "none")
    found_loss, found, _ = passes(config, kind)
    assert torch.equal(found_loss, loss)
    for one, other in zip(found, gradients, strict=True):
        assert one is not None
        assert other is not None
        assert torch.equal(one, other)


def test_full_computes_all_again_and_selective_all_but_products_and_attention() -> None:
    calls = {kind: passes(SHAPE, kind)[2] for kind in ("none", "selective", "full")}

    def count(kind: str, operator: str) -> int:
        return sum(n for name, n in calls[kind].items() if operator in name)

    attention, activation, product = "_scaled_dot_product", "aten.gelu.default", "aten.addmm"
    assert [count(kind, activation) for kind in ("none", "selective", "full")] == [3, 6, 6]
    assert [count(kind, product) for kind in ("none", "selective")] == [12, 12]
    assert count("full", product) == 12 + 9  # no gradient needs the result of a block's last one
    forward = [count(kind, f"{attention}_flash_attention_for_cpu.default") for kind in ("none", "selective", "full")]
    assert forward == [3, 3, 6]


def test_full_keeps_little_but_the_blocks_inputs() -> None:
    """Bytes that autograd keeps between the passes. (What `selective` stores is not among them: tests/test_scale.py
    counts that.)"""

    def kept(kind: str) -> int:
        model = GPT.create(SHAPE, seed=1)
        for block in model.blocks:
            checkpoint_activations(block, kind)
        seen: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        ids = torch.zeros(2, 16, dtype=torch.int64)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            model(ids, ids)
        return sum(seen.values()) - sum(p.untyped_storage().nbytes() for p in model.parameters())

    assert kept("full") < 0.4 * kept("none")


def test_evaluation_and_generation_are_left_alone() -> None:
    model = GPT.create(SHAPE, seed=1)
    ids = torch.arange(10)[None]
    with torch.no_grad():
        before = model(ids)
        for block in model.blocks:
            checkpoint_activations(block, "full")
        assert torch.equal(model(ids), before)
        cache = model.new_cache(1, 16)
        model(ids[:, :6], cache=cache)
        torch.testing.assert_close(model(ids[:, 6:], cache=cache), before[:, 6:], atol=1e-5, rtol=1e-5)
