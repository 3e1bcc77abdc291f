"""plan and bench: what a run will need, and what this machine gives."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from glassgpt.cli.options import Command, require_json, say, write_json
from glassgpt.cli.train import RecipeCommand
from glassgpt.utils.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Plan(RecipeCommand):
    """Estimate what a run needs: memory by component, the micro-batch that fits, tokens/s and hours.

    Takes a recipe's name or .toml file and the options of train. Nothing is written, and no text is read. --device here
    (or auto, cpu, cuda) measures this machine for some seconds to a minute. The name of a GPU uses its data sheet:
    b200, h200, h100, h100-nvl, h100-pcie, a100-80, a100-40, l40s, a10, l4, v100-32, v100-16, t4, rtx4090, rtx3090.
    """

    gpus: int = 1  # Number of GPUs that train together.

    def run(self) -> None:
        if self.resume is not None:
            raise UserError("plan estimates new runs; pass a recipe, or the config.toml of a run, instead of --resume")
        from glassgpt.planning.plan import plan
        from glassgpt.utils.device import keep_freed_memory

        keep_freed_memory()  # as training does, so that the measured times are those of training
        print(plan(self.config, self.gpus))


@dataclass(frozen=True, kw_only=True)
class Bench(Command):
    """Measure this machine: matrix products, memory bandwidth, training and generation, each with its limit."""

    device: str = "auto"  # auto, cpu, cuda, cuda:1.
    json: Annotated[Path | None, arg(metavar="FILE")] = None  # File to write the figures to as JSON.

    def run(self) -> None:
        require_json(self.json)
        import torch

        from glassgpt.planning.benchmark import measure
        from glassgpt.utils.device import device_name, find_device, keep_freed_memory

        keep_freed_memory()
        device = find_device(self.device)
        if device.type == "mps":
            raise UserError("bench measures CPUs and CUDA devices; use --device cpu")
        say(f"{device_name(device)}, {torch.get_num_threads()} threads, torch {torch.__version__}")
        figures = {}
        for figure in measure(device):
            say(str(figure))
            figures[figure.name] = figure.to_dict()
        write_json(self.json, {"device": device_name(device), **figures})
