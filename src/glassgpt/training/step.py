"""One update: gradients of the batch, the verdict whether they are finite, and the optimizers. Shapes: `W` ranks."""

import math
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from glassgpt.model.param_groups import norms_by_group
from glassgpt.model.summary import ModelSummary
from glassgpt.training.optim import lr_at
from glassgpt.training.recorder import Recorder
from glassgpt.training.setup import TrainState
from glassgpt.utils.device import autocast
from glassgpt.utils.errors import UserError
from glassgpt.utils.rng import device_rng, seed_for

# At this loss scale, float16 gradients that are still infinite are not a matter of the scale.
SMALLEST_SCALE = 1.0


class NonFiniteError(UserError):
    """The loss or the gradient norm of an update is not finite; the weights are those before the update."""

    def __init__(self, update: "Update") -> None:
        self.step = update.step
        loss, norm = update.loss_and_norm()
        failed = (~update.numbers[:, 0].isfinite()).nonzero().flatten().tolist()
        of_rank = f" (on rank {failed[0]})" if failed and len(update.numbers) > 1 else ""
        super().__init__(f"step {self.step}: the loss is {loss}{of_rank}, the gradient norm {norm}")


@dataclass
class Update:
    """An update that was started. On a GPU it may still run, and its numbers may still be on their way to the host."""

    step: int  # from 1
    lr: float
    numbers: Tensor  # loss in nats and gradient norm before clipping of each rank (W, 2), on the host
    group_norms: dict[str, Tensor]
    """Gradient norm () by parameter group, before clipping, on the device; empty unless an evaluation follows."""
    arrived: torch.cuda.Event | None = None  # when the numbers are on the host; None if they are there already
    is_judged: bool = False  # on the host, when it was started
    is_outlier: bool = False

    def loss_and_norm(self) -> tuple[float, float]:
        """The mean loss and the gradient norm; waits for them. Every rank gets the same bits."""
        if self.arrived is not None:
            self.arrived.synchronize()
        losses, norms = self.numbers.double().unbind(1)
        return losses.mean().item(), norms[0].item()

    def read(self) -> dict[str, Any]:
        """Wait for the record: `step`, `loss`, `lr`, `grad_norm`, and `skipped` if it was. Raises `NonFiniteError`."""
        loss, norm = self.loss_and_norm()
        if not self.is_judged and not (math.isfinite(loss) and math.isfinite(norm)):
            raise NonFiniteError(self)
        record = {"step": self.step, "loss": loss, "lr": self.lr, "grad_norm": norm}
        return record | ({"skipped": True} if self.is_outlier else {})


class UpdateQueue:
    """Starts and records updates. A device that judges them itself computes one while the host starts the next."""

    def __init__(self, state: TrainState, recorder: Recorder) -> None:
        self._state, self._recorder = state, recorder
        self._running: deque[Update] = deque()
        self._began = 0.0
        self.group_norms: dict[str, float] = {}  # gradient norms by parameter group of the last finished update

    def start_update(self) -> None:
        """Start the next update."""
        state = self._state
        if not self._running:
            self._began = time.perf_counter()
        self._running.append(start_update(state, lr_at(state.step, state.steps, state.config.optim)))
        state.step += 1

    def finish_updates(self, *, all_of_them: bool, memory_bytes: int) -> None:
        """Wait for running updates and record them, except the newest one unless it must be finished, too."""
        keep = 0 if all_of_them or self._state.found_inf is None else 1
        while len(self._running) > keep:
            update = self._running.popleft()
            record = update.read()
            seconds, self._began = time.perf_counter() - self._began, time.perf_counter()
            self._recorder.step({**record, **self._throughput(update.step, seconds), "memory_bytes": memory_bytes})
            self.group_norms = {name: norm.item() for name, norm in update.group_norms.items()}

    def _throughput(self, step: int, seconds: float) -> Mapping[str, float | None]:
        """Count an update's tokens, and measure its speed; `peak_share` is None if the device's peak is unknown."""
        state, config, progress = self._state, self._state.config, (step - 1) / self._state.steps
        tokens = config.update_tokens(progress)
        state.tokens_seen += tokens
        shape = config.model.with_shorter_context(config.sequence_length(progress))
        share = None
        if state.peak_flops:
            flops = tokens * ModelSummary(shape).training_flops_per_token
            share = flops / seconds / (state.peak_flops * state.ranks.size)
        speed = {"seconds": seconds, "tokens_per_second": tokens / seconds}
        return {**speed, "tokens_seen": state.tokens_seen, "peak_share": share}


def start_update(state: TrainState, lr: float) -> Update:
    """Start one update; `Update.read` waits for it. If `state.found_inf` is set, the host waits for nothing here.

    If the loss or the gradient norm is not finite, all ranks raise `NonFiniteError`, with the weights untouched. In
    float16 infinite gradients are normal now and then: the update is skipped and the loss scale halved.
    """
    loss = compute_gradients(state)
    norm, group_norms = clip_gradients(state)
    numbers = state.ranks.all_gather(torch.stack([loss, norm.to(loss.device)])[None])
    # Queue the copy before the optimizers: reading the numbers then waits neither for them nor for the next update.
    on_host = numbers.to("cpu", non_blocking=state.found_inf is not None)
    update = Update(state.step + 1, lr, on_host, group_norms, is_judged=state.found_inf is None)
    if state.found_inf is None:
        if _is_accepted(state, update):
            _apply(state, lr)
        state.scaler.update()
    else:
        if numbers.device.type == "cuda":
            update.arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            update.arrived.record()
        torch.maximum(state.found_inf, (~numbers.isfinite()).any().to(state.found_inf.dtype), out=state.found_inf)
        _apply(state, lr)
    state.strategy.finish_update()
    return update


def _is_accepted(state: TrainState, update: Update) -> bool:
    """The host's verdict: whether to apply the update. Raises `NonFiniteError`."""
    # One verdict for all ranks and optimizers: left to the scaler, each would decide alone, and apply half an update.
    loss, norm = update.loss_and_norm()
    if math.isfinite(loss) and math.isfinite(norm):
        update.is_outlier = state.outliers.is_outlier(loss, norm)
    elif not math.isfinite(loss) or state.scaler.get_scale() <= SMALLEST_SCALE:
        raise NonFiniteError(update)
    return math.isfinite(norm) and not update.is_outlier


def _apply(state: TrainState, lr: float) -> None:
    """Let the optimizers change the weights; if `state.found_inf` is 1, they leave them and their state unchanged."""
    state.ranks.enter_phase(f"the optimizer in update {state.step + 1}")
    for optimizer in state.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        state.scaler.step(optimizer)


def compute_gradients(state: TrainState) -> Tensor:
    """Compute the gradients of the batch. Returns this rank's mean loss (), on the device.

    Raises `StoppedError` between two micro-batches if a rank has a `stop_signal`.
    """
    config, strategy, ranks = state.config, state.strategy, state.ranks
    ranks.enter_phase(f"update {state.step + 1}")
    rows = state.local_rows()
    micro_batches = rows.tensor_split(config.micro_steps(ranks.size, config.update_tokens(state.step / state.steps)))
    total = torch.zeros((), device=state.device)
    strategy.forward.train()
    with device_rng(state.device) as seed_rng:
        for index, micro_batch in enumerate(micro_batches):
            ranks.enter_phase(f"micro-batch {index + 1} of update {state.step + 1}")
            if index:
                ranks.stop_if_asked()
            # Dropout takes no generator: the global one is seeded for this micro-batch of the whole batch.
            seed_rng(seed_for(config.seed, "dropout", state.step, ranks.rank * len(micro_batches) + index))
            with strategy.gradient_sync(index + 1 == len(micro_batches)):
                with autocast(state.device, state.precision):
                    loss = strategy.forward(micro_batch[:, :-1], micro_batch[:, 1:]) * (len(micro_batch) / len(rows))
                state.scaler.scale(loss).backward()
            total += loss.detach()
    return total


def clip_gradients(state: TrainState) -> tuple[Tensor, dict[str, Tensor]]:
    """Clip the gradients. Returns their norm () before that, and if an evaluation follows, by parameter group."""
    strategy, grad_clip = state.strategy, state.config.optim.grad_clip
    state.ranks.enter_phase(f"the gradient norm of update {state.step + 1}")
    for optimizer in state.optimizers:
        state.scaler.unscale_(optimizer)
    norm = torch.nn.utils.get_total_norm([p.grad for p in strategy.model.parameters() if p.grad is not None])
    groups = norms_by_group(strategy.model, gradients=True) if state.evaluates_at(state.step + 1) else {}
    group_norms = {name: strategy.full_tensor(group_norm) for name, group_norm in groups.items()}
    if grad_clip:
        torch.nn.utils.clip_grads_with_norm_(strategy.model.parameters(), grad_clip, norm)
    return strategy.full_tensor(norm), group_norms
