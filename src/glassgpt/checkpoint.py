"""Checkpoints: a directory each, whole or not there, verified when read, never unpickled.

    checkpoints/000500/  model.safetensors  optimizer.safetensors  config.toml  tokenizer.json  state.json  manifest.json

`manifest.json` holds the sha256 of every other file, so a truncated or altered checkpoint is noticed before it is used.
"""

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from .config import ModelConfig, TrainConfig
from .errors import UserError
from .files import PARTIAL_PREFIX, atomic_directory, remove_partials, sha256_of
from .tokenizers import Tokenizer, load_tokenizer

OPTIMIZER_FILE = "optimizer.safetensors"
_STEP_NAME = re.compile(r"\d{6,}")


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """What training goes on from, besides weights and optimizer: where the run is and what its best was."""

    step: int
    """Updates done."""
    val_loss: float | None = None
    """Validation loss at this step, where it was evaluated, in nats a token."""
    best_step: int | None = None
    best_val_loss: float | None = None
    scaler: dict[str, float | int] | None = None
    """Loss scale of float16 training."""
    data_fingerprint: str | None = None
    """Of the dataset that the run trains on."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint directory that has been verified."""

    path: Path

    @property
    def config(self) -> TrainConfig:
        """The run's config when this was saved, `model.vocab_size` filled in."""
        return TrainConfig.from_toml((self.path / "config.toml").read_text(encoding="utf-8"), origin=str(self.path / "config.toml"))

    @property
    def model_config(self) -> ModelConfig:
        """The model's shape."""
        return self.config.model

    @property
    def facts(self) -> tuple[tuple[str, str], ...]:
        """What `glassgpt info` tells: where it is, and its training so far."""
        config, state = self.config, self.state
        loss = "not evaluated" if state.val_loss is None else f"{state.val_loss:.4f} nats a token"
        return (
            ("checkpoint", str(self.path)),
            ("step", f"{state.step:,} ({state.step * config.batch_tokens:,} tokens seen)"),
            ("validation loss", loss),
            ("trained on", config.data.source),
        )

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the model was trained with."""
        return load_tokenizer(self.path / "tokenizer.json")

    @property
    def state(self) -> TrainingState:
        """Where training was. Raises `UserError` where it cannot be read, which is found in a checkpoint not verified only."""
        try:
            return TrainingState(**json.loads((self.path / "state.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            raise UserError(f"checkpoint {self.path} is damaged: state.json cannot be read") from None

    def load_model(self, model: nn.Module) -> None:
        """Fill a model's parameters in place. Raises `UserError` if it has another architecture."""
        tensors = read_tensors(self.path / "model.safetensors")
        parameters = dict(model.named_parameters())
        wrong = sorted(tensors.keys() ^ parameters.keys())
        wrong += sorted(name for name in tensors.keys() & parameters.keys() if tensors[name].shape != parameters[name].shape)
        if wrong:
            raise UserError(f"{self.path} is a checkpoint of another architecture: {wrong[0]!r} differs ({len(wrong)} tensors in all)")
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(tensors[name])

    def load_optimizers(self, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Fill the optimizers' state of each parameter. Learning rate and other settings stay as they are."""
        parameters = dict(model.named_parameters())
        owners = {parameter: optimizer for optimizer in optimizers for group in optimizer.param_groups for parameter in group["params"]}
        for key, value in read_tensors(self.path / OPTIMIZER_FILE).items():
            kind, _, name = key.partition(".")
            parameter = parameters[name]
            # A copy, since what was read is a map of the file, and pruning will remove the file.
            owners[parameter].state[parameter][kind] = value.to(parameter.device, copy=True)


def save_checkpoint(
    directory: Path,
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    config: TrainConfig,
    tokenizer: Tokenizer,
    training: TrainingState,
) -> Path:
    """Write `directory/NNNNNN` atomically. Raises `UserError` when the disk is full; what was there before stays whole."""
    final = directory / f"{training.step:06d}"
    weights: dict[str, Tensor] = dict(model.named_parameters())
    names = {parameter: name for name, parameter in weights.items()}
    states = [item for optimizer in optimizers for item in optimizer.state.items()]
    moments = {f"{key}.{names[parameter]}": value for parameter, state in states for key, value in state.items()}
    with atomic_directory(final) as partial:
        write_tensors(partial / "model.safetensors", weights)
        write_tensors(partial / OPTIMIZER_FILE, moments)
        (partial / "config.toml").write_text(config.to_toml(), encoding="utf-8")
        (partial / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
        (partial / "state.json").write_text(json.dumps(dataclasses.asdict(training)), encoding="utf-8")
        sums = {path.name: sha256_of(path) for path in sorted(partial.iterdir())}
        (partial / "manifest.json").write_text(json.dumps({"sha256": sums}, indent=1), encoding="utf-8")
    return final


def checkpoint_paths(directory: Path) -> list[Path]:
    """The checkpoint directories in order of their steps."""
    if not directory.is_dir():
        return []
    return sorted((path for path in directory.iterdir() if _STEP_NAME.fullmatch(path.name)), key=lambda path: int(path.name))


def open_checkpoint(path: Path, *, for_training: bool = True) -> Checkpoint:
    """Verify a checkpoint against its manifest. Raises `UserError` naming the first file that is missing or altered.

    Only training reads the optimizer's state, two thirds of the bytes: others leave it unread. A directory that is not there
    (any more) is a `FileNotFoundError`.
    """
    try:
        sums: dict[str, str] = json.loads((path / "manifest.json").read_text(encoding="utf-8"))["sha256"]
    except FileNotFoundError:
        if not path.is_dir():
            raise
        raise UserError(f"{path} is no checkpoint: it has no manifest.json") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"checkpoint {path} is damaged: manifest.json cannot be read") from None
    for name, expected in sums.items():
        if name == OPTIMIZER_FILE and not for_training:
            continue
        try:
            found = sha256_of(path / name)
        except FileNotFoundError:
            if not path.is_dir():
                raise
            raise UserError(f"checkpoint {path} is damaged: {name} is missing") from None
        if found != expected:
            raise UserError(f"checkpoint {path} is damaged: {name} does not match its sha256")
    return Checkpoint(path)


def latest_checkpoint(directory: Path, warn: Callable[[str], None], *, for_training: bool = True) -> Checkpoint | None:
    """The newest checkpoint that is whole, None where there are none.

    Damaged ones are named through `warn` and skipped; if none of them is whole, that is a `UserError`.
    """
    paths = checkpoint_paths(directory)
    for path in reversed(paths):
        try:
            return open_checkpoint(path, for_training=for_training)
        except UserError as error:
            warn(f"{error}; trying the one before it")
    if paths:
        raise UserError(f"no checkpoint in {directory} is whole: start the run again with --overwrite")
    return None


def prune_checkpoints(directory: Path, keep: int, best_step: int | None) -> None:
    """Remove all but the newest `keep` checkpoints and the best one, and what killed saves left behind."""
    remove_partials(directory)
    for path in checkpoint_paths(directory)[:-keep]:
        if int(path.name) != best_step:
            _remove(path)


def remove_later_checkpoints(directory: Path, step: int) -> None:
    """Remove the checkpoints of later steps than the whole one that a run goes on from.

    They are damaged, and would count among the newest: whole ones would be pruned for them.
    """
    for path in checkpoint_paths(directory):
        if int(path.name) > step:
            _remove(path)


def _remove(path: Path) -> None:
    """Remove a checkpoint: for a reader it is gone at once, never half there."""
    aside = path.with_name(f"{PARTIAL_PREFIX}removed-{path.name}")
    os.replace(path, aside)
    shutil.rmtree(aside)


@contextmanager
def _as_os_errors() -> Iterator[None]:
    """safetensors reports a full disk as its own error; give it the number that the rest of the code looks for."""
    try:
        yield
    except SafetensorError as error:
        found = re.search(r"os error (\d+)", str(error))
        if found is None:
            raise
        raise OSError(int(found[1]), str(error)) from error


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file. Raises `OSError` as other writing does, where the disk is full, say."""
    path.touch()  # for its mode: safetensors writes files that nobody else may read
    mode = path.stat().st_mode
    with _as_os_errors():
        safetensors.torch.save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path, metadata)
    path.chmod(mode)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, as a map of the file. Raises `UserError` where it is damaged."""
    try:
        return safetensors.torch.load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} cannot be read as safetensors: {error}") from None
