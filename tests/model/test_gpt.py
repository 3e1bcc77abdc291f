"""The model: GPT-2's sizes, initialisation, positions, padding, tying, dropout and compilation.

test_slots.py tests its mathematics.

Tests that depend on weights use large ones (`random_model`), because GPT-2's initialisation hides errors in attention.
"""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glassgpt.config.model import ModelConfig
from glassgpt.config.recipes import recipe
from glassgpt.config.schema import TrainConfig
from glassgpt.distributed.strategies import Strategy
from glassgpt.interop.references import load_source
from glassgpt.model.gpt import GPT
from glassgpt.runs.checkpoint import Snapshot, TrainingState, open_checkpoint, save_checkpoint
from glassgpt.tokenizers.builtin import CharacterTokenizer
from glassgpt.utils.errors import UserError
from glassgpt.utils.torch_internals import uncompiled

TINY: dict[str, Any] = {"vocab_size": 11, "context_length": 8, "n_layer": 2, "n_head": 2, "n_embd": 16}


def config(**changes: Any) -> ModelConfig:
    """Return a tiny model config with some settings changed."""
    return ModelConfig(**(TINY | changes))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_model(shape: ModelConfig, dtype: torch.dtype = torch.float64) -> GPT:
    """Return a model whose weights, including norms and biases, are random and large enough to affect the output."""
    model = GPT.create(shape, seed=0).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator(parameter.numel()), dtype=torch.float64)
            parameter.add_(0.3 * noise.to(dtype))
    return model.eval()


def token_ids(rows: int = 2, length: int = 8, vocab: int = 11) -> Tensor:
    """Return random token ids (rows, length)."""
    return torch.randint(vocab, (rows, length), generator=generator(9))


# Sizes


@pytest.mark.parametrize(
    ("name", "parameters", "padded"),
    [
        ("gpt2", 124_439_808, 124_475_904),
        ("gpt2-medium", 354_823_168, 354_871_296),
        ("gpt2-large", 774_030_080, 774_090_240),
        ("gpt2-xl", 1_557_611_200, 1_557_686_400),
    ],
)
def test_gpt2_has_its_published_number_of_parameters(name: str, parameters: int, padded: int) -> None:
    """The counts are those of Hugging Face's checkpoints; padding to 50,304 adds 47 rows."""
    shape = recipe(name, model={"vocab_size": 50257}).model
    for multiple, expected in ((1, parameters), (shape.vocab_multiple, padded)):
        with torch.device("meta"):
            model = GPT(recipe(name, model={"vocab_size": 50257, "vocab_multiple": multiple}).model)
        assert sum(p.numel() for p in model.parameters()) == expected


def test_rotary_positions_replace_the_learned_ones() -> None:
    """Learned positions must not remain in the model as well, as in an earlier implementation."""
    learned, rope = GPT.create(config(), 0), GPT.create(config(position="rope"), 0)
    removed = dict(learned.named_parameters()).keys() - dict(rope.named_parameters()).keys()
    assert {name: learned.get_parameter(name).shape for name in removed} == {"positions.table.weight": (8, 16)}
    assert dict(rope.named_parameters()).keys() <= dict(learned.named_parameters()).keys()


# Initialisation


@pytest.mark.parametrize("residual_init", ["scaled", "zero"])
def test_initialisation_has_the_standard_deviations_of_gpt2(residual_init: str) -> None:
    """Standard deviation s and mean of every tensor are within five standard errors, s / sqrt(2n) and s / sqrt(n).

    Earlier implementations had a standard deviation of (2L)^-0.5 in residual projections, or 0.02 in those of the
    feed-forward.
    """
    layers = 3
    model = GPT.create(
        config(n_layer=layers, n_embd=64, context_length=64, tied_head=False, residual_init=residual_init), seed=1
    )
    residual = 0.02 / math.sqrt(2 * layers) if residual_init == "scaled" else 0.0
    kinds = set()
    for name, p in model.named_parameters():
        if p.ndim == 1:
            assert (p == (1.0 if "norm" in name and name.endswith("weight") else 0.0)).all(), name
            continue
        is_residual = name.endswith(("attention.out.weight", "feed_forward.down.weight"))
        kinds.add(is_residual)
        std = residual if is_residual else 0.02
        assert abs(p.std().item() - std) <= 5 * std / math.sqrt(2 * p.numel()), name
        assert abs(p.mean().item()) <= 5 * std / math.sqrt(p.numel()), name
    assert kinds == {True, False}


def test_initial_weights_depend_only_on_the_seed() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = GPT.create(config(qk_norm=True), seed=5).state_dict()
    assert torch.equal(torch.get_rng_state(), before), "creating a model must not change the global random state"
    torch.manual_seed(2)
    second, other = GPT.create(config(qk_norm=True), seed=5).state_dict(), GPT.create(config(), seed=6).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["embedding.weight"], other["embedding.weight"])


def test_initial_values_of_a_parameter_do_not_depend_on_the_other_layers() -> None:
    shallow, deep = (GPT.create(config(n_layer=n), seed=3).state_dict() for n in (2, 8))
    for name, weight in shallow.items():
        # The scale is 1 / sqrt(2 x layers): sqrt(16) / sqrt(4).
        scale = 2.0 if name.endswith(("attention.out.weight", "feed_forward.down.weight")) else 1.0
        torch.testing.assert_close(weight, deep[name] * scale, atol=0, rtol=1e-6)
    first, second = shallow["blocks.0.attention.qkv.weight"], shallow["blocks.1.attention.qkv.weight"]
    assert not torch.equal(first, second)


# Positions


def test_ids_that_are_no_whole_numbers_are_refused() -> None:
    model = GPT.create(config(), seed=0)
    for wrong in (torch.rand(1, 3), torch.ones(1, 3, dtype=torch.bool), torch.ones(3, dtype=torch.int64), [[1, 2]]):
        with pytest.raises(UserError, match="ids must be"):
            model(wrong)
    assert torch.equal(model(torch.tensor([[1, 2]], dtype=torch.int32)), model(torch.tensor([[1, 2]])))


def test_more_tokens_than_learned_positions_are_refused() -> None:
    with pytest.raises(ValueError, match="9 tokens do not fit into 8 positions"):
        GPT.create(config(), 0)(torch.zeros(1, 9, dtype=torch.long))


@pytest.mark.parametrize("position", ["rope", "sinusoidal", "none"])
def test_computed_positions_are_unlimited(position: str) -> None:
    model, ids = random_model(config(position=position)), token_ids(length=20)
    torch.testing.assert_close(model(ids)[:, :8], model(ids[:, :8]), atol=1e-12, rtol=0)


# Padding, tying, dropout


@pytest.mark.parametrize("tied", [True, False])
def test_the_padding_of_the_vocabulary_affects_no_logits_loss_or_gradients(tied: bool) -> None:
    """The padding rows have arbitrary values. They get no gradient, and the rest equals the model without them."""
    unpadded, padded = random_model(config(tied_head=tied)), random_model(config(tied_head=tied, vocab_multiple=16))
    with torch.no_grad():
        for name, parameter in padded.named_parameters():
            source = unpadded.get_parameter(name)
            parameter.fill_(50.0)
            parameter[: source.shape[0]] = source
    ids, targets = token_ids(), token_ids().roll(1, dims=1)
    assert padded(ids).shape == (2, 8, 11)
    torch.testing.assert_close(padded(ids), unpadded(ids), atol=1e-12, rtol=0)
    for model in (unpadded, padded):
        model(ids, targets).backward()
    torch.testing.assert_close(padded(ids, targets), unpadded(ids, targets), atol=1e-12, rtol=0)
    for name, parameter in padded.named_parameters():
        source = unpadded.get_parameter(name)
        assert parameter.grad is not None
        assert source.grad is not None
        torch.testing.assert_close(parameter.grad[: source.shape[0]], source.grad, atol=1e-12, rtol=0)
        assert not parameter.grad[source.shape[0] :].any()


def test_a_tied_head_is_one_parameter_with_both_gradients() -> None:
    tied, untied = random_model(config()), random_model(config(tied_head=False))
    with torch.no_grad():
        for name, parameter in untied.named_parameters():
            parameter.copy_(tied.get_parameter("embedding.weight" if name == "head.weight" else name))
    ids, targets = token_ids(), token_ids().roll(1, dims=1)
    for model in (tied, untied):
        model(ids, targets).backward()
    assert dict(untied.named_parameters()).keys() - dict(tied.named_parameters()).keys() == {"head.weight"}
    grads = [untied.get_parameter(name).grad for name in ("embedding.weight", "head.weight")]
    both = sum(grad for grad in grads if grad is not None)
    torch.testing.assert_close(tied.get_parameter("embedding.weight").grad, both, atol=1e-12, rtol=0)


def test_a_tied_head_stays_tied_through_a_checkpoint(tmp_path: Path) -> None:
    model = random_model(config(), torch.float32)
    run = TrainConfig(steps=1, batch_tokens=8, micro_batch_size=1, model=config())
    snapshot = Snapshot(dict(model.named_parameters()), {})
    path = save_checkpoint(tmp_path, snapshot, run, CharacterTokenizer("abcdefghijk"), TrainingState(step=1))
    loaded, _ = load_source(open_checkpoint(path), torch.device("cpu"))
    with torch.no_grad():
        loaded.get_parameter("embedding.weight").mul_(2)
        model.get_parameter("embedding.weight").mul_(2)
    assert torch.equal(loaded(token_ids()), model(token_ids())), "the loaded head is not tied to its embedding"


def test_dropout_applies_only_in_training() -> None:
    with_dropout, without_dropout = (random_model(config(dropout=p)) for p in (0.5, 0.0))
    ids = token_ids()
    assert torch.equal(with_dropout(ids), without_dropout(ids))
    torch.manual_seed(0)
    first, second = with_dropout.train()(ids), with_dropout(ids)
    assert not torch.equal(first, second)
    assert torch.equal(without_dropout.train()(ids), without_dropout.eval()(ids))


def test_dropout_applies_to_embedding_attention_weights_and_both_branches() -> None:
    """Every dropout has the rate of the config, as in GPT-2."""
    model = GPT.create(config(dropout=0.25, attention="explicit"), 0).train()
    calls: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout):
            assert module.p == 0.25
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    model(token_ids())
    block = ["attention.kernel.dropout", "dropout", "dropout"]
    assert calls == ["dropout", *(f"blocks.{n}.{name}" for n in range(2) for name in block)]


# Compile and autocast


@pytest.mark.parametrize("position", ["rope", "sinusoidal"])
def test_half_precision_weights_compute_in_half_precision(position: str) -> None:
    """Angles stay float32, but the model computes in bfloat16, whose 8 bits give a loss of 3 nats to about 1 %."""
    model, ids, targets = (
        GPT.create(config(position=position, qk_norm=True), 0),
        token_ids(),
        token_ids().roll(1, dims=1),
    )
    exact = model(ids, targets).item()
    assert model.bfloat16()(ids).dtype == torch.bfloat16
    assert model(ids, targets).item() == pytest.approx(exact, rel=0.01)


def test_compile_in_place_keeps_names_and_values() -> None:
    """Compiled names have no prefix (an earlier implementation's checkpoints had). 1e-6 allows for reordered sums."""
    model, ids, targets = random_model(config(), torch.float32), token_ids(), token_ids().roll(1, dims=1)
    names = list(model.state_dict())
    loss = model(ids, targets)
    loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    model.compile(backend=backend)
    model.zero_grad()
    compiled = model(ids, targets)
    compiled.backward()
    assert graphs, "nothing was compiled"
    assert list(model.state_dict()) == names
    assert [name for name, _ in model.named_parameters()] == list(expected)
    torch.testing.assert_close(compiled, loss, atol=1e-6, rtol=0)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-6, rtol=1e-5)


def test_autocast_computes_in_bfloat16_and_keeps_float32_outside() -> None:
    """bfloat16's 8 bits give a loss of 3 nats to about 1 %; equal bits would mean that autocast had no effect."""
    model, ids, targets = GPT.create(config(), 0), token_ids(), token_ids().roll(1, dims=1)
    exact = model(ids, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, each = model(ids, targets), model(ids, targets, reduction="none")
        assert model(ids).dtype == torch.bfloat16
    loss.backward()
    assert loss.dtype == each.dtype == torch.float32
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}
    assert 0 < abs(loss.item() - exact.item()) < 0.01 * exact.item()
    assert each.mean().item() == pytest.approx(loss.item(), rel=1e-6)
    assert exact.item() == pytest.approx(F.cross_entropy(model(ids).flatten(0, 1), targets.flatten()).item(), rel=1e-6)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_with_flex_attention_a_model_is_compiled_once_per_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mask must not have its own graph, and a shorter text, not compiled, must not replace the compiled one's."""
    model = GPT.create(config(context_length=256, window=64, attention="flex", position="rope"), 0)
    ids = torch.zeros(1, 256, dtype=torch.int64)
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    Strategy(model).compile(backend)  # type: ignore[arg-type]
    with torch.no_grad():
        for _ in range(2):
            model(ids)
            with uncompiled(model):
                model(ids[:, :100])
    assert len(graphs) == 1
