"""Lesson 14: its functions against the library and PyTorch, without training."""

import pytest
import torch
import torch.nn.functional as F

from glassgpt.config.schema import SamplingConfig
from glassgpt.generation.generate import sampling_distribution
from glassgpt.learn.catalog import find_lesson
from lesson_harness import load

LESSON = load(find_lesson("14").path)


@pytest.mark.parametrize("temperature", [0.25, 1.0, 3.0])
def test_temperature_is_that_of_the_library(temperature: float) -> None:
    logits = 3 * torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    expected = sampling_distribution(logits, SamplingConfig(temperature=temperature))
    assert torch.allclose(LESSON.at_temperature(logits, temperature), expected, atol=1e-6)


@pytest.mark.parametrize(("method", "value"), [("top-k", 1), ("top-k", 7), ("top-p", 0.7), ("min-p", 0.2)])
def test_truncation_is_that_of_the_library(method: str, value: float) -> None:
    logits = 3 * torch.randn(8, 50, generator=torch.Generator().manual_seed(1))
    settings = SamplingConfig.from_dict({"temperature": 1.0, method.replace("-", "_"): value})
    ours = torch.stack([LESSON.truncated(p, method, value) for p in logits.softmax(dim=-1)])
    assert torch.allclose(ours, sampling_distribution(logits, settings), atol=1e-6)


def test_attention_with_a_cache_is_causal_attention() -> None:
    q, k, v = torch.randn(3, 4, 12, 8, generator=torch.Generator().manual_seed(2))
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert torch.allclose(LESSON.attention_with_cache(q, k, v), expected, atol=1e-5)
