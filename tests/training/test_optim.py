"""Optimizers and schedule: AdamW by hand, Muon against PyTorch's, decay on matrices only, learning rates in numbers."""

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


# Of one process; Muon asks it for nothing about the model.
WHOLE = Strategy(GPT.create(SHAPE, seed=0))


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# Schedule


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 6e-4 / 716),  # 8.38e-7
        (357, 6e-4 / 2),  # halfway up: 358/716
        (714, 6e-4 * 715 / 716),
        (715, 6e-4),  # the peak
        (9893, 3.3e-4),  # half a step before the middle of 715 and 19072: (6e-4 + 6e-5) / 2
        (19072, 6e-5),  # the last update
        (30000, 6e-5),
    ],
)
def test_gpt2s_schedule_in_numbers(step: int, expected: float) -> None:
    """By hand, to the four digits written."""
    assert lr_at(step, 19073, recipe("gpt2").optim) == pytest.approx(expected, rel=2e-4)


@pytest.mark.parametrize("step", [*range(0, 720, 7), 714, 715, 5000, 12345, 19072])
def test_gpt2s_schedule_is_the_courses(step: int) -> None:
    """The seeds' get_lr, written from its description: up by (step + 1)/715, then a cosine over 18,358 steps.

    It holds the peak for two updates and stops one step short of the minimum, ours does neither: 1/715 = 0.14 % apart
    at most.
    """
    ramp = 6e-4 * (step + 1) / 715
    theirs = ramp if step < 715 else 6e-5 + 0.5 * (1 + math.cos(math.pi * (step - 715) / (19073 - 715))) * (6e-4 - 6e-5)
    assert lr_at(step, 19073, recipe("gpt2").optim) == pytest.approx(theirs, rel=1 / 715)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("linear", [0.25, 0.5, 0.75, 1.0, 0.8, 0.6, 0.4, 0.2]),
        ("cosine", [0.25, 0.5, 0.75, 1.0, 0.2 + 0.8 * (2 + 2**0.5) / 4, 0.6, 0.2 + 0.8 * (2 - 2**0.5) / 4, 0.2]),
        ("constant", [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_schedules_by_hand(schedule: str, expected: list[float]) -> None:
    """Eight updates, three of them warmup: the peak at update 3, the floor of 0.2 at update 7."""
    config = _config(schedule=schedule, warmup_steps=3, min_lr_ratio=0.2)
    assert [lr_at(step, 8, config) for step in range(8)] == pytest.approx([2.0 * x for x in expected], rel=1e-12)


def _config(**changes: object) -> OptimConfig:
    return OptimConfig(**({"lr": 2.0} | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (2, 1), (5, 5), (5, 50), (6, 5)])
def test_short_runs_have_a_rate(schedule: str, steps: int, warmup: int) -> None:
    """Warmup as long as the run or longer, or a single step: a rate above 0 and up to the peak at each update."""
    rates = [lr_at(step, steps, _config(schedule=schedule, warmup_steps=warmup)) for step in range(steps)]
    assert all(0 < rate <= 2.0 for rate in rates)
    assert rates[0] == pytest.approx(2.0 / (warmup + 1))


# AdamW


def test_adamw_is_the_formula() -> None:
    """Loshchilov and Hutter, 2019, algorithm 2, three updates in float64."""
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
def test_decay_falls_on_matrices_only_and_once_on_each(name: str) -> None:
    """With zero gradients all that moves is what decays: every matrix by 1 - lr x decay, no bias and no norm at all."""
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


def test_muon_takes_the_blocks_matrices_and_adamw_the_rest() -> None:
    model = GPT.create(SHAPE, 0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    owned = [
        {names[id(p)] for group in o.param_groups for p in group["params"]}
        for o in build_optimizers(Strategy(model), OptimConfig(name="muon"))
    ]
    block = ("attention.qkv", "attention.out", "feed_forward.up", "feed_forward.down")
    assert owned[0] == {f"blocks.{n}.{part}.weight" for n in range(2) for part in block}
    assert owned[0] | owned[1] == set(names.values())
    assert not owned[0] & owned[1]


@pytest.mark.parametrize("kv_heads", [2, 1])
def test_muon_turns_query_key_and_value_each_by_itself(kv_heads: int) -> None:
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
        # Fused, the three would share a matrix whose columns are at right angles, and each part's own values be below
        # 0.68.
        assert values.min() > 0.6
        assert values.max() < 1.3


# Muon


@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 8, 24), (2, 24, 8), (4, 1, 5)])
def test_orthogonalize_evens_out_the_singular_values_and_keeps_the_directions(shape: tuple[int, int, int]) -> None:
    """The image of U S V' is a polynomial in it, so U' X V is diagonal, and its diagonal that polynomial of S in
    float64.

    1e-4 is float32's rounding, which five steps with a slope of 3.4 amplify by up to 500. The bounds are the
    docstring's.
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


def test_orthogonalize_treats_each_matrix_by_itself() -> None:
    """In a batch as alone, and whatever the scale, to float32's rounding."""
    batch = random(3, 6, 4, dtype=torch.float32)
    alone = torch.cat(
        [orthogonalize(scale * matrix[None]) for matrix, scale in zip(batch, (1, 1e-3, 1e3), strict=True)]
    )
    torch.testing.assert_close(orthogonalize(batch), alone, atol=1e-4, rtol=0)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_muon_orthogonalizes_in_the_runs_precision(precision: str) -> None:
    """On a CPU; the parameters stay in float32, and the update is that in float32 to bfloat16's digits."""
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
def test_muons_arithmetic_does_not_depend_on_the_device(monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    """The meta device stands for any that is not a CPU."""
    dtypes = set[torch.dtype]()

    def observed(matrices: Tensor, dtype: torch.dtype) -> Tensor:
        dtypes.add(dtype)
        return matrices

    monkeypatch.setattr(optim, "orthogonalize", observed)
    model = GPT.empty(SHAPE, torch.device("meta"))
    muon, _ = build_optimizers(Strategy(model), OptimConfig(name="muon"), precision)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    muon.step()
    assert dtypes == {torch.bfloat16 if precision == "bfloat16" else torch.float32}


@pytest.mark.parametrize("shape", [(32, 32), (64, 16), (16, 64)])
def test_muon_is_pytorchs(shape: tuple[int, int]) -> None:
    """Three updates against `torch.optim.Muon` in the same scaling. It orthogonalises in bfloat16, and five steps of a
    polynomial with slope 3.4 amplify that rounding of 0.4 %: 5 % of the way that the weights went."""
    start = random(*shape, dtype=torch.float32)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    optimizers = (
        Muon([{"params": [ours]}], OptimConfig(lr=0.02, momentum=0.9, weight_decay=0.1), WHOLE),
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
def test_a_fused_projection_is_three_matrices(rows: list[int]) -> None:
    """Queries, keys and values move as if each were a parameter of its own, to float32's rounding."""
    start, grad = random(24, 8, dtype=torch.float32), random(24, 8, seed=1, dtype=torch.float32)
    grad[8:16] *= 100  # one large part must not make the other two small
    fused, parts = nn.Parameter(start.clone()), [nn.Parameter(part.clone()) for part in torch.split(start, rows)]
    fused.grad = grad.clone()
    for parameter, piece in zip(parts, torch.split(grad, rows), strict=True):
        parameter.grad = piece.clone()
    for group in ({"params": [fused], "split": rows}, {"params": parts}):
        Muon([group], OptimConfig(lr=0.1, momentum=0.9, weight_decay=0.0), WHOLE).step()
    torch.testing.assert_close(fused.detach(), torch.cat([p.detach() for p in parts]), atol=1e-5, rtol=0)


def test_muons_update_has_the_size_of_adamws() -> None:
    """Its promise, so that one learning rate serves both: an entry moves by about 0.2 lr, whatever the shape (Liu et
    al., 2025)."""
    for shape in ((64, 64), (256, 32), (32, 256)):
        parameter = nn.Parameter(torch.zeros(shape))
        parameter.grad = random(*shape, dtype=torch.float32)
        Muon([{"params": [parameter]}], OptimConfig(lr=1.0, momentum=0.95, weight_decay=0.0), WHOLE).step()
        assert parameter.detach().square().mean().sqrt().item() == pytest.approx(0.2, rel=0.2), shape


def test_a_parameter_without_gradient_is_left_alone() -> None:
    parameter = nn.Parameter(torch.ones(4, 4))
    Muon([{"params": [parameter]}], OptimConfig(lr=1.0, momentum=0.9, weight_decay=0.5), WHOLE).step()
    assert torch.equal(parameter.detach(), torch.ones(4, 4))


# Outliers


def test_an_outlier_is_told_by_its_distance_from_the_128_before() -> None:
    """Beside the formula in numpy, on losses and norms that are drawn; in the first 128 nothing is one."""
    generator = np.random.default_rng(0)
    pairs = generator.normal(3.0, 0.1, (400, 2))
    pairs[[60, 200, 301], 0] += 2.0
    pairs[350, 1] += 0.35
    watch, found = OutlierWatch(4.0), []
    for step, (loss, norm) in enumerate(pairs.tolist()):
        before = pairs[max(0, step - 128) : step]
        z = (pairs[step] - before.mean(axis=0)) / before.std(axis=0) if len(before) == 128 else np.zeros(2)
        found.append(watch.is_outlier(loss, norm))
        assert found[-1] == bool((z > 4.0).any()), step
    assert [step for step, is_outlier in enumerate(found) if is_outlier][:2] == [200, 301]
    assert not found[60]  # too early
    resumed = OutlierWatch(4.0, watch.recent)
    assert [resumed.is_outlier(9.0, 3.0), watch.is_outlier(9.0, 3.0)] == [True, True]


@pytest.mark.parametrize("values", [[2.0] * 200, [2.0 - 0.01 * i for i in range(200)]])
def test_equal_and_falling_losses_are_no_outliers(values: list[float]) -> None:
    watch = OutlierWatch(3.0)
    assert not any(watch.is_outlier(value, 1.0) for value in values)


def test_outliers_are_off_unless_asked_for() -> None:
    watch = OutlierWatch(0.0)
    assert not any(watch.is_outlier(float(i % 100 == 99) * 1e9, 1.0) for i in range(500))
    assert watch.recent == []
