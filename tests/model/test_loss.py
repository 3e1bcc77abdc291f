"""The fused head and loss equal `F.cross_entropy` over full logits: values, gradients, chunks, memory, precision."""

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func  # type: ignore[import-untyped]
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from glassgpt.model import loss as loss_module
from glassgpt.model.loss import IGNORED, cross_entropy, soft_cap, token_losses

B, T, C, V, PADDED = 3, 5, 6, 13, 16


def inputs(dtype: torch.dtype = torch.float64, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden (B, T, C), weight (PADDED, C) and targets (B, T).

    The padding rows would have the largest logits. Two targets are ignored.
    """
    generator = torch.Generator().manual_seed(0)
    hidden = scale * torch.randn(B, T, C, generator=generator, dtype=torch.float64)
    weight = torch.randn(PADDED, C, generator=generator, dtype=torch.float64)
    weight[V:] *= 30
    targets = torch.randint(V, (B, T), generator=generator)
    targets[0, 2] = targets[2, 4] = IGNORED
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets


def reference_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, cap: float | None, reduction: str = "mean"
) -> Tensor:
    """Return PyTorch's cross-entropy over full logits."""
    logits = soft_cap(hidden @ weight[:vocab_size].T, cap)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction=reduction, ignore_index=IGNORED)


# 0 and 1 give chunks of one row, 4 leaves a last chunk of 3, 15 and 1,000 give one chunk.
@pytest.mark.parametrize(("rows", "cap", "vocab_size"), list(product([0, 1, 4, 15, 1000], [None, 1.5], [V, PADDED])))
def test_loss_and_gradients_equal_those_of_full_logits(
    rows: int, cap: float | None, vocab_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1e-12 is float64's rounding. The upstream gradient of 3 stands for gradient accumulation and loss scaling."""
    monkeypatch.setattr(loss_module, "CHUNK_ELEMENTS", rows * PADDED)
    monkeypatch.setattr(loss_module, "CPU_VOCAB_BLOCK", 5)
    hidden, weight, targets = inputs()
    actual = cross_entropy(hidden, weight, targets, vocab_size, cap)
    expected = reference_loss(hidden, weight, targets, vocab_size, cap)
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=1e-12)
    gradients = [torch.autograd.grad(3 * loss, (hidden, weight)) for loss in (actual, expected)]
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-12, rtol=1e-12)
    assert not gradients[0][1][vocab_size:].any()
    each = token_losses(hidden, weight, targets, vocab_size, cap)
    torch.testing.assert_close(
        each.flatten(), reference_loss(hidden, weight, targets, vocab_size, cap, "none"), atol=1e-12, rtol=1e-12
    )
    assert each.shape == targets.shape
    assert not each.requires_grad


@pytest.mark.parametrize(
    ("hidden_grad", "weight_grad", "products"), [(True, True, 3), (True, False, 2), (False, True, 2), (False, False, 1)]
)
def test_only_required_gradients_are_computed(hidden_grad: bool, weight_grad: bool, products: int) -> None:
    """By PyTorch's FLOP count, the logits take one matrix product and each gradient one more.

    Without autograd, the loss is the same.
    """
    hidden, weight, targets = inputs()
    expected = torch.autograd.grad(cross_entropy(hidden, weight, targets, V), (hidden, weight))
    hidden.requires_grad_(hidden_grad), weight.requires_grad_(weight_grad)
    with FlopCounterMode(display=False) as counter:
        loss = cross_entropy(hidden, weight, targets, PADDED)
    assert counter.get_total_flops() == products * 2 * B * T * C * PADDED
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        torch.testing.assert_close(cross_entropy(hidden, weight, targets, PADDED), loss.detach(), atol=1e-12, rtol=0)
    assert counter.get_total_flops() == 2 * B * T * C * PADDED
    needed = [(x, gradient) for x, gradient in zip((hidden, weight), expected, strict=True) if x.requires_grad]
    if needed:
        cross_entropy(hidden, weight, targets, V).backward()  # type: ignore[no-untyped-call]
    for x, gradient in needed:
        torch.testing.assert_close(x.grad, gradient, atol=1e-12, rtol=0)


@pytest.mark.parametrize("cap", [None, 1.5])
def test_gradients_equal_finite_differences(cap: float | None) -> None:
    """The gradient is computed by a separate formula, so finite differences of the loss are an independent check."""
    hidden, weight, targets = inputs()
    assert torch.autograd.gradcheck(lambda h, w: cross_entropy(h, w, targets, V, cap), (hidden, weight))


def test_the_soft_cap_is_the_identity_near_0_and_bounded() -> None:
    """A cap of None returns the logits themselves."""
    x = torch.tensor([-1e4, -1e-3, 0.0, 1e-3, 1e4], dtype=torch.float64)
    torch.testing.assert_close(
        soft_cap(x, 30.0), torch.tensor([-30, -1e-3, 0, 1e-3, 30], dtype=torch.float64), atol=1e-12, rtol=0
    )
    assert soft_cap(x, None) is x


@pytest.mark.parametrize("reduce", [cross_entropy, token_losses])
@pytest.mark.parametrize("wrong", [-1, PADDED])
def test_an_invalid_target_is_an_error(reduce: Any, wrong: int) -> None:
    hidden, weight, targets = inputs()
    targets[1, 1] = wrong
    with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
        reduce(hidden, weight, targets, V)


def test_huge_logits_do_not_overflow() -> None:
    hidden, weight, targets = inputs(torch.float32, scale=1e4)
    loss = cross_entropy(hidden, weight, targets, V)
    torch.testing.assert_close(loss, reference_loss(hidden, weight, targets, V, None))
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(loss, (hidden, weight)))


class LargestTensor(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Record the number of elements of the largest tensor that any operation creates."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


def largest_tensor(function: Callable[[], Tensor]) -> int:
    """Return the elements of the largest tensor that `function` and the backward pass of its result create."""
    mode = LargestTensor()  # type: ignore[no-untyped-call]
    with mode:
        result = function()
        if result.requires_grad:
            torch.autograd.backward(result)
    return mode.numel


def test_full_logits_are_never_created(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest tensor is a chunk of logits, the head or the hidden states; an unfused loss creates full logits."""
    rows, width, vocab = 512, 8, 300
    monkeypatch.setattr(loss_module, "CHUNK_ELEMENTS", 16 * vocab)
    hidden = torch.randn(rows, width, requires_grad=True)
    weight = torch.randn(vocab, width, requires_grad=True)
    targets = torch.randint(vocab, (rows,))
    most = max(16 * vocab, rows * width, vocab * width)
    assert largest_tensor(lambda: cross_entropy(hidden, weight, targets, vocab, 5.0)) <= most
    assert largest_tensor(lambda: token_losses(hidden, weight, targets, vocab, 5.0)) <= most
    assert largest_tensor(lambda: F.cross_entropy(hidden @ weight.T, targets)) == rows * vocab, (
        "LargestTensor must see the full logits of an unfused loss"
    )


def test_evaluation_losses_have_no_autograd_graph() -> None:
    hidden, weight, targets = inputs()
    assert token_losses(hidden, weight, targets, V).grad_fn is None
    assert cross_entropy(hidden, weight, targets, V).grad_fn is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loss_under_autocast_equals_that_of_separate_operations(dtype: torch.dtype) -> None:
    """The reference rounds its logits at the same place, so the losses agree to the rounding of a float32 sum, 1e-6.

    Gradients agree with exact ones to 4 units in the last place of the type. Losses and gradients stay float32.
    """
    hidden, weight, targets = inputs(torch.float32)
    exact_gradients = torch.autograd.grad(reference_loss(hidden, weight, targets, V, None), (hidden, weight))
    with torch.autocast("cpu", dtype=dtype):
        loss = cross_entropy(hidden, weight, targets, V)
        each = token_losses(hidden, weight, targets, V)
        expected = reference_loss(hidden, weight, targets, V, None)
    gradients = torch.autograd.grad(loss, (hidden, weight))
    assert loss.dtype == each.dtype == gradients[0].dtype == gradients[1].dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert each.sum().item() / (B * T - 2) == pytest.approx(loss.item(), rel=1e-6)
    for actual, exact in zip(gradients, exact_gradients, strict=True):
        assert 0 < (actual - exact).abs().max() < 4 * torch.finfo(dtype).eps * exact.abs().max()


def test_float16_gradients_neither_vanish_nor_overflow() -> None:
    """Gradients must be divided by the number of rows last; otherwise many would be below float16's smallest number.

    Here, 16,384 rows of a normalised hidden state, like a batch on a GPU, have nearly equal probabilities of 1/512.
    After the division, an entry is 1e-7, where float16 has steps of 6e-8. The gradient of the weights sums all rows.
    The tolerance of 1 % is ten units of float16.
    """
    rows, width, vocab = 16384, 8, 512
    generator = torch.Generator().manual_seed(0)
    hidden = F.layer_norm(torch.randn(rows, width, generator=generator), (width,)).requires_grad_()
    weight = (0.02 * torch.randn(vocab, width, generator=generator)).requires_grad_()
    targets = torch.zeros(rows, dtype=torch.long)  # equal targets give the largest possible sum
    exact = torch.autograd.grad(reference_loss(hidden[None], weight, targets[None], vocab, None), (hidden, weight))
    with torch.autocast("cpu", dtype=torch.float16):
        loss = cross_entropy(hidden, weight, targets, vocab)
    gradients = torch.autograd.grad(loss, (hidden, weight))
    for actual, expected in zip(gradients, exact, strict=True):
        assert actual.isfinite().all()
        assert (actual - expected).norm() < 0.01 * expected.norm()


def test_a_compiled_loss_computes_its_gradients_in_the_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Computing them in the backward pass would need all logits to be kept.

    The graph has no scatter, which would split the pass over the logits in two.
    """
    monkeypatch.setattr(loss_module, "CHUNK_ROWS", 256)
    graphs: list[torch.fx.Graph] = []

    def keep(module: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(module.graph)
        return make_boxed_func(module.forward)

    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep, partition_fn=min_cut_rematerialization_partition)
    hidden = torch.randn(1024, 16, requires_grad=True)
    weight, targets = torch.randn(2048, 16, requires_grad=True), torch.arange(1024)
    compiled = torch.compile(cross_entropy, backend=backend, dynamic=False, fullgraph=True)(
        hidden, weight, targets, 2000
    )
    compiled.backward()  # type: ignore[no-untyped-call]
    actual = hidden.grad, weight.grad
    expected = torch.autograd.grad(cross_entropy(hidden, weight, targets, 2000), (hidden, weight))
    torch.testing.assert_close(actual, expected)
    forward, backward = ([str(node.target) for node in graph.nodes] for graph in graphs)
    assert sum("mm" in name for name in forward) == 12  # four chunks of three products
    assert not any("mm" in name for name in backward)
    assert not any("aten.scatter" in name for name in forward)
