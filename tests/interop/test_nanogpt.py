"""Checkpoints of nanoGPT and build-nanogpt, saved here like their scripts save them, equal transformers' GPT-2.

The two projects use the tensor names of GPT-2's first files, and transposed linear weights. Logits agree to 1e-5 in
float32 on random weights.
"""

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import glassgpt as g
from glassgpt.interop.nanogpt import open_nanogpt
from glassgpt.interop.references import describe, find_model
from glassgpt.tokenizers.builtin import CharacterTokenizer
from glassgpt.utils.errors import UserError

transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed: the checkpoints are compared with its GPT-2"
)

SHAPE: dict[str, Any] = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 12, "vocab_size": 30}
LINEAR = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def hf_gpt2(activation: str, vocab_size: int = 30) -> Any:
    """Return a random GPT-2 of transformers."""
    config = transformers.GPT2Config(
        vocab_size=vocab_size,
        n_positions=12,
        n_embd=16,
        n_layer=2,
        n_head=2,
        activation_function=activation,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def nanogpt_state_dict(model: Any, prefix: str = "") -> dict[str, Tensor]:
    """Return these weights as both projects save them, with the buffers of the masks and the tied head."""
    tensors = {name: (t.T.contiguous() if name.endswith(LINEAR) else t) for name, t in model.state_dict().items()}
    tensors |= {f"transformer.h.{n}.attn.bias": torch.ones(1, 1, 12, 12).tril() for n in range(2)}
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def save_nanogpt(path: Path, weights: Any, *, prefix: str = "", **changes: Any) -> Path:
    """Save a checkpoint like nanoGPT's train.py, with some keys changed."""
    content = {
        "model": nanogpt_state_dict(weights, prefix),
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.95)}]},
        "model_args": {**SHAPE, "bias": True, "dropout": 0.1},
        "iter_num": 2000,
        "best_val_loss": torch.tensor(1.88),
        "config": {"out_dir": "out", "compile": True, "min_lr": 1e-4},
    }
    torch.save({**content, **changes}, path)
    return path


def save_build_nanogpt(path: Path, model: Any) -> Path:
    """Save a checkpoint like build-nanogpt, in another process whose main script defines the pickled config class."""
    torch.save(nanogpt_state_dict(model), path.with_suffix(".tensors"))
    script = path.with_suffix(".py")
    script.write_text(
        f"""
import torch
from dataclasses import dataclass
@dataclass
class GPTConfig:
    block_size: int = 1024
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
state = torch.load({str(path.with_suffix(".tensors"))!r}, weights_only=True)
config = GPTConfig(**{SHAPE})
torch.save({{"model": state, "config": config, "step": 19072, "val_loss": 3.29}}, {str(path)!r})
"""
    )
    subprocess.run([sys.executable, str(script)], check=True)
    return path


def ids(rows: int = 2, length: int = 11) -> Tensor:
    """Return random token ids (rows, length)."""
    return torch.randint(30, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("prefix", ["", "_orig_mod."], ids=["plain", "compiled"])
def test_a_nanogpt_checkpoint_gives_the_same_logits(prefix: str, tmp_path: Path) -> None:
    """nanoGPT uses the exact GELU, unlike GPT-2; torch.compile adds a prefix to every name."""
    expected = hf_gpt2("gelu")
    model, tokenizer = g.load(save_nanogpt(tmp_path / "ckpt.pt", expected, prefix=prefix))
    with torch.no_grad():
        torch.testing.assert_close(model(ids()), expected(ids()).logits, atol=1e-5, rtol=0)
    assert tokenizer is None
    characters = CharacterTokenizer("abcdefghijklmnopqrstuvwxyz.,! ")
    (tmp_path / "tokenizer.json").write_text(characters.to_json())
    _, tokenizer = g.load(tmp_path / "ckpt.pt")
    assert tokenizer is not None
    assert tokenizer.to_json() == characters.to_json()
    (tmp_path / "tokenizer.json").unlink()
    text = describe(tmp_path / "ckpt.pt")
    assert all(words in text for words in ("nanoGPT", "2,000", "1.8800", "12 tokens, learned positions", "none"))


@pytest.mark.slow
def test_a_build_nanogpt_checkpoint_gives_the_same_logits(tmp_path: Path) -> None:
    expected = hf_gpt2("gelu_new")
    path = save_build_nanogpt(tmp_path / "model_19072.pt", expected)
    model, _ = g.load(path)
    with torch.no_grad():
        torch.testing.assert_close(model(ids()), expected(ids()).logits, atol=1e-5, rtol=0)
    assert "19,072" in describe(path)
    assert "3.2900" in describe(path)


def test_a_checkpoint_without_biases_gives_the_logits_of_zero_biases(tmp_path: Path) -> None:
    """With nanoGPT's `bias=False`, linear layers and LayerNorms have no biases."""
    expected = hf_gpt2("gelu")
    with torch.no_grad():
        for name, parameter in expected.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
    tensors = {name: t for name, t in nanogpt_state_dict(expected).items() if not name.endswith("bias")}
    args = {**SHAPE, "bias": False, "dropout": 0.0}
    model, _ = g.load(save_nanogpt(tmp_path / "ckpt.pt", expected, model=tensors, model_args=args))
    assert not model.config.bias
    assert not model.config.resolved_norm_bias
    with torch.no_grad():
        torch.testing.assert_close(model(ids()), expected(ids()).logits, atol=1e-5, rtol=0)


def test_the_padding_of_gpt2s_vocabulary_is_not_predicted(tmp_path: Path) -> None:
    """A table of 50,304 rows is recognised as 50,257 tokens with padding; logits have only the tokens."""
    args = {**SHAPE, "vocab_size": 50304, "bias": True, "dropout": 0.0}
    path = save_nanogpt(tmp_path / "ckpt.pt", hf_gpt2("gelu", 50304), model_args=args)
    source = open_nanogpt(path)
    assert (source.model_config.vocab_size, source.model_config.padded_vocab_size) == (50257, 50304)
    model = g.GPT.empty(source.model_config)
    source.load_model(model)
    assert model(ids()).shape == (2, 11, 50257)


class Other:
    """A class that loading a pickle must not instantiate."""


def _touch(path: str) -> object:
    Path(path).touch()
    return None


class Payload:
    """A pickle of it creates a file when it is loaded as code."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return _touch, (str(self.path),)


def test_code_in_a_pickle_is_not_run(tmp_path: Path) -> None:
    path = tmp_path / "evil.pt"
    torch.save({"model": {}, "model_args": Payload(tmp_path / "ran")}, path)
    with pytest.raises(UserError, match="would execute"):
        find_model(path)
    assert not (tmp_path / "ran").exists()


REFUSED: dict[str, tuple[Any, str]] = {
    "a list": ([1, 2], "'model' must hold tensors"),
    "no model": ({"step": 1}, "'model' must hold tensors"),
    "a model that is no tensors": ({"model": {"a": 1}}, "'model' must hold tensors"),
    "weights alone": ({"model": {"a": torch.ones(1)}}, "model_args"),
    "another class": ({"model": {"a": torch.ones(1)}, "config": Other()}, "test_nanogpt.Other"),
    "a loss that is text": ({"model": {"a": torch.ones(1)}, "model_args": {}, "best_val_loss": "x"}, "'x'"),
    "a loss that is a vector": (
        {"model": {"a": torch.ones(1)}, "model_args": {}, "best_val_loss": torch.ones(3)},
        "scalar",
    ),
    "numbers for names": ({"model": {1: torch.ones(1)}, "model_args": {}}, "'model' must hold tensors"),
    "numbers for settings": ({"model": {"a": torch.ones(1)}, "model_args": {1: 2}}, "startswith"),
    "an impossible shape": ({"model": {"a": torch.ones(1)}, "model_args": {"n_head": 5, "n_embd": 16}}, "got 5"),
    "an unknown setting": ({"model": {"a": torch.ones(1)}, "model_args": {"rotary": True}}, "rotary = True"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_invalid_files_are_errors_that_name_the_reason(name: str, tmp_path: Path) -> None:
    content, reason = REFUSED[name]
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(UserError) as error:
        g.load(tmp_path / "x.pt")
    assert reason in str(error.value)
    assert "x.pt" in str(error.value)
    assert str(error.value).count("\n") == 0


@pytest.mark.parametrize("damage", ["empty", "cut off", "text"])
def test_a_damaged_file_is_refused(damage: str, tmp_path: Path) -> None:
    path = save_nanogpt(tmp_path / "ckpt.pt", hf_gpt2("gelu"))
    content = path.read_bytes()
    path.write_bytes({"empty": b"", "cut off": content[: len(content) // 2], "text": b"hello"}[damage])
    with pytest.raises(UserError, match=r"ckpt\.pt"):
        g.load(path)


def test_the_error_names_missing_or_misshapen_tensors(tmp_path: Path) -> None:
    weights = hf_gpt2("gelu")
    missing, misshapen = nanogpt_state_dict(weights), nanogpt_state_dict(weights)
    missing.pop("transformer.h.1.ln_2.weight")
    misshapen["transformer.wpe.weight"] = torch.ones(13, 16)
    for tensors, name in ((missing, "transformer.h.1.ln_2.weight"), (misshapen, "transformer.wpe.weight")):
        with pytest.raises(UserError, match=name):
            g.load(save_nanogpt(tmp_path / "ckpt.pt", weights, model=tensors))


def test_a_nanogpt_checkpoint_can_be_exported_to_hugging_face(tmp_path: Path) -> None:
    """The exported model has the same logits in transformers, and the same config when it is read again."""
    expected = hf_gpt2("gelu")
    family = g.export(save_nanogpt(tmp_path / "ckpt.pt", expected), tmp_path / "hf")
    assert family == "GPT2"
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    with torch.no_grad():
        torch.testing.assert_close(back(ids()).logits, expected(ids()).logits, atol=1e-5, rtol=0)
    assert dataclasses.asdict(find_model(tmp_path / "hf").model_config) == dataclasses.asdict(
        find_model(tmp_path / "ckpt.pt").model_config
    )
