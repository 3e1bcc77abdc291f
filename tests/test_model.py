"""The model: GPT-2's sizes, an independent forward pass, initialisation, causality, padding, tying, gradients, compile.

Where weights matter they are drawn large (`lively`), since at GPT-2's initialisation a mistake in attention hardly shows.
"""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glassgpt.checkpoint import TrainingState, open_checkpoint, save_checkpoint
from glassgpt.config import ModelConfig, TrainConfig, recipe
from glassgpt.loss import IGNORED
from glassgpt.model import GPT
from glassgpt.reference import load_checkpoint
from glassgpt.tokenizers import BytesTokenizer

TINY: dict[str, Any] = {"vocab_size": 11, "context_length": 8, "n_layer": 2, "n_head": 2, "n_embd": 16}
# Every slot of the model at least once away from GPT-2.
VARIANTS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "explicit": {"attention": "explicit"},
    "rope": {"position": "rope", "rope_base": 50.0},
    "qk_norm": {"qk_norm": True, "position": "rope"},
    "relu": {"activation": "relu"},
    "relu_squared": {"activation": "relu_squared", "tied_head": False},
    "no bias": {"bias": False},
    "soft-cap": {"logit_softcap": 2.0},
    "padded": {"vocab_multiple": 16},
}
EACH_VARIANT = pytest.mark.parametrize("variant", VARIANTS)


def config(**changes: Any) -> ModelConfig:
    return ModelConfig(**(TINY | changes))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def lively(shape: ModelConfig, dtype: torch.dtype = torch.float64) -> GPT:
    """A model whose weights, norms and biases included, are random and large enough that all of it matters."""
    model = GPT.create(shape, seed=0).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator(parameter.numel()), dtype=torch.float64)
            parameter.add_(0.3 * noise.to(dtype))
    return model.eval()


def token_ids(rows: int = 2, length: int = 8, vocab: int = 11) -> Tensor:
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
    """As counted in Hugging Face's checkpoints; padding to 50,304 adds 47 rows."""
    shape = recipe(name, model={"vocab_size": 50257}).model
    for multiple, expected in ((1, parameters), (shape.vocab_multiple, padded)):
        with torch.device("meta"):
            model = GPT(recipe(name, model={"vocab_size": 50257, "vocab_multiple": multiple}).model)
        assert sum(p.numel() for p in model.parameters()) == expected


def test_rotary_positions_replace_the_learned_ones() -> None:
    """Seed C kept both."""
    learned, rope = GPT.create(config(), 0), GPT.create(config(position="rope"), 0)
    gone = dict(learned.named_parameters()).keys() - dict(rope.named_parameters()).keys()
    assert {name: learned.get_parameter(name).shape for name in gone} == {"positions.table.weight": (8, 16)}
    assert dict(rope.named_parameters()).keys() <= dict(learned.named_parameters()).keys()


# An independent forward pass


def paper_gpt(shape: ModelConfig, w: dict[str, Tensor], ids: list[int]) -> Tensor:
    """Logits (T, V) of one sequence, written from the papers: one head and one query at a time, no code of the package."""
    C, D = shape.n_embd, shape.n_embd // shape.n_head

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", torch.zeros(()))

    def layer_norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{name}.weight"] + w.get(
            f"{name}.bias", torch.zeros(())
        )

    def positioned(x: Tensor, t: int, norm: str) -> Tensor:
        if shape.qk_norm:
            x = x / x.square().mean().sqrt() * w[f"{norm}.weight"]
        if shape.position == "learned":
            return x
        turned = x.clone()
        for i in range(D // 2):
            angle = t * shape.rope_base ** (-2 * i / D)
            a, b = x[i], x[i + D // 2]
            turned[i], turned[i + D // 2] = a * math.cos(angle) - b * math.sin(angle), a * math.sin(angle) + b * math.cos(angle)
        return turned

    def attention(x: Tensor, name: str) -> Tensor:
        qkv = linear(x, f"{name}.qkv")
        heads = []
        for h in range(shape.n_head):
            q, k, v = (qkv[:, part * C + h * D : part * C + (h + 1) * D] for part in range(3))
            rows = []
            for t in range(len(x)):
                query = positioned(q[t], t, f"{name}.q_norm")
                scores = torch.stack([query @ positioned(k[s], s, f"{name}.k_norm") / math.sqrt(D) for s in range(t + 1)])
                rows.append(scores.softmax(0) @ v[: t + 1])
            heads.append(torch.stack(rows))
        return linear(torch.cat(heads, dim=-1), f"{name}.out")

    def activation(x: Tensor) -> Tensor:
        if shape.activation == "gelu_tanh":  # Hendrycks and Gimpel, 2016, section 2
            return 0.5 * x * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).tanh())
        positive = torch.where(x > 0, x, torch.zeros_like(x))
        return positive**2 if shape.activation == "relu_squared" else positive

    x = w["embedding.weight"][ids]
    if shape.position == "learned":
        x = x + w["positions.table.weight"][: len(ids)]
    for n in range(shape.n_layer):
        block = f"blocks.{n}"
        x = x + attention(layer_norm(x, f"{block}.attention_norm"), f"{block}.attention")
        up = activation(linear(layer_norm(x, f"{block}.feed_forward_norm"), f"{block}.feed_forward.up"))
        x = x + linear(up, f"{block}.feed_forward.down")
    head = w["embedding.weight" if shape.tied_head else "head.weight"]
    logits = layer_norm(x, "norm") @ head[: shape.vocab_size].T
    return logits if shape.logit_softcap is None else shape.logit_softcap * (logits / shape.logit_softcap).tanh()


@EACH_VARIANT
def test_logits_and_loss_are_the_papers(variant: str) -> None:
    """1e-9 for float64 over two layers; 1e-5 with rotary positions, whose angles are float32."""
    shape = config(**VARIANTS[variant])
    model, ids = lively(shape), token_ids()
    tolerance = 1e-5 if shape.position == "rope" else 1e-9
    expected = torch.stack([paper_gpt(shape, dict(model.named_parameters()), row.tolist()) for row in ids])
    torch.testing.assert_close(model(ids), expected, atol=tolerance, rtol=0)
    targets = token_ids().roll(1, dims=1)
    loss = -expected.log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)
    torch.testing.assert_close(model(ids, targets), loss.mean(), atol=tolerance, rtol=0)
    torch.testing.assert_close(model(ids, targets, reduction="none"), loss, atol=tolerance, rtol=0)


# Gradients


@EACH_VARIANT
def test_gradients_are_the_slope_of_the_loss(variant: str) -> None:
    """One random direction for each kind of parameter, central differences in float64.

    Rounding puts 1e-15 / h = 1e-8 on the slope, curvature far less: 1e-7 leaves room. A larger h would cross the bends of ReLU, where
    the loss has no slope: there are 2,048 units, so at 1e-5 one of a dozen directions does.
    """
    model, ids, h = lively(config(**VARIANTS[variant])), token_ids(), 1e-7
    targets = token_ids().roll(1, dims=1)
    targets[0, 3] = IGNORED
    model(ids, targets).backward()
    kinds = {re.sub(r"\d+", "*", name): name for name in dict(model.named_parameters())}
    assert len(kinds) >= 9
    for name in kinds.values():
        parameter = model.get_parameter(name)
        direction = torch.randn(parameter.shape, generator=generator(), dtype=torch.float64)
        losses = []
        for side in (h, -2 * h):
            with torch.no_grad():
                parameter.add_(side * direction)
            losses.append(model(ids, targets).item())
        with torch.no_grad():
            parameter.add_(h * direction)
        assert parameter.grad is not None
        slope = (losses[0] - losses[1]) / (2 * h)
        assert (parameter.grad * direction).sum().item() == pytest.approx(slope, abs=1e-7, rel=1e-6), name


# Initialisation


@pytest.mark.parametrize("residual_init", ["scaled", "zero"])
def test_initialisation_follows_its_formula(residual_init: str) -> None:
    """Every tensor against GPT-2's rule, within five standard errors of a standard deviation, s / sqrt(2n), and of a mean, s / sqrt(n).

    Seed A assigned (2L)^-0.5 to the residual projections; seed B's misspelt flag left the feed-forward's unscaled.
    """
    layers = 3
    model = GPT.create(config(n_layer=layers, n_embd=64, context_length=64, tied_head=False, residual_init=residual_init), seed=1)
    residual = 0.02 / math.sqrt(2 * layers) if residual_init == "scaled" else 0.0
    seen = set()
    for name, p in model.named_parameters():
        if p.ndim == 1:
            assert (p == (1.0 if "norm" in name and name.endswith("weight") else 0.0)).all(), name
            continue
        is_residual = name.endswith(("attention.out.weight", "feed_forward.down.weight"))
        seen.add(is_residual)
        std = residual if is_residual else 0.02
        assert abs(p.std().item() - std) <= 5 * std / math.sqrt(2 * p.numel()), name
        assert abs(p.mean().item()) <= 5 * std / math.sqrt(p.numel()), name
    assert seen == {True, False}


def test_creation_depends_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = GPT.create(config(qk_norm=True), seed=5).state_dict()
    assert torch.equal(torch.get_rng_state(), before), "creating a model must not move the global generator"
    torch.manual_seed(2)
    second, other = GPT.create(config(qk_norm=True), seed=5).state_dict(), GPT.create(config(), seed=6).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["embedding.weight"], other["embedding.weight"])


def test_a_parameters_first_values_do_not_depend_on_the_others() -> None:
    shallow, deep = (GPT.create(config(n_layer=n), seed=3).state_dict() for n in (2, 8))
    for name, weight in shallow.items():
        scale = 2.0 if name.endswith(("attention.out.weight", "feed_forward.down.weight")) else 1.0  # sqrt(16) / sqrt(4)
        torch.testing.assert_close(weight, deep[name] * scale, atol=0, rtol=1e-6)
    first, second = shallow["blocks.0.attention.qkv.weight"], shallow["blocks.1.attention.qkv.weight"]
    assert not torch.equal(first, second)


# Causality and positions


@EACH_VARIANT
def test_nothing_from_the_future(variant: str) -> None:
    """Bitwise: a later token changes no earlier logit, and every earlier token changes the last one."""
    model, ids = lively(config(**VARIANTS[variant]), torch.float32), token_ids(rows=1)
    logits = model(ids)
    for t in range(8):
        changed = ids.clone()
        changed[0, t] = (changed[0, t] + 1) % 11
        other = model(changed)
        assert torch.equal(other[:, :t], logits[:, :t])
        assert not torch.equal(other[:, -1], logits[:, -1])


def test_too_long_input_is_refused() -> None:
    with pytest.raises(ValueError, match="9 tokens do not fit into 8 positions"):
        GPT.create(config(), 0)(torch.zeros(1, 9, dtype=torch.long))


# Padding, tying, dropout


@pytest.mark.parametrize("tied", [True, False])
def test_padding_is_invisible(tied: bool) -> None:
    """Whatever stands in the padded rows, logits, loss and gradients are those of the model without them."""
    plain, padded = lively(config(tied_head=tied)), lively(config(tied_head=tied, vocab_multiple=16))
    with torch.no_grad():
        for name, parameter in padded.named_parameters():
            source = plain.get_parameter(name)
            parameter.fill_(50.0)
            parameter[: source.shape[0]] = source
    ids, targets = token_ids(), token_ids().roll(1, dims=1)
    assert padded(ids).shape == (2, 8, 11)
    torch.testing.assert_close(padded(ids), plain(ids), atol=1e-12, rtol=0)
    for model in (plain, padded):
        model(ids, targets).backward()
    torch.testing.assert_close(padded(ids, targets), plain(ids, targets), atol=1e-12, rtol=0)
    for name, parameter in padded.named_parameters():
        source = plain.get_parameter(name)
        assert parameter.grad is not None
        assert source.grad is not None
        torch.testing.assert_close(parameter.grad[: source.shape[0]], source.grad, atol=1e-12, rtol=0)
        assert not parameter.grad[source.shape[0] :].any()


def test_a_tied_head_is_one_parameter_with_both_gradients() -> None:
    tied, untied = lively(config()), lively(config(tied_head=False))
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
    model = lively(config(), torch.float32)
    run = TrainConfig(steps=1, batch_tokens=8, micro_batch_size=1, model=config())
    path = save_checkpoint(tmp_path, model, [], run, BytesTokenizer(), TrainingState(step=1))
    loaded, _ = load_checkpoint(open_checkpoint(path), torch.device("cpu"))
    with torch.no_grad():
        loaded.get_parameter("embedding.weight").mul_(2)
        model.get_parameter("embedding.weight").mul_(2)
    assert torch.equal(loaded(token_ids()), model(token_ids())), "the loaded head did not follow its embedding"


def test_dropout_acts_in_training_only() -> None:
    dropped, plain = (lively(config(dropout=p)) for p in (0.5, 0.0))
    ids = token_ids()
    assert torch.equal(dropped(ids), plain(ids))
    torch.manual_seed(0)
    first, second = dropped.train()(ids), dropped(ids)
    assert not torch.equal(first, second)
    assert torch.equal(plain.train()(ids), plain.eval()(ids))


def test_dropout_stands_in_its_four_places() -> None:
    """On the embedding, the attention weights and both branches of a block, each with the config's rate (GPT-2)."""
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


def test_compile_in_place_keeps_names_and_values() -> None:
    """Seed B's checkpoint had a compile prefix in every name. 1e-6: a compiler may sum in another order."""
    model, ids, targets = lively(config(), torch.float32), token_ids(), token_ids().roll(1, dims=1)
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
    """bfloat16 has 8 bits, so a loss of 3 nats is known to about 1 %; bitwise equality would mean that autocast was ignored."""
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
