"""Lesson 9: its functions against the library and PyTorch, without training."""

import math

import pytest
import torch
import torch.nn.functional as F

from glassgpt.learn.catalog import find_lesson
from glassgpt.model.loss import cross_entropy
from lesson_harness import load

LESSON = load(find_lesson("9").path)


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shift", [-1000.0, 0.0, 1000.0])
def test_losses_and_gradients_are_pytorchs_however_large_the_logits(shift: float) -> None:
    logits = (5 * draw(0, 40, 17) + shift).requires_grad_()
    targets = torch.arange(40) % 17
    expected = F.cross_entropy(logits, targets, reduction="none")
    (gradient,) = torch.autograd.grad(expected.sum(), logits)
    assert torch.allclose(LESSON.token_losses(logits, targets), expected, atol=1e-5 + 1e-6 * abs(shift))
    assert torch.allclose(LESSON.loss_gradient(logits, targets), gradient, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 7, 40, 64])
def test_chunks_of_any_size_give_the_librarys_loss_and_gradient(rows: int) -> None:
    h, W, targets = draw(1, 40, 8).requires_grad_(), draw(2, 17, 8), torch.arange(40) % 17
    expected = cross_entropy(h, W, targets, 17)
    (gradient,) = torch.autograd.grad(expected, h)
    loss, by_h = LESSON.chunked_loss(h.detach(), W, targets, rows)
    assert loss == pytest.approx(expected.item(), abs=1e-5)
    assert torch.allclose(by_h, gradient, atol=1e-6)


def test_bits_per_byte_of_chance_among_bytes_are_8() -> None:
    text = "5 € für é"
    losses = torch.full((len(text.encode()),), math.log(256))
    assert LESSON.bits_per_byte(losses, text) == pytest.approx(8.0)
