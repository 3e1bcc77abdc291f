"""Lens, predictions and attribution against the model's own logits and against the definitions, on every slot."""

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
from slot_harness import SLOTS, TINY, combined, lively, token_ids

COMBINATIONS = [
    dict(zip(SLOTS, values, strict=True)) for values in AllPairs([list(values) for values in SLOTS.values()])
]


def small(**changes: Any) -> GPT:
    return lively(ModelConfig(**(TINY | changes))).float()


@torch.no_grad()
def seen_of(model: GPT, ids: Tensor) -> ActivationCache:
    with capture(model) as seen:
        model(ids)
    return seen


@pytest.mark.parametrize("choice", COMBINATIONS, ids=lambda choice: " ".join(choice.values()))
def test_parts_sum_to_the_models_logit(choice: dict[str, str]) -> None:
    """To 1e-4 in float32, the bar of issue 7, whatever the slots; and each head's part is what its columns of `out` write."""
    config = combined(choice)
    model = lively(config).float()
    uncapped = GPT.empty(dataclasses.replace(config, logit_softcap=None)).eval()
    uncapped.load_state_dict(model.state_dict())
    seen = seen_of(model, token_ids())
    with torch.no_grad():
        logits = uncapped(token_ids())[0]
    for position, token, against in ((0, 3, None), (4, 7, 2), (9, 0, 10)):
        made = logit_attribution(model, seen, position, token, against)
        expected = logits[position, token] - (0 if against is None else logits[position, against])
        assert made.logit == pytest.approx(float(logits[position, token]), abs=1e-4)
        assert sum(part.value for part in made.parts) == pytest.approx(float(expected), abs=1e-4)
        assert {part.kind for part in made.parts} >= {"embedding", "head", "feed_forward"}
        assert "patch" not in {part.kind for part in made.parts}
        assert [part.layer for part in made.parts if part.kind == "attention_bias"] == ([0, 1] if config.bias else [])
        assert len([part for part in made.parts if part.kind == "norm_bias"]) == config.resolved_norm_bias


@torch.no_grad()
def test_a_part_is_the_logit_that_would_be_missing() -> None:
    """Taken off the stream, at the norm's scale as it was, a part takes its value off the logit: the norm written out, in float64."""
    model = lively(ModelConfig(**TINY)).double()
    seen = seen_of(model, token_ids())
    x = seen.residual_stream[-1][0, 5]
    scale = (x.var(correction=0) + model.config.norm_eps).rsqrt()

    def logit(stream: Tensor) -> float:
        assert isinstance(model.norm.weight, Tensor)
        assert isinstance(model.norm.bias, Tensor)
        normed = (stream - stream.mean()) * scale * model.norm.weight + model.norm.bias
        return float(normed @ model.embedding.weight[4])

    parts = {part.name: part.value for part in logit_attribution(model, seen, 5, 4).parts}
    out = model.get_parameter("blocks.1.attention.out.weight")
    writes = {
        "embedding": seen.residual_stream[0][0, 5],
        "layer 1, head 2": out[:, 8:12] @ seen.layers[1].kernel_out[0, 2, 5],
        "layer 0, attention's bias": model.get_parameter("blocks.0.attention.out.bias"),
        "layer 0, feed-forward": seen.layers[0].mlp_out[0, 5],
    }
    for name, write in writes.items():
        assert parts[name] == pytest.approx(logit(x) - logit(x - write), abs=1e-9)  # float64's rounding
    assert parts["final norm's bias"] == pytest.approx(logit(torch.zeros_like(x)), abs=1e-9)


@torch.no_grad()
@pytest.mark.parametrize(
    "changes", [{}, {"logit_softcap": 2.0, "tied_head": False, "norm": "rmsnorm", "embedding_norm": True}]
)
@pytest.mark.parametrize("rows", [3, 100])
def test_the_last_depth_is_the_model(changes: dict[str, Any], rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """And each number is that of its definition, in chunks of three positions and in one; to float32's rounding."""
    monkeypatch.setattr(lens_module, "CHUNK_ELEMENTS", rows * 11)
    model, ids = small(vocab_multiple=8, **changes), token_ids()
    seen = seen_of(model, ids)
    made = logit_lens(model, seen, start=2, k=4, watch=[5, 0])
    for depth, stream in enumerate(seen.residual_stream):
        logits = model.logits(model.norm(stream))[0, 2:]
        check_against(logits, ids[0, 2:], made, depth)
        torch.testing.assert_close(made.norm[depth], stream[0, 2:].square().sum(-1).sqrt())
    torch.testing.assert_close(logits, model(ids)[0, 2:], rtol=0, atol=0)


def check_against(logits: Tensor, ids: Tensor, made: Lens, depth: int) -> None:
    p = logits.softmax(-1)
    order = logits.argsort(dim=-1, descending=True)
    assert made.top_ids[depth].tolist() == order[:, :4].tolist()
    torch.testing.assert_close(made.top_p[depth], p.gather(1, order[:, :4]))
    for column, token in enumerate((5, 0)):
        torch.testing.assert_close(made.watch_p[depth, :, column], p[:, token])
        assert made.watch_rank[depth, :, column].tolist() == [row.tolist().index(token) for row in order]
    following = ids[1:].tolist()
    assert made.next_rank[depth].tolist() == [
        row.tolist().index(token) for row, token in zip(order[:-1], following, strict=True)
    ] + [-1]
    torch.testing.assert_close(made.next_p[depth, :-1], p[:-1].gather(1, ids[1:, None])[:, 0])
    assert made.next_p[depth, -1].isnan()
    torch.testing.assert_close(made.entropy[depth], -(p * p.log2()).sum(-1))


@torch.no_grad()
def test_predictions_are_the_loss_in_bits() -> None:
    """The mean surprisal is the model's loss; the rest is what the lens says of the last depth."""
    model, ids = small(vocab_multiple=8), token_ids()
    seen = seen_of(model, ids)
    made, last = predictions(model, seen), logit_lens(model, seen)
    assert made.surprisal[0].isnan()
    loss = model(ids[:1, :-1], ids[:1, 1:])
    torch.testing.assert_close(made.surprisal[1:].mean(), loss / math.log(2))
    for mine, of_lens in ((made.top_ids, last.top_ids), (made.top_p, last.top_p), (made.entropy, last.entropy)):
        torch.testing.assert_close(mine, of_lens[-1])


def test_a_lens_inside_a_capture_is_not_taken_for_the_model() -> None:
    model, ids = small(), token_ids()
    with torch.no_grad(), capture(model) as seen:
        model(ids)
        hidden = seen.ln_final.clone()
        logit_lens(model, seen, stop=3)
    assert torch.equal(seen.ln_final, hidden)


@torch.no_grad()
def test_a_lens_finds_what_hardly_can_be() -> None:
    """A probability below float32's smallest still has a surprisal; more ids than the vocabulary has are not asked for; one token
    has no next."""
    model = small()
    model.embedding.weight.mul_(60)
    seen = seen_of(model, token_ids())
    bits = predictions(model, seen).surprisal[1:]
    assert bool(bits.isfinite().all())
    assert float(bits.max()) > 150
    assert logit_lens(model, seen, k=50).top_ids.shape == (3, 10, 11)
    alone = logit_lens(model, seen_of(model, token_ids(rows=1, length=1)))
    assert alone.next_rank.tolist() == [[-1]] * 3


def test_refusals() -> None:
    model = small()
    seen = seen_of(model, token_ids())
    for call, said in (
        (lambda: logit_lens(model, seen, 4, 11), "no positions 4 to 11.* 10 tokens"),
        (lambda: logit_lens(model, seen, watch=[11]), "no token 11.* 0 to 10"),
        (lambda: logit_attribution(model, seen, 10, 0), "no position 10"),
        (lambda: logit_attribution(model, seen, 0, 0, against=-1), "no token -1"),
    ):
        with pytest.raises(UserError, match=said):
            call()
