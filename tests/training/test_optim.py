"""Optimizers and schedules: AdamW and the schedules equal formulas, Muon equals PyTorch's; outliers are detected."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from glassgpt.config.model import ModelConfig
from glassgpt.config.recipes import recipe
from glassgpt.config.schema import OptimConfig
from glassgpt.distributed.strategies import Strategy
from glassgpt.model.gpt import GPT
from glassgpt.training import optim
from glassgpt.training.optim import Muon, OutlierWatch, build_adamw, build_optimizers, lr_at, orthogonalize

SHAPE = ModelConfig(vocab_size=11, context_length=8, n_layer=2, n_head=2, n_embd=8, qk_norm=True)


# The strategy of a single process. Muon does not use its model.
SINGLE_PROCESS = Strategy(GPT.create(SHAPE, seed=0))


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return normally distributed numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# Schedule


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 6e-4 / 716),  # 8.38e-7
        (357, 6e-4 / 2),  # half of the warmup: 358/716
        (714, 6e-4 * 715 / 716),
        (715, 6e-4),  # the peak
        (9893, 3.3e-4),  # half a step before the middle of 715 and 19072: (6e-4 + 6e-5) / 2
        (19072, 6e-5),  # the last update
        (30000, 6e-5),
    ],
)
def test_gpt2s_learning_rates_equal_numbers_by_hand(step: int, expected: float) -> None:
    """The tolerance of 2e-4 is that of the numbers above, which have up to four digits."""
    assert lr_at(step, 19073, recipe("gpt2").optim) == pytest.approx(expected, rel=2e-4)


@pytest.mark.parametrize("step", [*range(0, 720, 7), 714, 715, 5000, 12345, 19072])
def test_gpt2s_schedule_is_close_to_that_of_build_nanogpt(step: int) -> None:
    """The reference warms up by (step + 1)/715, then follows a cosine over 18,358 steps, like build-nanogpt's `get_lr`.

    It stays at the peak for two updates and ends one step before the minimum, unlike ours, so the rates differ by up to
    1/715 = 0.14 %.
    """
    ramp = 6e-4 * (step + 1) / 715
    expected = (
        ramp if step < 715 else 6e-5 + 0.5 * (1 + math.cos(math.pi * (step - 715) / (19073 - 715))) * (6e-4 - 6e-5)
    )
    assert lr_at(step, 19073, recipe("gpt2").optim) == pytest.approx(expected, rel=1 / 715)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("linear", [0.25, 0.5, 0.75, 1.0, 0.8, 0.6, 0.4, 0.2]),
        ("cosine", [0.25, 0.5, 0.75, 1.0, 0.2 + 0.8 * (2 + 2**0.5) / 4, 0.6, 0.2 + 0.8 * (2 - 2**0.5) / 4, 0.2]),
        ("constant", [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_schedules_equal_numbers_by_hand(schedule: str, expected: list[float]) -> None:
    """Of eight updates, three are warmup; the peak is at update 3 and the minimum of 0.2 at update 7."""
    config = _config(schedule=schedule, warmup_steps=3, min_lr_ratio=0.2)
    assert [lr_at(step, 8, config) for step in range(8)] == pytest.approx([2.0 * x for x in expected], rel=1e-12)


def _config(**changes: object) -> OptimConfig:
    """Return a config with a peak learning rate of 2."""
    return OptimConfig(**({"lr": 2.0} | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (2, 1), (5, 5), (5, 50), (6, 5)])
def test_the_learning_rate_of_short_runs_is_positive_and_at_most_the_peak(
    schedule: str, steps: int, warmup: int
) -> None:
    """This includes a warmup as long as the run or longer, and a single step."""
    rates = [lr_at(step, steps, _config(schedule=schedule, warmup_steps=warmup)) for step in range(steps)]
    assert all(0 < rate <= 2.0 for rate in rates)
    assert rates[0] == pytest.approx(2.0 / (warmup + 1))


# AdamW


def test_adamw_equals_its_formula() -> None:
    """The reference is algorithm 2 of Loshchilov and Hutter (2019), for three updates in float64."""
    lr, wd, b1, b2, eps = 0.1, 0.3, 0.8, 0.9, 1e-3
    start = random(3, 4)
    parameter = nn.Parameter(start.clone())
    optimizer = build_adamw([parameter], OptimConfig(lr=lr, weight_decay=wd, beta1=b1, beta2=b2, eps=eps))
    expected, m, v = start.clone(), torch.zeros(3, 4), torch.zeros(3, 4)
    for t in range(1, 4):
        grad = random(3, 4, seed=t)
        parameter.grad = grad.clone()
        optimizer.step()
        m, v = b1 * m + (1 - b1) * grad, b2 * v + (1 - b2) * grad**2
        update = (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + eps)
        expected = expected - lr * wd * expected - lr * update
    torch.testing.assert_close(parameter.detach(), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_weight_decay_applies_once_to_each_matrix_and_to_nothing_else(name: str) -> None:
    """With zero gradients, every matrix is multiplied by 1 - lr x decay, and biases and norms do not change."""
    model = GPT.create(SHAPE, 0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for optimizer in build_optimizers(Strategy(model), _config(name=name, lr=0.5, weight_decay=0.2)):
        optimizer.step()
    for key, parameter in model.named_parameters():
        expected = before[key] * 0.9 if parameter.ndim == 2 else before[key]
        torch.testing.assert_close(parameter.detach(), expected, atol=1e-6, rtol=0, msg=key)


def test_muon_optimizes_the_matrices_of_blocks_and_adamw_the_rest() -> None:
    model = GPT.create(SHAPE, 0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    optimized = [
        {names[id(p)] for group in o.param_groups for p in group["params"]}
        for o in build_optimizers(Strategy(model), OptimConfig(name="muon"))
    ]
    block = ("attention.qkv", "attention.out", "feed_forward.up", "feed_forward.down")
    assert optimized[0] == {f"blocks.{n}.{part}.weight" for n in range(2) for part in block}
    assert optimized[0] | optimized[1] == set(names.values())
    assert not optimized[0] & optimized[1]


@pytest.mark.parametrize("kv_heads", [2, 1])
def test_muon_orthogonalizes_query_key_and_value_separately(kv_heads: int) -> None:
    shape = dataclasses.replace(SHAPE, n_kv_head=kv_heads)
    model = GPT.create(shape, 0)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    weight = model.blocks[0].attention.qkv.weight  # type: ignore[union-attr]
    before = weight.detach().clone()  # type: ignore[operator]
    muon = build_optimizers(Strategy(model), _config(name="muon", lr=1.0, weight_decay=0.0))[0]
    muon.step()
    rows = [heads * shape.resolved_head_dim for heads in (shape.n_head, kv_heads, kv_heads)]
    for update in torch.split(weight.detach() - before, rows):  # type: ignore[operator]
        values = torch.linalg.svdvals(update / (0.2 * math.sqrt(max(update.shape))))
        # Orthogonalized together, the three parts would share one matrix with orthogonal columns, and the singular
        # values of each part would be below 0.68.
        assert values.min() > 0.6
        assert values.max() < 1.3


# Muon


@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 8, 24), (2, 24, 8), (4, 1, 5)])
def test_orthogonalize_equalizes_singular_values_and_keeps_singular_vectors(shape: tuple[int, int, int]) -> None:
    """The result X of U S V' is a polynomial of it, so U' X V is diagonal, with that polynomial of S in float64.

    1e-4 is float32's rounding, which five steps with a slope of 3.4 amplify up to 500 times. The bounds of 0.68 and
    1.21 are those in the docstring of `orthogonalize`.
    """
    n, rows, columns = shape
    rank = min(rows, columns)
    u, v = (torch.linalg.qr(random(n, size, rank, seed=size))[0] for size in (rows, columns))
    values = torch.logspace(0, -2, rank, dtype=torch.float64)
    result = orthogonalize((u * values) @ v.mT).to(torch.float64)
    inner = u.mT @ result @ v
    diagonal = inner.diagonal(dim1=-2, dim2=-1)
    x = values / values.norm()
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5
    torch.testing.assert_close(inner, torch.diag_embed(x.expand(n, -1)), atol=1e-4, rtol=0)
    assert diagonal.min() > 0.68
    assert diagonal.max() < 1.21


def test_orthogonalize_treats_the_matrices_of_a_batch_separately() -> None:
    """A matrix gives the same result in a batch and alone, and at any scale, within float32's rounding."""
    batch = random(3, 6, 4, dtype=torch.float32)
    separate = torch.cat(
        [orthogonalize(scale * matrix[None]) for matrix, scale in zip(batch, (1, 1e-3, 1e3), strict=True)]
    )
    torch.testing.assert_close(orthogonalize(batch), separate, atol=1e-4, rtol=0)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_muon_orthogonalizes_in_the_runs_precision(precision: str) -> None:
    """Parameters stay float32, and updates in bfloat16 equal those in float32 within its digits, on a CPU."""
    updates = []
    for each in ("float32", precision):
        model = GPT.create(SHAPE, 0)
        weight = model.get_parameter("blocks.0.feed_forward.up.weight")
        before = weight.detach().clone()
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
        muon, _ = build_optimizers(Strategy(model), OptimConfig(name="muon", lr=0.1, weight_decay=0.0), each)
        muon.step()
        assert weight.dtype == torch.float32
        updates.append(weight.detach() - before)
    exact, rounded = updates
    assert torch.equal(exact, rounded) == (precision == "float32")
    torch.testing.assert_close(rounded, exact, atol=0.1 * exact.abs().max().item(), rtol=0)


@pytest.mark.parametrize("precision", ["float32", "tf32", "float16", "bfloat16"])
def test_the_dtype_of_muons_arithmetic_does_not_depend_on_the_device(
    monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    """The meta device stands for any device other than the CPU."""
    dtypes = set[torch.dtype]()

    def record_dtype(matrices: Tensor, dtype: torch.dtype) -> Tensor:
        dtypes.add(dtype)
        return matrices

    monkeypatch.setattr(optim, "orthogonalize", record_dtype)
    model = GPT.empty(SHAPE, torch.device("meta"))
    muon, _ = build_optimizers(Strategy(model), OptimConfig(name="muon"), precision)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    muon.step()
    assert dtypes == {torch.bfloat16 if precision == "bfloat16" else torch.float32}


@pytest.mark.parametrize("shape", [(32, 32), (64, 16), (16, 64)])
def test_muon_equals_pytorchs(shape: tuple[int, int]) -> None:
    """After three updates in the same scaling, weights differ by at most 5 % of their total change.

    `torch.optim.Muon` orthogonalizes in bfloat16, and five steps of a polynomial with a slope of 3.4 amplify its
    rounding of 0.4 %.
    """
    start = random(*shape, dtype=torch.float32)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    optimizers = (
        Muon([{"params": [ours]}], OptimConfig(lr=0.02, momentum=0.9, weight_decay=0.1), SINGLE_PROCESS),
        torch.optim.Muon(
            [theirs], lr=0.02, momentum=0.9, weight_decay=0.1, nesterov=True, adjust_lr_fn="match_rms_adamw"
        ),
    )
    for step in range(3):
        for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
            parameter.grad = random(*shape, seed=step + 1, dtype=torch.float32)
            optimizer.step()
    assert (ours - theirs).norm() < 0.05 * (theirs - start).norm()


@pytest.mark.parametrize("rows", [[8, 8, 8], [12, 6, 6]], ids=["all heads", "grouped heads"])
def test_a_fused_projection_is_updated_like_three_matrices(rows: list[int]) -> None:
    """Queries, keys and values change as if they were separate parameters, within float32's rounding."""
    start, grad = random(24, 8, dtype=torch.float32), random(24, 8, seed=1, dtype=torch.float32)
    grad[8:16] *= 100  # a large part must not reduce the updates of the other two
    fused, parts = nn.Parameter(start.clone()), [nn.Parameter(part.clone()) for part in torch.split(start, rows)]
    fused.grad = grad.clone()
    for parameter, piece in zip(parts, torch.split(grad, rows), strict=True):
        parameter.grad = piece.clone()
    for group in ({"params": [fused], "split": rows}, {"params": parts}):
        Muon([group], OptimConfig(lr=0.1, momentum=0.9, weight_decay=0.0), SINGLE_PROCESS).step()
    torch.testing.assert_close(fused.detach(), torch.cat([p.detach() for p in parts]), atol=1e-5, rtol=0)


def test_an_update_of_muon_is_as_large_as_one_of_adamw() -> None:
    """One learning rate can serve both: an entry changes by about 0.2 lr for any shape (Liu et al., 2025)."""
    for shape in ((64, 64), (256, 32), (32, 256)):
        parameter = nn.Parameter(torch.zeros(shape))
        parameter.grad = random(*shape, dtype=torch.float32)
        Muon([{"params": [parameter]}], OptimConfig(lr=1.0, momentum=0.95, weight_decay=0.0), SINGLE_PROCESS).step()
        assert parameter.detach().square().mean().sqrt().item() == pytest.approx(0.2, rel=0.2), shape


def test_muon_does_not_change_a_parameter_without_gradient() -> None:
    parameter = nn.Parameter(torch.ones(4, 4))
    Muon([{"params": [parameter]}], OptimConfig(lr=1.0, momentum=0.9, weight_decay=0.5), SINGLE_PROCESS).step()
    assert torch.equal(parameter.detach(), torch.ones(4, 4))


# Outliers


def test_an_outlier_is_far_from_the_mean_of_the_last_128_values() -> None:
    """The reference is the formula in NumPy, on random losses and norms. None of the first 128 values is an outlier."""
    generator = np.random.default_rng(0)
    pairs = generator.normal(3.0, 0.1, (400, 2))
    pairs[[60, 200, 301], 0] += 2.0
    pairs[350, 1] += 0.35
    watch, outliers = OutlierWatch(4.0), []
    for step, (loss, norm) in enumerate(pairs.tolist()):
        before = pairs[max(0, step - 128) : step]
        z = (pairs[step] - before.mean(axis=0)) / before.std(axis=0) if len(before) == 128 else np.zeros(2)
        outliers.append(watch.is_outlier(loss, norm))
        assert outliers[-1] == bool((z > 4.0).any()), step
    assert [step for step, is_outlier in enumerate(outliers) if is_outlier][:2] == [200, 301]
    assert not outliers[60]  # fewer than 128 values precede it
    resumed = OutlierWatch(4.0, watch.recent)
    assert [resumed.is_outlier(9.0, 3.0), watch.is_outlier(9.0, 3.0)] == [True, True]


@pytest.mark.parametrize("values", [[2.0] * 200, [2.0 - 0.01 * i for i in range(200)]])
def test_equal_and_falling_losses_are_not_outliers(values: list[float]) -> None:
    watch = OutlierWatch(3.0)
    assert not any(watch.is_outlier(value, 1.0) for value in values)


def test_a_threshold_of_0_disables_outlier_detection() -> None:
    watch = OutlierWatch(0.0)
    assert not any(watch.is_outlier(float(i % 100 == 99) * 1e9, 1.0) for i in range(500))
    assert watch.recent == []
