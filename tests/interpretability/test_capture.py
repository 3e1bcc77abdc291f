"""What the glass shows is what the model computed: on every slot, compiled or cached, and nothing of it stays behind."""

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, cast

import pytest
import torch
from allpairspy import AllPairs
from torch import Tensor

from glassgpt.config.model import ModelConfig
from glassgpt.generation.inference import InferenceGPT, PackedLinear, quantize
from glassgpt.interpretability.capture import ActivationCache, LayerActivations, attention_overview, capture
from glassgpt.interpretability.interventions import Edit, edited, effects
from glassgpt.interpretability.logit_lens import logit_lens, predictions
from glassgpt.model.activation_checkpointing import checkpoint_activations
from glassgpt.model.gpt import GPT, Block
from glassgpt.utils.errors import UserError
from slot_harness import SLOTS, TINY, T, combined, lively, token_ids

# Each pair of values meets, the kernel being one more slot.
COMBINATIONS = [
    (values[0], dict(zip(SLOTS, values[1:], strict=True)))
    for values in AllPairs([["sdpa", "explicit", "flex"], *map(list, SLOTS.values())])
]


def small(**changes: Any) -> GPT:
    return lively(ModelConfig(**(TINY | changes))).float()


def hooks_of(model: GPT) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@torch.no_grad()
def seen_of(model: GPT, ids: Tensor) -> ActivationCache:
    with capture(model) as seen:
        model(ids)
    return seen


@pytest.mark.parametrize(
    ("attention", "choice"), COMBINATIONS, ids=lambda part: part if isinstance(part, str) else " ".join(part.values())
)
def test_recomputed_attention_is_the_kernels(choice: dict[str, str], attention: str) -> None:
    """To 1e-5 in float32, with every slot: rounding of values of about 1 (FlexAttention sums in other blocks).

    The same call on the same tensors gives the same bits, so those are compared exactly. One head's product is another call: a head
    of 6 floats may begin at an address that is not a multiple of 16 bytes, the batched product of all heads works on aligned copies,
    and MKL sums in another order for unaligned operands on some CPUs (seen on AMD Zen 5, with one thread and with two).
    """
    model = lively(combined(choice, attention=attention)).float()
    seen = seen_of(model, token_ids())
    picture = attention_overview(seen)
    assert max(picture.kernel_errors) < 1e-5
    for layer, block in zip(seen.layers, cast(Iterable[Block], model.blocks), strict=True):
        weights = layer.pattern()
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones_like(weights[..., 0]))  # 1 to rounding
        assert bool((weights[..., ~layer.mask] == 0).all())
        assert torch.equal(layer.pattern(), weights)
        torch.testing.assert_close(layer.pattern(head=3), weights[:, 3], rtol=1e-5, atol=1e-6)
        # The residual stream is the sum of what was added to it.
        torch.testing.assert_close(layer.resid_mid, layer.resid_pre + layer.attn_out, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(layer.resid_post, layer.resid_mid + layer.mlp_out, rtol=1e-5, atol=1e-5)
        check_hook_points(model, layer, block)
        torch.testing.assert_close(block.feed_forward.down(layer.mlp_post), layer.mlp_out, rtol=0, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(model.logits(seen.ln_final), model(token_ids()), rtol=0, atol=0)
    assert hooks_of(model) == 0


@torch.no_grad()
def check_hook_points(model: GPT, layer: LayerActivations, block: Block) -> None:
    """q, k, v, scores and z by their definitions, from the block's input; to float32's rounding."""
    attention, config = block.attention, model.config
    split = attention.qkv(block.attention_norm(layer.resid_pre)).split(attention.split, dim=-1)
    q, k, v = (x.unflatten(-1, (-1, config.resolved_head_dim)).transpose(1, 2) for x in split)
    positions = torch.arange(q.shape[-2])
    expected = {"q": q, "k": k, "v": v, "q_norm": attention.q_norm(q), "k_norm": attention.k_norm(k)}
    expected |= {f"rot_{name}": attention.rotary(expected[f"{name}_norm"], positions) for name in "qk"}
    keys = expected["rot_k"].repeat_interleave(len(q[0]) // len(k[0]), dim=1)
    scores = expected["rot_q"] @ keys.transpose(-2, -1) / math.sqrt(config.resolved_head_dim)
    actual = {name: getattr(layer, name) for name in expected} | {"scores": layer.scores(), "z": layer.z}
    expected |= {"scores": scores.masked_fill(~layer.mask, -torch.inf), "z": layer.kernel_out}
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


def test_captures_that_end_in_another_order_leave_compiling_as_it_was() -> None:
    """As in two threads: the compiler's switch is the process's, and once it stayed turned."""
    first, second = capture(small()), capture(small())
    compiled: list[torch.fx.GraphModule] = []
    for enter in (first.__enter__, second.__enter__):
        enter()
    for leave in (first.__exit__, second.__exit__):
        leave(None, None, None)
    model = small()

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        compiled.append(graph)
        return graph.forward

    model.compile(backend=backend)
    with torch.no_grad():
        model(token_ids())
    assert compiled


def test_a_compiled_model_is_seen_and_stays_compiled() -> None:
    """After a compiled call, where hooks would not fire; what is seen is what the model computes, and nothing is compiled anew."""
    model, ids, compiled = small(), token_ids(), []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        compiled.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model.compile(backend=backend)
    with torch.no_grad():
        logits = model(ids)
        before = len(compiled)
        assert before > 0
        seen = seen_of(model, ids)
        torch.testing.assert_close(model.logits(seen.ln_final), logits)
        assert max(attention_overview(seen).kernel_errors) < 1e-5
        with edited(model, [Edit("block", 0)]):
            assert not torch.allclose(model(ids), logits)
        assert torch.equal(model(ids), logits)
    assert len(compiled) == before
    assert hooks_of(model) == 0


def interrupted(model: GPT) -> None:
    assert hooks_of(model) > 0
    raise KeyboardInterrupt


def test_hooks_are_gone_whatever_ends_it() -> None:
    """An interrupt inside, or a forward pass that fails."""
    model = small()
    for context in (capture(model), edited(model, [Edit("head", 0, 0), Edit("position", position=0)])):
        with pytest.raises(KeyboardInterrupt), context:
            interrupted(model)
        assert hooks_of(model) == 0
    with capture(model), pytest.raises(ValueError, match="do not fit"):
        model(token_ids(length=11))
    assert hooks_of(model) == 0


def test_nothing_of_it_is_in_a_checkpoint() -> None:
    model = small()
    keys = list(model.state_dict())
    with capture(model), edited(model, [Edit("head", 0, 0)]):
        model(token_ids())
        assert list(model.state_dict()) == keys
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize(
    "changes",
    [{}, {"window": 3}, {"window": 3, "window_globals": 2, "n_kv_head": 2, "position": "rope"}],
    ids=["full", "window", "globals"],
)
@torch.no_grad()
def test_a_cached_pass_is_seen_too(changes: dict[str, Any]) -> None:
    """One token after another, the rows of weights are those of the whole text, at the keys that are kept; to float32's rounding."""
    model, ids = small(**changes), token_ids()
    whole, cache = seen_of(model, ids), model.new_cache(len(ids), T)
    with capture(model) as seen:
        for start, end in ((0, 4), (4, 5), (5, 6), (6, 9), (9, 10)):
            model(ids[:, start:end], cache=cache)
            for layer, full, kept in zip(seen.layers, whole.layers, cache.layers, strict=True):
                weights, expected = layer.pattern(), full.pattern()[:, :, start:end]
                assert layer.kernel_error(weights) < 1e-5
                torch.testing.assert_close(layer.rot_q, full.rot_q[:, :, start:end], rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(layer.k, full.k[:, :, start:end], rtol=1e-4, atol=1e-5)
                if end == start + 1:  # one token: its keys are those that the cache holds, which go round in a window
                    expected = expected[..., kept.positions[: weights.shape[-1]]]
                    torch.testing.assert_close(weights, expected, rtol=1e-4, atol=1e-5)
                    assert bool((weights[..., ~layer.mask] == 0).all())


@pytest.mark.parametrize("window", [1, 3])
@torch.no_grad()
def test_what_was_seen_of_a_cache_stays(window: int) -> None:
    """Though the cache goes on, and in a window its buffers are written over. In one of a single token its values alone tell."""
    model, ids = small(window=window), token_ids()
    cache = model.new_cache(len(ids), T)
    model(ids[:, :5], cache=cache)
    with capture(model) as seen:
        model(ids[:, 5:6], cache=cache)
    before, values = seen.layers[0].pattern(), seen.layers[0].v.clone()
    model(ids[:, 6:], cache=cache)
    assert torch.equal(seen.layers[0].pattern(), before)
    assert torch.equal(seen.layers[0].v, values)


@pytest.mark.parametrize(
    "ask",
    [attention_overview, partial(logit_lens, small()), partial(predictions, small())],
    ids=["picture", "lens", "predictions"],
)
def test_before_a_pass_there_is_nothing_to_ask(ask: Callable[[ActivationCache], object]) -> None:
    with capture(small()) as seen, pytest.raises(UserError, match="no activations captured"):
        ask(seen)


def test_a_thumbnail_has_the_largest_weight_of_each_cell() -> None:
    """Where size is no divisor of the tokens, neighbouring cells share a row or column: cell i of 5 has those from floor(i T / 5) to
    ceil((i + 1) T / 5)."""
    length, size = 8, 5
    seen = seen_of(small(), token_ids(length=length))
    for layer, thumbnails in zip(seen.layers, attention_overview(seen, size).thumbnails, strict=True):
        weights = layer.pattern()[0]
        cells = [slice(i * length // size, -(-(i + 1) * length // size)) for i in range(size)]
        expected = torch.stack(
            [torch.stack([weights[:, row, column].amax(dim=(1, 2)) for column in cells], -1) for row in cells], 1
        )
        assert torch.equal(thumbnails, expected)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_a_training_step_is_seen_and_left_as_it_is(recompute: str) -> None:
    """In training mode, under activation checkpointing: what is seen is what was computed, and the gradients are the same bits."""
    model, ids = small(), token_ids()
    for block in model.blocks:
        checkpoint_activations(block, recompute)
    model.train()
    model(ids, ids.roll(1, 1)).backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    with capture(model) as seen:
        loss = model(ids, ids.roll(1, 1))
        loss.backward()
    assert max(attention_overview(seen).kernel_errors) < 1e-5
    assert not seen.layers[0].resid_post.requires_grad
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=0, atol=0)


def test_a_model_made_ready_to_write_is_seen_too() -> None:
    """Its modules are others around the same kernels: weights that sum to 1, and what it computes itself."""
    model, ids = small(n_embd=64), token_ids()
    for ready in (quantize(model), InferenceGPT(model, partial(PackedLinear, rows=1))):
        seen = seen_of(ready, ids)
        assert max(attention_overview(seen).kernel_errors) < 1e-5
        torch.testing.assert_close(ready.logits(seen.ln_final), ready(ids))
        torch.testing.assert_close(logit_lens(ready, seen).top_p[-1], ready(ids)[0].softmax(-1).topk(5).values)
        before, after = effects(ready, ids, [Edit("head", 0, 1)])
        assert not torch.equal(before, after)
        assert hooks_of(ready) == hooks_of(model) == 0
