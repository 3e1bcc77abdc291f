"""Training: one update as a function, and the loop that reads as the recipe of a run.

A run's state is its weights, its optimizer and the number of updates done. Batches, dropout and samples are functions of
the seed and the step, so a run that was killed and resumed computes what it would have computed. Under `torchrun` all of this
runs on each rank; the first one writes.
"""

import dataclasses
import hashlib
import math
import os
import shlex
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glassgpt.config.schema import DataConfig, ProbeConfig, TrainConfig
from glassgpt.data.sources import resolve
from glassgpt.distributed.group import Ranks, process_group, under_torchrun
from glassgpt.evaluation.hellaswag import evaluate_hellaswag
from glassgpt.evaluation.perplexity import evaluate_data
from glassgpt.interpretability.snapshots import take_probe
from glassgpt.model.gpt import GPT
from glassgpt.model.param_groups import group_gradient_norms, group_weight_norms
from glassgpt.model.summary import ModelSummary
from glassgpt.runs.checkpoint import Checkpoint, latest_checkpoint, remove_later_checkpoints, take_snapshot
from glassgpt.runs.run_directory import RunDirectory
from glassgpt.training.loggers import require_log_targets
from glassgpt.training.optim import lr_at
from glassgpt.training.progress import PlainProgress, Progress, SilentProgress
from glassgpt.training.recorder import Recorder, RunRecorder
from glassgpt.training.setup import TrainState, environment_of, sampler, setup_training
from glassgpt.utils.device import autocast, matmul_precision, memory_used, peak_flops
from glassgpt.utils.errors import UserError, program
from glassgpt.utils.files import explain_os_errors
from glassgpt.utils.rng import seed_for

# Loss scale under which float16 gradients that are still infinite are no accident any more.
SMALLEST_SCALE = 1.0
# Seconds in which the processes of a lost host let go of a run, and in which another host sees what was written there.
SETTLING = 60.0


class NonFiniteError(UserError):
    """The loss or the gradient of update `step` is no longer a number; the weights are still those before the update."""

    def __init__(self, step: int, loss: float, norm: float, of_rank: str = "") -> None:
        super().__init__(f"step {step}: the loss is {loss}{of_rank}, the gradient norm {norm}")
        self.step = step


def train(
    config: TrainConfig, out: str | Path | None = None, *, overwrite: bool = False, progress: Progress | None = None
) -> Path:
    """Train a new run in the directory `out` (default: `runs/NAME`) and return it.

    Raises `UserError` before anything is written if config, data or machine do not fit or the directory is taken (`overwrite`
    replaces a run), and if the loss stops being finite. Ctrl-C saves a checkpoint, then raises `KeyboardInterrupt`; SIGTERM
    and SIGHUP save, then raise `SystemExit(0)`. Under `torchrun` every rank calls it; where torchrun starts the ranks again, the
    run that they began goes on.
    """
    run = RunDirectory(out if out is not None else Path("runs") / config.name)
    with ExitStack() as until_parted, process_group() as ranks:
        progress = _shown_by(ranks, progress)
        if ranks.all_gather_object(ranks.is_main and _is_begun(run, config, ranks))[0]:
            progress.message(f"going on with {run.path}, which this call of torchrun began")
            stopped_by = _resume(run, ranks, progress, until_parted, wait=SETTLING)
        else:
            stopped_by = _train(config, run, overwrite, ranks, progress, until_parted)
    return _ended(run, stopped_by)


def _train(
    config: TrainConfig, run: RunDirectory, overwrite: bool, ranks: Ranks, progress: Progress, until_parted: ExitStack
) -> int | None:
    if ranks.is_main:
        run.require_free(overwrite)
        require_log_targets(config.log)
    trainer = setup_training(config, ranks, progress)
    recorder = RunRecorder(run, trainer, progress, _request(config)) if ranks.is_main else Recorder()
    with _locked(run, ranks):
        if ranks.is_main:
            run.require_free(overwrite)  # again: another process may have been quicker
            run.clear()
            run.write_environment(environment_of(trainer))
            recorder.status("running")  # with launch and request, for `_is_begun`
            run.write_config(trainer.config)
            run.cut_back(0)
        return _run_to_end(run, trainer, recorder, progress, until_parted)


def _ended(run: RunDirectory, stopped_by: int | None) -> Path:
    """The run's directory; or the exception by which a process ends that a signal has stopped."""
    if stopped_by is None:
        return run.path
    # Under torchrun any other exit code is a failure, behind which it starts the ranks again.
    raise KeyboardInterrupt if stopped_by == signal.SIGINT and not under_torchrun() else SystemExit(0)


def _request(config: TrainConfig) -> str:
    """What is asked for, in short: a run that is begun goes on only for who asks for the same."""
    return hashlib.sha256(config.to_toml().encode()).hexdigest()[:16]


def _is_begun(run: RunDirectory, config: TrainConfig, ranks: Ranks) -> bool:
    """Whether torchrun has started these processes again, behind others that began this run.

    Raises `UserError` where that cannot be told any more: the run may be lost if it were begun anew.
    """
    with explain_os_errors("read", run.path):
        if ranks.launch_id is None or not run.is_run:
            return False
    status = run.read_status()
    if not status and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")):
        raise UserError(f"{run.status_path} cannot be read, so nobody knows who began this run; go on with --resume")
    own = (socket.gethostname(), os.getpid())  # which began it itself, in an earlier call
    return (status.get("launch"), status.get("request")) == (ranks.launch_id, _request(config)) and own != (
        status["host"],
        status["pid"],
    )


def resume(
    run: str | Path,
    *,
    steps: int | None = None,
    strategy: str | None = None,
    log: str | None = None,
    progress: Progress | None = None,
) -> Path:
    """Go on with a run from its newest whole checkpoint, exactly as if it had never stopped; return its directory.

    With other `steps` the schedule from the checkpoint on is that of a run of that length. A finished run is left as it is.
    On another number of processes, or by another `strategy` (see `TrainConfig`), losses are the same up to rounding; where else
    numbers go, `log`, changes nothing in them.
    Raises `UserError` for a folder that is no run, data or settings that have changed, and damaged checkpoints throughout.
    """
    directory = RunDirectory(run)
    with ExitStack() as until_parted, process_group() as ranks:
        if ranks.is_main:
            directory.require_run()
        # Started again by torchrun: what is left of the ranks before may need a moment to end.
        wait = (
            SETTLING
            if ranks.launch_id is not None and directory.read_status().get("launch") == ranks.launch_id
            else 0.0
        )
        changes = {"strategy": strategy, "log": log}
        stopped_by = _resume(directory, ranks, _shown_by(ranks, progress), until_parted, steps, changes, wait)
    return _ended(directory, stopped_by)


def _resume(
    run: RunDirectory,
    ranks: Ranks,
    progress: Progress,
    until_parted: ExitStack,
    steps: int | None = None,
    changes: Mapping[str, str | None] | None = None,
    wait: float = 0.0,
) -> int | None:
    with _locked(run, ranks, wait):
        found = ranks.all_gather_object(_find_end(run, steps, changes or {}, progress) if ranks.is_main else None)[0]
        config, environment = TrainConfig.from_dict(found["config"]), found["environment"]
        checkpoint = None if found["step"] is None else _see_checkpoint(run.checkpoints / f"{found['step']:06d}")
        # Other thread counts add up in another order; so do other numbers of processes, whose threads are torchrun's to choose.
        same_processes = environment.get("processes", 1) == ranks.size
        with _threads(environment["threads"] if same_processes else torch.get_num_threads()):
            trainer = setup_training(config, ranks, progress, checkpoint, environment["data_fingerprint"])
            _compare_environments(environment, environment_of(trainer), progress)
            recorder = RunRecorder(run, trainer, progress, found["request"]) if ranks.is_main else Recorder()
            if trainer.step >= trainer.steps:
                if run.read_status().get("state") != "finished":  # a kill may have come before that was written
                    recorder.status("finished")
                progress.message(f"{run.path} is finished at step {trainer.step}; --steps N extends it")
                return None
            if checkpoint is None:
                progress.message(f"{run.path} has no checkpoint: it begins again at step 0")
            if ranks.is_main:
                run.cut_back(trainer.step if checkpoint is not None else -1)
                run.write_config(config)
                remove_later_checkpoints(run.checkpoints, trainer.step)
                recorder.status("running")
            return _run_to_end(run, trainer, recorder, progress, until_parted)


def _find_end(
    run: RunDirectory, steps: int | None, changes: Mapping[str, str | None], progress: Progress
) -> dict[str, Any]:
    """Where a run stands: its config with what is asked for, its environment, and the step of its newest whole checkpoint."""
    environment, config = run.read_environment(), run.read_config()
    checkpoint = latest_checkpoint(run.checkpoints, progress.message)
    done = checkpoint.state.step if checkpoint is not None else 0
    if checkpoint is not None:
        _require_same_settings(run, config, checkpoint.config)
    _require_texts(run, config.data)
    config = config.override(**{name: value for name, value in changes.items() if value is not None})
    require_log_targets(config.log)
    if steps is not None and steps != config.steps:
        if steps <= done:
            raise UserError(f"the run {run.path} is at step {done} already: --steps must be larger")
        config = config.override(steps=steps)
        progress.message(f"from step {done} on, the schedule is that of a run of {steps} steps")
    step, request = done if checkpoint is not None else None, run.read_status().get("request")
    return {"config": config.to_dict(), "environment": environment, "step": step, "request": request}


def _see_checkpoint(path: Path) -> Checkpoint:
    """A checkpoint that the first rank has verified. Another host may see it later: a network's file system takes its time."""
    give_up = time.monotonic() + SETTLING
    while not (path / "manifest.json").is_file():
        if time.monotonic() > give_up:
            raise UserError(f"{path} is not there: a run that goes on needs a directory that all hosts share")
        time.sleep(0.5)
    return Checkpoint(path)


def _shown_by(ranks: Ranks, progress: Progress | None) -> Progress:
    """Who shows the run: on the first rank the one that is given, or plain lines; on the others nobody."""
    return (progress or PlainProgress()) if ranks.is_main else SilentProgress()


def _locked(run: RunDirectory, ranks: Ranks, wait: float = 0.0) -> AbstractContextManager[None]:
    return run.locked(wait) if ranks.is_main else nullcontext()


def _require_same_settings(run: RunDirectory, config: TrainConfig, saved: TrainConfig) -> None:
    """Refuse a config that was edited since the checkpoint, but for its length, the place of its text, its log and its probes."""
    # The texts may have moved: their fingerprint tells whether they are the same. The strategy changes rounding only, the rest nothing.
    texts = {"source": "", "mixture": {}}
    free = {"steps": 1, "strategy": "fsdp", "log": "none", "data": texts, "probe": dataclasses.asdict(ProbeConfig())}
    weights = list(config.data.mixture.values()) == list(saved.data.mixture.values())
    if not weights or config.override(**free) != saved.override(**free):
        raise UserError(
            f"{run.config_path} was changed since the run's last checkpoint, so it cannot go on exactly; "
            f"put it back, or start a new run with --init-from {shlex.quote(str(run.path))}"
        )


def _require_texts(run: RunDirectory, data: DataConfig) -> None:
    try:
        for source in data.sources:
            resolve(source)
    except UserError as error:
        moved = f"if the text has moved, write its new place into {run.config_path} as data.source, or in data.mixture"
        raise UserError(f"{str(error).splitlines()[0]}\n{moved}") from None


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Compute with this many threads inside: other counts add up in another order, and give other bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _compare_environments(before: dict[str, Any], now: dict[str, Any], progress: Progress) -> None:
    """Warn of whatever can change the bits."""
    changed = [f"{key} was {before.get(key)}, is {now[key]}" for key in now if before.get(key) != now[key]]
    if changed:
        progress.message(
            f"warning: not the environment that the run began in, so its bits may differ: {'; '.join(changed)}"
        )


def _run_to_end(
    run: RunDirectory, trainer: TrainState, recorder: Recorder, progress: Progress, until_parted: ExitStack
) -> int | None:
    """Train until the last step is saved, or that of a signal, which is returned.

    Signals are collected from here on until the ranks have parted: torchrun may repeat its own at any time.
    """
    trainer.ranks.enter_phase("the opening of the logs", may_take_long=True)
    recorder.begin()
    trainer.ranks.on_failure(recorder.fail)
    try:
        caught = until_parted.enter_context(_signals(once=not under_torchrun()))
        with matmul_precision(trainer.precision):
            stopped_by = _loop(run, trainer, recorder, caught)
            trainer.ranks.enter_phase("the last save, and the logs' end", may_take_long=True)
            recorder.finish()
    except KeyboardInterrupt:  # a second one: what is not saved is lost
        try:
            recorder.status("interrupted")
        finally:
            recorder.hurry_logs(failed=False)
        raise
    recorder.close()
    trainer.ranks.on_failure(
        Recorder().fail
    )  # all is written: a rank that is lost from here on is no failure of the run
    if stopped_by is None:
        recorder.status("finished")
        recorder.close_logs()
        progress.finished(run.path)
        return None
    recorder.status("interrupted" if stopped_by == signal.SIGINT else "preempted")
    recorder.close_logs()
    command = f"torchrun … -m {__package__}" if under_torchrun() else program()
    progress.message(
        f"stopped at step {trainer.step} and saved; go on with: {command} train --resume {shlex.quote(str(run.path))}"
    )
    return stopped_by


def _count_tokens(trainer: TrainState, step: int, seconds: float, peak: float | None) -> dict[str, float | None]:
    """Count an update's tokens; what its record says of them. `peak` is a rank's FLOP/s, where that is known."""
    config, progress = trainer.config, (step - 1) / trainer.steps
    tokens = config.update_tokens(progress)
    trainer.tokens_seen += tokens
    flops = (
        tokens
        * ModelSummary(config.model.with_shorter_context(config.sequence_length(progress))).training_flops_per_token
    )
    return {
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "tokens_seen": trainer.tokens_seen,
        "peak_share": flops / seconds / (peak * trainer.ranks.size) if peak else None,
    }


def _loop(run: RunDirectory, trainer: TrainState, recorder: Recorder, caught: list[int]) -> int | None:
    """Evaluate, then update, record, evaluate, sample and save until the last step, or a signal on any rank, which is returned."""
    config, ranks = trainer.config, trainer.ranks
    peak = peak_flops(trainer.device, trainer.precision)
    if trainer.step == 0:
        _evaluate(trainer, recorder)
    begun: deque[Update] = deque()
    grad_norms: dict[str, float] = {}
    began = 0.0
    while trainer.step < trainer.steps:
        if not begun:  # else it was when the numbers of the one before were there
            began = time.perf_counter()
        try:
            begun.append(begin_update(trainer, lr_at(trainer.step, trainer.steps, config.optim)))
            trainer.step += 1
            # Looked at once, so that no signal can end the loop behind a step that was not saved.
            signals, memory = (
                ranks.all_gather_numbers([caught[0] if caught else 0, memory_used(trainer.device)])
                .max(axis=0)
                .astype(int)
                .tolist()
            )
            last, evaluates = trainer.step == trainer.steps, _evaluates(trainer, trainer.step)
            saves = last or signals or _due(trainer.step, config.checkpoint_every)
            looks = not evaluates and bool(trainer.prompts) and _due(trainer.step, config.probe.every)
            # A GPU has the next update at hand meanwhile, unless its weights are to be looked at.
            while len(begun) > (0 if evaluates or looks or saves or trainer.found_inf is None else 1):
                update = begun.popleft()
                numbers = update.read()
                seconds, began = time.perf_counter() - began, time.perf_counter()
                recorder.step({**numbers, **_count_tokens(trainer, update.step, seconds, peak), "memory_bytes": memory})
                grad_norms = {part: norm.item() for part, norm in update.part_norms.items()}
        except NonFiniteError as error:
            trainer.step = error.step - 1
            recorder.failed_step(lr_at(trainer.step, trainer.steps, config.optim))
            ranks.all_gather_numbers(
                [0]
            )  # all of them fail, and the first one to say so ends the others: not before this is written
            raise UserError(
                f"{error}; its batch is in {run.failure_path(error.step)}. Try a lower --optim.lr"
            ) from None
        val_loss, is_best = None, False
        if evaluates:
            val_loss, is_best = _evaluate(trainer, recorder, grad_norms)
        elif looks:
            with trainer.strategy.full_model() as model:
                _look(trainer, recorder, model)
        if saves or is_best:
            ranks.enter_phase(f"the save of step {trainer.step}", may_take_long=True)
            recorder.finish()  # the save before: two copies might be more than the host's memory holds
            ranks.enter_phase(f"the gathering of step {trainer.step}")
            recorder.save(take_snapshot(trainer.strategy, trainer.optimizers), val_loss)
        if signals and not last:
            return int(signals)
    return None


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _evaluates(trainer: TrainState, step: int) -> bool:
    """Whether the model is evaluated behind this update."""
    return step == trainer.steps or _due(step, trainer.config.eval_every)


@dataclass
class Update:
    """An update that has begun. On a GPU it may still go on, and its numbers be on their way to the host."""

    step: int
    """From 1."""
    lr: float
    numbers: Tensor
    """Loss in nats and gradient norm before clipping (2,), on the host."""
    is_judged: bool
    """Whether they have been looked at already."""
    part_norms: dict[str, Tensor]
    """The gradient's norm () by part, before clipping, on the device; empty unless an evaluation follows."""
    there: torch.cuda.Event | None = None
    """When the numbers are; None where they are now."""
    is_outlier: bool = False

    def read(self) -> dict[str, Any]:
        """Wait for the numbers: `step`, `loss`, `lr`, `grad_norm`, and `skipped` where it was. Raises `NonFiniteError`."""
        if self.there is not None:
            self.there.synchronize()
        loss, norm = self.numbers.tolist()
        if not self.is_judged and not (math.isfinite(loss) and math.isfinite(norm)):
            raise NonFiniteError(self.step, loss, norm)
        return {"step": self.step, "loss": loss, "lr": self.lr, "grad_norm": norm} | (
            {"skipped": True} if self.is_outlier else {}
        )


def train_step(trainer: TrainState, lr: float) -> dict[str, Any]:
    """One update, waited for. Returns what `Update.read` does: `loss` is the batch's mean.

    Under float16 an infinite gradient is normal now and then: nothing is updated, and the loss scale halves. Otherwise
    raises `NonFiniteError`, with the weights untouched, where loss or norm is not finite. All ranks come to the same verdict.
    """
    return begin_update(trainer, lr).read()


def begin_update(trainer: TrainState, lr: float) -> Update:
    """An update as `train_step` says, which with `trainer.found_inf` is neither waited for nor judged here."""
    loss, norm, part_norms = _form_gradients(trainer)
    if trainer.found_inf is None:
        update = _judge_and_apply(trainer, lr, loss.item(), norm.item(), part_norms)
    else:
        update = _apply_unless_unfinite(trainer, lr, torch.stack([loss, norm]), part_norms, trainer.found_inf)
    trainer.strategy.finish_update()
    return update


def _apply_unless_unfinite(
    trainer: TrainState, lr: float, numbers: Tensor, part_norms: dict[str, Tensor], found_inf: Tensor
) -> Update:
    """Have the device judge its loss and norm (2,) by itself: where one was not finite once, its optimizers do nothing any more."""
    torch.maximum(found_inf, (~numbers.isfinite()).any().to(found_inf.dtype), out=found_inf)
    # Sent ahead of the optimizers' work: who waits for the numbers does not wait for that, nor for the next update.
    on_host, there = numbers.to("cpu", non_blocking=True), None
    if numbers.device.type == "cuda":
        there = torch.cuda.Event()  # type: ignore[no-untyped-call]
        there.record()
    _apply(trainer, lr)
    return Update(trainer.step + 1, lr, on_host, is_judged=False, part_norms=part_norms, there=there)


def _form_gradients(trainer: TrainState) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The gradients of the batch, clipped. Returns this rank's mean loss () and the norm () before clipping, on the device.

    Where an evaluation follows, the norms by part as well: every rank knows that beforehand, as their sums need.
    """
    config, strategy, ranks, scaler = trainer.config, trainer.strategy, trainer.ranks, trainer.scaler
    ranks.enter_phase(f"update {trainer.step + 1}")
    rows = _to_device(torch.from_numpy(trainer.rows(ranks.slice_of)), trainer.device)
    micro_batches = rows.tensor_split(config.micro_steps(ranks.size, trainer.update_tokens))
    total = torch.zeros((), device=trainer.device)
    strategy.forward.train()
    for index, micro_batch in enumerate(micro_batches):
        place = f"micro-batch {index + 1} of update {trainer.step + 1}"
        ranks.enter_phase(f"{place}, forward")
        if config.model.dropout:
            # No generator can be passed to dropout, so the global one is set to what this draw is for: the micro-batch of the
            # whole batch, whichever rank has it.
            torch.manual_seed(seed_for(config.seed, "dropout", trainer.step, ranks.rank * len(micro_batches) + index))
        with strategy.gradient_sync(index + 1 == len(micro_batches)):
            with autocast(trainer.device, trainer.precision):
                loss: Tensor = strategy.forward(micro_batch[:, :-1], micro_batch[:, 1:]) * (
                    len(micro_batch) / len(rows)
                )
            ranks.enter_phase(f"{place}, backward")
            scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        total += loss.detach()
    ranks.enter_phase(f"the gradient norm of update {trainer.step + 1}")
    for optimizer in trainer.optimizers:
        scaler.unscale_(optimizer)
    gradients = [parameter.grad for parameter in strategy.model.parameters() if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    part_norms = (
        group_gradient_norms(strategy.model, strategy.full_tensor) if _evaluates(trainer, trainer.step + 1) else {}
    )
    if config.optim.grad_clip:
        torch.nn.utils.clip_grads_with_norm_(strategy.model.parameters(), config.optim.grad_clip, norm)
    return total, strategy.full_tensor(norm), part_norms


def _to_device(rows: Tensor, device: torch.device) -> Tensor:
    """Rows on the device. From pinned memory a GPU fetches them itself, and nobody waits for what it has at hand before that."""
    return rows.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else rows.to(device)


def _judge_and_apply(
    trainer: TrainState, lr: float, loss: float, own_norm: float, part_norms: dict[str, Tensor]
) -> Update:
    """Update the weights unless this loss or norm, or another rank's, forbids it."""
    ranks, scaler = trainer.ranks, trainer.scaler
    losses, norms = ranks.all_gather_numbers([loss, own_norm]).T
    mean_loss, norm = (
        float(losses.mean()),
        float(norms[0]),
    )  # the first rank's: its last bit may be another one elsewhere
    is_outlier = False
    # One verdict for all ranks and optimizers: left to the scaler, each would decide alone, and half an update would be done.
    if math.isfinite(mean_loss) and math.isfinite(norm):
        is_outlier = trainer.outliers.is_outlier(mean_loss, norm)
        if not is_outlier:
            _apply(trainer, lr)
    elif not math.isfinite(mean_loss) or scaler.get_scale() <= SMALLEST_SCALE:
        of_rank = next(
            (f" (on rank {rank})" for rank, own in enumerate(losses) if ranks.size > 1 and not math.isfinite(own)), ""
        )
        raise NonFiniteError(trainer.step + 1, mean_loss, norm, of_rank)
    scaler.update()
    numbers = torch.tensor([mean_loss, norm], dtype=torch.float64)
    return Update(trainer.step + 1, lr, numbers, is_judged=True, part_norms=part_norms, is_outlier=is_outlier)


def _apply(trainer: TrainState, lr: float) -> None:
    """Have the optimizers change the weights."""
    trainer.ranks.enter_phase(f"the optimizer in update {trainer.step + 1}")
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        trainer.scaler.step(optimizer)


def _evaluate(
    trainer: TrainState, recorder: Recorder, grad_norms: Mapping[str, float] | None = None
) -> tuple[float, bool]:
    """Validation loss, norms, samples and a look into the model at this step; the loss, and whether it is the best so far.

    `grad_norms`: of its update, by part.
    """
    config, ranks, precision = trainer.config, trainer.ranks, trainer.precision
    began = time.perf_counter()
    with trainer.strategy.full_model() as model:
        ranks.enter_phase(f"the evaluation of step {trainer.step}")
        result = evaluate_data(model, trainer.data, precision=precision, limit=config.eval_tokens, ranks=ranks)
        record = {"step": trainer.step, **{f"val_{key}": value for key, value in result.items()}}
        if trainer.hellaswag and (trainer.step == trainer.steps or _due(trainer.step, config.hellaswag_every)):
            scores = evaluate_hellaswag(
                model, trainer.data.tokenizer, trainer.hellaswag, precision=precision, ranks=ranks
            )
            record |= {
                "hellaswag_acc": scores["acc"],
                "hellaswag_acc_norm": scores["acc_norm"],
                "hellaswag_items": scores["n"],
            }
            record["hellaswag_published"] = trainer.hellaswag_published
        record |= {"weight_norms": group_weight_norms(model)} | ({"grad_norms": dict(grad_norms)} if grad_norms else {})
        record["seconds"] = time.perf_counter() - began
        recorder.evaluated(record)
        ranks.enter_phase(f"the samples of step {trainer.step}", may_take_long=True)
        samples = sample(trainer, model) if config.sample.count and ranks.is_main else []
        if samples:
            recorder.sampled(samples)
        _look(trainer, recorder, model, samples)
    loss: float = result["loss"]
    is_best = (
        trainer.step > 0 and math.isfinite(loss) and (trainer.best_val_loss is None or loss < trainer.best_val_loss)
    )
    if is_best:
        trainer.best_step, trainer.best_val_loss = trainer.step, loss
    return loss, is_best


def _look(trainer: TrainState, recorder: Recorder, model: GPT, samples: Sequence[str] = ()) -> None:
    """A snapshot of what the model computes at this step, by the first rank."""
    trainer.ranks.enter_phase(f"the snapshot of step {trainer.step}", may_take_long=True)
    if trainer.prompts and trainer.ranks.is_main:
        recorder.probed(take_probe(model, trainer.prompts, samples, trainer.step))


def sample(trainer: TrainState, model: GPT) -> list[str]:
    """What the model writes at this step, prompt included."""
    settings = trainer.config.sample
    texts = [settings.prompt or ""] * settings.count
    for token in sampler(
        model, trainer.data.tokenizer, settings, seed_for(trainer.config.seed, "sample", trainer.step)
    ):
        texts[token.sample] += token.text
    return texts


@contextmanager
def _signals(once: bool) -> Iterator[list[int]]:
    """Collect SIGINT, SIGTERM and SIGHUP, so that the step at hand is finished and saved; a second one ends the process at once.

    Not so a second SIGHUP: of a lost connection both the terminal and the shell give notice. Nor any second one unless it comes
    `once`: under torchrun both the scheduler and torchrun pass it on.
    Python allows handlers in the main thread only: in another one (a notebook's worker, say) nothing is caught.
    """
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return

    def catch(number: int, frame: object) -> None:
        if not caught:
            caught.append(number)
        elif once and number == signal.SIGINT:
            raise KeyboardInterrupt
        elif once and number == signal.SIGTERM:
            os._exit(128 + number)

    numbers = [signal.SIGINT, signal.SIGTERM]
    if sys.platform != "win32" and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as it is under nohup
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, catch) for number in numbers}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
