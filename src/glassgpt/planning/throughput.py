"""How long an update takes: foretold from a GPU's data sheet, or from short timings of a run's own parts on this machine.

Shapes: `B` sequences in a micro-batch, `T` time, `C` channels.
"""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from glassgpt.config.schema import TrainConfig
from glassgpt.distributed.strategies import Strategy, build_block_masks
from glassgpt.model.activation_checkpointing import checkpoint_activations
from glassgpt.model.gpt import GPT
from glassgpt.model.summary import ModelSummary
from glassgpt.planning.memory import batch_a_rank, bytes_sent_a_step
from glassgpt.training.optim import build_optimizers
from glassgpt.utils.device import Gpu, autocast, matmul_precision

# Share of a GPU's peak that training is assumed to reach: the best published figures of GPT-2-sized runs are near it.
ASSUMED_SHARE = 0.40
# Bytes/s of one GPU's part of the network between hosts (400 Gbit/s InfiniBand, a card a GPU), and GPUs in a host.
BETWEEN_HOSTS = 50e9
GPUS_A_HOST = 8
# Bytes of a parameter that clipping (reads, scales) and AdamW (weight, gradient, two moments; three written) move.
_BYTES_OF_UPDATE = 12 + 28
# Blocks that are timed one behind the other: of a small model all, so that what stays in a cache stays there.
_BLOCKS = 4
# Seconds of one round of timings, beyond which the micro-batch is timed in part and scaled up; rounds; and seconds in all.
_ROUND = 2.5
_ROUNDS = 3
_IN_ALL = 2.0


@dataclass(frozen=True)
class StepTime:
    """Seconds of one update by what they are spent on."""

    blocks: float
    """Forward and backward passes of the blocks, all micro-steps."""
    head: float
    """Embedding, head and loss."""
    update: float
    """Clipping and the optimizer."""
    network: float = 0.0
    """Sending, which is taken to be hidden behind computing where that takes longer."""

    @property
    def seconds(self) -> float:
        """A whole update."""
        return max(self.blocks + self.head, self.network) + self.update


def assumed_step_time(config: TrainConfig, gpu: Gpu, processes: int, strategy: str, precision: str) -> StepTime:
    """By the data sheet: products at `ASSUMED_SHARE` of the peak, the update at the memory's bandwidth. The GPU must have the precision."""
    summary, batch = ModelSummary(config.model), batch_a_rank(config, processes)
    peak = gpu.peak(precision)
    assert peak is not None
    tokens = batch.sequences * config.model.context_length
    head = 6 * config.model.padded_vocab_size * config.model.n_embd
    blocks = summary.training_flops_per_token - head
    again = blocks / 3 if config.activation_checkpointing == "full" else 0  # another forward pass
    network = bytes_sent_a_step(config, processes, strategy, precision) / link(gpu, processes)
    held = summary.parameters / (processes if strategy == "fsdp" else 1)
    rate = ASSUMED_SHARE * peak
    return StepTime(
        tokens * (blocks + again) / rate, tokens * head / rate, held * _BYTES_OF_UPDATE / gpu.bandwidth, network
    )


def link(gpu: Gpu, processes: int) -> float:
    """Bytes/s that a rank can send: within a host as its GPUs are linked, beyond it at most the network's."""
    return gpu.link if processes <= GPUS_A_HOST else min(gpu.link, BETWEEN_HOSTS)


def measured_step_time(
    config: TrainConfig, device: torch.device, precision: str, clock: Callable[[], float] = time.perf_counter
) -> StepTime:
    """By timings on this machine, of one process: some blocks, embedding with head and loss, and an update of each, a few seconds.

    The parts have the sizes of the run, micro-batch included: of one that would take too long a part is timed and scaled up.
    """
    batch, parts = batch_a_rank(config, 1), _Parts(config, device, precision, clock)
    with matmul_precision(precision):
        count = batch.micro_batch
        if device.type == "cpu":
            parts.time(1)  # what happens once, happens here
            count = max(1, min(count, int(_ROUND / sum(parts.time(1)))))
        parts.time(count)
        rounds, begin = [parts.time(count)], clock()
        while len(rounds) < _ROUNDS or clock() - begin < _IN_ALL:
            rounds.append(parts.time(count))
    blocks, head, update, update_of_rest = (statistics.median(times) for times in zip(*rounds, strict=True))
    passes, layers = batch.sequences / count, config.model.n_layer / parts.layers
    return StepTime(passes * layers * blocks, passes * head, layers * update + update_of_rest)


class _Parts:
    """A model of the run's sizes with some of its blocks, whose parts are timed by themselves."""

    def __init__(self, config: TrainConfig, device: torch.device, precision: str, clock: Callable[[], float]) -> None:
        pattern = len(config.model.window_pattern)
        self.layers = min(config.model.n_layer, -(-_BLOCKS // pattern) * pattern)
        self.model = GPT.create(dataclasses.replace(config.model, n_layer=self.layers), config.seed, device).train()
        self.blocks, self._none = self.model.blocks, nn.ModuleList()
        for block in self.blocks:
            checkpoint_activations(block, config.activation_checkpointing)
        if config.compiles_on(device.type):
            build_block_masks(self.model)
            for part in (
                *self.blocks,
                self.model,
            ):  # the model by itself is embedding, head and loss: its blocks are taken out then
                part.compile(backend=config.compile_backend, dynamic=False)
        self._optimizers = build_optimizers(Strategy(self.model), config.optim, precision)
        self._device, self._precision, self._clock = device, precision, clock
        self._clip = config.optim.grad_clip

    def time(self, count: int) -> tuple[float, float, float, float]:
        """Seconds for so many sequences: the blocks forward and backward, the rest, and an update of the one and of the other."""
        model, shape = self.model, self.model.config
        x = torch.randn(count, shape.context_length, shape.n_embd, device=self._device, requires_grad=True)
        ids = torch.randint(0, model.vocab_size, x.shape[:2], device=self._device)
        gradient, positions = torch.full_like(x, 1e-6), torch.arange(shape.context_length, device=self._device)

        def through_blocks() -> None:
            with autocast(self._device, self._precision):
                y = x
                for block in self.blocks:
                    y = block(y, positions)
            y.backward(gradient)  # type: ignore[no-untyped-call]

        def around_blocks() -> None:
            model.blocks = self._none
            with autocast(self._device, self._precision):
                loss = model(ids, ids)
            loss.backward()
            model.blocks = self.blocks

        # Each part's gradients are the only ones when its update comes: what has none is passed over.
        blocks, update = self._seconds(through_blocks), self._seconds(self._update)
        return blocks, self._seconds(around_blocks), update, self._seconds(self._update)

    def _update(self) -> None:
        parameters = [
            p for group in (o.param_groups for o in self._optimizers) for each in group for p in each["params"]
        ]
        torch.nn.utils.clip_grad_norm_(parameters, self._clip or math.inf).item()
        for optimizer in self._optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def _seconds(self, function: Callable[[], None]) -> float:
        begin = self._clock()
        function()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return self._clock() - begin
