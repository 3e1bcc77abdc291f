"""Checkpoints: one directory each, written atomically, verified when read, never unpickled.

    000500/  model.safetensors  optimizer.safetensors  config.toml  tokenizer.json  state.json
             environment.json  logs.json  manifest.json

`manifest.json` holds the sha256 of every other file, so a truncated or altered checkpoint is detected before its use.
So is one of another step or another run: `environment.json`, a copy of the run's own file, has the run's id.
`logs.json` says how long the run's logs were, with their sha256. Version 0.2 wrote neither of the two.
A checkpoint that fails verification is set aside as `damaged-000500/` on resume, never deleted.
"""

import dataclasses
import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from glassgpt.config.model import ModelConfig
from glassgpt.config.schema import TrainConfig
from glassgpt.config.validation import Count, NotNegative, StrictConfig
from glassgpt.distributed.strategies import Strategy
from glassgpt.runs.environment import ENVIRONMENT_FILE, read_environment
from glassgpt.runs.run_directory import STEP_NAME, step_paths
from glassgpt.tokenizers.builtin import Tokenizer, load_tokenizer
from glassgpt.utils.errors import UserError
from glassgpt.utils.files import (
    PARTIAL_PREFIX,
    atomic_directory,
    decoded,
    finite,
    read_file,
    read_object,
    remove_partials,
    sha256_of,
    unused_path,
)

OPTIMIZER_FILE = "optimizer.safetensors"
LOGS_FILE = "logs.json"
_FILES = {"model.safetensors", OPTIMIZER_FILE, "config.toml", "tokenizer.json", "state.json"}


@dataclass(frozen=True, kw_only=True)
class TrainingState(StrictConfig):
    """The state of training besides weights and optimizer: the progress of the run, and its best step."""

    step: Count[int]  # updates done
    val_loss: float | None = None  # at this step, in nats per token; None if it was not evaluated, or not finite
    best_step: Count[int | None] = None
    best_val_loss: float | None = None
    scaler: dict[str, float | int] | None = None  # the loss scale of float16 training
    data_fingerprint: str | None = None
    recent: list[list[float]] | None = None  # loss and gradient norm of the last updates, if outliers are skipped
    tokens_seen: NotNegative[int | None] = None  # None before 2026-11-22, when all updates had the same size
    # Gradient norms for the evaluation of this step if a signal interrupted it: a resumed run evaluates first.
    pending_evaluation: dict[str, float] | None = None

    def check(self) -> None:
        self.require("recent", all(len(pair) == 2 for pair in self.recent or ()), "pairs of a loss and a norm")
        self.require("scaler", (self.scaler or {}).get("scale", 1.0) > 0, "a table with a scale above 0")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint directory. What is read from it is verified if it comes from `open_checkpoint`."""

    path: Path

    @contextmanager
    def reading(self, name: str) -> Iterator[None]:
        """Raise `UserError` if a file is damaged, but `OSError` if it may not be read or the checkpoint was removed."""
        try:
            yield
        except (OSError, UserError) as error:
            cause = error.__cause__ if isinstance(error, UserError) else error
            if isinstance(cause, OSError) and (isinstance(cause, PermissionError) or not self.path.is_dir()):
                raise cause from None
            raise UserError(f"checkpoint {self.path} is damaged: {name}: {error}") from None

    @property
    def config(self) -> TrainConfig:
        """The run's config when this was saved, `model.vocab_size` filled in."""
        with self.reading("config.toml"):
            return TrainConfig.from_toml(decoded(read_file(self.path / "config.toml"), "it"))

    @property
    def model_config(self) -> ModelConfig:
        """The model's shape."""
        return self.config.model

    @property
    def facts(self) -> tuple[tuple[str, str], ...]:
        """What `glassgpt info` prints: the path, and the training so far."""
        state = self.state
        step = ("step", f"{state.step:,} ({self.tokens_seen:,} tokens seen)")
        loss = "not evaluated" if state.val_loss is None else f"{state.val_loss:.4f} nats per token"
        source = ("trained on", self.config.data.source)
        return ("checkpoint", str(self.path)), step, ("validation loss", loss), source

    @property
    def tokens_seen(self) -> int:
        """Tokens of all updates so far."""
        counted = self.state.tokens_seen
        return self.state.step * self.config.batch_tokens if counted is None else counted

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the model was trained with."""
        return load_tokenizer(self.path / "tokenizer.json")

    @property
    def state(self) -> TrainingState:
        """Training progress. Raises `UserError` if it is damaged, or if this is another step's or run's checkpoint."""
        with self.reading("state.json"):
            values = read_object(self.path / "state.json")
            values["val_loss"] = finite(values.get("val_loss"))  # version 0.2 wrote NaN
            state = TrainingState.from_dict(values)
            if STEP_NAME.fullmatch(self.path.name) and int(self.path.name) != state.step:
                raise UserError(f"it is of step {state.step}; rename the checkpoint to {state.step:06d}")
        run = self.path.absolute().parent.parent
        try:
            own, here = (read_environment(each / ENVIRONMENT_FILE).get("run_id") for each in (self.path, run))
        except UserError:  # of version 0.2, outside of a run, or damaged: there is nothing to compare
            return state
        if own != here:
            raise UserError(f"checkpoint {self.path} was saved by another run than {run}; move it out of there")
        return state

    @property
    def environment(self) -> dict[str, Any] | None:
        """The copy of the run's `environment.json`; None in a checkpoint of version 0.2."""
        path = self.path / ENVIRONMENT_FILE
        return read_environment(path) if path.exists() else None

    @property
    def logs(self) -> dict[str, Any]:
        """The marks of the run's logs at this step by file name (`metrics.mark_of`); empty if version 0.2 wrote it."""
        path = self.path / LOGS_FILE
        return read_object(path) if path.exists() else {}

    def load_model(self, model: nn.Module) -> None:
        """Fill a model's parameters in place. Raises `UserError` if it has another architecture."""
        tensors = read_tensors(self.path / "model.safetensors")
        parameters = dict(model.named_parameters())
        shapes, own = ({(name, t.shape) for name, t in each.items()} for each in (tensors, parameters))
        if wrong := sorted({name for name, _ in shapes ^ own}):
            what = f"{wrong[0]!r} differs ({len(wrong)} tensors in all)"
            raise UserError(f"{self.path} is a checkpoint of another architecture: {what}")
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(tensors[name])

    def load_optimizers(self, strategy: Strategy, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Fill the optimizers' state of each parameter. Learning rate and other settings stay as they are."""
        parameters = dict(strategy.model.named_parameters())
        owners = {p: optimizer for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
        for key, value in read_tensors(self.path / OPTIMIZER_FILE).items():
            moment, _, name = key.partition(".")
            parameter = parameters[name]
            # A copy, since what was read is a map of the file, and pruning will remove the file.
            copy = value.to(parameter.device, copy=True)
            is_per_element = copy.shape == parameter.shape  # unlike AdamW's count of steps
            state = owners[parameter].state[parameter]
            state[moment] = strategy.shard_like(copy, parameter) if is_per_element else copy


@dataclass(frozen=True)
class Snapshot:
    """Copies of weights and optimizer state in host memory, which do not change while they are written."""

    weights: dict[str, Tensor]
    moments: dict[str, Tensor]  # by moment and parameter: `exp_avg.blocks.0.attention.qkv.weight`


def take_snapshot(strategy: Strategy, optimizers: Sequence[torch.optim.Optimizer]) -> Snapshot | None:
    """A snapshot on the main rank, None on the others, which help to gather it."""
    snapshot = Snapshot({}, {})
    names: dict[Tensor, str] = {parameter: name for name, parameter in strategy.model.named_parameters()}
    tensors = [(snapshot.weights, name, parameter.detach()) for parameter, name in names.items()]
    for parameter, state in (item for optimizer in optimizers for item in optimizer.state.items()):
        tensors += [(snapshot.moments, f"{moment}.{names[parameter]}", value) for moment, value in state.items()]
    for copies, name, tensor in tensors:
        full = strategy.full_tensor(tensor)
        if strategy.ranks.is_main:
            copies[name] = full.to("cpu", copy=True)
    return snapshot if strategy.ranks.is_main else None


def save_checkpoint(
    directory: Path,
    snapshot: Snapshot,
    config: TrainConfig,
    tokenizer: Tokenizer,
    training: TrainingState,
    about_run: Mapping[str, Mapping[str, Any]] | None = None,
) -> Path:
    """Write `directory/NNNNNN` atomically. Raises `UserError` if the disk is full; an earlier version stays valid.

    `about_run`: contents of `environment.json` and `logs.json`, if a run saves it.
    """
    final = directory / f"{training.step:06d}"
    with atomic_directory(final) as partial:
        write_tensors(partial / "model.safetensors", snapshot.weights)
        write_tensors(partial / OPTIMIZER_FILE, snapshot.moments)
        (partial / "config.toml").write_text(config.to_toml(), encoding="utf-8")
        (partial / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
        (partial / "state.json").write_text(json.dumps(dataclasses.asdict(training)), encoding="utf-8")
        for name, values in (about_run or {}).items():
            (partial / name).write_text(json.dumps(values, indent=1), encoding="utf-8")
        sums = {path.name: sha256_of(path) for path in sorted(partial.iterdir())}
        (partial / "manifest.json").write_text(json.dumps({"sha256": sums}, indent=1), encoding="utf-8")
    return final


def checkpoint_paths(directory: Path) -> list[Path]:
    """The checkpoint directories in order of their steps, damaged ones included, but not an empty directory."""
    marks = ("manifest.json", "model.safetensors")
    return [path for path in step_paths(directory) if any((path / name).exists() for name in marks)]


def open_checkpoint(path: Path, *, for_training: bool = True) -> Checkpoint:
    """Verify a checkpoint against its manifest and its place. Raises `UserError` with what is missing or altered.

    Without `for_training` the files that only resuming needs are not verified; the optimizer's state is two thirds of
    the bytes. Raises `FileNotFoundError` if the directory does not exist (any more).
    """
    checkpoint = Checkpoint(path)
    with checkpoint.reading("manifest.json"):
        sums = read_object(path / "manifest.json").get("sha256")
        if not isinstance(sums, dict) or not _FILES <= sums.keys() <= _FILES | {ENVIRONMENT_FILE, LOGS_FILE}:
            raise UserError("it does not name the files of a checkpoint")
    for name in sums.keys() if for_training else _FILES - {OPTIMIZER_FILE}:
        with checkpoint.reading(name):
            if sha256_of(path / name) != sums[name]:
                own = path.parent.parent / name
                is_intact = own.is_file() and sha256_of(own) == sums[name]
                raise UserError(f"it does not match its sha256{f'; copy {own} over it' if is_intact else ''}")
    _ = checkpoint.state  # raises if it belongs to another step or run
    return checkpoint


def latest_checkpoint(directory: Path, warn: Callable[[str], None], *, for_training: bool = True) -> Checkpoint | None:
    """The newest valid checkpoint; None without checkpoints.

    Damaged ones are reported through `warn` and skipped. Raises `UserError` if all of them are damaged.
    """
    paths = checkpoint_paths(directory)
    for path in reversed(paths):
        try:
            return open_checkpoint(path, for_training=for_training)
        except UserError as error:
            warn(f"{error}; trying the one before it")
    if paths:
        remedy = "restore one from a copy, or start a new run elsewhere"
        raise UserError(f"no checkpoint in {directory} passes verification; {remedy}")
    return None


def prune_checkpoints(directory: Path, keep: int, best_step: int | None) -> None:
    """Remove all but the newest `keep` checkpoints and the best one, and the remains of killed saves."""
    remove_partials(directory)
    for path in checkpoint_paths(directory)[:-keep]:
        if int(path.name) != best_step:
            aside = path.with_name(f"{PARTIAL_PREFIX}removed-{path.name}")
            os.replace(path, aside)  # atomic for the checkpoint's readers
            shutil.rmtree(aside)


def set_aside_later_checkpoints(directory: Path, step: int, notify: Callable[[str], None]) -> None:
    """Rename the checkpoints of later steps than the one that a run resumes from: `000500` -> `damaged-000500`.

    Their names would count among the newest, and valid checkpoints would be pruned for them. Nothing is deleted.
    """
    for path in checkpoint_paths(directory):
        if int(path.name) > step:
            aside = unused_path(path.with_name(f"damaged-{path.name}"))
            os.replace(path, aside)
            notify(f"checkpoint {path} was set aside as {aside.name}")


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file. Raises `OSError`, for example if the disk is full."""
    path.touch()  # for its mode: safetensors writes files that nobody else may read
    mode = path.stat().st_mode
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    try:
        safetensors.torch.save_file(tensors, path, metadata)
    except SafetensorError as error:
        if (number := re.search(r"os error (\d+)", str(error))) is None:  # only in the text
            raise
        raise OSError(int(number[1]), str(error)) from error
    path.chmod(mode)


def tensor_file(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """The content of a small safetensors file; deterministic if `metadata` has a single key."""
    return safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, memory-mapped. Raises `UserError` if it is damaged."""
    return read_tensors_and_metadata(path)[0]


def read_tensors_and_metadata(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file. Raises `UserError` if it is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except FileNotFoundError:  # that of safetensors has no errno
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(path)) from None
    except SafetensorError as error:
        raise UserError(f"{path} cannot be read as safetensors: {error}; restore it from a copy") from None
