"""Lesson 6: its functions against the library, and its exercises against attention, without training."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from glassgpt.config.model import ModelConfig
from glassgpt.learn.catalog import find_lesson
from glassgpt.model.gpt import GPT
from lesson_harness import load

LESSON = load(find_lesson("6").path)
CONFIG = ModelConfig(vocab_size=11, n_layer=2, n_head=4, n_embd=32, context_length=16, bias=False)


@pytest.mark.parametrize("K", [1, 2, 4])
def test_contributions_sum_to_attention(K: int) -> None:
    generator = torch.Generator().manual_seed(K)
    q, W_o = torch.randn(4, 6, 8, generator=generator), torch.randn(4, 8, 32, generator=generator)
    k, v = torch.randn(2, K, 6, 8, generator=generator)
    z = F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, enable_gqa=True)[0]
    expected = z.transpose(0, 1).flatten(1) @ W_o.flatten(0, 1)
    assert torch.allclose(LESSON.contributions(q, k, v, W_o).sum(dim=0), expected, atol=1e-5)


def test_pooling_equal_heads_changes_nothing() -> None:
    ids = torch.arange(11)[None]
    grouped = GPT.create(replace(CONFIG, n_kv_head=2), seed=0)
    expand = find_lesson("6").exercises()["expand_key_heads"]
    state = grouped.state_dict()
    for name in [name for name in state if name.endswith("qkv.weight")]:
        q, k, v = state[name].split([32, 16, 16])
        state[name] = torch.cat([q, expand(k, 4, 2), expand(v, 4, 2)])
    full = GPT.create(CONFIG, seed=1)
    full.load_state_dict(state)
    with torch.no_grad():
        assert torch.allclose(full(ids), grouped(ids), atol=1e-6)
        assert torch.allclose(LESSON.pooled(full, 2)(ids), grouped(ids), atol=1e-6)


def test_a_mixture_holds_what_the_formula_says() -> None:
    a, b = torch.randn(2, 4096, 8, generator=torch.Generator().manual_seed(1))
    for w in (0.1, 0.5, 0.9):
        assert LESSON.recovered(w * a + (1 - w) * b, a) == pytest.approx(w**2 / (w**2 + (1 - w) ** 2), abs=0.02)
