"""Components, spectra and gradients equal NumPy's, the definitions and finite differences."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from glassgpt.config.model import ModelConfig
from glassgpt.generation.inference import quantize
from glassgpt.interpretability import weights
from glassgpt.interpretability.weights import (
    gradient_norms,
    nearest,
    principal_components,
    singular_values,
    statistics,
    tables,
    thumbnail,
    weight_of,
)
from glassgpt.model.activation_checkpointing import checkpoint_activations
from glassgpt.model.gpt import GPT
from glassgpt.utils.errors import UserError
from slot_harness import TINY, V, random, random_model, token_ids


def small(**changes: Any) -> GPT:
    return random_model(ModelConfig(**(TINY | changes)))


def table(N: int = 50, C: int = 8) -> Tensor:
    """Return a table (N, C) with unequal variances along its columns and a mean that is not 0."""
    return random(N, C, seed=0) * torch.arange(1, C + 1) + 3


@pytest.mark.parametrize("elements", [2**24, 2 * 8 * 7])
def test_principal_components_equal_numpys(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference is NumPy's SVD of the centred table. Rows are processed in one piece and in chunks of seven."""
    monkeypatch.setattr(weights, "CHUNK_ELEMENTS", elements)
    x = table().float()
    points, explained = principal_components(x)
    centred = x.double().numpy() - x.double().numpy().mean(axis=0)
    u, s, vt = np.linalg.svd(centred, full_matrices=False)
    sign = np.sign(vt[np.arange(3), np.abs(vt[:3]).argmax(axis=1)])
    np.testing.assert_allclose(points.numpy(), u[:, :3] * s[:3] * sign, atol=1e-9)
    np.testing.assert_allclose(explained.numpy(), (s**2 / (s**2).sum())[:3], atol=1e-12)


def test_principal_components_of_degenerate_tables() -> None:
    """A table of equal rows has no variance; a table of two columns has two components."""
    points, explained = principal_components(torch.ones(5, 8))
    assert points.abs().max() == 0
    assert explained.tolist() == [0, 0, 0]
    points, explained = principal_components(table(C=2))
    assert points.shape == (50, 3)
    assert explained[2] == 0
    assert float(explained.sum()) == pytest.approx(1)


@pytest.mark.parametrize("shape", [(50, 8), (8, 50), (6, 6)])
def test_singular_values_equal_numpys(shape: tuple[int, int]) -> None:
    """They agree to 1e-8 of the largest, which is about 10. One singular value is 0."""
    x = random(*shape, seed=1)
    x[0] = x[1]
    expected = np.linalg.svd(x.numpy(), compute_uv=False)
    np.testing.assert_allclose(singular_values(x).numpy(), expected, atol=1e-7)
    with pytest.raises(UserError, match=r"shape \(8,\)"):
        singular_values(torch.ones(8))


def test_nearest_rows_are_ranked_by_cosine_not_by_distance() -> None:
    x = torch.tensor([[1.0, 0], [100, 1], [0.5, 0.5], [-1, 0], [0, 0], [1.1, 0.6]])
    ids, cosines = nearest(x, 0, k=12)
    assert ids.tolist() == [1, 5, 2, 4, 3]
    torch.testing.assert_close(cosines, torch.tensor([100 / 10001**0.5, 1.1 / 1.57**0.5, 0.5**0.5, 0, -1]))
    assert nearest(x, 0, k=2)[0].tolist() == [1, 5]
    with pytest.raises(UserError, match=r"no row 6.* 0 to 5"):
        nearest(x, 6)


def test_a_thumbnail_contains_the_mean_of_each_cell() -> None:
    x = random(12, 8, seed=2)
    torch.testing.assert_close(thumbnail(x, 4), x.view(4, 3, 4, 2).mean(dim=(1, 3)).float())
    torch.testing.assert_close(thumbnail(x[:, :6], 3), x[:, :6].reshape(3, 4, 3, 2).mean(dim=(1, 3)).float())
    torch.testing.assert_close(thumbnail(x, 256), x.float())
    torch.testing.assert_close(thumbnail(x[0], 2), x[0].view(1, 2, 4).mean(-1).float())


def test_statistics_equal_numpys() -> None:
    x = table().float()
    a = x.numpy().astype(np.float64)
    expected = {"norm": np.linalg.norm(a), "mean": a.mean(), "std": a.std(), "largest": np.abs(a).max()}
    assert statistics(x) == pytest.approx(expected, rel=1e-5)


def test_tables_do_not_include_padding() -> None:
    model = small(vocab_multiple=8, tied_head=False)
    shapes = {name: tuple(table.shape) for name, table in tables(model).items()}
    assert shapes == {"embedding": (V, 16), "head": (V, 16), "positions": (10, 16)}
    assert weight_of(model, "head.weight").shape == (V, 16)
    assert list(tables(small(position="rope"))) == ["embedding"]
    with pytest.raises(UserError, match=r"did you mean 'embedding.weight'"):
        weight_of(model, "embeddings.weight")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tied_head": False, "vocab_multiple": 8, "logit_softcap": 2.0},
        {"position": "rope", "n_kv_head": 2, "activation": "swiglu", "window": 3},
    ],
)
@pytest.mark.parametrize("recompute", ["none", "selective"])
def test_gradient_norms_equal_those_of_a_backward_pass(changes: dict[str, Any], recompute: str) -> None:
    """The reference is a written-out loss; norms agree to float32's rounding. `.grad` is unchanged."""
    model, ids = small(**changes), token_ids()
    for block in model.blocks:
        checkpoint_activations(block, recompute)
    with torch.inference_mode():
        value, norms = gradient_norms(model, ids.clone())
    assert all(parameter.grad is None for parameter in model.parameters())
    logits = model(ids[:, :-1])
    loss = -logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).mean()
    loss.backward()
    assert value == pytest.approx(loss.item(), rel=1e-6)
    assert list(norms) == [name for name, _ in model.named_parameters()]
    gradients = {}
    for name, (weight_norm, gradient_norm) in norms.items():
        weight, gradient = model.get_parameter(name).detach(), model.get_parameter(name).grad
        assert gradient is not None
        assert gradient_norm == pytest.approx(float(gradient.norm()), rel=1e-5)
        assert weight_norm == pytest.approx(float(weight.norm()), rel=1e-5)
        gradients[name] = gradient.clone()
    gradient_norms(model, ids)
    for name, gradient in gradients.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, rtol=0, atol=0)


def test_a_gradient_norm_is_the_slope_along_the_gradient() -> None:
    """By central differences, the loss rises by the gradient's norm per unit along the gradient."""
    model, ids = small(), token_ids()
    bias = model.get_parameter("norm.bias")
    (gradient,) = torch.autograd.grad(model(ids[:, :-1], ids[:, 1:]), [bias])
    direction, losses = gradient / gradient.norm(), []
    for change in (1e-5, -2e-5):
        with torch.no_grad():
            bias.add_(change * direction)
            losses.append(float(model(ids[:, :-1], ids[:, 1:])))
    norm = gradient_norms(model, ids)[1]["norm.bias"][1]
    assert (losses[0] - losses[1]) / 2e-5 == pytest.approx(norm, rel=1e-5)


def test_invalid_requests_are_refused() -> None:
    with pytest.raises(UserError, match="one token has no loss"):
        gradient_norms(small(), token_ids(length=1))
    with pytest.raises(UserError, match="trains on CUDA only"):
        gradient_norms(small(attention="flex"), token_ids())
    inference = quantize(small().float())
    assert torch.equal(tables(inference)["embedding"], inference.embedding.weight[: inference.vocab_size])
    with pytest.raises(UserError, match="no gradients"):
        gradient_norms(inference, token_ids())
