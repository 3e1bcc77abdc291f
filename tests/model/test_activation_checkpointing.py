"""Activation checkpointing: the same bits of loss and gradients, with recomputation and less memory."""

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


class OperatorCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Count the operators that run inside the context."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: dict[str, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[str(function)] = self.calls.get(str(function), 0) + 1
        return function(*args, **(kwargs or {}))


def forward_and_backward(config: ModelConfig, kind: str) -> tuple[Tensor, list[Tensor | None], dict[str, int]]:
    """Return the loss, the gradients and the operator counts of a forward and backward pass."""
    model = GPT.create(config, seed=1)
    names = [name for name, _ in model.named_parameters()]
    for block in model.blocks:
        checkpoint_activations(block, kind)
    assert [name for name, _ in model.named_parameters()] == names  # checkpointing adds no wrapper module
    ids = torch.randint(0, 50, (2, 17), generator=torch.Generator().manual_seed(2))
    torch.manual_seed(3)
    with OperatorCounter() as counter:
        loss = model(ids[:, :-1], ids[:, 1:])
        loss.backward()
    return loss.detach(), [p.grad for p in model.parameters()], counter.calls


@pytest.mark.parametrize("kind", ["selective", "full"])
@pytest.mark.parametrize("config", VARIANTS, ids=["modern", "dropout and windows"])
def test_loss_and_gradients_have_the_same_bits(config: ModelConfig, kind: str) -> None:
    loss, gradients, _ = forward_and_backward(config, "none")
    checkpointed_loss, checkpointed, _ = forward_and_backward(config, kind)
    assert torch.equal(checkpointed_loss, loss)
    for one, other in zip(checkpointed, gradients, strict=True):
        assert one is not None
        assert other is not None
        assert torch.equal(one, other)


def test_full_recomputes_everything_and_selective_all_but_matrix_products_and_attention() -> None:
    calls = {kind: forward_and_backward(SHAPE, kind)[2] for kind in ("none", "selective", "full")}

    def count(kind: str, operator: str) -> int:
        return sum(n for name, n in calls[kind].items() if operator in name)

    attention, activation, product = "_scaled_dot_product", "aten.gelu.default", "aten.addmm"
    assert [count(kind, activation) for kind in ("none", "selective", "full")] == [3, 6, 6]
    assert [count(kind, product) for kind in ("none", "selective")] == [12, 12]
    assert count("full", product) == 12 + 9  # no gradient needs the output of a block's last product
    forward = [count(kind, f"{attention}_flash_attention_for_cpu.default") for kind in ("none", "selective", "full")]
    assert forward == [3, 3, 6]


def test_full_checkpointing_saves_less_than_40_percent_of_the_bytes() -> None:
    """The bytes are those that autograd saves between the passes; tests/planning/test_memory.py checks `selective`."""

    def saved_bytes(kind: str) -> int:
        model = GPT.create(SHAPE, seed=1)
        for block in model.blocks:
            checkpoint_activations(block, kind)
        sizes: dict[int, int] = {}

        def record(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        ids = torch.zeros(2, 16, dtype=torch.int64)
        with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
            model(ids, ids)
        return sum(sizes.values()) - sum(p.untyped_storage().nbytes() for p in model.parameters())

    assert saved_bytes("full") < 0.4 * saved_bytes("none")


def test_evaluation_and_generation_are_unchanged() -> None:
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
