"""What an update works on, and how it is put together: data, model, optimizers, new or as a checkpoint left them."""

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glassgpt.config.model import ModelConfig
from glassgpt.config.schema import SampleConfig, TrainConfig
from glassgpt.data.batches import Batches
from glassgpt.data.dataset import Ids
from glassgpt.data.training_data import TrainingData, open_training_data, pinned, require_validation, with_own_tokenizer
from glassgpt.distributed.group import Ranks, require_same
from glassgpt.distributed.strategies import Strategy, parallelize
from glassgpt.evaluation.hellaswag_items import Item, find_items, is_published, read_items, subset
from glassgpt.evaluation.hellaswag_items import fingerprint as fingerprint_of_items
from glassgpt.generation.generate import GeneratedToken, generate, prompt_ids
from glassgpt.interop.references import ModelSource, find_model, load_source, tokenizer_of
from glassgpt.interpretability.snapshots import Prompt, prompt_of
from glassgpt.model.activation_checkpointing import checkpoint_activations
from glassgpt.model.gpt import GPT, initialize
from glassgpt.model.summary import ModelSummary
from glassgpt.planning.memory_check import check_memory
from glassgpt.runs.checkpoint import Checkpoint
from glassgpt.tokenizers.builtin import Tokenizer, tokenizer_file
from glassgpt.training.optim import OutlierWatch, build_optimizers
from glassgpt.training.progress import Progress
from glassgpt.utils.device import describe_environment, find_precision, require_kernel
from glassgpt.utils.errors import UserError, did_you_mean


@dataclass
class TrainState:
    """What an update works on. `step` counts the updates done."""

    config: TrainConfig
    data: TrainingData
    batches: Batches
    steps: int
    device: torch.device
    precision: str
    strategy: Strategy
    optimizers: list[torch.optim.Optimizer]
    scaler: torch.amp.GradScaler
    outliers: OutlierWatch
    hellaswag: Sequence[Item] = ()
    hellaswag_published: bool = False
    prompts: Sequence[Prompt] = ()
    """What the model is looked into with at each evaluation; nothing is where there are none."""

    step: int = 0
    tokens_seen: int = 0
    best_step: int | None = None
    best_val_loss: float | None = None
    found_inf: Tensor | None = None
    """Where the device judges updates by itself, so that the host need not wait: 1.0 there, (), once a loss or norm was not finite."""

    shorter: dict[int, Batches] = field(default_factory=dict)
    """Batches of the lengths that sequences have at first, with `context_start`."""

    @property
    def ranks(self) -> Ranks:
        """The processes that train together."""
        return self.strategy.ranks

    @property
    def update_tokens(self) -> int:
        """Tokens of the next update."""
        return self.config.update_tokens(self.step / self.steps)

    def rows(self, share: Callable[[int], slice] = slice) -> Ids:
        """The sequences of the next update (B, T + 1), or a share of them: at first shorter and fewer ones, where the config asks."""
        config, length = self.config, self.config.sequence_length(self.step / self.steps)
        batches = self.batches
        if length < config.model.context_length:
            if length not in self.shorter:
                self.shorter[length] = self.data.batches(
                    length, config.batch_tokens // length, config.seed, config.data.order
                )
            batches = self.shorter[length]
        # Of a smaller update's batch the rest is passed over, so that which windows a step has depends on the step alone.
        return batches.batch_at(self.step, share(self.update_tokens // length))


def setup_training(
    config: TrainConfig,
    ranks: Ranks,
    progress: Progress,
    checkpoint: Checkpoint | None = None,
    fingerprint: str | None = None,
) -> TrainState:
    """Everything an update needs, new or as a checkpoint left it. Writes nothing but a prepared dataset.

    `fingerprint` is that of the data which a resumed run must find. Raises `UserError` where something does not fit.
    """
    device = ranks.device(config.device)
    precision = find_precision(config.precision, device)
    if config.init_from == "":
        raise UserError("this recipe goes on from a trained model: name one with --init-from REFERENCE")
    with ranks.main_process_first("opening the data"):
        start = find_model(config.init_from) if config.init_from is not None and checkpoint is None else None
        config, data = _open_data(config, start or checkpoint, fingerprint, ranks, progress)
        items, is_all = _open_hellaswag(config)
    ranks.enter_phase("the start of training")
    model, config = _make_model(config, start, checkpoint, ranks, device, precision)
    if config.sample.count:
        sampler(
            model, data.tokenizer, config.sample, config.seed
        )  # refuses now what it would refuse at the first sample
    prompts = _probe_prompts(model, data, config)
    batches = data.batches(config.model.context_length, config.batch_size, config.seed, config.data.order)
    steps = config.steps or max(1, math.ceil((config.epochs or 0) * batches.windows_per_epoch / config.batch_size))
    versions = {"version of the code": _code_hash(), "torch": torch.__version__, "precision": precision}
    texts = {"data": data.fingerprint, "set of HellaSwag's items": fingerprint_of_items(items)}
    require_same(ranks, {**versions, "config": config.to_toml(), **texts})
    for block in model.blocks:
        checkpoint_activations(block, config.activation_checkpointing)
    strategy = parallelize(model, config, ranks, device, precision)
    if config.strategy not in ("auto", strategy.name):
        progress.message(f"one process: strategy = {config.strategy!r} has no effect (torchrun starts several)")
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "float16")
    optimizers = build_optimizers(strategy, config.optim, precision)
    outliers = OutlierWatch(config.optim.skip_outliers)
    trainer = TrainState(
        config, data, batches, steps, device, precision, strategy, optimizers, scaler, outliers, items, is_all, prompts
    )
    # Several ranks agree on the host; so they do where float16's scale or the losses before have a say.
    if (
        device.type == "cuda"
        and strategy.name == "single"
        and not scaler.is_enabled()
        and not config.optim.skip_outliers
    ):
        judge_on_device(trainer)
    if checkpoint is not None:
        _restore(trainer, checkpoint)
    if config.compiles_on(device.type):
        _compile(strategy, config.compile_backend)
    return trainer


def _make_model(
    config: TrainConfig,
    start: ModelSource | None,
    checkpoint: Checkpoint | None,
    ranks: Ranks,
    device: torch.device,
    precision: str,
) -> tuple[GPT, TrainConfig]:
    """The model, new or with the weights of `start` or a checkpoint, and the config that tells its shape; what cannot train is refused."""
    model: GPT | None = None
    if start is not None:
        model, config = _start_from(start, config, device)
    if checkpoint is None:
        config.sequences_per_process(ranks.size)  # refuses a batch that the ranks do not divide
    elif ranks.size not in config.valid_process_counts:
        possible = ", ".join(map(str, config.valid_process_counts))
        raise UserError(
            f"{ranks.size} processes cannot share this run's {config.batch_size} sequences a step; go on with it on {possible}"
        )
    check_memory(config, ranks, device, precision, model)
    require_kernel(config.model.attention, device)
    if model is None:
        model = GPT.empty(config.model, device)
        if checkpoint is None:
            initialize(model, config.seed)
        else:
            checkpoint.load_model(model)
    return model, config


def _compile(strategy: Strategy, backend: str) -> None:
    known = torch.compiler.list_backends(exclude_tags=())
    if backend not in known:
        raise UserError(f"there is no compile_backend {backend!r}{did_you_mean(backend, known)}")
    strategy.compile(backend)


def judge_on_device(trainer: TrainState) -> None:
    """Have the optimizers skip updates where `trainer.found_inf` says so, which they read on the device."""
    trainer.found_inf = torch.zeros((), device=trainer.device)
    for optimizer in trainer.optimizers:
        optimizer.found_inf = trainer.found_inf  # type: ignore[attr-defined]  # what GradScaler, too, tells an optimizer by


def _code_hash() -> str:
    """Of this package's own files: installed from other commits, ranks may differ under one version number."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _open_data(
    config: TrainConfig, start: ModelSource | None, fingerprint: str | None, ranks: Ranks, progress: Progress
) -> tuple[TrainConfig, TrainingData]:
    """The data, and the config with what it determines: the vocabulary, and references that hold from any directory."""
    is_new = fingerprint is None
    if is_new and start is not None and config.init_from is not None:
        config = config.override(init_from=str(start.path.resolve()))
    if is_new:
        config = dataclasses.replace(config, data=pinned(config.data))
    # A run that begins from another's weights has its tokenizer, and one that goes on need not find the tokenizer's file again;
    # any other has what its own data make.
    given = (
        config.init_from is not None or tokenizer_file(config.data.tokenizer) is not None or bool(config.data.mixture)
    )
    tokenizer = tokenizer_of(start) if start is not None and given else None
    if tokenizer is None and config.init_from is not None:
        raise UserError(
            f"{config.init_from} has no tokenizer, so no text can be prepared for it; put its tokenizer.json beside it"
        )
    data = open_training_data(config.data, tokenizer, progress.message)
    if is_new and config.init_from is None:
        config = dataclasses.replace(config, data=with_own_tokenizer(config.data, data, progress.message))
    if not is_new:
        if fingerprint != data.fingerprint:
            raise UserError(
                "the text has changed since this run began, so it cannot go on exactly; start a new run (--data, --out)"
            )
        if ranks.local_rank == 0:
            data.verify()  # reads all shards: once on each host
    require_validation(data)
    vocab_size = data.tokenizer.vocab_size
    if config.model.vocab_size not in (None, vocab_size):
        raise UserError(
            f"model.vocab_size = {config.model.vocab_size}, but the tokenizer has {vocab_size} ids; leave it out"
        )
    return config.override(model={"vocab_size": vocab_size}), data


def _open_hellaswag(config: TrainConfig) -> tuple[Sequence[Item], bool]:
    """The items that the run is evaluated on, and whether they are all of the published file."""
    if not config.hellaswag_every:
        return (), False
    try:
        file = find_items(config.hellaswag_file)
        items = read_items(file)
    except UserError as error:
        raise UserError(f"{error}\n(--hellaswag-every 0 trains without HellaSwag)") from error
    chosen = subset(items, config.hellaswag_items)
    return chosen, len(chosen) == len(items) and is_published(file)


def _start_from(source: ModelSource, config: TrainConfig, device: torch.device) -> tuple[GPT, TrainConfig]:
    """A model with another one's weights, its context cropped to the config's; and the config that tells its shape."""
    model, _ = load_source(source, device)
    shape = shape_from(model.config, config.model)
    cropped = GPT.empty(shape, device)
    with torch.no_grad():
        for parameter, whole in zip(cropped.parameters(), model.parameters(), strict=True):
            parameter.copy_(whole[: parameter.shape[0]])  # only learned positions have rows to lose
    return cropped, dataclasses.replace(config, model=shape)


def shape_from(trained: ModelConfig, own: ModelConfig) -> ModelConfig:
    """The shape of a run that goes on from a trained model; of its own settings it has the context's length, dropout and kernel."""
    return dataclasses.replace(
        trained.with_shorter_context(own.context_length), dropout=own.dropout, attention=own.attention
    )


def _restore(trainer: TrainState, checkpoint: Checkpoint) -> None:
    state = checkpoint.state
    checkpoint.load_optimizers(trainer.strategy, trainer.optimizers)
    if state.scaler is not None and trainer.scaler.is_enabled():
        trainer.scaler.load_state_dict(dict(state.scaler))
    trainer.outliers.recent = state.recent or []
    trainer.tokens_seen = checkpoint.tokens_seen
    trainer.step, trainer.best_step, trainer.best_val_loss = state.step, state.best_step, state.best_val_loss


def sampler(model: GPT, tokenizer: Tokenizer, settings: SampleConfig, seed: int) -> Iterator[GeneratedToken]:
    """The tokens of the samples that [sample] asks for. Raises `UserError` at once for what cannot be asked of this model."""
    return generate(
        model,
        tokenizer,
        settings.prompt,
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        min_p=settings.min_p,
        n=settings.count,
        seed=seed,
        precision="float32",
    )


def _probe_prompts(model: GPT, data: TrainingData, config: TrainConfig) -> list[Prompt]:
    """The prompts that [probe] asks for. Raises `UserError` for one that the tokenizer has no ids for."""
    length, found = min(config.probe.tokens, config.model.context_length), []
    if length and not config.probe.prompts:
        found = [each.validation.read(0, min(length, len(each.validation))).tolist() for each in data.datasets]
    for text in config.probe.prompts if length else []:
        try:
            found.append(prompt_ids(model, data.tokenizer, text)[0, :length].tolist())
        except UserError as error:
            raise UserError(f"probe.prompts, {text!r}: {error}") from None
    return [prompt_of(ids, data.tokenizer) for ids in found]


def environment_of(trainer: TrainState) -> dict[str, Any]:
    """Besides config and data, all that the bits of a run depend on."""
    return {
        **describe_environment(trainer.device, trainer.precision),
        "processes": trainer.ranks.size,
        "strategy": trainer.strategy.name,
        "parameters": ModelSummary(trainer.config.model).parameters,
        "data_fingerprint": trainer.data.fingerprint,
    }
