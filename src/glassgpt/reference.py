"""A model reference is one string: a run (`runs/demo`, `@best`, `@500`) or a checkpoint directory."""

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from .checkpoint import Checkpoint, checkpoint_paths, latest_checkpoint, open_checkpoint
from .errors import UserError, program
from .files import explained, user_path
from .hardware import find_device
from .model import GPT
from .summary import ModelSummary
from .tokenizers import Tokenizer

T = TypeVar("T")


def find_checkpoint(reference: str | Path) -> Checkpoint:
    """The verified checkpoint that a reference names: a run's newest whole one, or its `@best` or `@STEP`.

    Raises `UserError` if there is none.
    """
    with explained("read", Path(reference)):
        return _find(str(reference))


def _find(text: str) -> Checkpoint:
    path = user_path(text)
    if path.is_dir() and (path / "manifest.json").is_file() and (path / "model.safetensors").is_file():
        return open_checkpoint(path, for_training=False)
    base, _, which = text.rpartition("@") if "@" in text and not path.exists() else (text, "", "")
    run = user_path(base)
    if run.is_file():
        raise UserError(f"{base} is a file; name a run or a checkpoint, which are directories")
    if not run.is_dir():
        raise UserError(f"there is no run or checkpoint at {base}; `{program()} train --out {shlex.quote(base)}` would make one")
    paths = checkpoint_paths(run / "checkpoints")
    if not paths:
        if (run / "config.toml").is_file():
            raise UserError(f"the run {run} has no checkpoint yet; go on with `{program()} train --resume {shlex.quote(str(run))}`")
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


def read_reference(reference: str | Path, read: Callable[[Checkpoint], T]) -> T:
    """What `read` makes of a reference's checkpoint. A run in training may prune it meanwhile: then its newer one is read."""
    try:
        return read(find_checkpoint(reference))
    except FileNotFoundError:
        return read(find_checkpoint(reference))


def load_checkpoint(checkpoint: Checkpoint, device: torch.device) -> tuple[GPT, Tokenizer]:
    """The model, in evaluation mode on `device`, and the tokenizer of a checkpoint."""
    config = checkpoint.config
    model = GPT.empty(config.model, device)
    checkpoint.load_model(model)
    return model.eval(), checkpoint.tokenizer


def load(reference: str | Path, device: str = "auto") -> tuple[GPT, Tokenizer | None]:
    """Model and tokenizer of a reference: `model, tokenizer = glassgpt.load("runs/demo@best")`.

    The model is in evaluation mode, on `device` (`auto`, `cpu`, `cuda`, …). Raises `UserError` if the reference names nothing, or
    something damaged.
    """
    target = find_device(device)
    return read_reference(reference, lambda checkpoint: load_checkpoint(checkpoint, target))


def describe(reference: str | Path) -> str:
    """A few lines on what a reference holds: where it is, its training so far, and its model's summary."""
    return read_reference(reference, _describe)


def _describe(checkpoint: Checkpoint) -> str:
    config, state, tokenizer = checkpoint.config, checkpoint.state, checkpoint.tokenizer
    loss = "not evaluated" if state.val_loss is None else f"{state.val_loss:.4f} nats a token"
    rows = (
        ("checkpoint", str(checkpoint.path)),
        ("step", f"{state.step:,} ({state.step * config.batch_tokens:,} tokens seen)"),
        ("validation loss", loss),
        ("trained on", config.data.source),
        ("tokenizer", f"{tokenizer.kind}, {tokenizer.vocab_size:,} ids"),
    )
    return "\n".join(f"{name:<22}{value}" for name, value in rows) + f"\n{ModelSummary(config.model)}"
