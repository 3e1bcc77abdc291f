"""A model reference is one string: a run (`runs/demo`, `@best`, `@500`) or a checkpoint directory of ours; a Hugging Face
directory, `.safetensors` file or hub id; a checkpoint of nanoGPT or build-nanogpt (`.pt`)."""

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeVar

import torch

from glassgpt.config.model import ModelConfig
from glassgpt.interop.hf_models import export_hf, open_hf
from glassgpt.interop.nanogpt import open_nanogpt
from glassgpt.model.gpt import GPT
from glassgpt.model.summary import ModelSummary
from glassgpt.runs.checkpoint import Checkpoint, checkpoint_paths, latest_checkpoint, open_checkpoint
from glassgpt.tokenizers.builtin import Tokenizer
from glassgpt.utils.device import find_device
from glassgpt.utils.errors import UserError, nearby_path, program
from glassgpt.utils.files import explain_os_errors, user_path
from glassgpt.utils.hub import download_model, find_hub_id

T = TypeVar("T")


class ModelSource(Protocol):
    """A model that a reference names: found and understood, but not loaded yet."""

    @property
    def path(self) -> Path:
        """Where it is."""
        ...

    @property
    def model_config(self) -> ModelConfig:
        """Its shape, `vocab_size` included."""
        ...

    @property
    def tokenizer(self) -> Tokenizer | None:
        """Its tokenizer, None where it has none."""
        ...

    @property
    def facts(self) -> tuple[tuple[str, str], ...]:
        """What `glassgpt info` tells besides the model's summary, as names and values."""
        ...

    def load_model(self, model: GPT) -> None:
        """Fill a model's parameters in place. Raises `UserError` where they do not fit."""
        ...


def find_model(reference: str | Path) -> ModelSource:
    """The model that a reference names. A hub id that is nothing on the disk is downloaded. Raises `UserError` if there is none."""
    with explain_os_errors("read", Path(reference)):
        return _find_model(str(reference))


def _find_model(text: str) -> ModelSource:
    path = user_path(text)
    if path.is_file() and path.suffix in (".pt", ".pth"):
        return open_nanogpt(path)
    if path.name == "model.safetensors" and (path.parent / "config.toml").is_file():
        return find_checkpoint(path.parent)
    if (path.is_file() and path.suffix == ".safetensors") or (path / "config.json").is_file():
        return open_hf(path)
    if (hub_id := find_hub_id(text)) is not None:
        return open_hf(download_model(hub_id))
    return find_checkpoint(text)


def find_checkpoint(reference: str | Path) -> Checkpoint:
    """The verified checkpoint that a reference names: a run's newest whole one, or its `@best` or `@STEP`.

    Raises `UserError` if there is none.
    """
    with explain_os_errors("read", Path(reference)):
        return _find(str(reference))


def _find(text: str) -> Checkpoint:
    path = user_path(text)
    if path.is_dir() and (path / "manifest.json").is_file() and (path / "model.safetensors").is_file():
        return open_checkpoint(path, for_training=False)
    base, _, which = text.rpartition("@") if "@" in text and not path.exists() else (text, "", "")
    run = user_path(base)
    if run.is_file():
        raise UserError(
            f"{base} is no model: name a run or a checkpoint, a .safetensors file, or a .pt file of nanoGPT"
        )
    if not run.is_dir() and run.suffix in (".pt", ".pth", ".safetensors"):
        raise UserError(f"there is no file {base}")
    if not run.is_dir():
        nearby = nearby_path(base)
        fix = f"did you mean {nearby}?" if nearby else f"start a run with: {program()} train --out {shlex.quote(base)}"
        raise UserError(f"{base} does not exist; {fix}\na model of the Hugging Face Hub is named hf:owner/name")
    paths = checkpoint_paths(run / "checkpoints")
    if not paths and any(run.glob("*.safetensors")):
        raise UserError(f"{run} has weights but no config.json, which says what model they are of; put it there")
    if not paths:
        if (run / "config.toml").is_file():
            raise UserError(
                f"the run {run} has no checkpoint yet; go on with `{program()} train --resume {shlex.quote(str(run))}`"
            )
        raise UserError(f"{run} is neither a run nor a checkpoint: it has no checkpoints directory")
    if not which or which == "best":
        notices: list[str] = []
        checkpoint = latest_checkpoint(run / "checkpoints", notices.append, for_training=False)
        if checkpoint is None:
            raise UserError(f"the checkpoints of {run} were removed meanwhile")
        for notice in notices:
            print(f"glassgpt: warning: {notice}", file=sys.stderr)
        if not which:
            return checkpoint
        best = checkpoint.state.best_step
        if best is None:
            raise UserError(f"no checkpoint of {run} has been evaluated yet; use {run}")
        return open_checkpoint(run / "checkpoints" / f"{best:06d}", for_training=False)
    if not which.isdecimal() or int(which) not in {int(p.name) for p in paths}:
        steps = ", ".join(str(int(p.name)) for p in paths)
        raise UserError(f"the run {run} has no checkpoint {which!r}; it has {steps} and best")
    return open_checkpoint(run / "checkpoints" / f"{int(which):06d}", for_training=False)


def read_reference(reference: str | Path, read: Callable[[ModelSource], T]) -> T:
    """What `read` makes of a reference's model. A run in training may prune a checkpoint meanwhile: then its newer one is read."""
    try:
        return read(find_model(reference))
    except FileNotFoundError:
        return read(find_model(reference))


def tokenizer_of(source: ModelSource) -> Tokenizer | None:
    """Its tokenizer. Raises `UserError` for one with more ids than the model has."""
    tokenizer, vocab_size = source.tokenizer, source.model_config.vocab_size or 0
    if tokenizer is not None and tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"{source.path}: its tokenizer has {tokenizer.vocab_size:,} ids and its model {vocab_size:,}, so they do not belong together; "
            "put the model's own tokenizer.json there"
        )
    return tokenizer


def load_source(source: ModelSource, device: torch.device) -> tuple[GPT, Tokenizer | None]:
    """The model, in evaluation mode on `device`, and the tokenizer."""
    model = GPT.empty(source.model_config, device)
    source.load_model(model)
    return model.eval(), tokenizer_of(source)


def load(reference: str | Path, device: str = "auto") -> tuple[GPT, Tokenizer | None]:
    """Model and tokenizer of a reference: `model, tokenizer = glassgpt.load("runs/demo@best")`.

    The model is in evaluation mode, on `device` (`auto`, `cpu`, `cuda`, …); the tokenizer is None where there is none beside it.
    Raises `UserError` if the reference names nothing, something damaged, or a model that the slots do not cover.
    """
    target = find_device(device)
    return read_reference(reference, lambda source: load_source(source, target))


def export(reference: str | Path, out: str | Path) -> str:
    """Write the model as a directory that Hugging Face's transformers loads, and return the family it became (`GPT2`, `Llama`, …).

    Raises `UserError` where no family can hold the model, naming what stands in the way, or the directory has something in it.
    """
    model, tokenizer = load(reference, device="cpu")
    return export_hf(model, tokenizer, user_path(str(out)))


def describe(reference: str | Path) -> str:
    """A few lines on what a reference holds: where it is, its training so far, its tokenizer, and its model's summary."""
    return read_reference(reference, _describe)


def _describe(source: ModelSource) -> str:
    try:
        tokenizer = tokenizer_of(source)
        about = "none" if tokenizer is None else f"{tokenizer.kind}, {tokenizer.vocab_size:,} ids"
    except UserError as error:  # GPT-2's vocabulary without network, say: the rest can be told all the same
        about = f"not at hand: {error}"
    rows = (*source.facts, ("tokenizer", about))
    return "\n".join(f"{name:<22}{value}" for name, value in rows) + f"\n{ModelSummary(source.model_config)}"
