"""How long an update takes: estimated from a GPU's data sheet, or measured on this machine."""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from glassgpt.config.schema import TrainConfig
from glassgpt.distributed.strategies import Strategy
from glassgpt.model.activation_checkpointing import checkpoint_activations
from glassgpt.model.gpt import GPT
from glassgpt.model.summary import ModelSummary
from glassgpt.planning.memory import batch_per_rank, bytes_sent_per_update
from glassgpt.training.optim import build_optimizers
from glassgpt.utils.device import autocast, matmul_precision, synchronize
from glassgpt.utils.gpu_specs import Gpu

# Share of a GPU's peak that training is assumed to reach: the best published figures of GPT-2-sized runs are close to
# it.
ASSUMED_SHARE = 0.40
# Bytes/s per GPU of the network between hosts (400 Gbit/s InfiniBand, one card per GPU), and GPUs per host.
BETWEEN_HOSTS = 50e9
GPUS_PER_HOST = 8
# Bytes per parameter that clipping (reads, scales) and AdamW (weight, gradient, two moments; writes three) move.
_BYTES_PER_UPDATE = 12 + 28
# Seconds that one measured pass should take at most: larger micro-batches are measured in part and scaled up.
# Repetitions; seconds in all.
_PASS_SECONDS = 2.5
_REPETITIONS = 3
_TOTAL_SECONDS = 2.0


@dataclass(frozen=True)
class StepTime:
    """Seconds of one update."""

    compute: float  # forward and backward passes of all micro-steps
    update: float  # clipping and the optimizer
    network: float = 0.0  # communication, assumed to overlap with computation

    @property
    def seconds(self) -> float:
        """The whole update."""
        return max(self.compute, self.network) + self.update


def estimated_step_time(config: TrainConfig, gpu: Gpu, processes: int, strategy: str, precision: str) -> StepTime:
    """From the data sheet: products at `ASSUMED_SHARE` of the peak, the update at the memory's bandwidth.

    Raises `ValueError` if the GPU does not support the precision.
    """
    summary, peak = ModelSummary(config.model), gpu.peak(precision)
    if peak is None:
        raise ValueError(f"{gpu.name} does not support {precision}")
    flops = summary.training_flops_per_token
    if config.activation_checkpointing == "full":  # one more forward pass of the blocks
        flops += (flops - 6 * config.model.padded_vocab_size * config.model.n_embd) // 3
    tokens = batch_per_rank(config, processes).sequences * config.model.context_length
    parameters = summary.parameters / (processes if strategy == "fsdp" else 1)
    return StepTime(
        compute=tokens * flops / (ASSUMED_SHARE * peak),
        update=parameters * _BYTES_PER_UPDATE / gpu.bandwidth,
        network=bytes_sent_per_update(config, processes, strategy, precision) / link_bandwidth(gpu, processes),
    )


def link_bandwidth(gpu: Gpu, processes: int) -> float:
    """Bytes/s that a rank can send: over the host's links, or between hosts at most the network's rate."""
    return gpu.link if processes <= GPUS_PER_HOST else min(gpu.link, BETWEEN_HOSTS)


def measured_step_time(
    config: TrainConfig, device: torch.device, precision: str, clock: Callable[[], float] = time.perf_counter
) -> StepTime:
    """Measure passes and updates of the run's model on this machine, in one process, for a few seconds.

    On a CPU a micro-batch that would take too long is measured in part and scaled up.
    """
    batch, step = batch_per_rank(config, 1), _Step(config, device, precision, clock)
    with matmul_precision(precision):
        count = batch.micro_batch
        if device.type == "cpu":
            step.measure(1)  # warm up
            count = max(1, min(count, int(_PASS_SECONDS / step.measure(1)[0])))
        step.measure(count)
        rounds, begin = [step.measure(count)], clock()
        while len(rounds) < _REPETITIONS or clock() - begin < _TOTAL_SECONDS:
            rounds.append(step.measure(count))
    compute, update = (statistics.median(times) for times in zip(*rounds, strict=True))
    return StepTime(batch.sequences / count * compute, update)


class _Step:
    """The model and the optimizers of a run, on random tokens."""

    def __init__(self, config: TrainConfig, device: torch.device, precision: str, clock: Callable[[], float]) -> None:
        self._strategy = Strategy(GPT.create(config.model, config.seed, device).train())
        for block in self._strategy.model.blocks:
            checkpoint_activations(block, config.activation_checkpointing)
        if config.compiles_on(device.type):
            self._strategy.compile(config.compile_backend)
        self._optimizers = build_optimizers(self._strategy, config.optim, precision)
        self._device, self._precision, self._clock = device, precision, clock
        self._clip = config.optim.grad_clip or math.inf

    def measure(self, count: int) -> tuple[float, float]:
        """Seconds of a forward and backward pass of this many sequences, and of an update."""
        model = self._strategy.model
        ids = torch.randint(model.vocab_size, (count, model.config.context_length), device=self._device)

        def forward_and_backward() -> None:
            with autocast(self._device, self._precision):
                loss = self._strategy.forward(ids, ids)
            loss.backward()

        return self._seconds(forward_and_backward), self._seconds(self._update)

    def _update(self) -> None:
        torch.nn.utils.clip_grad_norm_(self._strategy.model.parameters(), self._clip).item()
        for optimizer in self._optimizers:
            optimizer.step()
        self._strategy.finish_update()

    def _seconds(self, function: Callable[[], None]) -> float:
        begin = self._clock()
        function()
        synchronize(self._device)
        return self._clock() - begin
