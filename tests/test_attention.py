"""Attention: kernels against the formula written as loops, rotary positions against complex numbers, caches against the whole.

float64 throughout, so a tolerance of 1e-12 leaves rounding three digits and a mistake none. Rotary angles are float32 in
any model (1e-7 of an angle up to a few turns): there the tolerance is 1e-5.
"""

import math
from typing import Literal

import pytest
import torch
from torch import Tensor

from glassgpt.attention import KERNELS, Attention, KVCache, LayerCache, Rotary, SDPAKernel, visible
from glassgpt.config import ModelConfig

B, H, T, D = 2, 3, 7, 5
KERNEL = pytest.mark.parametrize("kernel", sorted(KERNELS))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v of the last T of S positions, number by number."""
    rows, before = q.shape[-2], k.shape[-2] - q.shape[-2]
    y = torch.zeros_like(q)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for t in range(rows):
                seen = range(before + t + 1)
                # By the head's width D: seeds C and D divided by the root of the model's, H x D.
                scores = torch.stack([(q[b, h, t] * k[b, h, s]).sum() / math.sqrt(q.shape[-1]) for s in seen])
                weights = scores.exp() / scores.exp().sum()
                y[b, h, t] = sum((weights[s] * v[b, h, s] for s in seen), start=torch.zeros(()))
    return y


@KERNEL
@pytest.mark.parametrize("queries", [T, 3, 1])
def test_kernel_is_the_formula_forward_and_backward(kernel: str, queries: int) -> None:
    """All positions, or only the last few behind a cache, where the mask comes from the rule."""
    q, k, v = random(B, H, queries, D, seed=1), random(B, H, T, D, seed=2), random(B, H, T, D, seed=3)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    mask = None if queries == T else visible(torch.arange(T - queries, T), torch.arange(T))
    upstream = random(B, H, queries, D, seed=4)
    actual, expected = KERNELS[kernel](dropout=0.0)(q, k, v, mask), by_hand(q, k, v)
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=0)
    gradients = torch.autograd.grad(actual, inputs, upstream), torch.autograd.grad(expected, inputs, upstream)
    torch.testing.assert_close(*gradients, atol=1e-12, rtol=0)


@KERNEL
def test_dropout_falls_on_the_weights_in_training_only(kernel: str) -> None:
    """With one-hot values the output is the weights themselves: each is 0 or the weight over 1 - p."""
    n, p = 64, 0.3
    q, k, v = random(1, 4, n, n, seed=1), random(1, 4, n, n, seed=2), torch.eye(n, dtype=torch.float64).expand(1, 4, n, n)
    module = KERNELS[kernel](dropout=p)
    weights = module.eval()(q, k, v)
    torch.testing.assert_close(weights, KERNELS[kernel](dropout=0.0)(q, k, v), atol=0, rtol=0)
    torch.manual_seed(0)
    dropped = module.train()(q, k, v)
    seen = torch.ones(n, n, dtype=torch.bool).tril().expand(1, 4, n, n)
    gone = (dropped == 0) & seen
    torch.testing.assert_close(dropped[~gone], weights[~gone] / (1 - p), atol=1e-12, rtol=0)
    count = int(seen.sum())
    assert abs(int(gone.sum()) / count - p) < 5 * math.sqrt(p * (1 - p) / count)  # five standard errors


def test_the_rule() -> None:
    assert visible(torch.tensor([2, 3]), torch.arange(5)).tolist() == [[True, True, True, False, False], [True, True, True, True, False]]


def test_rotary_is_a_turn_of_complex_numbers() -> None:
    """Dimensions i and i + D/2 are one complex number, multiplied by exp(i p base^(-2i/D)) at position p."""
    x, positions, base = random(B, H, T, 8), torch.arange(3, 3 + T), 100.0
    speed = torch.tensor([base ** (-2 * i / 8) for i in range(4)], dtype=torch.float64)
    turn = torch.exp(1j * positions[:, None] * speed)
    turned = torch.complex(x[..., :4], x[..., 4:]) * turn
    expected = torch.cat([turned.real, turned.imag], dim=-1)
    torch.testing.assert_close(Rotary(8, base)(x, positions), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_rotary_attention_knows_distances_only(qk_norm: bool) -> None:
    attention = _attention("rope", qk_norm=qk_norm)
    x, positions = random(B, T, 24), torch.arange(T)
    here = attention(x, positions)
    torch.testing.assert_close(attention(x, positions + 50), here, atol=1e-5, rtol=0)
    assert (attention(x, positions * 2) - here).abs().max() > 1e-2  # other distances do matter


def test_attention_without_positions_ignores_the_order_of_what_it_sees() -> None:
    """A check of the test above: with learned positions nothing inside attention may know where a token stands."""
    attention = _attention("learned")
    x, order = random(B, T, 24), torch.tensor([3, 1, 0, 2, 5, 4, 6])
    before, after = attention(x, torch.arange(T)), attention(x[:, order], torch.arange(T))
    torch.testing.assert_close(after[:, -1], before[:, -1], atol=1e-12, rtol=0)


@KERNEL
@pytest.mark.parametrize("position", ["learned", "rope"])
def test_attention_over_a_cache_is_attention_over_the_whole(kernel: str, position: Literal["learned", "rope"]) -> None:
    attention = _attention(position, kernel=kernel)
    x, positions = random(B, T, 24), torch.arange(T)
    whole = attention(x, positions)
    cache = LayerCache((B, 3, T, 8), torch.float64, torch.device("cpu"))
    parts = []
    for start, end in ((0, 3), (3, 4), (4, 6), (6, 7)):
        mask = visible(positions[start:end], positions[:end]) if start else None
        parts.append(attention(x[:, start:end], positions[start:end], mask, cache))
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-12, rtol=0)
    assert cache.length == T


def test_the_kernel_shows_queries_keys_and_values_to_a_hook() -> None:
    """The seam of the glass: q, k and v caught in front of the fused kernel give its output by the formula, and no kernel has weights."""
    attention = _attention("rope")
    caught: list[Tensor] = []
    attention.kernel.register_forward_pre_hook(lambda _, inputs: caught.extend(inputs[:3]))
    outputs: list[Tensor] = []
    attention.kernel.register_forward_hook(lambda _, inputs, output: outputs.append(output))
    attention(random(B, T, 24), torch.arange(T))
    torch.testing.assert_close(outputs[0], by_hand(*caught), atol=1e-12, rtol=0)
    assert isinstance(attention.kernel, SDPAKernel)
    assert not any("kernel" in name or "rotary" in name for name in attention.state_dict())


def test_a_cache_beyond_the_context_is_refused() -> None:
    with pytest.raises(ValueError, match="9 positions exceeds the context length of 8"):
        KVCache(ModelConfig(context_length=8), 1, capacity=9, dtype=torch.float32, device=torch.device("cpu"))


def _attention(position: Literal["learned", "rope"], *, kernel: str = "sdpa", qk_norm: bool = False) -> Attention:
    """Three heads of 8 with weights that make attention pointed, so a wrong turn shows."""
    attention = Attention(ModelConfig(n_embd=24, n_head=3, position=position, qk_norm=qk_norm)).double()
    attention.kernel = KERNELS[kernel](0.0)
    with torch.no_grad():
        for index, parameter in enumerate(attention.parameters()):
            parameter.copy_(0.5 * random(*parameter.shape, seed=index + 10))
    return attention
