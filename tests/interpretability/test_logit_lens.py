"""Lens, predictions and attribution equal the model's own logits and the definitions, for every slot."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from allpairspy import AllPairs
from torch import Tensor

from glassgpt.config.model import ModelConfig
from glassgpt.interpretability import logit_lens as lens_module
from glassgpt.interpretability.capture import ActivationCache, capture
from glassgpt.interpretability.logit_lens import Lens, logit_attribution, logit_lens, predictions
from glassgpt.model.gpt import GPT
from glassgpt.utils.errors import UserError
from slot_harness import SLOTS, TINY, combined, random_model, token_ids

COMBINATIONS = [
    dict(zip(SLOTS, values, strict=True)) for values in AllPairs([list(values) for values in SLOTS.values()])
]


def small(**changes: Any) -> GPT:
    return random_model(ModelConfig(**(TINY | changes))).float()


@torch.no_grad()
def captured(model: GPT, ids: Tensor) -> ActivationCache:
    with capture(model) as cache:
        model(ids)
    return cache


@pytest.mark.parametrize("choice", COMBINATIONS, ids=lambda choice: " ".join(choice.values()))
def test_contributions_sum_to_the_logit(choice: dict[str, str]) -> None:
    """The contributions of all parts sum to the logit before the soft-cap, to 1e-4 in float32, for every slot."""
    config = combined(choice)
    model = random_model(config).float()
    uncapped = GPT.empty(dataclasses.replace(config, logit_softcap=None)).eval()
    uncapped.load_state_dict(model.state_dict())
    cache = captured(model, token_ids())
    with torch.no_grad():
        logits = uncapped(token_ids())[0]
    for position, token, against in ((0, 3, None), (4, 7, 2), (9, 0, 10)):
        result = logit_attribution(model, cache, position, token, against)
        expected = logits[position, token] - (0 if against is None else logits[position, against])
        assert result.logit == pytest.approx(float(logits[position, token]), abs=1e-4)
        assert sum(part.value for part in result.parts) == pytest.approx(float(expected), abs=1e-4)
        assert {part.kind for part in result.parts} >= {"embedding", "head", "feed_forward"}
        assert "patch" not in {part.kind for part in result.parts}
        assert [part.layer for part in result.parts if part.kind == "attention_bias"] == ([0, 1] if config.bias else [])
        assert len([part for part in result.parts if part.kind == "norm_bias"]) == config.resolved_norm_bias


@torch.no_grad()
def test_a_contribution_is_the_change_of_the_logit_without_the_part() -> None:
    """The final norm's scale stays fixed; the norm is written out in float64."""
    model = random_model(ModelConfig(**TINY)).double()
    cache = captured(model, token_ids())
    x = cache.residual_stream[-1][0, 5]
    scale = (x.var(correction=0) + model.config.norm_eps).rsqrt()

    def logit(stream: Tensor) -> float:
        assert isinstance(model.norm.weight, Tensor)
        assert isinstance(model.norm.bias, Tensor)
        normed = (stream - stream.mean()) * scale * model.norm.weight + model.norm.bias
        return float(normed @ model.embedding.weight[4])

    parts = {part.name: part.value for part in logit_attribution(model, cache, 5, 4).parts}
    out = model.get_parameter("blocks.1.attention.out.weight")
    outputs = {
        "embedding": cache.residual_stream[0][0, 5],
        "layer 1, head 2": out[:, 8:12] @ cache.layers[1].kernel_out[0, 2, 5],
        "layer 0, attention's bias": model.get_parameter("blocks.0.attention.out.bias"),
        "layer 0, feed-forward": cache.layers[0].mlp_out[0, 5],
    }
    for name, output in outputs.items():
        assert parts[name] == pytest.approx(logit(x) - logit(x - output), abs=1e-9)  # rounding of float64
    assert parts["final norm's bias"] == pytest.approx(logit(torch.zeros_like(x)), abs=1e-9)


@torch.no_grad()
@pytest.mark.parametrize(
    "changes", [{}, {"logit_softcap": 2.0, "tied_head": False, "norm": "rmsnorm", "embedding_norm": True}]
)
@pytest.mark.parametrize("rows", [3, 100])
def test_each_depth_equals_norm_and_head_and_the_last_depth_equals_the_model(
    changes: dict[str, Any], rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every number equals its definition within float32's rounding, in chunks of three positions and in one chunk."""
    monkeypatch.setattr(lens_module, "CHUNK_ELEMENTS", rows * 11)
    model, ids = small(vocab_multiple=8, **changes), token_ids()
    cache = captured(model, ids)
    result = logit_lens(model, cache, start=2, k=4, watch=[5, 0])
    for depth, stream in enumerate(cache.residual_stream):
        logits = model.logits(model.norm(stream))[0, 2:]
        check_against(logits, ids[0, 2:], result, depth)
        torch.testing.assert_close(result.norm[depth], stream[0, 2:].square().sum(-1).sqrt())
    torch.testing.assert_close(logits, model(ids)[0, 2:], rtol=0, atol=0)


def check_against(logits: Tensor, ids: Tensor, result: Lens, depth: int) -> None:
    """Assert the lens at one depth by the definitions of its numbers."""
    p = logits.softmax(-1)
    order = logits.argsort(dim=-1, descending=True)
    assert result.top_ids[depth].tolist() == order[:, :4].tolist()
    torch.testing.assert_close(result.top_p[depth], p.gather(1, order[:, :4]))
    for column, token in enumerate((5, 0)):
        torch.testing.assert_close(result.watch_p[depth, :, column], p[:, token])
        assert result.watch_rank[depth, :, column].tolist() == [row.tolist().index(token) for row in order]
    following = ids[1:].tolist()
    assert result.next_rank[depth].tolist() == [
        row.tolist().index(token) for row, token in zip(order[:-1], following, strict=True)
    ] + [-1]
    torch.testing.assert_close(result.next_p[depth, :-1], p[:-1].gather(1, ids[1:, None])[:, 0])
    assert result.next_p[depth, -1].isnan()
    torch.testing.assert_close(result.entropy[depth], -(p * p.log2()).sum(-1))


@torch.no_grad()
def test_mean_surprisal_equals_the_models_loss() -> None:
    """Surprisal is in bits, the loss in nats. The other predictions equal the lens at the last depth."""
    model, ids = small(vocab_multiple=8), token_ids()
    cache = captured(model, ids)
    result, last = predictions(model, cache), logit_lens(model, cache)
    assert result.surprisal[0].isnan()
    loss = model(ids[:1, :-1], ids[:1, 1:])
    torch.testing.assert_close(result.surprisal[1:].mean(), loss / math.log(2))
    for actual, from_lens in (
        (result.top_ids, last.top_ids),
        (result.top_p, last.top_p),
        (result.entropy, last.entropy),
    ):
        torch.testing.assert_close(actual, from_lens[-1])


def test_a_capture_does_not_record_the_lens() -> None:
    model, ids = small(), token_ids()
    with torch.no_grad(), capture(model) as cache:
        model(ids)
        hidden = cache.ln_final.clone()
        logit_lens(model, cache, stop=3)
    assert torch.equal(cache.ln_final, hidden)


@torch.no_grad()
def test_edge_cases_of_the_lens() -> None:
    """Surprisal stays finite if a probability underflows, the vocabulary limits k, and one token has no next token."""
    model = small()
    model.embedding.weight.mul_(60)
    cache = captured(model, token_ids())
    bits = predictions(model, cache).surprisal[1:]
    assert bool(bits.isfinite().all())
    assert float(bits.max()) > 150
    assert logit_lens(model, cache, k=50).top_ids.shape == (3, 10, 11)
    single_token = logit_lens(model, captured(model, token_ids(rows=1, length=1)))
    assert single_token.next_rank.tolist() == [[-1]] * 3


def test_invalid_positions_and_tokens_are_refused() -> None:
    model = small()
    cache = captured(model, token_ids())
    for call, message in (
        (lambda: logit_lens(model, cache, 4, 11), "start 4 to stop 11.* 10 tokens"),
        (lambda: logit_lens(model, cache, watch=[11]), "no token 11.* 0 to 10"),
        (lambda: logit_attribution(model, cache, 10, 0), "no position 10"),
        (lambda: logit_attribution(model, cache, 0, 0, against=-1), "no token -1"),
    ):
        with pytest.raises(UserError, match=message):
            call()
