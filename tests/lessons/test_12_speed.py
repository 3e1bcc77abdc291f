"""Lesson 12: its functions against PyTorch, without training or measuring."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from glassgpt.learn.catalog import find_lesson
from lesson_harness import load

LESSON = load(find_lesson("12").path)


@pytest.mark.parametrize(("T", "block"), [(1, 4), (12, 1), (12, 5), (12, 4), (12, 20)])
def test_blocks_give_exact_attention(T: int, block: int) -> None:
    q, k, v = 5 * torch.randn(3, T, 8, generator=torch.Generator().manual_seed(T), dtype=torch.float64)
    expected = F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True)[0]
    result = LESSON.flash_attention(q.numpy(), k.numpy(), v.numpy(), block)
    assert np.allclose(result, expected.numpy(), rtol=0, atol=1e-12)


def test_steps_of_gelu() -> None:
    x = torch.linspace(-6, 6, 101)
    assert torch.allclose(LESSON.gelu_in_steps(x), F.gelu(x, approximate="tanh"), atol=1e-6)
