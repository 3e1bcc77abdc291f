"""Lesson 10: its functions against PyTorch and the library, without training."""

import pytest
import torch

from glassgpt.config.schema import OptimConfig
from glassgpt.learn.catalog import find_lesson
from glassgpt.training.optim import lr_at, orthogonalize
from lesson_harness import load

LESSON, EXERCISES = load(find_lesson("10").path), find_lesson("10").exercises()


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_adamw(decay: float) -> None:
    w, m, v = draw(5), 0.0, 0.0
    theirs = w.clone().requires_grad_()
    optimizer = torch.optim.AdamW([theirs], lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=decay)
    for t in range(1, 31):
        theirs.grad = draw(5, seed=t)
        w, m, v = LESSON.adamw_step(w, theirs.grad, m, v, t, 0.1, decay)
        optimizer.step()
    assert torch.allclose(w, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [0.01, 0.1, 1, 10])
@pytest.mark.parametrize("l2", [False, True])
def test_both_decays(size: float, l2: bool) -> None:
    w = torch.ones((), dtype=torch.float64, requires_grad=True)
    kind = torch.optim.Adam if l2 else torch.optim.AdamW
    optimizer = kind([w], lr=0.001, betas=(0.9, 0.95), weight_decay=0.1)
    for t in range(1, 2001):
        w.grad = torch.full_like(w, size * (-1) ** t)
        optimizer.step()
    assert LESSON.decayed(size, l2)[-1] == pytest.approx(w.item(), abs=1e-9)


def test_schedules() -> None:
    for schedule in ("cosine", "constant"):
        config = OptimConfig(lr=LESSON.PEAK, warmup_steps=LESSON.WARMUP, min_lr_ratio=0.0, schedule=schedule)
        for step in range(LESSON.STEPS):
            assert LESSON.learning_rate(step, schedule) == pytest.approx(lr_at(step, LESSON.STEPS, config), abs=1e-15)
    wsd = [LESSON.learning_rate(step, "WSD") for step in range(LESSON.STEPS)]
    assert wsd[:320] == [LESSON.learning_rate(step, "constant") for step in range(320)]
    assert wsd[-1] == 0
    assert torch.tensor(wsd[319:]).diff().std() < 1e-9  # linear


@pytest.mark.parametrize("shape", [(4, 4), (6, 20)])
def test_newton_schulz(shape: tuple[int, int]) -> None:
    G = draw(*shape)
    expected = orthogonalize(G[None], torch.float64)[0]
    assert torch.allclose(LESSON.newton_schulz(G / G.norm()), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("limit", [0.5, 100.0])
def test_clipping(limit: float) -> None:
    gradients = [draw(2, 3).float(), draw(4, seed=1).float()]
    parameters = [torch.nn.Parameter(torch.zeros_like(g)) for g in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    torch.nn.utils.clip_grad_norm_(parameters, limit)
    ours = EXERCISES["clip_gradients"](gradients, limit)
    torch.testing.assert_close(ours, [parameter.grad for parameter in parameters], atol=1e-5, rtol=0)


def test_move_without_correction() -> None:
    m = v = 0.0
    for t in range(1, 8):
        _, m, v = LESSON.adamw_step(0.0, 3.0, m, v, t, 0.1, 0.0)
        assert EXERCISES["uncorrected_move"](t, 0.9, 0.95) == pytest.approx(m / v**0.5)
