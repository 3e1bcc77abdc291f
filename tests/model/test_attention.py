"""Attention equals formulas written as loops and complex numbers; a KV cache equals attention over the whole text.

Values are float64, so a tolerance of 1e-12 allows for rounding but for no mistake. Rotary angles are float32 in any
model (1e-7 of an angle of up to a few turns), so the tolerance for rotary positions is 1e-5.
"""

import dataclasses
import itertools
import math
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from glassgpt.config.model import ModelConfig
from glassgpt.model.attention import (
    Attention,
    ExplicitKernel,
    FlexKernel,
    Rotary,
    SDPAKernel,
    Span,
    WindowKernel,
    attention_scores,
)
from glassgpt.model.kv_cache import KVCache, LayerCache

B, H, T, D = 2, 4, 7, 5
FULL, WINDOW, GLOBALS = Span(), Span(3), Span(2, 2)
# Each fast kernel with a span that it supports, and the explicit kernel with all spans.
KERNELS = pytest.mark.parametrize(
    ("kernel", "span"),
    [
        (SDPAKernel, FULL),
        (WindowKernel, WINDOW),
        (WindowKernel, GLOBALS),
        *((ExplicitKernel, span) for span in (FULL, WINDOW, GLOBALS)),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else f"{value.window}+{value.n_global}",
)
Kernel = type[SDPAKernel] | type[ExplicitKernel]


def random(*shape: int, seed: int = 0) -> Tensor:
    """Return normally distributed float64 numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def attention_by_loops(q: Tensor, k: Tensor, v: Tensor, span: Span) -> Tensor:
    """Return softmax(q k^T / sqrt(D)) v for the last T of S positions. Query heads share key/value heads in groups."""
    rows, before = q.shape[-2], k.shape[-2] - q.shape[-2]
    y = torch.zeros_like(q)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            kv_head = h * k.shape[1] // q.shape[1]
            for t in range(rows):
                p = before + t
                visible = [s for s in range(p + 1) if span.window is None or p - s < span.window or s < span.n_global]
                # The divisor is the root of the head width D; two earlier implementations used the model's, H x D.
                scores = torch.stack([(q[b, h, t] * k[b, kv_head, s]).sum() / math.sqrt(q.shape[-1]) for s in visible])
                weights = scores.exp() / scores.exp().sum()
                y[b, h, t] = sum((weights[i] * v[b, kv_head, s] for i, s in enumerate(visible)), start=torch.zeros(()))
    return y


@KERNELS
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("queries", [T, 3, 1])
def test_kernels_equal_the_formula_forward_and_backward(
    kernel: Kernel, span: Span, kv_heads: int, queries: int
) -> None:
    """There are as many queries as keys, or only the last few after a cache, with the mask of `Span`."""
    q, k, v = random(B, H, queries, D, seed=1), random(B, kv_heads, T, D, seed=2), random(B, kv_heads, T, D, seed=3)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    mask = None if queries == T else span.visible(torch.arange(T - queries, T)[:, None], torch.arange(T))
    upstream = random(B, H, queries, D, seed=4)
    actual, expected = kernel(span, dropout=0.0)(q, k, v, mask), attention_by_loops(q, k, v, span)
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=0)
    gradients = torch.autograd.grad(actual, inputs, upstream), torch.autograd.grad(expected, inputs, upstream)
    torch.testing.assert_close(*gradients, atol=1e-12, rtol=0)


@settings(deadline=None)
@given(length=st.integers(1, 40), window=st.integers(1, 45), n_global=st.integers(0, 12), grouped=st.booleans())
def test_the_window_kernel_equals_the_explicit_kernel_at_any_length(
    length: int, window: int, n_global: int, grouped: bool
) -> None:
    """This holds if the window does not divide the length or exceeds the text, or if all tokens are global."""
    span = Span(window, n_global)
    heads = 1 if grouped else 2
    q, k, v = random(1, 2, length, 4, seed=1), random(1, heads, length, 4, seed=2), random(1, heads, length, 4, seed=3)
    inputs, upstream = [x.requires_grad_() for x in (q, k, v)], random(1, 2, length, 4, seed=4)
    fast, explicit = WindowKernel(span, 0.0)(q, k, v), ExplicitKernel(span, 0.0)(q, k, v)
    torch.testing.assert_close(fast, explicit, atol=1e-12, rtol=0)
    gradients = torch.autograd.grad(fast, inputs, upstream), torch.autograd.grad(explicit, inputs, upstream)
    torch.testing.assert_close(*gradients, atol=1e-12, rtol=0)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("span", [FULL, Span(20), Span(20, 3)], ids=str)
@pytest.mark.parametrize("heads", [2, 1])
def test_flex_attention_equals_the_explicit_kernel(span: Span, heads: int) -> None:
    """Only the forward pass is compared, because FlexAttention has no gradients on a CPU (test_cuda.py tests them).

    Several lengths check that the cached mask is replaced. On a CPU it computes in float32, so the tolerance is 1e-6.
    """
    flex, explicit = FlexKernel(span, 0.0), ExplicitKernel(span, 0.0)
    for length, seed in ((150, 1), (150, 2), (40, 3)):
        q, k, v = (random(1, n, length, 16, seed=seed + n).float() for n in (2, heads, heads))
        torch.testing.assert_close(flex(q, k, v), explicit(q, k, v), atol=1e-6, rtol=0)


def test_the_config_chooses_the_kernel() -> None:
    for attention, kernel in (("sdpa", SDPAKernel), ("explicit", ExplicitKernel), ("flex", FlexKernel)):
        assert type(_attention("rope", attention=attention).kernel) is kernel
    assert type(_attention("rope", span=WINDOW).kernel) is WindowKernel


@KERNELS
def test_dropout_applies_to_attention_weights_only_in_training(kernel: Kernel, span: Span) -> None:
    """With one-hot values, the output is the weights: in training, each is 0 or the weight divided by 1 - p."""
    n, p = 64, 0.3
    span = dataclasses.replace(span, window=span.window and 20)
    q, k, v = (
        random(1, 4, n, n, seed=1),
        random(1, 4, n, n, seed=2),
        torch.eye(n, dtype=torch.float64).expand(1, 4, n, n),
    )
    module = kernel(span, dropout=p)
    weights = module.eval()(q, k, v)
    torch.testing.assert_close(weights, kernel(span, dropout=0.0)(q, k, v), atol=0, rtol=0)
    torch.manual_seed(0)
    dropped = module.train()(q, k, v)
    nonzero = weights > 0
    zeroed = (dropped == 0) & nonzero
    torch.testing.assert_close(dropped[~zeroed], weights[~zeroed] / (1 - p), atol=1e-12, rtol=0)
    count = int(nonzero.sum())
    assert abs(int(zeroed.sum()) / count - p) < 5 * math.sqrt(p * (1 - p) / count)  # five standard errors


def test_the_mask_of_a_span() -> None:
    """A window W includes the token itself. The first G tokens are visible to all later tokens, not to earlier ones."""
    q, k = torch.tensor([2, 3]), torch.arange(5)
    assert FULL.visible(q[:, None], k).int().tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]
    assert Span(2).visible(q[:, None], k).int().tolist() == [[0, 1, 1, 0, 0], [0, 0, 1, 1, 0]]
    assert Span(1, 1).visible(q[:, None], k).int().tolist() == [[1, 0, 1, 0, 0], [1, 0, 0, 1, 0]]
    assert Span(1, 5).visible(q[:, None], k).int().tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]


def test_rotary_is_a_rotation_of_complex_numbers() -> None:
    """Dimensions i and i + D/2 are one complex number, multiplied by exp(i p base^(-2i/D)) at position p."""
    x, positions, base = random(B, H, T, 8), torch.arange(3, 3 + T), 100.0
    frequency = torch.tensor([base ** (-2 * i / 8) for i in range(4)], dtype=torch.float64)
    rotation = torch.exp(1j * positions[:, None] * frequency)
    rotated = torch.complex(x[..., :4], x[..., 4:]) * rotation
    expected = torch.cat([rotated.real, rotated.imag], dim=-1)
    torch.testing.assert_close(Rotary(8, base)(x, positions), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_rotary_attention_depends_only_on_distances(qk_norm: bool) -> None:
    attention = _attention("rope", qk_norm=qk_norm)
    x, positions = random(B, T, 24), torch.arange(T)
    expected = attention(x, positions)
    torch.testing.assert_close(attention(x, positions + 50), expected, atol=1e-5, rtol=0)
    assert (attention(x, positions * 2) - expected).abs().max() > 1e-2  # other distances change the output


def test_attention_without_rotary_positions_ignores_the_order_of_the_keys() -> None:
    """This validates the test above: with learned positions, attention itself does not depend on positions."""
    attention = _attention("learned")
    x, order = random(B, T, 24), torch.tensor([3, 1, 0, 2, 5, 4, 6])
    before, after = attention(x, torch.arange(T)), attention(x[:, order], torch.arange(T))
    torch.testing.assert_close(after[:, -1], before[:, -1], atol=1e-12, rtol=0)


@settings(deadline=None)
@given(
    parts=st.lists(st.integers(1, 12), min_size=1, max_size=8),
    span=st.builds(Span, st.one_of(st.none(), st.integers(1, 9)), st.just(0))
    | st.builds(Span, st.integers(1, 9), st.integers(0, 6)),
    position=st.sampled_from(["learned", "rope"]),
    explicit=st.booleans(),
)
def test_attention_with_a_cache_equals_attention_over_the_whole_text(
    parts: list[int], span: Span, position: Any, explicit: bool
) -> None:
    """The text arrives in any parts. With a window, the W + G positions of the cache are overwritten repeatedly."""
    attention = _attention(position, span=span, attention="explicit" if explicit else "sdpa", n_kv_head=1)
    total = sum(parts)
    x, positions = random(B, total, 24), torch.arange(total)
    shape = ModelConfig(n_embd=24, n_head=3, n_kv_head=1, window=span.window, window_globals=span.n_global)
    cache = LayerCache(shape, span.window, B, total, torch.zeros((), dtype=torch.float64))
    ends = list(itertools.accumulate(parts))
    with torch.no_grad():
        outputs = [
            attention(x[:, end - n : end], positions[end - n : end], cache) for n, end in zip(parts, ends, strict=True)
        ]
        torch.testing.assert_close(torch.cat(outputs, dim=1), attention(x, positions), atol=1e-12, rtol=0)
    assert cache.length == total
    slots = total if span.window is None else min(total, span.window + span.n_global)
    assert cache.k.shape == cache.v.shape == (B, 1, slots, 8)


def test_a_hook_on_the_kernel_receives_queries_keys_and_values() -> None:
    """The formula gives the output of the fused kernel from them. Kernels have no parameters."""
    attention = _attention("rope")
    captured: list[Tensor] = []
    attention.kernel.register_forward_pre_hook(lambda _, inputs: captured.extend(inputs[:3]))
    outputs: list[Tensor] = []
    attention.kernel.register_forward_hook(lambda _, inputs, output: outputs.append(output))
    attention(random(B, T, 24), torch.arange(T))
    torch.testing.assert_close(
        outputs[0], attention_by_loops(captured[0], captured[1], captured[2], FULL), atol=1e-12, rtol=0
    )
    assert isinstance(attention.kernel, SDPAKernel)
    assert not any("kernel" in name or "rotary" in name for name in attention.state_dict())


class LinearBias(nn.Module):
    """ALiBi (Press et al., 2022): scores decrease with the distance, by a slope per head."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("slopes", torch.tensor([0.5, 0.25, 0.125], dtype=torch.float64), persistent=False)

    def forward(self, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        slopes = self.get_buffer("slopes")
        return -slopes[:, None, None] * (q_pos[:, None] - k_pos[None, :])


@pytest.mark.parametrize("kernel", ["sdpa", "explicit", "flex"])
@pytest.mark.parametrize("span", [FULL, WINDOW, GLOBALS], ids=str)
def test_every_kernel_adds_the_position_bias_to_the_scores(kernel: str, span: Span) -> None:
    """The output equals the formula, and with a KV cache, a text in parts equals the whole text."""
    attention = _attention("learned", span=span, attention=kernel, n_kv_head=1)
    attention.position_bias = LinearBias()  # type: ignore[assignment]
    captured: list[Any] = []
    attention.kernel.register_forward_hook(lambda _, inputs, output: captured.append((inputs, output)))
    x, positions = random(B, T, 24), torch.arange(T)
    with torch.no_grad():
        full_text = attention(x, positions)
        (q, k, v, _, bias), output = captured[0]
        assert bias[1, 4, 1] == -0.25 * 3
        scores = q @ k.transpose(-2, -1) / math.sqrt(8) + bias
        torch.testing.assert_close(attention_scores(q, k, bias), scores, atol=1e-12, rtol=0)
        weights = scores.masked_fill(~span.visible(positions[:, None], positions), -torch.inf).softmax(-1)
        torch.testing.assert_close(output, weights @ v, atol=1e-12, rtol=0)
        shape = ModelConfig(n_embd=24, n_head=3, n_kv_head=1, window=span.window, window_globals=span.n_global)
        cache = LayerCache(shape, span.window, B, T, torch.zeros((), dtype=torch.float64))
        parts = [attention(x[:, a:b], positions[a:b], cache) for a, b in ((0, 2), (2, 3), (3, 6), (6, 7))]
    torch.testing.assert_close(torch.cat(parts, dim=1), full_text, atol=1e-12, rtol=0)


def test_a_cache_beyond_the_context_is_refused() -> None:
    with pytest.raises(ValueError, match="9 positions exceeds the context length of 8"):
        KVCache(ModelConfig(context_length=8), 1, 9, torch.zeros(()))


def test_a_windowed_cache_is_unlimited_with_relative_positions() -> None:
    """In other cases, the capacity of the cache is the limit, also if it is smaller than the window.

    With rotary positions and a global token it is limited too, because the distance to that token would grow forever.
    """
    positions: tuple[Literal["rope", "none", "learned", "sinusoidal"], ...] = ("rope", "none", "learned", "sinusoidal")
    unlimited = set()
    for position, pattern, n_global, capacity in itertools.product(positions, ("S", "SL"), (0, 1), (3, 4, 8)):
        config = ModelConfig(
            context_length=8, position=position, window=4 - n_global, window_globals=n_global, window_pattern=pattern
        )
        limit = KVCache(config, 1, capacity, torch.zeros(())).limit
        assert limit in (None, capacity)
        if limit is None:
            unlimited.add((position, pattern, n_global, capacity))
    assert unlimited == {
        (*kind, capacity) for kind in (("rope", "S", 0), ("none", "S", 0), ("none", "S", 1)) for capacity in (4, 8)
    }


def _attention(position: Literal["learned", "rope"], *, span: Span = FULL, **changes: Any) -> Attention:
    """Return attention with three heads of 8, whose large weights give peaked attention, so that errors show."""
    changes |= {"window": span.window, "window_globals": span.n_global}
    attention = Attention(ModelConfig(n_embd=24, n_head=3, position=position, **changes), span.window).double()
    with torch.no_grad():
        for index, parameter in enumerate(attention.parameters()):
            parameter.copy_(0.5 * random(*parameter.shape, seed=index + 10))
    return attention
