"""plan and bench: what a run will need, and what this machine gives."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from glassgpt.cli.options import parse, require_json, say, write_json
from glassgpt.cli.train import TrainOptions, parse_settings
from glassgpt.utils.errors import UserError


@dataclass(frozen=True, kw_only=True)
class PlanOptions(TrainOptions):
    """Options of `glassgpt plan`."""

    gpus: int = 1
    """Number of GPUs that train together."""


def plan(arguments: Sequence[str]) -> None:
    """Estimate what a run needs: memory by component, the micro-batch that fits, tokens/s and hours.

    Takes a recipe's name or .toml file and the options of train. Nothing is written, and no text is read. --device here
    (or auto, cpu, cuda) measures this machine for some seconds to a minute. The name of a GPU uses its data sheet:
    b200, h200, h100, h100-nvl, h100-pcie, a100-80, a100-40, l40s, a10, l4, v100-32, v100-16, t4, rtx4090, rtx3090.
    """
    options = parse_settings(PlanOptions, "plan", plan, arguments)
    if options.resume is not None:
        raise UserError("plan estimates new runs; pass a recipe, or the config.toml of a run, instead of --resume")
    from glassgpt.planning.plan import plan as plan_run
    from glassgpt.utils.device import keep_freed_memory

    keep_freed_memory()  # as training does, so that the measured times are those of training
    print(plan_run(options.config, options.gpus))


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """Options of `glassgpt bench`."""

    device: str = "auto"
    """auto, cpu, cuda, cuda:1."""
    json: Annotated[Path | None, arg(metavar="FILE")] = None
    """File to write the figures to as JSON."""


def bench(arguments: Sequence[str]) -> None:
    """Measure this machine: matrix products, memory bandwidth, training and generation, each with its limit."""
    options = parse(BenchOptions, "bench", bench, arguments)
    if options.json is not None:
        require_json(options.json)
    import torch

    from glassgpt.planning.benchmark import measure
    from glassgpt.utils.device import device_name, find_device, keep_freed_memory

    keep_freed_memory()
    device = find_device(options.device)
    if device.type == "mps":
        raise UserError("bench measures CPUs and CUDA devices; use --device cpu")
    say(f"{device_name(device)}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    figures = []
    for figure in measure(device):
        say(str(figure))
        figures.append(figure)
    if options.json is not None:
        write_json(
            options.json, {"device": device_name(device), **{figure.name: figure.to_dict() for figure in figures}}
        )
