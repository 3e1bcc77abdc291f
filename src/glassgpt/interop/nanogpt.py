"""Checkpoints of nanoGPT (`ckpt.pt`) and build-nanogpt (`model_19072.pt`): pickles, read as tensors and plain values only."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from glassgpt.config.model import ModelConfig
from glassgpt.interop.hf_families import Family, gpt2_rows
from glassgpt.model.gpt import GPT
from glassgpt.tokenizers.builtin import BPETokenizer, Tokenizer, load_tokenizer
from glassgpt.utils.errors import UserError
from glassgpt.utils.files import explain_os_errors
from glassgpt.utils.safe_pickle import read_pickle

GPT2_VOCAB_SIZE = 50257
_KEYS = {name: (name,) for name in ("vocab_size", "n_layer", "n_head", "n_embd")} | {"context_length": ("block_size",)}
_DEFAULTS = {"vocab_size": 50304, "block_size": 1024, "n_layer": 12, "n_head": 12, "n_embd": 768}
# Both name tensors as GPT-2's first files do, but hold them as a linear layer does.
_BUILD_NANOGPT = Family(
    name="build-nanogpt",
    model_type="build-nanogpt",
    architecture="",
    prefix="transformer.",
    keys=_KEYS,
    defaults=_DEFAULTS | {"vocab_size": 50257},
    rows=gpt2_rows(transposed=False),
    buffers=r"h\.\d+\.attn\.bias",
)
_NANOGPT = dataclasses.replace(
    _BUILD_NANOGPT,
    name="nanoGPT",
    model_type="nanogpt",
    fixed={"activation": "gelu"},  # the exact form, unlike GPT-2
    keys=_KEYS | {"bias": ("bias",), "dropout": ("dropout",)},
    defaults=_DEFAULTS | {"bias": True, "dropout": 0.0},
)


class _PickledConfig:
    """Takes the place of build-nanogpt's own `GPTConfig`, which its checkpoints hold pickled: attributes, and no code."""


@dataclass(frozen=True)
class NanoGPTModel:
    """A file of one of the two projects, its config understood and its tensors read."""

    path: Path
    family: Family
    model_config: ModelConfig
    tensors: Mapping[str, Tensor]
    facts: tuple[tuple[str, str], ...]
    """What `glassgpt info` tells."""

    @property
    def tokenizer(self) -> Tokenizer | None:
        """A tokenizer.json beside the file, else GPT-2's where the vocabulary has its size, else None.

        A nanoGPT model of characters keeps these in a pickled file of its own; `glassgpt prepare` on its text makes the same.
        """
        beside = self.path.parent / "tokenizer.json"
        if beside.is_file():
            return load_tokenizer(beside)
        return BPETokenizer.gpt2() if self.model_config.vocab_size == GPT2_VOCAB_SIZE else None

    def load_model(self, model: GPT) -> None:
        """Fill a model's parameters in place. Raises `UserError` naming the first tensor that is wrong."""
        try:
            self.family.fill(model, self.tensors)
        except UserError as error:
            raise UserError(f"cannot load {self.path}: {error}") from None


def open_nanogpt(path: Path) -> NanoGPTModel:
    """A `.pt` file of nanoGPT or build-nanogpt. Raises `UserError` for another one, with the reason."""
    with explain_os_errors("read", path):
        content = read_pickle(
            path, [(_PickledConfig, f"{module}.GPTConfig") for module in ("__main__", "train_gpt2", "model")]
        )
    if not isinstance(content, dict):
        raise UserError(f"{path} holds {type(content).__name__}, not the dictionary of a checkpoint")
    weights = content.get("model")
    if not isinstance(weights, dict) or not all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in weights.items()
    ):
        raise UserError(f"{path} holds no model of nanoGPT or build-nanogpt: it has no tensors by name under 'model'")
    config = content.get("config")
    if isinstance(config, _PickledConfig):
        family, settings, steps = _BUILD_NANOGPT, vars(config), content.get("step")
    elif isinstance(content.get("model_args"), dict):
        family, settings, steps = _NANOGPT, content["model_args"], content.get("iter_num")
    else:
        raise UserError(
            f"{path} tells no shape: nanoGPT's files have 'model_args' and build-nanogpt's a 'config', and weights alone do not say "
            "how many heads they are for"
        )
    # torch.compile puts a prefix before every name.
    tensors = {name.removeprefix("_orig_mod."): tensor for name, tensor in weights.items()}
    try:
        loss = content.get("best_val_loss" if family is _NANOGPT else "val_loss")
        facts = (
            ("checkpoint", f"{path} ({family.name})"),
            ("step", f"{steps:,}" if isinstance(steps, int) else "not told"),
            (
                "validation loss",
                "not told" if loss is None else f"{float(loss):.4f} nats a token, as its project estimated it",
            ),
        )
        return NanoGPTModel(path, family, _padding_told(family.read(settings)), tensors, facts)
    except (
        UserError,
        TypeError,
        ValueError,
        AttributeError,
        RuntimeError,
    ) as error:  # a text where a number belongs, say
        raise UserError(f"cannot use {path}: {error}") from None


def _padding_told(config: ModelConfig) -> ModelConfig:
    """50,304 rows are GPT-2's 50,257 tokens and padding, in both projects."""
    if config.vocab_size != 50304:
        return config
    return dataclasses.replace(config, vocab_size=GPT2_VOCAB_SIZE, vocab_multiple=128)
