"""plan and bench: what a run will need, and what this machine gives."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from ..config import TrainConfig
from ..errors import UserError
from ..parsing import parse_options
from .shared import description, parse, require_json, say, write_json
from .training import named_recipe


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Options of `glassgpt plan`."""

    gpus: int = 1
    """GPUs that train together."""
    data: Annotated[str | None, arg(metavar="SRC", help_behavior_hint="(default: --data.source)")] = None
    """Short for --data.source, as for train. Only a prepared dataset is looked at, for its vocabulary."""
    config: Annotated[TrainConfig, arg(name="")]


def plan(arguments: Sequence[str]) -> None:
    """Say what a run will need: memory by part, the micro-batch that fits, tokens/s and hours.

    A recipe's name or .toml file comes first, then its settings as for train. --device here (or auto, cpu, cuda) times this machine for
    some seconds; a GPU's name takes its data sheet: b200, h200, h100, h100-nvl, h100-pcie, a100-80, a100-40, l40s, a10, l4, v100-32,
    v100-16, t4, rtx4090, rtx3090.
    """
    config, rest = named_recipe(arguments)
    bare = "a recipe comes first (glassgpt plan RECIPE …), a value follows its option, a switch takes none"
    defaults = PlanOptions(config=config)
    options = parse_options(PlanOptions, "glassgpt plan [RECIPE]", description(plan), rest, default=defaults, bare=bare)
    from ..hardware import keep_freed_memory
    from ..plan import plan as plan_run

    keep_freed_memory()  # as training does: the timings are to be its
    config = options.config if options.data is None else options.config.override(data={"source": options.data})
    print(plan_run(config, options.gpus))


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """Options of `glassgpt bench`."""

    device: str = "auto"
    """auto, cpu, cuda, cuda:1."""
    json: Annotated[Path | None, arg(metavar="FILE")] = None
    """File to write the figures to as JSON."""


def bench(arguments: Sequence[str]) -> None:
    """Measure this machine: products, memory bandwidth, training and generation, each beside its limit (a minute or two)."""
    options = parse(BenchOptions, "bench", bench, arguments)
    if options.json is not None:
        require_json(options.json)
    import torch

    from ..bench import measure
    from ..hardware import device_name, find_device, keep_freed_memory

    keep_freed_memory()
    device = find_device(options.device)
    if device.type == "mps":
        raise UserError("bench measures CPUs and CUDA devices: give --device cpu")
    say(f"{device_name(device)}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    figures = []
    for figure in measure(device):
        say(str(figure))
        figures.append(figure)
    if options.json is not None:
        write_json(options.json, {"device": device_name(device), **{figure.name: figure.to_dict() for figure in figures}})
