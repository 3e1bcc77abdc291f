"""Every slot of the model with its values, and checks that hold for any combination of them.

`tests/model/test_slots.py` checks combinations that cover every pair of values, `benchmarks/slots.py` all combinations.
The reference is `paper_gpt`, written from the papers without code of the package.
"""

import dataclasses
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glassgpt.config.model import ModelConfig
from glassgpt.config.schema import TrainConfig
from glassgpt.generation.generate import generate
from glassgpt.interop.references import load_source
from glassgpt.model.gpt import GPT
from glassgpt.runs.checkpoint import Snapshot, TrainingState, open_checkpoint, save_checkpoint
from glassgpt.tokenizers.builtin import CharacterTokenizer

V, T = 11, 10
TINY: dict[str, Any] = {"vocab_size": V, "context_length": T, "n_layer": 2, "n_head": 4, "n_embd": 16}

# Slot -> value -> the settings of that value. GPT-2's values are listed too, so that a combination names every slot.
SLOTS: dict[str, dict[str, dict[str, Any]]] = {
    "position": {
        "learned": {"position": "learned"},
        "rope": {"position": "rope", "rope_base": 50.0},
        "sinusoidal": {"position": "sinusoidal"},
        "none": {"position": "none"},
    },
    "key/value heads": {"multi-head": {}, "grouped": {"n_kv_head": 2}, "multi-query": {"n_kv_head": 1}},
    "span": {
        "full": {},
        "window": {"window": 3},
        "globals": {"window": 3, "window_globals": 2},
        "pattern": {"window": 3, "window_pattern": "SL"},
    },
    "norm": {
        "layernorm": {"norm": "layernorm", "norm_bias": True},
        "layernorm without bias": {"norm": "layernorm", "norm_bias": False, "norm_eps": 1e-2},
        "rmsnorm": {"norm": "rmsnorm"},
        "rmsnorm without weight": {"norm": "rmsnorm", "norm_weight": False, "norm_eps": 1e-2},
    },
    "embedding norm": {"off": {}, "on": {"embedding_norm": True}},
    "QK-norm": {"off": {}, "on": {"qk_norm": True}},
    "feed-forward": {
        name: {"activation": name} for name in ("gelu_tanh", "gelu", "relu", "relu_squared", "silu", "swiglu")
    },
    "widths": {"GPT-2's": {}, "apart": {"head_dim": 6, "n_inner": 20}},
    "bias": {"on": {"bias": True}, "off": {"bias": False}},
    "head": {"tied": {}, "untied": {"tied_head": False}},
    "soft-cap": {"off": {}, "on": {"logit_softcap": 2.0}},
}


def combined(choice: dict[str, str], **more: Any) -> ModelConfig:
    """Return the config with one value for each slot: `{"position": "rope", …}`."""
    settings = [SLOTS[slot][value] for slot, value in choice.items()]
    return ModelConfig(**(TINY | {k: v for part in settings for k, v in part.items()} | more))


def random(*shape: int, seed: int) -> Tensor:
    """Return a float64 tensor of standard normal values."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_model(config: ModelConfig) -> GPT:
    """Return a float64 model whose weights, also of norms and biases, are random and large.

    With GPT-2's initialisation, a mistake in attention would hardly change the logits.
    """
    model = GPT.create(config, seed=0).double()
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            parameter.add_(0.3 * random(*parameter.shape, seed=index))
    return model.eval()


def token_ids(rows: int = 2, length: int = T) -> Tensor:
    return torch.randint(V, (rows, length), generator=torch.Generator().manual_seed(9))


# The reference


def paper_gpt(shape: ModelConfig, w: dict[str, Tensor], ids: list[int]) -> Tensor:
    """Return the logits (T, V) of one sequence, computed as in the papers: one head and one query at a time.

    It shares no code with the package.
    """
    C, H = shape.n_embd, shape.n_head
    D = shape.head_dim or C // H
    shared_by = H // (shape.n_kv_head or H)

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", torch.zeros(()))

    def norm(x: Tensor, name: str) -> Tensor:
        x = x - x.mean(-1, keepdim=True) if shape.norm == "layernorm" else x
        x = x / (x.square().mean(-1, keepdim=True) + shape.norm_eps).sqrt()
        return x * w.get(f"{name}.weight", torch.ones(())) + w.get(f"{name}.bias", torch.zeros(()))

    def normed_and_rotated(x: Tensor, t: int, name: str) -> Tensor:
        if shape.qk_norm:
            x = x / (x.square().mean() + shape.norm_eps).sqrt() * w.get(f"{name}.weight", torch.ones(()))
        if shape.position != "rope":
            return x
        rotated = x.clone()
        for i in range(D // 2):
            angle = t * shape.rope_base ** (-2 * i / D)
            a, b = x[i], x[i + D // 2]
            rotated[i], rotated[i + D // 2] = (
                a * math.cos(angle) - b * math.sin(angle),
                a * math.sin(angle) + b * math.cos(angle),
            )
        return rotated

    def visible_positions(layer: int, t: int) -> list[int]:
        sliding = shape.window is not None and shape.window_pattern[layer % len(shape.window_pattern)] == "S"
        return [s for s in range(t + 1) if not sliding or s < shape.window_globals or t - s < (shape.window or 0)]

    def attention(x: Tensor, layer: int) -> Tensor:
        name = f"blocks.{layer}.attention"
        qkv = linear(x, f"{name}.qkv")
        q, k, v = qkv[:, : H * D], *qkv[:, H * D :].chunk(2, dim=1)
        heads = []
        for h in range(H):
            query, (key, value) = q[:, h * D : (h + 1) * D], (x[:, h // shared_by * D :][:, :D] for x in (k, v))
            query = torch.stack([normed_and_rotated(row, t, f"{name}.q_norm") for t, row in enumerate(query)])
            key = torch.stack([normed_and_rotated(row, t, f"{name}.k_norm") for t, row in enumerate(key)])
            rows = []
            for t in range(len(x)):
                visible = visible_positions(layer, t)
                # Divide by the root of the head's width, not of the model's.
                scores = torch.stack([query[t] @ key[s] / math.sqrt(D) for s in visible])
                rows.append(scores.softmax(0) @ value[visible])
            heads.append(torch.stack(rows))
        return linear(torch.cat(heads, dim=-1), f"{name}.out")

    def feed_forward(x: Tensor, name: str) -> Tensor:
        up = linear(x, f"{name}.up")
        match shape.activation:
            case "gelu_tanh":  # Hendrycks and Gimpel, 2016, section 2
                up = 0.5 * up * (1 + (math.sqrt(2 / math.pi) * (up + 0.044715 * up**3)).tanh())
            case "gelu":
                up = up * 0.5 * (1 + torch.erf(up / math.sqrt(2)))
            case "relu":
                up = torch.where(up > 0, up, torch.zeros_like(up))
            case "relu_squared":
                up = torch.where(up > 0, up**2, torch.zeros_like(up))
            case "silu":
                up = up / (1 + torch.exp(-up))
            case "swiglu":  # Shazeer, 2020, section 2
                gate = linear(x, f"{name}.gate")
                up = gate / (1 + torch.exp(-gate)) * up
        return linear(up, f"{name}.down")

    x = w["embedding.weight"][ids]
    if shape.position == "learned":
        x = x + w["positions.table.weight"][: len(ids)]
    if shape.position == "sinusoidal":  # Vaswani et al., 2017, sections 3.4 and 3.5
        waves = [
            [(math.cos if i % 2 else math.sin)(t / 10000 ** (i // 2 * 2 / C)) for i in range(C)]
            for t in range(len(ids))
        ]
        x = x * math.sqrt(C) + torch.tensor(waves, dtype=torch.float64)
    if shape.embedding_norm:
        x = norm(x, "embedding_norm")
    for n in range(shape.n_layer):
        x = x + attention(norm(x, f"blocks.{n}.attention_norm"), n)
        x = x + feed_forward(norm(x, f"blocks.{n}.feed_forward_norm"), f"blocks.{n}.feed_forward")
    head = w["embedding.weight" if shape.tied_head else "head.weight"]
    logits = norm(x, "norm") @ head[: shape.vocab_size].T
    return logits if shape.logit_softcap is None else shape.logit_softcap * (logits / shape.logit_softcap).tanh()


# Checks


def check_everything(config: ModelConfig) -> None:
    """Run all checks below on one random model. Raises `AssertionError`."""
    model = random_model(config)
    check_logits(model)
    check_kernels(model)
    check_gradients(model)
    check_causality(model)
    check_cache(model)
    check_checkpoint(model)
    check_generation(model)


def check_logits(model: GPT) -> None:
    """Logits and loss equal `paper_gpt`'s to 1e-9 in float64, or to 1e-5 with position angles, which are float32."""
    config, ids, targets = model.config, token_ids(), token_ids().roll(1, dims=1)
    tolerance = 1e-5 if config.position in ("rope", "sinusoidal") else 1e-9
    with torch.no_grad():
        logits, each = model(ids), model(ids, targets, reduction="none")
        # Checking the last row is enough: rows are independent sequences, and the loss is the mean over all.
        expected = paper_gpt(config, dict(model.named_parameters()), ids[-1].tolist())
        torch.testing.assert_close(logits[-1], expected, atol=tolerance, rtol=0)
        losses = -logits.log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)
        torch.testing.assert_close(each, losses, atol=1e-12, rtol=0)
        torch.testing.assert_close(model(ids, targets), losses.mean(), atol=1e-12, rtol=0)


def check_kernels(model: GPT) -> None:
    """The explicit kernel has the same logits and gradients as the default one, to 1e-12: in float64, only the order
    of sums differs."""
    explicit = GPT.empty(dataclasses.replace(model.config, attention="explicit")).double().eval()
    explicit.load_state_dict(model.state_dict())
    ids, targets = token_ids(), token_ids().roll(1, dims=1)
    for other in (model, explicit):
        other.zero_grad()
        other(ids, targets).backward()
    torch.testing.assert_close(explicit(ids), model(ids), atol=1e-12, rtol=0)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, explicit.get_parameter(name).grad, atol=1e-12, rtol=1e-9)


def check_gradients(model: GPT) -> None:
    """The gradient of one parameter of each kind equals the slope of the loss along a random direction, computed by
    central differences with h = 1e-7.

    Rounding adds an error of 1e-15 / h = 1e-8 to the slope, curvature far less, so the tolerance is 1e-7. At a kink of
    ReLU the loss has no slope: in about one of a thousand models, one of the 2,560 units is within h of its kink. Then
    the check uses h = 1e-9, with a tolerance of 1e-5 for the larger rounding error.
    """
    ids, targets = token_ids(), token_ids().roll(1, dims=1)
    model.zero_grad()
    model(ids, targets).backward()
    last = model.config.n_layer - 1
    for name, parameter in model.named_parameters():
        if name.startswith("blocks.") and not name.startswith(f"blocks.{last}."):
            continue  # one parameter of each kind is enough: those of the last block
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        direction = random(*parameter.shape, seed=1)
        expected = (parameter.grad * direction).sum().item()
        slopes = {1e-7: _slope(model, parameter, direction, 1e-7, ids, targets)}
        if abs(slopes[1e-7] - expected) > 1e-7 + 1e-6 * abs(expected):
            slopes[1e-9] = _slope(model, parameter, direction, 1e-9, ids, targets)
            assert abs(slopes[1e-9] - expected) <= 1e-5 + 1e-6 * abs(expected), (
                f"{name}: slopes {slopes}, gradient {expected}"
            )


@torch.no_grad()
def _slope(model: GPT, parameter: Tensor, direction: Tensor, h: float, ids: Tensor, targets: Tensor) -> float:
    """Return the slope of the loss along a direction, by central differences."""
    losses: list[float] = []
    for side in (h, -2 * h):
        parameter.add_(side * direction)
        losses.append(model(ids, targets).item())
    parameter.add_(h * direction)
    return (losses[0] - losses[1]) / (2 * h)


@torch.no_grad()
def check_causality(model: GPT) -> None:
    """Another token at t changes no bit of the logits before t, and does change the logits at t, for every t."""
    ids = token_ids(rows=1)
    logits = model(ids)
    for t in range(1, T):
        other = ids.clone()
        other[0, t] = (ids[0, t] + 1) % V
        changed = model(other)
        assert torch.equal(changed[:, :t], logits[:, :t]), f"token {t} changes logits before it"
        assert not torch.equal(changed[:, t], logits[:, t])


@torch.no_grad()
def check_cache(model: GPT) -> None:
    """Logits with a cache, fed in parts of different lengths, equal those of the whole text to 1e-12: in float64, only
    the order of sums differs.

    Layers with a window of W and G global tokens store exactly W + G positions.
    """
    config, ids = model.config, token_ids()
    cache = model.new_cache(len(ids), T)
    parts = [model(ids[:, start:end], cache=cache) for start, end in ((0, 3), (3, 4), (4, 8), (8, 9), (9, 10))]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(ids), atol=1e-12, rtol=0)
    for layer, window in zip(cache.layers, config.windows, strict=True):
        slots = T if window is None else window + config.window_globals
        assert layer.k.shape == layer.v.shape == (2, config.resolved_n_kv_head, slots, config.resolved_head_dim)


def check_checkpoint(model: GPT) -> None:
    """Loaded weights equal the saved ones bit for bit, after rounding to float32."""
    run = TrainConfig(steps=1, batch_tokens=T, micro_batch_size=1, model=model.config)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        snapshot = Snapshot(dict(model.named_parameters()), {})
        path = save_checkpoint(Path(folder), snapshot, run, CharacterTokenizer("abcdefghijk"), TrainingState(step=1))
        loaded, _ = load_source(open_checkpoint(path), torch.device("cpu"))
        for name, parameter in loaded.named_parameters():
            assert torch.equal(parameter, model.get_parameter(name).float()), name


def check_generation(model: GPT) -> None:
    """Greedy generation gives the same text with and without a cache, also beyond the context length."""
    texts = [[token.token_id for token in _greedy(model, use_cache)] for use_cache in (True, False)]
    assert texts[0] == texts[1]
    assert len(texts[0]) == T // 2


def _greedy(model: GPT, use_cache: bool) -> Iterator[Any]:
    prompt = list(range(T - 2))  # so that the context is full after three tokens
    return generate(model, None, prompt, max_new_tokens=T // 2, temperature=0, use_cache=use_cache)
