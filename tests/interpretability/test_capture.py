"""Captured activations equal what the model computed, for every slot, compiled or with a KV cache; no hook remains."""

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, cast

import pytest
import torch
from allpairspy import AllPairs
from torch import Tensor, nn

from glassgpt.config.model import ModelConfig
from glassgpt.generation.inference import InferenceGPT, PackedLinear, quantize
from glassgpt.interpretability.capture import ActivationCache, LayerActivations, attention_overview, capture
from glassgpt.interpretability.interventions import Edit, edited, effects
from glassgpt.interpretability.logit_lens import logit_lens, predictions
from glassgpt.model.activation_checkpointing import checkpoint_activations
from glassgpt.model.attention import attention_scores
from glassgpt.model.gpt import GPT, Block
from glassgpt.utils.errors import UserError
from slot_harness import SLOTS, TINY, T, combined, random_model, token_ids

# In these combinations, every value of a slot meets every value of every other slot; the kernel is one more slot.
COMBINATIONS = [
    (values[0], dict(zip(SLOTS, values[1:], strict=True)))
    for values in AllPairs([["sdpa", "explicit", "flex"], *map(list, SLOTS.values())])
]


def small(**changes: Any) -> GPT:
    return random_model(ModelConfig(**(TINY | changes))).float()


def hooks_of(model: GPT) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@torch.no_grad()
def captured(model: GPT, ids: Tensor) -> ActivationCache:
    with capture(model) as cache:
        model(ids)
    return cache


@pytest.mark.parametrize(
    ("attention", "choice"), COMBINATIONS, ids=lambda part: part if isinstance(part, str) else " ".join(part.values())
)
def test_activations_match_the_model(choice: dict[str, str], attention: str) -> None:
    """All values agree to 1e-5 in float32, the rounding of values of about 1, for every slot and kernel.

    The same call on the same tensors gives the same bits, so those values are compared exactly. The product over one
    head is a different call: a head of 6 floats may begin at an address that is not a multiple of 16 bytes, whereas the
    batched product over all heads works on aligned copies, and MKL sums unaligned operands in another order on some
    CPUs (observed on AMD Zen 5, with one thread and with two). FlexAttention also sums in other blocks.
    """
    model = random_model(combined(choice, attention=attention)).float()
    cache = captured(model, token_ids())
    assert max(attention_overview(cache)[2]) < 1e-5
    for layer, block in zip(cache.layers, cast(Iterable[Block], model.blocks), strict=True):
        weights = layer.pattern()
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones_like(weights[..., 0]))  # 1 within rounding
        assert bool((weights[..., ~layer.mask] == 0).all())
        assert torch.equal(layer.pattern(), weights)
        torch.testing.assert_close(layer.pattern(head=3), weights[:, 3], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(layer.row(4), weights[:, :, 4], rtol=1e-5, atol=1e-6)
        # The residual stream is the sum of its inputs.
        torch.testing.assert_close(layer.resid_mid, layer.resid_pre + layer.attn_out, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(layer.resid_post, layer.resid_mid + layer.mlp_out, rtol=1e-5, atol=1e-5)
        check_hook_points(model, layer, block)
        torch.testing.assert_close(block.feed_forward.down(layer.mlp_post), layer.mlp_out, rtol=0, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(model.logits(cache.ln_final), model(token_ids()), rtol=0, atol=0)
    assert hooks_of(model) == 0


class DistanceBias(nn.Module):
    """A position bias like in ALiBi: each head subtracts its slope times the distance."""

    def forward(self, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        slopes = torch.tensor([0.0, 0.5, 1.0, 2.0])
        return -slopes[:, None, None] * (q_pos[:, None] - k_pos)


@pytest.mark.parametrize("attention", ["sdpa", "explicit"])
@torch.no_grad()
def test_scores_include_a_position_bias(attention: str) -> None:
    model, ids = small(attention=attention), token_ids()
    for block in cast(Iterable[Block], model.blocks):
        block.attention.position_bias = DistanceBias()  # type: ignore[assignment]
    layer = captured(model, ids).layers[1]
    assert layer.kernel_error() < 1e-5
    assert layer.kernel_error(head=3) < 1e-5
    scores_without_bias = attention_scores(layer.rot_q, layer.rot_k)
    assert layer.scores()[0, 3, 6, 2] == pytest.approx(float(scores_without_bias[0, 3, 6, 2]) - 2.0 * 4, abs=1e-5)
    torch.testing.assert_close(layer.scores(head=3), layer.scores()[:, 3], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def check_hook_points(model: GPT, layer: LayerActivations, block: Block) -> None:
    """Assert q, k, v, scores and z by their definitions, computed from the block's input, within float32's rounding."""
    attention, config = block.attention, model.config
    split = attention.qkv(block.attention_norm(layer.resid_pre)).split(attention.split, dim=-1)
    q, k, v = (x.unflatten(-1, (-1, config.resolved_head_dim)).transpose(1, 2) for x in split)
    positions = torch.arange(q.shape[-2])
    expected = {"q": q, "k": k, "v": v, "q_norm": attention.q_norm(q), "k_norm": attention.k_norm(k)}
    expected |= {f"rot_{name}": attention.rotary(expected[f"{name}_norm"], positions) for name in "qk"}
    keys = expected["rot_k"].repeat_interleave(len(q[0]) // len(k[0]), dim=1)
    scores = expected["rot_q"] @ keys.transpose(-2, -1) / math.sqrt(config.resolved_head_dim)
    if (bias := attention.position_bias(positions, positions)) is not None:
        scores = scores + bias
    actual = {name: getattr(layer, name) for name in expected} | {"scores": layer.scores(), "z": layer.z}
    expected |= {"scores": scores.masked_fill(~layer.mask, -torch.inf), "z": layer.kernel_out}
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


def test_overlapping_captures_restore_compilation() -> None:
    """A capture disables compilation for the whole process. After two overlapping captures, it is enabled again."""
    torch.compiler.reset()  # earlier tests in this process may have reached the recompile limit
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


def test_a_compiled_model_is_captured_and_stays_compiled() -> None:
    """The capture works after a compiled call, in which hooks would not run, and nothing is compiled a second time."""
    torch.compiler.reset()
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
        cache = captured(model, ids)
        torch.testing.assert_close(model.logits(cache.ln_final), logits)
        assert max(attention_overview(cache)[2]) < 1e-5
        with edited(model, [Edit("block", 0)]):
            assert not torch.allclose(model(ids), logits)
        assert torch.equal(model(ids), logits)
    assert len(compiled) == before
    assert hooks_of(model) == 0


def raise_interrupt(model: GPT) -> None:
    assert hooks_of(model) > 0
    raise KeyboardInterrupt


def test_hooks_are_removed_after_errors() -> None:
    """Hooks are removed after an interrupt inside the context, and after a failed forward pass."""
    model = small()
    for context in (capture(model), edited(model, [Edit("head", 0, 0), Edit("position", position=0)])):
        with pytest.raises(KeyboardInterrupt), context:
            raise_interrupt(model)
        assert hooks_of(model) == 0
    with capture(model), pytest.raises(ValueError, match="do not fit"):
        model(token_ids(length=11))
    assert hooks_of(model) == 0


def test_the_state_dict_is_unchanged() -> None:
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
def test_capture_with_a_kv_cache_equals_capture_of_the_whole_text(changes: dict[str, Any]) -> None:
    """For a text in pieces, patterns equal the full text's rows at the cached keys, within float32's rounding."""
    model, ids = small(**changes), token_ids()
    full_text, kv_cache = captured(model, ids), model.new_cache(len(ids), T)
    with capture(model) as cache:
        for start, end in ((0, 4), (4, 5), (5, 6), (6, 9), (9, 10)):
            model(ids[:, start:end], cache=kv_cache)
            for layer, full, layer_kv in zip(cache.layers, full_text.layers, kv_cache.layers, strict=True):
                weights, expected = layer.pattern(), full.pattern()[:, :, start:end]
                assert layer.kernel_error(weights) < 1e-5
                torch.testing.assert_close(layer.rot_q, full.rot_q[:, :, start:end], rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(layer.k, full.k[:, :, start:end], rtol=1e-4, atol=1e-5)
                if end == start + 1:  # one token attends to the keys in the cache, a ring buffer if there is a window
                    expected = expected[..., layer_kv.positions[: weights.shape[-1]]]
                    torch.testing.assert_close(weights, expected, rtol=1e-4, atol=1e-5)
                    assert bool((weights[..., ~layer.mask] == 0).all())


@pytest.mark.parametrize("window", [1, 3])
@torch.no_grad()
def test_later_tokens_do_not_overwrite_captured_values(window: int) -> None:
    """With a window, the KV cache overwrites its buffers, so a capture must copy them.

    With a window of one token, every pattern is 1, so only the values v can show a missing copy.
    """
    model, ids = small(window=window), token_ids()
    kv_cache = model.new_cache(len(ids), T)
    model(ids[:, :5], cache=kv_cache)
    with capture(model) as cache:
        model(ids[:, 5:6], cache=kv_cache)
    before, values = cache.layers[0].pattern(), cache.layers[0].v.clone()
    model(ids[:, 6:], cache=kv_cache)
    assert torch.equal(cache.layers[0].pattern(), before)
    assert torch.equal(cache.layers[0].v, values)


@pytest.mark.parametrize(
    "analyze",
    [
        attention_overview,
        partial(logit_lens, small()),
        partial(predictions, small()),
        lambda cache: cache.layers[1].pattern(head=0),
        lambda cache: cache.layers[1].kernel_error(),
        lambda cache: cache.residual_stream,
    ],
    ids=["overview", "lens", "predictions", "pattern", "kernel_error", "residual_stream"],
)
def test_results_before_a_forward_pass_are_refused(analyze: Callable[[ActivationCache], object]) -> None:
    with capture(small()) as cache, pytest.raises(UserError, match="no activations captured"):
        analyze(cache)


def test_a_head_that_does_not_exist_is_refused() -> None:
    model = small()
    with capture(model) as cache:
        model(token_ids())
    layer = cache.layers[0]
    for call in (layer.scores, layer.pattern, partial(layer.kernel_error, None), partial(layer.kernel_error, layer.v)):
        for head in (-1, 4, 9):
            with pytest.raises(UserError, match=f"no head {head}; valid: 0 to 3"):
                call(head)
    with pytest.raises(AttributeError, match="patern"):
        layer.patern()  # type: ignore[attr-defined]


def test_a_thumbnail_has_the_largest_weight_of_each_cell() -> None:
    """If size does not divide T, cells overlap: cell i of 5 covers rows floor(i T / 5) to ceil((i + 1) T / 5)."""
    length, size = 8, 5
    cache = captured(small(), token_ids(length=length))
    for layer, thumbnails in zip(cache.layers, attention_overview(cache, size)[0], strict=True):
        weights = layer.pattern()[0]
        cells = [slice(i * length // size, -(-(i + 1) * length // size)) for i in range(size)]
        expected = torch.stack(
            [torch.stack([weights[:, row, column].amax(dim=(1, 2)) for column in cells], -1) for row in cells], 1
        )
        assert torch.equal(thumbnails, expected)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_capturing_a_training_step_does_not_change_its_gradients(recompute: str) -> None:
    """In training mode and with activation checkpointing, gradients have the same bits with and without a capture."""
    model, ids = small(), token_ids()
    for block in model.blocks:
        checkpoint_activations(block, recompute)
    model.train()
    model(ids, ids.roll(1, 1)).backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    with capture(model) as cache:
        loss = model(ids, ids.roll(1, 1))
        loss.backward()
    assert max(attention_overview(cache)[2]) < 1e-5
    assert not cache.layers[0].resid_post.requires_grad
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=0, atol=0)


def test_inference_models_are_captured_and_edited() -> None:
    """Inference models have other linear modules around the same attention kernels."""
    model, ids = small(n_embd=64), token_ids()
    for inference in (quantize(model), InferenceGPT(model, partial(PackedLinear, rows=1))):
        cache = captured(inference, ids)
        assert max(attention_overview(cache)[2]) < 1e-5
        torch.testing.assert_close(inference.logits(cache.ln_final), inference(ids))
        torch.testing.assert_close(logit_lens(inference, cache).top_p[-1], inference(ids)[0].softmax(-1).topk(5).values)
        before, after = effects(inference, ids, [Edit("head", 0, 1)])
        assert not torch.equal(before, after)
        assert hooks_of(inference) == hooks_of(model) == 0
