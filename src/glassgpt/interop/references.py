"""Model references: one string names a run (`runs/demo`, `runs/demo@best`, `runs/demo@500`), a checkpoint, a Hugging
Face directory, .safetensors file or hub id, or a .pt file of nanoGPT or build-nanogpt.
"""

import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch

from glassgpt.config.schema import TrainConfig
from glassgpt.interop.hf_mapping import ExternalModel
from glassgpt.interop.hf_models import chat_template_in, export_hf, open_hf
from glassgpt.interop.nanogpt import open_nanogpt
from glassgpt.model.gpt import GPT
from glassgpt.model.summary import ModelSummary
from glassgpt.runs.checkpoint import Checkpoint, TrainingState, checkpoint_paths, latest_checkpoint, open_checkpoint
from glassgpt.tokenizers.builtin import Tokenizer
from glassgpt.utils.arguments import check_arguments
from glassgpt.utils.device import find_device
from glassgpt.utils.errors import UserError, nearby_path, program
from glassgpt.utils.files import explain_os_errors, user_path
from glassgpt.utils.hub import download_model, find_hub_id

ATTEMPTS = 5  # at reading a model whose files are replaced meanwhile
T = TypeVar("T")
# A model that was found and whose config was read, but whose weights are not loaded yet.
ModelSource = Checkpoint | ExternalModel


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode with what its reference says about it."""

    reference: str
    model: GPT
    tokenizer: Tokenizer | None
    config: TrainConfig | None  # of its run; None for a model from elsewhere
    state: TrainingState | None  # of its checkpoint; None for a model from elsewhere

    @property
    def provenance(self) -> dict[str, Any]:
        """What every result of this model names: versions, reference and step."""
        step = None if self.state is None else self.state.step
        return {"glassgpt": version("glassgpt"), "torch": torch.__version__, "model": self.reference, "step": step}


def find_model(reference: str | Path, *, verify: bool = True) -> ModelSource:
    """The model that a reference names; a hub id is downloaded. Raises `UserError` if it does not exist or is damaged.

    verify: compare a checkpoint's files with their sha256, which reads all weights.
    """
    text, path = str(reference), user_path(str(reference))
    with explain_os_errors("read", Path(reference)):
        if path.is_file() and path.suffix in (".pt", ".pth"):
            return open_nanogpt(path)
        if path.name == "model.safetensors" and (path.parent / "config.toml").is_file():
            return find_checkpoint(path.parent, verify=verify)
        if (path.is_file() and path.suffix == ".safetensors") or (path / "config.json").is_file():
            return open_hf(path)
        if (hub_id := find_hub_id(text)) is not None:
            return open_hf(download_model(hub_id))
        return find_checkpoint(text, verify=verify)


def find_checkpoint(reference: str | Path, *, verify: bool = True) -> Checkpoint:
    """The checkpoint that a reference names: a directory, or a run's newest valid one, `@best` or `@STEP`."""
    text, path = str(reference), user_path(str(reference))
    if not (path.is_dir() and (path / "manifest.json").is_file() and (path / "model.safetensors").is_file()):
        base, _, selector = text.rpartition("@") if "@" in text and not path.exists() else (text, "", "")
        directory = _require_checkpoints(base)
        if base != text and not selector:
            raise UserError(f"{text} names no checkpoint after the @; use {base}, {base}@best or {base}@STEP")
        steps = [int(path.name) for path in checkpoint_paths(directory)]
        if not selector and verify:
            warn = partial(print, "glassgpt: warning:", file=sys.stderr)  # names damaged checkpoints
            if (newest := latest_checkpoint(directory, warn, for_training=False)) is None:
                raise UserError(f"the checkpoints in {directory} were removed meanwhile")
            return newest
        if selector not in ("", "best") and not (selector.isdecimal() and int(selector) in steps):
            raise UserError(f"{base} has no checkpoint {selector!r}; it has {', '.join(map(str, steps))} and best")
        step = _best_step(directory) if selector == "best" else int(selector or steps[-1])
        path = directory / f"{step:06d}"
    return open_checkpoint(path, for_training=False) if verify else Checkpoint(path)


def _require_checkpoints(name: str) -> Path:
    """The `checkpoints` directory of a run. Raises `UserError` with the reason if the run has none."""
    run = user_path(name)
    if not name or (run.exists() and not run.is_dir()):
        kinds = "a run, a checkpoint, a .safetensors file, or nanoGPT's .pt file"
        raise UserError(f"{name or repr(name)} is not a model; pass {kinds}")
    if not run.is_dir():
        nearby = nearby_path(name)
        start = f"start a run with: {program()} train --out {shlex.quote(name)}"
        fix = f"did you mean {nearby}?" if nearby else start if run.parts[0] == "runs" else "check the path"
        raise UserError(f"{name} does not exist; {fix}\na model of the Hugging Face Hub is named hf:owner/name")
    if checkpoint_paths(run / "checkpoints"):
        return run / "checkpoints"
    if any(run.glob("*.safetensors")):
        raise UserError(f"{run} has weights but no config.json; add the model's config.json")
    if (run / "config.toml").is_file():
        resume = f"{program()} train --resume {shlex.quote(str(run))}"
        raise UserError(f"{run} has no checkpoint yet; continue its training with: {resume}")
    runs = sorted(config.parent for config in run.glob("*/config.toml"))
    hint = f"; name a run in it, such as {runs[0]}" if runs else ""
    raise UserError(f"{run} is neither a run nor a checkpoint: it has no checkpoints directory{hint}")


def _best_step(directory: Path) -> int:
    """The best step according to the newest readable state.json. No weights are read."""
    error = UserError(f"the checkpoints in {directory} were removed meanwhile")
    for path in reversed(checkpoint_paths(directory)):
        try:
            step = Checkpoint(path).state.best_step
        except UserError as damage:
            error = damage
            continue
        if step is None:
            raise UserError(f"{directory.parent} has no best checkpoint: none was evaluated yet; leave @best out")
        return step
    raise error


def read_reference(reference: str | Path, read: Callable[[ModelSource], T], verify: bool = True) -> T:
    """Call `read` with a reference's model. If training prunes the checkpoint meanwhile, read the newer one.

    Raises `UserError` if the files vanish again and again.
    """
    for _ in range(ATTEMPTS):
        try:
            with explain_os_errors("read", Path(reference)):
                return read(find_model(reference, verify=verify))
        except UserError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise
    raise UserError(f"{reference}: its files were removed while they were read; try again, or name another checkpoint")


def tokenizer_of(source: ModelSource) -> Tokenizer | None:
    """The model's tokenizer. Raises `UserError` if it has more ids than the model."""
    tokenizer, vocab_size = source.tokenizer, source.model_config.vocab_size or 0
    if tokenizer is not None and tokenizer.model_vocab_size > vocab_size:
        sizes = f"the tokenizer has {tokenizer.model_vocab_size:,} ids and the model {vocab_size:,}"
        raise UserError(f"{source.path}: {sizes}, so they do not match; put the model's own tokenizer.json there")
    return tokenizer


def load_source(source: ModelSource, device: torch.device) -> tuple[GPT, Tokenizer | None]:
    """The model, in evaluation mode on `device`, and the tokenizer."""
    ends = None
    if isinstance(source, ExternalModel) and source.tensors:  # reads the tensors, and counts their layers
        ends = source.end_ids
    source.load_model(GPT.empty(source.model_config, "meta"))  # compares all shapes before memory is taken
    model = GPT.empty(source.model_config, device)
    source.load_model(model)
    model.end_ids = ends
    return model.eval(), tokenizer_of(source)


def load_model(reference: str | Path, device: torch.device) -> LoadedModel:
    """Load a reference's model, its tokenizer, and the config and state of its run. Raises `UserError` as `load`."""

    def read(source: ModelSource) -> LoadedModel:
        run = (source.config, source.state) if isinstance(source, Checkpoint) else (None, None)
        return LoadedModel(str(reference), *load_source(source, device), *run)

    return read_reference(reference, read)


@check_arguments
def load(reference: str | Path, device: str | torch.device = "auto") -> tuple[GPT, Tokenizer | None]:
    """Load a model and its tokenizer: `model, tokenizer = glassgpt.load("runs/demo@best")`.

    The model is in evaluation mode on `device` (`auto`, `cpu`, `cuda`, ...); the tokenizer is None if there is none.
    Raises `UserError` if the model does not exist, is damaged, or has an architecture that glassgpt does not support.
    """
    loaded = load_model(reference, find_device(device))
    return loaded.model, loaded.tokenizer


@check_arguments
def export(reference: str | Path, out: str | Path, dtype: str = "float32") -> str:
    """Write a directory that Hugging Face's transformers loads, and return the model's family (`GPT2`, `Llama`, ...).

    dtype: `float32`, `bfloat16` or `float16`. A Hugging Face model's chat template is kept. Raises `UserError` if no
    family can hold the model, naming the settings, or the dtype its numbers, or if the directory is not empty.
    """

    def read(source: ModelSource) -> tuple[GPT, Tokenizer | None, Any]:
        folder = source.path if source.path.is_dir() else source.path.parent
        return *load_source(source, torch.device("cpu")), chat_template_in(folder)

    model, tokenizer, chat_template = read_reference(reference, read)
    return export_hf(model, tokenizer, user_path(out), dtype, chat_template)


def describe(reference: str | Path) -> str:
    """A few lines about a model: its place, training so far, tokenizer and summary. Weights are not verified."""

    def read(source: ModelSource) -> str:
        try:
            tokenizer = tokenizer_of(source)
            about = "none" if tokenizer is None else f"{tokenizer.kind}, {tokenizer.vocab_size:,} ids"
        except UserError as error:  # for example, GPT-2's vocabulary without network
            about = f"not available: {error}"
        rows = (*source.facts, ("tokenizer", about))
        return "\n".join(f"{name:<22}{value}" for name, value in rows) + f"\n{ModelSummary(source.model_config)}"

    return read_reference(reference, read, verify=False)
