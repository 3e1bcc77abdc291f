"""Training: one update as a function, and the loop that reads as the recipe of a run.

A run's state is its weights, its optimizer and the number of updates done. Batches, dropout and samples are functions of
the seed and the step, so a run that was killed and resumed computes what it would have computed.
"""

import dataclasses
import json
import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint import Checkpoint, TrainingState, latest_checkpoint, prune_checkpoints, remove_later_checkpoints, save_checkpoint
from .config import TrainConfig
from .data.prepare import prepare
from .data.tokens import Batches, Dataset, open_dataset
from .errors import UserError
from .evaluate.loss import evaluate_stream
from .files import write_atomic
from .generation import generate, prompt_ids
from .hardware import autocast, describe_environment, find_device, find_precision, matmul_precision, memory_bytes, peak_flops
from .model import GPT
from .optim import build_optimizers, lr_at
from .progress import PlainProgress, Progress
from .reference import find_checkpoint, load_checkpoint
from .run_directory import MetricsLog, RunDirectory
from .seeding import seed_for
from .summary import ModelSummary


@dataclass
class Trainer:
    """What an update works on. `step` counts the updates done."""

    config: TrainConfig
    dataset: Dataset
    batches: Batches
    steps: int
    device: torch.device
    precision: str
    model: GPT
    optimizers: list[torch.optim.Optimizer]
    scaler: torch.amp.GradScaler
    step: int = 0
    best_step: int | None = None
    best_val_loss: float | None = None


class NonFiniteError(UserError):
    """The loss or the gradient is no longer a number; the weights are still those before the update."""


def train(config: TrainConfig, out: str | Path | None = None, *, overwrite: bool = False, progress: Progress | None = None) -> Path:
    """Train a new run in the directory `out` (default: `runs/NAME`) and return it.

    Raises `UserError` before anything is written if config, data or machine do not fit or the directory is taken (`overwrite`
    replaces a run), and if the loss stops being finite. Ctrl-C saves a checkpoint, then raises `KeyboardInterrupt`; SIGTERM
    saves, then raises `SystemExit(0)`.
    """
    run = RunDirectory(out if out is not None else Path("runs") / config.name)
    progress = progress or PlainProgress()
    run.require_free(overwrite)
    trainer = _new_trainer(config, progress)
    with run.locked():
        run.require_free(overwrite)  # again: another process may have been quicker
        run.clear()
        run.write_environment(_environment(trainer))
        run.write_config(trainer.config)
        run.cut_back(0)
        _run_to_end(run, trainer, progress)
    return run.path


def resume(run: str | Path, *, steps: int | None = None, progress: Progress | None = None) -> Path:
    """Go on with a run from its newest whole checkpoint, exactly as if it had never stopped; return its directory.

    `steps` extends (or shortens) it: from the checkpoint on, the schedule is that of the other length. A finished run is left as it
    is. Raises `UserError` for a folder that is no run, data that have changed, and damaged checkpoints throughout.
    """
    directory = RunDirectory(run)
    progress = progress or PlainProgress()
    directory.require_run()
    with directory.locked():
        environment = directory.read_environment()
        torch.set_num_threads(environment["threads"])  # other counts sum in another order: other bits
        config = directory.read_config()
        former = config
        if steps is not None:
            config = config.override(steps=steps)
        checkpoint = latest_checkpoint(directory.checkpoints, progress.message)
        if steps is not None and checkpoint is not None and checkpoint.state.step > steps:
            raise UserError(f"the run {directory.path} is at step {checkpoint.state.step} already: --steps must be larger")
        trainer = _new_trainer(config, progress, checkpoint, environment["data_fingerprint"])
        _compare_environments(environment, _environment(trainer), progress)
        if trainer.step >= trainer.steps:
            progress.message(f"{directory.path} is finished at step {trainer.step}; --steps N extends it")
            return directory.path
        if config != former:
            progress.message(f"from step {trainer.step} on, the schedule is that of a run of {trainer.steps} steps")
            directory.write_config(config)
        directory.cut_back(trainer.step if checkpoint is not None else -1)
        remove_later_checkpoints(directory.checkpoints, trainer.step)
        _run_to_end(directory, trainer, progress)
    return directory.path


def _new_trainer(
    config: TrainConfig, progress: Progress, checkpoint: Checkpoint | None = None, fingerprint: str | None = None
) -> Trainer:
    """Everything an update needs, new or as a checkpoint left it, on the data of that fingerprint. Writes nothing but a dataset."""
    device = find_device(config.device)
    precision = find_precision(config.precision, device)
    source = checkpoint or (find_checkpoint(config.init_from) if config.init_from is not None else None)
    # A run that began from another's weights has its tokenizer; any other has what its own data make, resumed or not.
    tokenizer = source.tokenizer if source is not None and config.init_from is not None else None
    dataset = open_dataset(prepare(config.data, tokenizer=tokenizer, log=progress.message))
    if fingerprint not in (None, dataset.fingerprint):
        raise UserError("the text has changed since this run began, so it cannot go on exactly; start a new run (--data, --out)")
    vocab_size = dataset.tokenizer.vocab_size
    if config.model.vocab_size not in (None, vocab_size):
        raise UserError(f"model.vocab_size = {config.model.vocab_size}, but the tokenizer has {vocab_size} ids; leave it out")
    if checkpoint is None and source is not None:
        model, config = _start_from(source, config, device)
    else:
        config = config.override(model={"vocab_size": vocab_size})
        model = GPT.create(config.model, config.seed, device)
    if len(dataset.validation) < 2:
        raise UserError(f"the {dataset.validation.name} has too little text to evaluate; raise data.validation_fraction, or give more text")
    batches = Batches(dataset.train, config.model.context_length, config.batch_size, config.seed, config.data.order)
    # Asked for now, so that a prompt that cannot be encoded is refused before the first step and not at the first sample.
    prompt_ids(model, dataset.tokenizer, config.sample.prompt) if config.sample.count else None
    if config.sample.top_k is not None and config.sample.top_k > vocab_size:
        raise UserError(f"sample.top_k must be from 1 to the vocabulary's {vocab_size}, got {config.sample.top_k}")
    steps = config.steps or max(1, math.ceil((config.epochs or 0) * batches.windows_per_epoch / config.batch_size))
    optimizers = build_optimizers(model, config.optim)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "float16")
    trainer = Trainer(config, dataset, batches, steps, device, precision, model, optimizers, scaler)
    if checkpoint is not None:
        _restore(trainer, checkpoint)
    if config.compile == "on" or (config.compile == "auto" and device.type == "cuda"):
        model.compile(backend=config.compile_backend)  # in place: no wrapper, so names stay as they are
    return trainer


def _start_from(source: Checkpoint, config: TrainConfig, device: torch.device) -> tuple[GPT, TrainConfig]:
    """A model with another run's weights, its context cropped to the config's; and the config that tells its shape."""
    model, _ = load_checkpoint(source, device)
    context_length = min(config.model.context_length, model.config.context_length)
    own = config.model
    shape = dataclasses.replace(model.config, context_length=context_length, dropout=own.dropout, attention=own.attention)
    cropped = GPT.create(shape, config.seed, device)
    with torch.no_grad():
        weights = dict(model.named_parameters())
        for name, parameter in cropped.named_parameters():
            parameter.copy_(weights[name][: parameter.shape[0]])
    return cropped, dataclasses.replace(config, model=shape)


def _restore(trainer: Trainer, checkpoint: Checkpoint) -> None:
    state = checkpoint.state
    checkpoint.load_model(trainer.model)
    checkpoint.load_optimizers(trainer.model, trainer.optimizers)
    if state.scaler is not None and trainer.scaler.is_enabled():
        trainer.scaler.load_state_dict(dict(state.scaler))
    trainer.step, trainer.best_step, trainer.best_val_loss = state.step, state.best_step, state.best_val_loss


def _environment(trainer: Trainer) -> dict[str, Any]:
    return {
        **describe_environment(trainer.device, trainer.precision),
        "parameters": ModelSummary(trainer.config.model).parameters,
        "data_fingerprint": trainer.dataset.fingerprint,
    }


def _compare_environments(before: dict[str, Any], now: dict[str, Any], progress: Progress) -> None:
    """Warn of whatever can change the bits."""
    changed = [f"{key} was {before.get(key)}, is {now[key]}" for key in now if key != "glassgpt" and before.get(key) != now[key]]
    if changed:
        progress.message(f"warning: not the environment that the run began in, so its bits may differ: {'; '.join(changed)}")


def _run_to_end(run: RunDirectory, trainer: Trainer, progress: Progress) -> None:
    metrics = MetricsLog(run.metrics_path)
    progress.started(run.path, trainer.config, str(ModelSummary(trainer.config.model)), trainer.step, trainer.steps)
    try:
        with matmul_precision(trainer.precision), _signals() as caught:
            _loop(run, trainer, metrics, progress, caught)
    finally:
        metrics.close()
    if trainer.step < trainer.steps:
        progress.message(f"stopped at step {trainer.step} and saved; go on with: glassgpt train --resume {run.path}")
        raise KeyboardInterrupt if caught[0] == signal.SIGINT else SystemExit(0)
    progress.finished(run.path)


def _loop(run: RunDirectory, trainer: Trainer, metrics: MetricsLog, progress: Progress, caught: list[int]) -> None:
    """Evaluate, then update, record, evaluate, sample and save until the last step or a signal."""
    config = trainer.config
    peak = peak_flops(trainer.device, trainer.precision)
    flops = ModelSummary(config.model).training_flops_per_token * config.batch_tokens
    if trainer.step == 0:
        _evaluate(run, trainer, metrics, progress)
    stopping = False
    while trainer.step < trainer.steps and not stopping:
        began = time.perf_counter()
        lr = lr_at(trainer.step, trainer.steps, config.optim)
        try:
            loss, grad_norm = train_step(trainer, lr)
        except NonFiniteError as error:
            _record_failure(run, trainer, metrics, lr)
            raise UserError(f"{error}; its batch is in {_failure_path(run, trainer)}. Try a lower --optim.lr") from None
        trainer.step += 1
        seconds = time.perf_counter() - began
        record = {
            "step": trainer.step,
            "loss": loss,
            "lr": lr,
            "grad_norm": grad_norm,
            "seconds": seconds,
            "tokens_per_second": config.batch_tokens / seconds,
            "tokens_seen": trainer.step * config.batch_tokens,
            "peak_share": flops / seconds / peak if peak else None,
            "memory_bytes": memory_bytes(trainer.device),
        }
        metrics.write(record)
        progress.step(record)
        last = trainer.step == trainer.steps
        val_loss, is_best = None, False
        if last or _due(trainer.step, config.eval_every):
            val_loss, is_best = _evaluate(run, trainer, metrics, progress)
        stopping = bool(caught)  # looked at once, so that no signal can end the loop behind a step that was not saved
        if last or is_best or stopping or _due(trainer.step, config.checkpoint_every):
            _save(run, trainer, metrics, val_loss)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def train_step(trainer: Trainer, lr: float) -> tuple[float, float]:
    """One update. Returns the batch's mean loss in nats and the gradient norm before clipping.

    Raises `NonFiniteError`, with the weights untouched, if either is not finite (an infinite norm under float16 is normal: the
    scaler then skips the update and lowers its scale).
    """
    config, model, scaler = trainer.config, trainer.model, trainer.scaler
    windows = torch.from_numpy(trainer.batches.batch_at(trainer.step))
    micro_batches = windows.to(trainer.device, non_blocking=True).chunk(config.accumulation)
    total = torch.zeros((), device=trainer.device)
    model.train()
    for index, micro_batch in enumerate(micro_batches):
        if config.model.dropout:
            # No generator can be passed to dropout, so the global one is set to what this draw is for.
            torch.manual_seed(seed_for(config.seed, "dropout", trainer.step, index))
        with autocast(trainer.device, trainer.precision):
            loss: Tensor = model(micro_batch[:, :-1], micro_batch[:, 1:]) / config.accumulation
        scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        total += loss.detach()
    for optimizer in trainer.optimizers:
        scaler.unscale_(optimizer)
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.grad_clip or math.inf)
    mean_loss, norm = total.item(), grad_norm.item()
    if not math.isfinite(mean_loss) or not (math.isfinite(norm) or scaler.is_enabled()):
        raise NonFiniteError(f"step {trainer.step + 1}: the loss is {mean_loss}, the gradient norm {norm}")
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        scaler.step(optimizer)
        optimizer.zero_grad(set_to_none=True)
    scaler.update()
    return mean_loss, norm


def _evaluate(run: RunDirectory, trainer: Trainer, metrics: MetricsLog, progress: Progress) -> tuple[float, bool]:
    """Validation loss and samples of this step; whether it is the best so far."""
    config, tokenizer = trainer.config, trainer.dataset.tokenizer
    began = time.perf_counter()
    result = evaluate_stream(trainer.model, trainer.dataset.validation, tokenizer, precision=trainer.precision, limit=config.eval_tokens)
    record = {"step": trainer.step, **{f"val_{key}": value for key, value in result.items()}, "seconds": time.perf_counter() - began}
    metrics.write(record)
    progress.evaluated(record)
    if config.sample.count:
        samples = sample(trainer)
        run.append_samples(trainer.step, samples)
        progress.sampled(trainer.step, samples)
    loss: float = result["loss"]
    is_best = trainer.step > 0 and math.isfinite(loss) and (trainer.best_val_loss is None or loss < trainer.best_val_loss)
    if is_best:
        trainer.best_step, trainer.best_val_loss = trainer.step, loss
    return loss, is_best


def sample(trainer: Trainer) -> list[str]:
    """What the model writes at this step, prompt included, as the config's [sample] asks."""
    settings = trainer.config.sample
    texts = [settings.prompt or ""] * settings.count
    pieces = generate(
        trainer.model,
        trainer.dataset.tokenizer,
        settings.prompt,
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        min_p=settings.min_p,
        n=settings.count,
        seed=seed_for(trainer.config.seed, "sample", trainer.step),
    )
    for piece in pieces:
        texts[piece.sample] += piece
    return texts


def _save(run: RunDirectory, trainer: Trainer, metrics: MetricsLog, val_loss: float | None) -> None:
    """A checkpoint of this step. The metrics reach the disk first: a checkpoint counts on all records up to its step."""
    metrics.sync()
    state = TrainingState(
        step=trainer.step,
        val_loss=val_loss,
        best_step=trainer.best_step,
        best_val_loss=trainer.best_val_loss,
        scaler=trainer.scaler.state_dict() or None,
    )
    save_checkpoint(run.checkpoints, trainer.model, trainer.optimizers, trainer.config, trainer.dataset.tokenizer, state)
    prune_checkpoints(run.checkpoints, trainer.config.keep_checkpoints, trainer.best_step)


def _failure_path(run: RunDirectory, trainer: Trainer) -> Path:
    return run.path / f"nonfinite-{trainer.step + 1:06d}.json"


def _record_failure(run: RunDirectory, trainer: Trainer, metrics: MetricsLog, lr: float) -> None:
    """Put the step that failed and its token ids on record."""
    metrics.write({"step": trainer.step + 1, "loss": math.nan, "lr": lr})
    ids = trainer.batches.batch_at(trainer.step).tolist()
    write_atomic(_failure_path(run, trainer), json.dumps({"step": trainer.step + 1, "lr": lr, "ids": ids}))


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM, so that the step at hand is finished and saved; a second one ends the process at once.

    Python allows handlers in the main thread only: in another one (a notebook's worker, say) nothing is caught.
    """
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return

    def catch(number: int, frame: object) -> None:
        if caught:
            os._exit(128 + number) if number != signal.SIGINT else signal.default_int_handler(number, None)
        caught.append(number)

    before = {number: signal.signal(number, catch) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
