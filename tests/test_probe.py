"""What the glass shows is what the model computed: on every slot, compiled or cached, and nothing of it stays behind."""

from typing import Any

import pytest
import torch
from allpairspy import AllPairs
from torch import Tensor

from glassgpt.config import ModelConfig
from glassgpt.model import GPT
from glassgpt.probe import Seen, attention_picture, capture
from slot_harness import SLOTS, TINY, combined, lively, token_ids

COMBINATIONS = [dict(zip(SLOTS, values, strict=True)) for values in AllPairs([list(values) for values in SLOTS.values()])]


def small(**changes: Any) -> GPT:
    return lively(ModelConfig(**(TINY | changes))).float()


def hooks_of(model: GPT) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@torch.no_grad()
def seen_of(model: GPT, ids: Tensor) -> Seen:
    with capture(model) as seen:
        model(ids)
    return seen


@pytest.mark.parametrize("attention", ["sdpa", "explicit", "flex"])
@pytest.mark.parametrize("choice", COMBINATIONS, ids=lambda choice: " ".join(choice.values()))
def test_recomputed_attention_is_the_kernels(choice: dict[str, str], attention: str) -> None:
    """To 1e-5 in float32, whatever the slots: rounding of values of a size of about 1 (FlexAttention sums in other blocks)."""
    model = lively(combined(choice, attention=attention)).float()
    seen = seen_of(model, token_ids())
    picture = attention_picture(seen)
    assert max(picture.differences) < 1e-5
    for layer, block in zip(seen.layers, model.blocks, strict=True):
        weights = layer.weights()
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones_like(weights[..., 0]))  # 1 to rounding
        assert bool((weights[..., ~layer.visible] == 0).all())
        torch.testing.assert_close(layer.weights(head=3), weights[:, 3], rtol=0, atol=0)
        # The residual stream is the sum of what was written into it.
        written = layer.stream_in + layer.attention_out + layer.feed_forward_out
        torch.testing.assert_close(layer.stream_out, written, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(block.feed_forward.down(layer.activations), layer.feed_forward_out, rtol=0, atol=0)  # type: ignore[operator, union-attr]
    with torch.no_grad():
        torch.testing.assert_close(model.logits(seen.hidden), model(token_ids()), rtol=0, atol=0)
    assert hooks_of(model) == 0
