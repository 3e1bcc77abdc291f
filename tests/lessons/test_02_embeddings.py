"""Lesson 2's functions against the library, without training."""

import pytest
import torch

from glassgpt.config.model import ModelConfig
from glassgpt.learn.catalog import find_lesson
from glassgpt.model.attention import Rotary
from glassgpt.model.gpt import SinusoidalPositions
from lesson_harness import load

LESSON = load(find_lesson("2").path)


def test_product_is_lookup() -> None:
    table = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([3, 0, 3, 6])
    assert torch.equal(LESSON.embed_by_product(ids, table), table[ids])


@pytest.mark.parametrize("C", [2, 8, 64])
def test_sinusoids_equal_the_library(C: int) -> None:
    library = SinusoidalPositions(ModelConfig(n_embd=C, n_head=1))
    expected = library(torch.zeros(1, 50, C), torch.arange(50))[0]
    torch.testing.assert_close(LESSON.sinusoid(50, C), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("D", [2, 8, 64])
def test_rotation_equals_the_library(D: int) -> None:
    x, positions = torch.randn(50, D, generator=torch.Generator().manual_seed(D)), torch.arange(50)
    expected = Rotary(D, 10000.0)(x[None, None], positions)[0, 0]
    torch.testing.assert_close(LESSON.rotate(x, positions), expected, atol=2e-5, rtol=0)


def test_scores_fall_more_slowly_with_a_larger_base() -> None:
    arrows = torch.tensor([1.0] * 32 + [0.0] * 32).expand(1, 1, 256, 64)
    rotated = [Rotary(64, base)(arrows, torch.arange(256))[0, 0] for base in (1e2, 1e4, 1e6)]
    means = [float((each @ each[0]).mean()) for each in rotated]
    assert means == sorted(means)


def test_one_layer_without_positions_ignores_the_order() -> None:
    assert LESSON.order_effect("none", 1) < 1e-6
    assert min(LESSON.order_effect("none", 2), LESSON.order_effect("learned", 1)) > 1e-3
