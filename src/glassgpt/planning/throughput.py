"""How long an update takes: estimated from a GPU's data sheet, or measured on this machine."""

import math
import statistics
import time
from collections.abc import Callable

import torch

from glassgpt.config.schema import TrainConfig
from glassgpt.distributed.strategies import Strategy
from glassgpt.model.activation_checkpointing import checkpoint_activations
from glassgpt.model.gpt import GPT
from glassgpt.model.summary import ModelSummary
from glassgpt.planning.memory import bytes_sent_per_update
from glassgpt.training.optim import build_optimizers
from glassgpt.utils.device import autocast, matmul_precision, synchronize
from glassgpt.utils.gpu_specs import Gpu

# Share of a GPU's peak that training is assumed to reach, close to the best published figures of GPT-2-sized runs.
ASSUMED_SHARE = 0.40
# Bytes/s per GPU of the network between hosts (400 Gbit/s InfiniBand, one card per GPU), and GPUs per host.
BETWEEN_HOSTS = 50e9
GPUS_PER_HOST = 8
# Bytes per parameter that clipping (reads, scales) and AdamW (weight, gradient, two moments; writes three) move.
_BYTES_PER_UPDATE = 12 + 28
# Seconds that one measured pass should take at most, repetitions, and seconds in all.
_PASS_SECONDS = 2.5
_REPETITIONS = 3
_TOTAL_SECONDS = 2.0


def estimated_step_time(config: TrainConfig, gpu: Gpu, processes: int, strategy: str, precision: str) -> float:
    """Seconds of an update from the data sheet: the passes or the communication that they hide, then the optimizer."""
    summary = ModelSummary(config.model)
    flops = summary.training_flops_per_token
    if config.activation_checkpointing == "full":  # one more forward pass of the blocks
        flops += (flops - 6 * config.model.padded_vocab_size * config.model.n_embd) // 3
    tokens = config.sequences_per_process(processes) * config.model.context_length
    passes = tokens * flops / (ASSUMED_SHARE * gpu.peaks[precision])
    network = bytes_sent_per_update(config, processes, strategy, precision) / link_bandwidth(gpu, processes)
    parameters = summary.parameters / (processes if strategy == "fsdp" else 1)
    return max(passes, network) + parameters * _BYTES_PER_UPDATE / gpu.bandwidth


def link_bandwidth(gpu: Gpu, processes: int) -> float:
    """Bytes/s that a rank can send: over the host's links, or between hosts at most the network's rate."""
    return gpu.link if processes <= GPUS_PER_HOST else min(gpu.link, BETWEEN_HOSTS)


def measured_step_time(
    config: TrainConfig, device: torch.device, precision: str, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Seconds of an update: measures passes and updates of the run's model, in one process, for a few seconds."""
    count, measure = config.micro_batch(1), _build_step(config, device, precision, clock)
    with matmul_precision(precision):
        if device.type == "cpu":  # a micro-batch that would take too long is measured in part and scaled up
            measure(1)  # warm up
            count = max(1, min(count, int(_PASS_SECONDS / measure(1)[0])))
        measure(count)
        rounds, begin = [measure(count)], clock()
        while len(rounds) < _REPETITIONS or clock() - begin < _TOTAL_SECONDS:
            rounds.append(measure(count))
    passes, update = (float(statistics.median(times)) for times in zip(*rounds, strict=True))
    return config.batch_size / count * passes + update


def _build_step(
    config: TrainConfig, device: torch.device, precision: str, clock: Callable[[], float]
) -> Callable[[int], tuple[float, float]]:
    """A function that measures the seconds of a forward and backward pass of some sequences, and of an update."""
    strategy = Strategy(GPT.create(config.model, config.seed, device).train())
    for block in strategy.model.blocks:
        checkpoint_activations(block, config.activation_checkpointing)
    if config.compiles_on(device.type):
        strategy.compile(config.compile_backend)
    optimizers = build_optimizers(strategy, config.optim, precision)

    def measure(count: int) -> tuple[float, float]:
        ids = torch.randint(strategy.model.vocab_size, (count, config.model.context_length), device=device)
        begin = clock()
        with autocast(device, precision):
            loss = strategy.forward(ids, ids)
        loss.backward()
        synchronize(device)
        middle = clock()
        torch.nn.utils.clip_grad_norm_(strategy.model.parameters(), config.optim.grad_clip or math.inf).item()
        for optimizer in optimizers:
            optimizer.step()
        strategy.finish_update()
        synchronize(device)
        return middle - begin, clock() - middle

    return measure
