"""Lesson 8: its functions and exercises against PyTorch and the library, without training."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from glassgpt.config.model import ModelConfig
from glassgpt.interpretability.capture import capture
from glassgpt.learn.catalog import find_lesson
from glassgpt.model.gpt import GPT, Block, FeedForward, SwiGLU
from glassgpt.model.summary import ModelSummary
from lesson_harness import load

LESSON = load(find_lesson("8").path)
EXERCISES = find_lesson("8").exercises()


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_norms() -> None:
    x, weight, bias = 3 + 2 * draw(4, 5, 16), draw(16), draw(2, 16)[1]
    assert torch.allclose(LESSON.rms_norm(x, weight), F.rms_norm(x, (16,), weight, 1e-5), atol=1e-5)
    assert torch.allclose(LESSON.layer_norm(x, weight, bias), F.layer_norm(x, (16,), weight, bias), atol=1e-5)


def test_feed_forward() -> None:
    x = 3 * draw(4, 5, 16)
    module = SwiGLU(ModelConfig(vocab_size=1, n_embd=16, n_head=2, bias=False))
    ours = LESSON.swiglu(x, module.gate.weight, module.up.weight, module.down.weight)
    assert torch.allclose(ours, module(x), atol=1e-5)
    assert torch.allclose(LESSON.gelu(x), F.gelu(x, approximate="tanh"), atol=1e-5)


@pytest.mark.parametrize("L", [3, 12])
@pytest.mark.parametrize("factor", [1.0, 0.3])
def test_variances_grow_as_derived(L: int, factor: float) -> None:
    measured = LESSON.measured_variances(L, 0.02 * factor)
    assert measured == pytest.approx(LESSON.derived_variances(L, 0.02 * factor), rel=0.1)


def test_another_draw_of_the_weights_differs_by_a_fifth(monkeypatch: pytest.MonkeyPatch) -> None:
    model = GPT.create(replace(LESSON.new_model(1).config, n_layer=48), seed=0)
    monkeypatch.setattr(LESSON, "new_model", lambda L: model)
    ratio = LESSON.measured_variances(48, 0.02)[-1] / LESSON.derived_variances(48, 0.02)[-1]
    assert ratio == pytest.approx(1.2, abs=0.03)


def test_longer_texts_have_smaller_variances() -> None:
    model = LESSON.new_model(12)
    with torch.no_grad(), capture(model) as cache:
        model(torch.arange(256).view(4, 64))
    stream = cache.residual_stream[-1]
    assert stream[:, 32:].square().mean() < 0.8 * stream[:, 0].square().mean()


def test_block_of_the_exercise_is_the_library_s() -> None:
    model = GPT.create(ModelConfig(vocab_size=7, n_layer=1, n_head=2, n_embd=16), seed=0)
    block, x, positions = model.blocks[0], draw(1, 5, 16), torch.arange(5)
    assert isinstance(block, Block)
    parts = block.attention_norm, lambda y: block.attention(y, positions, None), block.feed_forward_norm
    ours = EXERCISES["pre_norm_block"](x, *parts, block.feed_forward)
    assert torch.allclose(ours, block(x, positions), atol=1e-6)


@pytest.mark.parametrize("n_embd", [16, 64, 768, 1000])
def test_width_of_the_exercise_is_the_library_s(n_embd: int) -> None:
    config = ModelConfig(vocab_size=1, n_embd=n_embd, n_head=2, activation="swiglu")
    assert EXERCISES["swiglu_width"](n_embd, 8) == config.resolved_n_inner
    assert ModelSummary(config).block_matrices - 4 * n_embd**2 >= 8 * n_embd**2


def test_variance_of_the_exercise_in_the_library() -> None:
    config = ModelConfig(vocab_size=1, n_embd=256, n_head=2, n_inner=4096, activation="relu_squared", bias=False)
    module, generator = FeedForward(config), torch.Generator().manual_seed(1)
    torch.nn.init.normal_(module.up.weight, std=0.05, generator=generator)
    torch.nn.init.normal_(module.down.weight, std=0.03, generator=generator)
    x = F.rms_norm(draw(512, 256), (256,))
    with torch.no_grad():
        measured = module(x).square().mean().item()
    assert measured == pytest.approx(EXERCISES["relu_squared_write"](256, 4096, 0.05, 0.03), rel=0.1)
