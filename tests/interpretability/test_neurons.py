"""Values, direct effects and searches of neurons equal hooks and formulas written out here, for every slot."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from allpairspy import AllPairs
from torch import Tensor

from glassgpt.config.model import ModelConfig
from glassgpt.interpretability import neurons
from glassgpt.interpretability.capture import ActivationCache, capture
from glassgpt.interpretability.logit_lens import logit_attribution
from glassgpt.interpretability.neurons import NeuronSearch, neuron_logits, neuron_values
from glassgpt.model.gpt import GPT
from glassgpt.utils.errors import UserError
from slot_harness import SLOTS, TINY, V, combined, random_model, token_ids

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
    "relu": lambda x: x.clamp(min=0),
    "relu_squared": lambda x: x.clamp(min=0) ** 2,
    "silu": lambda x: x * x.sigmoid(),
}
COMBINATIONS = [dict(zip(SLOTS, values, strict=True)) for values in AllPairs(list(map(list, SLOTS.values())))]


def small(**changes: Any) -> GPT:
    return random_model(ModelConfig(**(TINY | changes))).float()


@torch.no_grad()
def captured(model: GPT, ids: Tensor) -> ActivationCache:
    with capture(model) as cache:
        model(ids)
    return cache


def direct_effect(model: GPT, x: Tensor, w: Tensor) -> Tensor:
    """Return head @ norm(w) in float64, with the final norm's scale fixed to that for the stream x."""
    x, w = x.double(), w.double()
    if model.config.norm == "layernorm":
        x, w = x - x.mean(), w - w.mean()
    w = w / (x.square().mean() + model.config.norm_eps).sqrt()
    weight = dict(model.named_parameters()).get("norm.weight")
    return model.head.weight[:V].double() @ (w if weight is None else w * weight.double())


@pytest.mark.parametrize("choice", COMBINATIONS, ids=lambda choice: " ".join(choice.values()))
@torch.no_grad()
def test_values_and_direct_effects_equal_hooks_and_formulas(choice: dict[str, str]) -> None:
    config = combined(choice)
    model = random_model(config).float()
    cache, position = captured(model, token_ids()), 4
    for i, layer in enumerate(cache.layers):
        values = neuron_values(model, i, layer.resid_mid)
        torch.testing.assert_close(values.post, layer.mlp_post, rtol=1e-5, atol=1e-6)
        if config.activation == "swiglu":
            assert values.pre_linear is not None
            post = values.pre * values.pre.sigmoid() * values.pre_linear
            torch.testing.assert_close(values.gate, values.pre * values.pre.sigmoid())
        else:
            post = ACTIVATIONS[config.activation](values.pre)
            assert values.gate is values.pre_linear is None
        torch.testing.assert_close(values.post, post)
        down = model.get_parameter(f"blocks.{i}.feed_forward.down.weight")
        effects = torch.stack([neuron_logits(model, cache, i, f, position) for f in range(down.shape[1])])
        x = cache.layers[-1].resid_post[0, position]
        expected = torch.stack([direct_effect(model, x, w) for w in down.T])
        torch.testing.assert_close(effects.double(), expected, rtol=1e-5, atol=1e-5)
        # All neurons and the bias together are what logit attribution gives the block.
        total = values.post[0, position].double() @ expected
        if config.bias:
            total += direct_effect(model, x, model.get_parameter(f"blocks.{i}.feed_forward.down.bias"))
        parts = logit_attribution(model, cache, position, 3).parts
        (block,) = [part.value for part in parts if part.kind == "feed_forward" and part.layer == i]
        assert float(total[3]) == pytest.approx(block, abs=1e-4)


def largest(model: GPT, windows: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the k largest values (L, k, F) of neurons, each of one window, with window and position."""
    with capture(model) as cache:
        model(windows)
    post = torch.stack([layer.mlp_post for layer in cache.layers])  # (L, N, T, F)
    first = int(windows.shape[1] > 1)
    values, positions = post[:, :, first:].max(dim=2)
    order = values.argsort(dim=1, descending=True)[:, :k]
    return values.gather(1, order), order, positions.gather(1, order) + first


@pytest.mark.parametrize(("n", "length"), [(9, 10), (2, 4), (6, 1)])
@pytest.mark.parametrize("changes", [{}, {"activation": "swiglu", "tied_head": False}])
@torch.no_grad()
def test_an_interrupted_search_finds_the_largest_values(
    changes: dict[str, Any], n: int, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows are searched two at a time. Before the end, the result is that of the windows searched so far."""
    monkeypatch.setattr(neurons, "BATCH_TOKENS", 2 * length)
    model = small(**changes).train()
    first = torch.randperm(V, generator=torch.Generator().manual_seed(0))[:length]
    windows = torch.stack([(first + i) % V for i in range(n)])  # all different, so that no values are equal
    search = NeuronSearch(model, windows, k=3)
    while not search.is_done:
        search.advance()
        expected = largest(model.eval(), windows[: search.searched], 3)
        model.train()
        for actual, wanted in zip((search.values, search.rows, search.positions), expected, strict=True):
            torch.testing.assert_close(actual, wanted)
    assert (search.searched, model.training) == (n, True)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_errors_name_what_is_out_of_range() -> None:
    model = small()
    cache: ActivationCache = captured(model, token_ids())
    for call, what in (
        (lambda: neuron_values(model, 2, cache.layers[0].resid_mid), "layer 2"),
        (lambda: neuron_logits(model, cache, 0, 64, 0), "neuron 64"),
        (lambda: neuron_logits(model, cache, 0, 0, 99), "position 99"),
        (lambda: NeuronSearch(model, torch.zeros(0, 4).long()), r"\(0, 4\)"),
    ):
        with pytest.raises(UserError, match=what):
            call()
    model.get_parameter("blocks.1.feed_forward.up.weight").data.fill_(torch.nan)
    with pytest.raises(UserError, match=r"blocks\.1\.feed_forward\.up\.weight"):
        NeuronSearch(model, token_ids()).run()
