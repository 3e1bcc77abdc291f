"""Captured activations are what the model computed, with every slot, compiled or cached; and no hook remains."""

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

# Each pair of values meets, the kernel being one more slot.
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
    """To 1e-5 in float32, with every slot: rounding of values of about 1 (FlexAttention sums in other blocks).

    The same call on the same tensors gives the same bits, so those are compared exactly. One head's product is another
    call: a head of 6 floats may begin at an address that is not a multiple of 16 bytes, the batched product of all
    heads works on aligned copies, and MKL sums in another order for unaligned operands on some CPUs (seen on AMD Zen 5,
    with one thread and with two).
    """
    model = random_model(combined(choice, attention=attention)).float()
    cache = captured(model, token_ids())
    assert max(attention_overview(cache)[2]) < 1e-5
    for layer, block in zip(cache.layers, cast(Iterable[Block], model.blocks), strict=True):
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
        torch.testing.assert_close(model.logits(cache.ln_final), model(token_ids()), rtol=0, atol=0)
    assert hooks_of(model) == 0


class DistanceBias(nn.Module):
    """As ALiBi: each head subtracts its slope times the distance."""

    def forward(self, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        slopes = torch.tensor([0.0, 0.5, 1.0, 2.0])
        return -slopes[:, None, None] * (q_pos[:, None] - k_pos)


@pytest.mark.parametrize("attention", ["sdpa", "explicit"])
@torch.no_grad()
def test_a_position_bias_is_in_the_scores(attention: str) -> None:
    model, ids = small(attention=attention), token_ids()
    for block in cast(Iterable[Block], model.blocks):
        block.attention.position_bias = DistanceBias()  # type: ignore[assignment]
    layer = captured(model, ids).layers[1]
    assert layer.kernel_error() < 1e-5
    assert layer.kernel_error(head=3) < 1e-5
    without = attention_scores(layer.rot_q, layer.rot_k)
    assert layer.scores()[0, 3, 6, 2] == pytest.approx(float(without[0, 3, 6, 2]) - 2.0 * 4, abs=1e-5)
    torch.testing.assert_close(layer.scores(head=3), layer.scores()[:, 3], rtol=1e-5, atol=1e-5)


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
    if (bias := attention.position_bias(positions, positions)) is not None:
        scores = scores + bias
    actual = {name: getattr(layer, name) for name in expected} | {"scores": layer.scores(), "z": layer.z}
    expected |= {"scores": scores.masked_fill(~layer.mask, -torch.inf), "z": layer.kernel_out}
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


def test_overlapping_captures_restore_compilation() -> None:
    """As in two threads: compilation is switched off for the whole process, and must be on again at the end."""
    torch.compiler.reset()  # other tests of this process may have used up the recompile limit
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
    """After a compiled call, in which hooks would not fire; nothing is compiled a second time."""
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


def interrupted(model: GPT) -> None:
    assert hooks_of(model) > 0
    raise KeyboardInterrupt


def test_hooks_are_removed_after_errors() -> None:
    """After an interrupt inside, and after a forward pass that fails."""
    model = small()
    for context in (capture(model), edited(model, [Edit("head", 0, 0), Edit("position", position=0)])):
        with pytest.raises(KeyboardInterrupt), context:
            interrupted(model)
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
def test_capture_over_a_kv_cache(changes: dict[str, Any]) -> None:
    """Piece by piece, the pattern's rows are those of the whole text at the cached keys; to float32's rounding."""
    model, ids = small(**changes), token_ids()
    whole, kv_cache = captured(model, ids), model.new_cache(len(ids), T)
    with capture(model) as cache:
        for start, end in ((0, 4), (4, 5), (5, 6), (6, 9), (9, 10)):
            model(ids[:, start:end], cache=kv_cache)
            for layer, full, kept in zip(cache.layers, whole.layers, kv_cache.layers, strict=True):
                weights, expected = layer.pattern(), full.pattern()[:, :, start:end]
                assert layer.kernel_error(weights) < 1e-5
                torch.testing.assert_close(layer.rot_q, full.rot_q[:, :, start:end], rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(layer.k, full.k[:, :, start:end], rtol=1e-4, atol=1e-5)
                if end == start + 1:  # one token: its keys are those that the cache holds, a ring buffer for a window
                    expected = expected[..., kept.positions[: weights.shape[-1]]]
                    torch.testing.assert_close(weights, expected, rtol=1e-4, atol=1e-5)
                    assert bool((weights[..., ~layer.mask] == 0).all())


@pytest.mark.parametrize("window", [1, 3])
@torch.no_grad()
def test_a_capture_keeps_its_values_when_the_kv_cache_goes_on(window: int) -> None:
    """In a window, the KV cache overwrites its buffers. With a window of one token only the values can show it."""
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
    "ask",
    [attention_overview, partial(logit_lens, small()), partial(predictions, small())],
    ids=["picture", "lens", "predictions"],
)
def test_results_before_a_pass_are_refused(ask: Callable[[ActivationCache], object]) -> None:
    with capture(small()) as cache, pytest.raises(UserError, match="no activations captured"):
        ask(cache)


def test_a_thumbnail_has_the_largest_weight_of_each_cell() -> None:
    """If size does not divide T, cells share rows: cell i of 5 has floor(i T / 5) to ceil((i + 1) T / 5)."""
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
def test_a_training_step_is_captured_and_unchanged(recompute: str) -> None:
    """In training mode, with activation checkpointing: the gradients have the same bits as without a capture."""
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


def test_an_inference_model_is_captured() -> None:
    """Its linear layers are other modules around the same kernels."""
    model, ids = small(n_embd=64), token_ids()
    for inference in (quantize(model), InferenceGPT(model, partial(PackedLinear, rows=1))):
        cache = captured(inference, ids)
        assert max(attention_overview(cache)[2]) < 1e-5
        torch.testing.assert_close(inference.logits(cache.ln_final), inference(ids))
        torch.testing.assert_close(logit_lens(inference, cache).top_p[-1], inference(ids)[0].softmax(-1).topk(5).values)
        before, after = effects(inference, ids, [Edit("head", 0, 1)])
        assert not torch.equal(before, after)
        assert hooks_of(inference) == hooks_of(model) == 0
