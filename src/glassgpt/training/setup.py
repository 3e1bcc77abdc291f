"""The state of training, new or restored from a checkpoint: data, model and optimizers."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from glassgpt.config.model import ModelConfig
from glassgpt.config.schema import SampleConfig, SamplingConfig, TrainConfig
from glassgpt.config.validation import flatten
from glassgpt.data.batches import Batches
from glassgpt.data.dataset import Ids
from glassgpt.data.training_data import TrainingData, open_training_data, pinned, with_own_tokenizer
from glassgpt.distributed.group import Ranks, require_same
from glassgpt.distributed.strategies import Strategy, parallelize
from glassgpt.evaluation.hellaswag_items import Item, load_items
from glassgpt.evaluation.hellaswag_items import fingerprint as fingerprint_of_items
from glassgpt.generation.generate import GeneratedToken, generate, prompt_ids
from glassgpt.interop.references import ModelSource, find_model, load_source, tokenizer_of
from glassgpt.interpretability.snapshots import Prompt, prompt_of
from glassgpt.model.activation_checkpointing import checkpoint_activations
from glassgpt.model.gpt import GPT, initialize
from glassgpt.model.summary import ModelSummary
from glassgpt.runs.checkpoint import Checkpoint
from glassgpt.tokenizers.builtin import Tokenizer, tokenizer_file
from glassgpt.training.optim import OutlierWatch, build_optimizers
from glassgpt.training.progress import Progress
from glassgpt.utils.device import describe_environment, find_precision, peak_flops, require_kernel
from glassgpt.utils.errors import UserError, did_you_mean

# Warn if an update on a CPU takes longer than this, at the share of the peak that such models reach.
LONG_UPDATE_SECONDS, USUAL_PEAK_SHARE = 60.0, 0.4


def is_due(step: int, every: int) -> bool:
    """Whether something that happens every N steps happens at this one; 0 is never."""
    return every > 0 and step % every == 0


@dataclass
class TrainState:
    """The state of training, which each update changes."""

    config: TrainConfig
    data: TrainingData
    batches: dict[int, Batches]  # by sequence length; shorter ones, with `context_start`, are added when needed
    steps: int
    device: torch.device
    precision: str
    strategy: Strategy
    optimizers: list[torch.optim.Optimizer]
    scaler: torch.amp.GradScaler
    outliers: OutlierWatch
    hellaswag: tuple[Sequence[Item], bool] = ((), False)  # the items, and whether they are the complete published file
    prompts: Sequence[Prompt] = ()  # inputs of the snapshots; empty if there are none
    peak_flops: float | None = None  # of this rank's device at its best; None if unknown

    step: int = 0  # updates done
    tokens_seen: int = 0
    pending_evaluation: Mapping[str, float] | None = None
    """Gradient norms by parameter group, for the record of this step's evaluation until it is complete."""
    best_step: int | None = None
    best_val_loss: float | None = None
    found_inf: Tensor | None = None
    """If the device judges updates itself, so that the host need not wait: 1.0 (), on the device, as soon as a loss or
    gradient norm was not finite; the optimizers then change nothing any more."""

    reader: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "glassgpt-batches"))
    read_ahead: tuple[int, Future[Tensor]] | None = None
    """The next step, and this rank's rows of its batch, which `reader` reads while the current step is computed."""

    @property
    def ranks(self) -> Ranks:
        """The processes that train together."""
        return self.strategy.ranks

    def evaluates_at(self, step: int) -> bool:
        """Whether the model is evaluated after this many updates."""
        return step == self.steps or is_due(step, self.config.eval_every)

    def rows(self, step: int, part: Callable[[int], slice] = slice) -> Ids:
        """The sequences (B, T + 1) of the update after `step` updates, or the slice of them that `part(B)` returns."""
        config, progress = self.config, step / self.steps
        length = config.sequence_length(progress)
        if length not in self.batches:
            batch_size = config.batch_tokens // length
            self.batches[length] = self.data.batches(length, batch_size, config.seed, config.data.order)
        # A smaller update skips the rest of its batch, so that the windows of a step depend on the step alone.
        return self.batches[length].batch_at(step, part(config.update_tokens(progress) // length))

    def local_rows(self) -> Tensor:
        """This rank's sequences (B, T + 1) of the next update, on the device."""
        step, ahead = self.step, self.read_ahead
        rows = ahead[1].result() if ahead is not None and ahead[0] == step else self._read_local_rows(step)
        with suppress(RuntimeError):  # no more threads: the next call reads its rows itself
            self.read_ahead = (step + 1, self.reader.submit(self._read_local_rows, step + 1))
        return rows.to(self.device, non_blocking=True)

    def _read_local_rows(self, step: int) -> Tensor:
        rows = torch.from_numpy(self.rows(step, self.ranks.slice_of))
        return rows.pin_memory() if self.device.type == "cuda" else rows  # for asynchronous copies


def setup_training(
    config: TrainConfig,
    ranks: Ranks,
    progress: Progress,
    checkpoint: Checkpoint | None = None,
    environment: Mapping[str, Any] | None = None,
) -> TrainState:
    """Build the state of a new run, or restore it from a checkpoint. Writes nothing except a prepared dataset.

    `environment`: of a resumed run when it began; it must find the same data, and keeps its precision. Raises
    `UserError` if something does not fit.
    """
    if config.init_from == "":
        raise UserError("this recipe starts from a trained model: name one with --init-from REFERENCE")
    device = ranks.device(config.device)
    precision = _precision_of(config, environment, device)
    fingerprint = None if environment is None else str(environment["data_fingerprint"])
    with ranks.main_process_first("opening the data"):
        start = find_model(config.init_from) if config.init_from and checkpoint is None else None
        config, data = _open_data(config, start or checkpoint, fingerprint, ranks, progress)
        hellaswag = _open_hellaswag(config)
    ranks.enter_phase("the start of training")
    model, config = _build_model(config, start, checkpoint, ranks, device)
    if config.sample.count:
        sampler(model, data.tokenizer, config.sample, config.seed)  # refuse now what the first sample would refuse
    batches = data.batches(config.model.context_length, config.batch_size, config.seed, config.data.order)
    facts = {**dict(flatten(config.to_dict())), "precision": precision, "data": data.fingerprint}
    require_same(ranks, {**facts, "set of HellaSwag's items": fingerprint_of_items(hellaswag[0])})
    for block in model.blocks:
        checkpoint_activations(block, config.activation_checkpointing)
    strategy = parallelize(model, config, ranks, device, precision)
    if config.strategy not in ("auto", strategy.name):
        progress.message(f"strategy = {config.strategy!r} has no effect on one process (torchrun starts several)")
    state = TrainState(
        config=config,
        data=data,
        batches={config.model.context_length: batches},
        steps=config.steps or max(1, math.ceil((config.epochs or 0) * batches.windows_per_epoch / config.batch_size)),
        device=device,
        precision=precision,
        strategy=strategy,
        optimizers=build_optimizers(strategy, config.optim, precision),
        scaler=torch.amp.GradScaler(device.type, enabled=precision == "float16"),
        outliers=OutlierWatch(config.optim.skip_outliers),
        hellaswag=hellaswag,
        prompts=_probe_prompts(model, data, config),
        peak_flops=peak_flops(device, precision),
    )
    # Float16's loss scale, the outlier check and an offloaded optimizer need the numbers of each update on the host.
    on_host = state.scaler.is_enabled() or config.optim.skip_outliers or config.cpu_offload
    if device.type == "cuda" and not on_host:
        judge_on_device(state)
    if checkpoint is not None:
        _restore(state, checkpoint)
    if config.compiles_on(device.type):
        _compile(strategy, config.compile_backend)
    _warn_of_long_updates(state, progress)
    return state


def _precision_of(config: TrainConfig, environment: Mapping[str, Any] | None, device: torch.device) -> str:
    """The precision of a run. A resumed one keeps its own: `auto` may have another meaning on this device."""
    if environment is None:
        return find_precision(config.precision, device)
    name = environment.get("precision", config.precision)
    try:
        return find_precision(name, device)
    except UserError as error:
        problem = f"this run began with precision {name!r}, so it cannot resume on {device.type}"
        raise UserError(f"{problem}: {error}") from None


def _warn_of_long_updates(state: TrainState, progress: Progress) -> None:
    """Warn if each update will take minutes on a CPU: the default of 524,288 tokens per update suits GPUs."""
    config = state.config
    if state.device.type != "cpu" or not state.peak_flops:
        return
    tokens = config.batch_tokens
    flops = tokens * ModelSummary(config.model).training_flops_per_token
    seconds = flops / (state.peak_flops * USUAL_PEAK_SHARE * state.ranks.size)
    if seconds > LONG_UPDATE_SECONDS:
        time = f"each update of {tokens:,} tokens will take about {seconds:,.0f} s on this CPU"
        smaller = max(config.model.context_length, tokens // 64)
        progress.message(f"warning: {time}; try fewer, such as --batch-tokens {smaller}")


def judge_on_device(state: TrainState) -> None:
    """Let the optimizers skip updates if `state.found_inf` is 1, which they read on the device."""
    state.found_inf = torch.zeros((), device=state.device)
    for optimizer in state.optimizers:
        setattr(optimizer, "found_inf", state.found_inf)  # noqa: B010 - undeclared in torch, where GradScaler sets it


def _build_model(
    config: TrainConfig, start: ModelSource | None, checkpoint: Checkpoint | None, ranks: Ranks, device: torch.device
) -> tuple[GPT, TrainConfig]:
    """The model, new or with the weights of `start` or a checkpoint, and the config with its shape."""
    config.sequences_per_process(ranks.size)  # raises if the ranks cannot share a batch
    require_kernel(config.model.attention, device)
    if start is not None:
        trained = load_source(start, device)[0]
        config = dataclasses.replace(config, model=shape_from(trained.config, config.model))
        model = GPT.empty(config.model, device)
        with torch.no_grad():
            for parameter, original in zip(model.parameters(), trained.parameters(), strict=True):
                parameter.copy_(original[: parameter.shape[0]])  # only learned positions have rows to lose
        return model, config
    model = GPT.empty(config.model, device)
    if checkpoint is not None:
        checkpoint.load_model(model)
    else:
        initialize(model, config.seed)
    return model, config


def _compile(strategy: Strategy, backend: str) -> None:
    known = torch.compiler.list_backends(exclude_tags=())
    if backend not in known:
        raise UserError(f"unknown compile_backend {backend!r}{did_you_mean(backend, known)}")
    strategy.compile(backend)


def _open_data(
    config: TrainConfig, start: ModelSource | None, fingerprint: str | None, ranks: Ranks, progress: Progress
) -> tuple[TrainConfig, TrainingData]:
    """The data, and the config with what it determines: the vocabulary, and references valid in any directory."""
    is_new = fingerprint is None
    if is_new:
        init_from = None if start is None else str(start.path.resolve())
        config = dataclasses.replace(config, init_from=init_from, data=pinned(config.data))
    # The tokenizer of the model that the run starts from or resumes, unless it is built from the data.
    from_data = config.init_from is None and tokenizer_file(config.data.tokenizer) is None and not config.data.mixture
    tokenizer = tokenizer_of(start) if start is not None and not from_data else None
    if tokenizer is None and config.init_from is not None:
        raise UserError(f"{config.init_from} has no tokenizer; put its tokenizer.json into the same directory")
    log, is_first = progress.message, ranks.local_rank == 0  # which verifies the files for its host
    data = open_training_data(config.data, tokenizer, log, fingerprint=fingerprint, check=is_first)
    if is_new and start is None:
        config = dataclasses.replace(config, data=with_own_tokenizer(config.data, data, progress.message))
    if not is_new and fingerprint != data.fingerprint:
        raise UserError("the text has changed since this run began, so it cannot resume; start a new run")
    for dataset in data.datasets:
        if len(dataset.validation) < 2:
            raise UserError(f"the {dataset.validation.name} is too short to evaluate; raise data.validation_fraction")
    least, most = data.tokenizer.model_vocab_size, data.tokenizer.vocab_size
    vocab_size = config.model.vocab_size or most
    if not least <= vocab_size <= most:
        raise UserError(f"model.vocab_size = {vocab_size}, but the tokenizer has {most}; leave it out")
    return config.override(model={"vocab_size": vocab_size}), data


def _open_hellaswag(config: TrainConfig) -> tuple[Sequence[Item], bool]:
    if not config.hellaswag_every:
        return (), False
    try:
        return load_items(config.hellaswag_file, config.hellaswag_items)
    except UserError as error:
        raise UserError(f"{error}\n(--hellaswag-every 0 trains without HellaSwag)") from error


def shape_from(trained: ModelConfig, own: ModelConfig) -> ModelConfig:
    """The shape of a run that starts from a trained model, with its own context length, dropout and kernel."""
    shape = trained.with_shorter_context(own.context_length)
    return dataclasses.replace(shape, dropout=own.dropout, attention=own.attention)


def _restore(state: TrainState, checkpoint: Checkpoint) -> None:
    saved = checkpoint.state
    checkpoint.load_optimizers(state.strategy, state.optimizers)
    if saved.scaler is not None and state.scaler.is_enabled():
        state.scaler.load_state_dict(dict(saved.scaler))
    state.outliers.recent = saved.recent or []
    state.tokens_seen = checkpoint.tokens_seen
    state.step, state.pending_evaluation = saved.step, saved.pending_evaluation
    if checkpoint.config.eval_tokens == state.config.eval_tokens:  # losses on other tokens are not comparable
        state.best_step, state.best_val_loss = saved.best_step, saved.best_val_loss


def sampler(model: GPT, tokenizer: Tokenizer, settings: SampleConfig, seed: int) -> Iterator[GeneratedToken]:
    """The tokens of the samples that [sample] asks for. Raises `UserError` at once if they cannot be generated."""
    sampling = {each.name: getattr(settings, each.name) for each in dataclasses.fields(SamplingConfig)}
    return generate(model, tokenizer, settings.prompt, **sampling, n=settings.count, seed=seed, precision="float32")


def _probe_prompts(model: GPT, data: TrainingData, config: TrainConfig) -> list[Prompt]:
    """The prompts of [probe]. Raises `UserError` for a prompt that the tokenizer cannot encode."""
    length = min(config.probe.tokens, config.model.context_length)
    if not length:
        return []
    if not config.probe.prompts:
        starts = (each.validation.read(0, min(length, len(each.validation))) for each in data.datasets)
        return [prompt_of(ids.tolist(), data.tokenizer) for ids in starts]
    prompts = []
    for text in config.probe.prompts:
        try:
            ids = prompt_ids(model, data.tokenizer, text)
        except UserError as error:
            raise UserError(f"probe.prompts, {text!r}: {error}") from None
        prompts.append(prompt_of(ids[0, :length].tolist(), data.tokenizer))
    return prompts


def environment_of(state: TrainState) -> dict[str, Any]:
    """Describe the software, machine and processes of a run: with config and data they determine its bits."""
    return {
        **describe_environment(state.device, state.precision),
        "processes": state.ranks.size,
        "strategy": state.strategy.name,
        "parameters": ModelSummary(state.config.model).parameters,
        "data_fingerprint": state.data.fingerprint,
    }
