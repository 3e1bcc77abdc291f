"""Lesson 5: its functions against the library and PyTorch, without training."""

import pytest
import torch
import torch.nn.functional as F

from glassgpt.learn.catalog import find_lesson
from glassgpt.model.attention import Span
from lesson_harness import load

LESSON = load(find_lesson("5").path)


@pytest.mark.parametrize(("W", "G"), [(1, 0), (4, 1), (3, 2), (20, 0)])
def test_masks_are_those_of_the_library(W: int, G: int) -> None:
    masks, device = LESSON.masks(12, W, G), torch.device("cpu")
    assert torch.equal(masks["causal"], Span().plain_mask(12, 12, device))
    assert torch.equal(masks["window"], Span(W).plain_mask(12, 12, device))
    assert torch.equal(masks["window and global tokens"], Span(W, G).plain_mask(12, 12, device))
    assert torch.equal(masks["Longformer"], masks["Longformer"].T)


def test_attention_is_that_of_pytorch() -> None:
    q, k, v = torch.randn(3, 2, 4, 12, 8, generator=torch.Generator().manual_seed(0))
    for mask in LESSON.masks(12, 4, 1).values():
        expected = F.scaled_dot_product_attention(q, k, v, mask)
        assert torch.allclose(LESSON.masked_attention(q, k, v, mask), expected, atol=1e-5)


@pytest.mark.parametrize("token", [0, 1, 7, 15])
def test_predicted_reach_is_the_measured_one(token: int) -> None:
    for mask in LESSON.masks(16, 3, 1).values():
        assert torch.equal(LESSON.reached(mask, token, 5), LESSON.changed(mask, token, 5))
