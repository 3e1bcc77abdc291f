"""Checkpoints of nanoGPT (`ckpt.pt`) and build-nanogpt (`model_19072.pt`), read as tensors and plain values only."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from glassgpt.config.model import ModelConfig
from glassgpt.interop.hf_families import gpt2_tensors
from glassgpt.interop.hf_mapping import Family
from glassgpt.model.gpt import GPT
from glassgpt.tokenizers.builtin import BPETokenizer, Tokenizer, load_tokenizer
from glassgpt.utils.errors import UserError
from glassgpt.utils.files import explain_os_errors
from glassgpt.utils.safe_pickle import read_pickle

GPT2_VOCAB_SIZE = 50257
_KEYS = {name: (name,) for name in ("vocab_size", "n_layer", "n_head", "n_embd")} | {"context_length": ("block_size",)}
_DEFAULTS = {"vocab_size": 50304, "block_size": 1024, "n_layer": 12, "n_head": 12, "n_embd": 768}
# Both use the tensor names of GPT-2's first files, but store weights as nn.Linear does.
_BUILD_NANOGPT = Family(
    name="build-nanogpt", model_type="build-nanogpt", architecture="", prefix="transformer.",
    keys=_KEYS,
    defaults=_DEFAULTS | {"vocab_size": GPT2_VOCAB_SIZE},
    tensors=gpt2_tensors(transposed=False),
    buffers=r"h\.\d+\.attn\.bias",
)  # fmt: skip
_NANOGPT = dataclasses.replace(
    _BUILD_NANOGPT,
    name="nanoGPT",
    model_type="nanogpt",
    fixed={"activation": "gelu"},  # the exact form, unlike GPT-2
    keys=_KEYS | {"bias": ("bias",), "dropout": ("dropout",)},
    defaults=_DEFAULTS | {"bias": True, "dropout": 0.0},
)


class _PickledConfig:
    """Replaces build-nanogpt's `GPTConfig`, which its checkpoints hold pickled: attributes without code."""


@dataclass(frozen=True)
class NanoGPTModel:
    """A checkpoint of one of the two projects, with its config and tensors."""

    path: Path
    family: Family
    model_config: ModelConfig
    tensors: Mapping[str, Tensor]
    facts: tuple[tuple[str, str], ...]
    """Names and values that `glassgpt info` prints."""

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer.json in the same folder, or GPT-2's for a vocabulary of its size, or None.

        nanoGPT's character models keep their characters in another pickle; `glassgpt prepare` on the text restores it.
        """
        file = self.path.parent / "tokenizer.json"
        if file.is_file():
            return load_tokenizer(file)
        return BPETokenizer.gpt2() if self.model_config.vocab_size == GPT2_VOCAB_SIZE else None

    def load_model(self, model: GPT) -> None:
        """Fill a model's parameters in place. Raises `UserError` with the first tensor that is wrong."""
        try:
            self.family.load_tensors(model, self.tensors)
        except UserError as error:
            raise UserError(f"cannot load {self.path}: {error}") from None


def open_nanogpt(path: Path) -> NanoGPTModel:
    """Read a `.pt` file of nanoGPT or build-nanogpt. Raises `UserError` with the reason for any other file."""
    with explain_os_errors("read", path):
        modules = ("__main__", "train_gpt2", "model")
        content = read_pickle(path, [(_PickledConfig, f"{module}.GPTConfig") for module in modules])
    weights = content.get("model") if isinstance(content, dict) else None
    if not isinstance(weights, dict) or not all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in weights.items()
    ):
        raise UserError(f"{path} is not a checkpoint of nanoGPT or build-nanogpt: 'model' must hold tensors by name")
    config = content.get("config")
    if isinstance(config, _PickledConfig):
        family, settings, names = _BUILD_NANOGPT, vars(config), ("step", "val_loss")
    elif isinstance(content.get("model_args"), dict):
        family, settings, names = _NANOGPT, content["model_args"], ("iter_num", "best_val_loss")
    else:
        raise UserError(f"{path} has neither nanoGPT's 'model_args' nor build-nanogpt's 'config'; both name the shape")
    # torch.compile puts a prefix before every name.
    tensors = {name.removeprefix("_orig_mod."): tensor for name, tensor in weights.items()}
    step, loss = (content.get(name) for name in names)
    try:
        facts = _facts(path, family, step, loss)
        return NanoGPTModel(path, family, _with_padding(family.read_config(settings)), tensors, facts)
    except (
        UserError,
        TypeError,
        ValueError,
        AttributeError,
        RuntimeError,
    ) as error:  # such as text instead of a number
        raise UserError(f"cannot use {path}: {error}") from None


def _facts(path: Path, family: Family, step: Any, loss: Any) -> tuple[tuple[str, str], ...]:
    return (
        ("checkpoint", f"{path} ({family.name})"),
        ("step", f"{step:,}" if isinstance(step, int) else "unknown"),
        ("validation loss", "unknown" if loss is None else f"{float(loss):.4f} nats per token, by its own estimate"),
    )


def _with_padding(config: ModelConfig) -> ModelConfig:
    """In both projects 50,304 rows are GPT-2's 50,257 tokens and padding."""
    if config.vocab_size != 50304:
        return config
    return dataclasses.replace(config, vocab_size=GPT2_VOCAB_SIZE, vocab_multiple=128)
