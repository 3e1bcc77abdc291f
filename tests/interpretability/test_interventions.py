"""Edits equal their equivalents in float64: weights set to 0, tokens removed from the text, hand-computed outputs."""

import copy
from typing import Any

import pytest
import torch
from allpairspy import AllPairs
from torch import Tensor

from glassgpt.config.model import ModelConfig
from glassgpt.interpretability.capture import ActivationCache, attention_overview, capture
from glassgpt.interpretability.interventions import Edit, edited, effects
from glassgpt.interpretability.logit_lens import logit_attribution
from glassgpt.model.gpt import GPT, Block
from glassgpt.utils.errors import UserError
from slot_harness import SLOTS, TINY, T, V, combined, random_model, token_ids

COMBINATIONS = [
    dict(zip(SLOTS, values, strict=True)) for values in AllPairs([list(values) for values in SLOTS.values()])
]
KERNELS = ["sdpa", "explicit", "flex"]
# In these combinations, every value of a slot meets every value of every other slot; the kernel is one more slot.
WITH_KERNELS = [
    (values[0], dict(zip(SLOTS, values[1:], strict=True)))
    for values in AllPairs([KERNELS, *(list(values) for values in SLOTS.values())])
]


def small(**changes: Any) -> GPT:
    return random_model(ModelConfig(**(TINY | changes)))


@torch.no_grad()
def captured(model: GPT, ids: Tensor) -> ActivationCache:
    with capture(model) as activations:
        model(ids)
    return activations


@torch.no_grad()
def logits_of(model: GPT, ids: Tensor, *edits: Edit, source: ActivationCache | None = None) -> Tensor:
    with edited(model, edits, source):
        logits: Tensor = model(ids)
    return logits


def close(actual: Tensor, expected: Tensor) -> None:
    """Assert equality to 1e-10: float64's rounding of sums in another order, of numbers up to about 100."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)


def hooks_of(model: GPT) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def block_of(model: GPT, layer: int) -> Block:
    block = model.blocks[layer]
    assert isinstance(block, Block)
    return block


@torch.no_grad()
def zero_weights(model: GPT, kind: str, layer: int, head: int = 0) -> GPT:
    """Return a copy of the model in which the output weights of one part are 0."""
    other = copy.deepcopy(model)
    block, D = block_of(other, layer), model.config.resolved_head_dim
    if kind == "head":
        block.attention.out.weight[:, head * D : (head + 1) * D] = 0
    if kind in ("attention", "block"):
        for parameter in block.attention.out.parameters():
            parameter.zero_()
    if kind in ("feed_forward", "block"):
        for parameter in block.feed_forward.down.parameters():
            parameter.zero_()
    return other


@pytest.mark.parametrize("choice", COMBINATIONS, ids=lambda choice: " ".join(choice.values()))
def test_ablation_equals_zero_weights(choice: dict[str, str]) -> None:
    """For every slot, this holds for each kind of part and for two parts. An edit of one position changes no other."""
    model, ids = random_model(combined(choice)), token_ids()
    unedited = logits_of(model, ids)
    for kind, layer, head in (
        ("head", 0, 1),
        ("head", 1, 3),
        ("attention", 0, None),
        ("feed_forward", 1, None),
        ("block", 0, None),
    ):
        with torch.no_grad():
            expected = zero_weights(model, kind, layer, head or 0)(ids)
        ablated = logits_of(model, ids, Edit(kind, layer, head))  # type: ignore[arg-type]
        close(ablated, expected)
        assert not torch.equal(ablated, unedited)
        if layer == 1:
            at_position_4 = logits_of(model, ids, Edit(kind, layer, head, position=4))  # type: ignore[arg-type]
            close(at_position_4[:, 4], ablated[:, 4])
            rest = [0, 1, 2, 3, 5, 6, 7, 8, 9]
            close(at_position_4[:, rest], unedited[:, rest])
    both = zero_weights(zero_weights(model, "head", 1, 2), "feed_forward", 0)
    with torch.no_grad():
        expected = both(ids)
    close(logits_of(model, ids, Edit("feed_forward", 0), Edit("head", 1, 2)), expected)
    assert hooks_of(model) == 0


@pytest.mark.parametrize(
    ("attention", "choice"), WITH_KERNELS, ids=lambda part: part if isinstance(part, str) else " ".join(part.values())
)
def test_no_later_token_attends_to_a_hidden_token(choice: dict[str, str], attention: str) -> None:
    """For every slot and kernel: logits up to it are unchanged; later ones do not depend on it; its weights are 0."""
    model, ids, hidden = random_model(combined(choice, attention=attention)), token_ids(), Edit("position", position=3)
    other = ids.clone()
    other[:, 3] = (ids[:, 3] + 1) % V
    with torch.no_grad(), edited(model, [hidden]), capture(model) as activations:
        logits = model(ids)
    close(logits[:, :4], logits_of(model, ids)[:, :4])
    close(logits[:, 4:], logits_of(model, other, hidden)[:, 4:])
    for layer in activations.layers:
        weights = layer.pattern()
        assert bool((weights[:, :, 4:, 3] == 0).all())
        assert bool((weights[:, :, 3, 3] > 0).all())
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
        assert layer.kernel_error() < 1e-10


@pytest.mark.parametrize("attention", KERNELS)
def test_hiding_a_token_equals_removing_it(attention: str) -> None:
    """One or two tokens are hidden, in a model without position encoding."""
    model, ids = small(position="none", attention=attention, n_kv_head=2), token_ids()
    for hidden in ([0], [4], [2, 5]):
        kept = [t for t in range(T) if t not in hidden]
        edits = [Edit("position", position=p) for p in hidden]
        close(logits_of(model, ids, *edits)[:, kept], logits_of(model, ids[:, kept]))


@torch.no_grad()
def test_a_token_can_be_hidden_in_one_layer_only() -> None:
    model = small()
    with edited(model, [Edit("position", layer=1, position=3)]), capture(model) as activations:
        model(token_ids())
    assert bool((activations.layers[0].pattern()[:, :, 4:, 3] > 0).all())
    assert bool((activations.layers[1].pattern()[:, :, 4:, 3] == 0).all())


@torch.no_grad()
def logits_with_outputs(
    model: GPT, activations: ActivationCache, attention: Tensor, feed_forward: Tensor | None = None
) -> Tensor:
    """Return the logits if the last layer's attention adds `attention` and its feed-forward adds `feed_forward`.

    If `feed_forward` is None, the block computes it from the changed residual stream.
    """
    block, layer = block_of(model, 1), activations.layers[1]
    x = layer.resid_pre + attention
    feed_forward_out = block.feed_forward(block.feed_forward_norm(x)) if feed_forward is None else feed_forward
    return model.logits(model.norm(x + feed_forward_out))


@torch.no_grad()
def test_mean_ablation_uses_the_mean_over_the_positions_of_each_text() -> None:
    model, ids = small(n_kv_head=2), token_ids()
    activations = captured(model, ids)
    attention, heads = activations.layers[1].attn_out, activations.layers[1].kernel_out
    columns = block_of(model, 1).attention.out.weight[:, 8:12]
    change = (heads.mean(dim=2, keepdim=True) - heads)[:, 2] @ columns.T
    change_at_5 = torch.zeros_like(change)
    change_at_5[:, 5] = change[:, 5]
    average = attention.mean(dim=1, keepdim=True)
    for edit, expected in (
        (Edit("attention", 1, by="mean"), logits_with_outputs(model, activations, average)),
        (Edit("head", 1, 2, by="mean"), logits_with_outputs(model, activations, attention + change)),
        (Edit("head", 1, 2, position=5, by="mean"), logits_with_outputs(model, activations, attention + change_at_5)),
        (
            Edit("feed_forward", 1, by="mean"),
            logits_with_outputs(model, activations, attention, activations.layers[1].mlp_out.mean(dim=1, keepdim=True)),
        ),
    ):
        close(logits_of(model, ids, edit), expected)


def test_the_order_of_edits_does_not_matter() -> None:
    """The mean is computed without the other edit of the same part, whichever edit comes first."""
    model, ids = small(), token_ids()
    one, other = Edit("head", 0, 2, position=1), Edit("head", 0, 2, position=6, by="mean")
    assert torch.equal(logits_of(model, ids, one, other), logits_of(model, ids, other, one))
    everywhere = Edit("head", 0, 2, by="mean")
    assert torch.equal(logits_of(model, ids, one, everywhere), logits_of(model, ids, everywhere))


@torch.no_grad()
def test_a_patch_from_the_same_text_changes_nothing() -> None:
    model, ids = small(n_kv_head=2, window=3, norm="rmsnorm"), token_ids()
    activations = captured(model, ids)
    edits = [
        Edit(kind, layer, by="patch") for kind in ("attention", "feed_forward", "block", "residual") for layer in (0, 1)
    ]
    edits += [Edit("head", 0, head, by="patch") for head in range(4)]
    for several in ([edit] for edit in edits), [edits]:
        for chosen in several:
            close(logits_of(model, ids, *chosen, source=activations), model(ids))


@torch.no_grad()
def test_a_patch_replaces_values_by_those_of_the_source_text() -> None:
    """A patched residual stream gives the source's logits; patched parts give hand-computed logits."""
    model, ids, other = small(n_kv_head=2), token_ids(), token_ids().flip(1)
    activations, source = captured(model, ids), captured(model, other)
    source_logits, unedited = model(other), model(ids)
    last = logits_of(model, ids, Edit("residual", 1, position=9, by="patch"), source=source)
    close(last[:, 9], source_logits[:, 9])
    close(last[:, :9], unedited[:, :9])
    close(logits_of(model, ids, Edit("residual", 0, by="patch"), source=source), source_logits)
    own_layer, source_layer = activations.layers[1], source.layers[1]
    columns = block_of(model, 1).attention.out.weight[:, 4:8]
    head = own_layer.attn_out + (source_layer.kernel_out - own_layer.kernel_out)[:, 1] @ columns.T
    for edit, expected in (
        (Edit("attention", 1, by="patch"), logits_with_outputs(model, activations, source_layer.attn_out)),
        (Edit("head", 1, 1, by="patch"), logits_with_outputs(model, activations, head)),
        (
            Edit("feed_forward", 1, by="patch"),
            logits_with_outputs(model, activations, own_layer.attn_out, source_layer.mlp_out),
        ),
        (
            Edit("block", 1, by="patch"),
            logits_with_outputs(model, activations, source_layer.attn_out, source_layer.mlp_out),
        ),
    ):
        close(logits_of(model, ids, edit, source=source), expected)


@torch.no_grad()
def test_a_patch_of_one_position_from_a_longer_text() -> None:
    """One source text is used for a batch of two."""
    model, ids = small(), token_ids(length=6)
    source = captured(model, token_ids()[:1])
    patched = logits_of(model, ids, Edit("residual", 1, position=5, by="patch"), source=source)
    close(patched[:, 5], model(token_ids()[:1])[:, 5].expand(2, -1))


def test_effects_returns_the_logits_without_and_with_the_edits() -> None:
    model, ids, edits = small(logit_softcap=2.0), token_ids(), [Edit("head", 0, 1)]
    before, after = effects(model, ids, edits)
    close(before, logits_of(model, ids))
    close(after, logits_of(model, ids, *edits))
    close(effects(model, ids, edits, position=7).change, (after - before)[:, 7])


@pytest.mark.parametrize("capture_first", [True, False])
@torch.no_grad()
def test_a_capture_is_consistent_under_edits(capture_first: bool) -> None:
    """Patterns match the kernel and parts sum to the logit, whichever of the two contexts is the outer one."""
    model, ids = small(n_kv_head=2), token_ids()
    source = captured(model, ids.flip(1))
    edits = [Edit("head", 0, 1), Edit("attention", 1), Edit("feed_forward", 0, by="mean"), Edit("position", position=2)]
    for several, patched in ((edits, False), ([*edits, Edit("residual", 0, by="patch")], True)):
        first, second = capture(model), edited(model, several, source)
        if capture_first:
            with first as activations, second:
                logits = model(ids)
        else:
            with second, first as activations:
                logits = model(ids)
        assert max(attention_overview(activations)[2]) < 1e-10
        assert bool((activations.layers[1].attn_out == 0).all())
        result = logit_attribution(model, activations, 7, 3)
        parts = {part.name: part.value for part in result.parts}
        assert sum(parts.values()) == pytest.approx(float(logits[0, 7, 3]), abs=1e-9)
        assert parts["layer 0, head 1"] == parts["layer 1, attention's bias"] == parts["layer 1, head 0"] == 0
        assert ("layer 0, patched in" in parts) == patched
        if patched:
            continue
        for layer in activations.layers:
            close(layer.resid_post, layer.resid_pre + layer.attn_out + layer.mlp_out)


def test_invalid_edits_are_refused() -> None:
    model, ids = small(), token_ids()
    source = captured(model, ids)
    for edit, message in (
        (Edit("head", 2, 0), "no layer 2.* 0 to 1"),
        (Edit("head", 0, 4), "no head 4.* 0 to 3"),
        (Edit("head", 0), "needs a head"),
        (Edit("attention", 0, 1), "does not take a head"),
        (Edit("block"), "needs a layer.* 0 to 1"),
        (Edit("attention", 0, position=10), "no position 10.* 0 to 9"),
        (Edit("position", position=-1), "no position -1"),
        (Edit("position"), "needs a position"),
        (Edit("position", position=1, by="mean"), "only by 'zero'"),
        (Edit("residual", 0), "only by 'patch'"),
    ):
        with pytest.raises(UserError, match=message):
            effects(model, ids, [edit], source)
        assert hooks_of(model) == 0
    with pytest.raises(UserError, match=r"edits must be Sequence\[Edit\], got Edit"):
        effects(model, ids, Edit("head", 0, 0))  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"edits\.kind .*'head'.*'haed'"):
        Edit("haed", 0, 0)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"edits\.by .*'zero' or 'mean' or 'patch'.*'nothing'"):
        Edit("head", 0, 0, by="nothing")  # type: ignore[arg-type]


def test_source_texts_of_another_shape_are_refused() -> None:
    model, ids = small(), token_ids()
    short, three = captured(model, ids[:, :6]), captured(model, token_ids(rows=3))
    other_model = captured(small(n_layer=1), ids)
    for edit, source, message in (
        (Edit("head", 0, 0, by="patch"), None, "needs `source`"),
        (Edit("head", 0, 0, by="patch"), short, "6 tokens, this one 10"),
        (Edit("residual", 0, position=6, by="patch"), short, "no position in the source text 6.* 0 to 5"),
        (Edit("block", 0, by="patch"), three, "3 source texts for a batch of 2"),
        (Edit("block", 0, by="patch"), other_model, "another shape"),
    ):
        with pytest.raises(UserError, match=message):
            effects(model, ids, [edit], source)
        assert hooks_of(model) == 0


@torch.no_grad()
def test_edits_with_a_kv_cache() -> None:
    """An ablated head stays ablated for all tokens; hiding a token is refused."""
    model, ids = small(), token_ids()
    with edited(model, [Edit("head", 0, 2)]):
        kv_cache = model.new_cache(2, T)
        parts = [model(ids[:, start:end], cache=kv_cache) for start, end in ((0, 4), (4, 5), (5, T))]
    close(torch.cat(parts, dim=1), zero_weights(model, "head", 0, 2)(ids))
    with edited(model, [Edit("position", position=2)]):
        kv_cache = model.new_cache(2, T)
        model(ids[:, :4], cache=kv_cache)
        with pytest.raises(UserError, match="KV cache"):
            model(ids[:, 4:5], cache=kv_cache)
    assert hooks_of(model) == 0


def test_gradients_pass_through_edits() -> None:
    """The gradients of an edited model equal those of the model with zero weights."""
    model, ids = small(), token_ids()
    other = zero_weights(model, "head", 0, 2)
    with edited(model, [Edit("head", 0, 2)]):
        model(ids, ids.roll(1, 1)).backward()
    other(ids, ids.roll(1, 1)).backward()
    mine, expected = (m.get_parameter("blocks.0.attention.qkv.weight").grad for m in (model, other))
    assert mine is not None
    assert expected is not None
    close(mine, expected)
