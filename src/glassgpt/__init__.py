"""glassgpt: train GPT-2-class language models from any text, evaluate them, generate with them, and look inside them.

Train, load and generate:

    import glassgpt as g
    run = g.train(g.recipe("demo"))
    model, tokenizer = g.load(run)
    for token in g.generate(model, tokenizer, "The "):
        print(token, end="")
"""

import importlib
from typing import TYPE_CHECKING, Any

from glassgpt.utils.openmp import limit_spinning

if TYPE_CHECKING:
    from glassgpt.config.model import ModelConfig as ModelConfig
    from glassgpt.config.recipes import recipe as recipe
    from glassgpt.config.recipes import recipe_names as recipe_names
    from glassgpt.config.schema import DataConfig as DataConfig
    from glassgpt.config.schema import OptimConfig as OptimConfig
    from glassgpt.config.schema import ProbeConfig as ProbeConfig
    from glassgpt.config.schema import SampleConfig as SampleConfig
    from glassgpt.config.schema import TrainConfig as TrainConfig
    from glassgpt.evaluation.perplexity import evaluate as evaluate
    from glassgpt.generation.generate import GeneratedToken as GeneratedToken
    from glassgpt.generation.generate import generate as generate
    from glassgpt.generation.inference import quantize as quantize
    from glassgpt.interop.references import export as export
    from glassgpt.interop.references import load as load
    from glassgpt.interpretability.capture import capture as capture
    from glassgpt.model.gpt import GPT as GPT
    from glassgpt.report.page import write_report as write_report
    from glassgpt.training.run import resume as resume
    from glassgpt.training.run import train as train
    from glassgpt.utils.errors import UserError as UserError

# Names are imported on first use: importing torch takes 1.6 s, and `glassgpt --help` does not need it.
_NAMES_BY_MODULE = {
    "config.model": ("ModelConfig",),
    "config.recipes": ("recipe", "recipe_names"),
    "config.schema": ("DataConfig", "OptimConfig", "ProbeConfig", "SampleConfig", "TrainConfig"),
    "evaluation.perplexity": ("evaluate",),
    "generation.generate": ("GeneratedToken", "generate"),
    "generation.inference": ("quantize",),
    "interop.references": ("export", "load"),
    "interpretability.capture": ("capture",),
    "model.gpt": ("GPT",),
    "report.page": ("write_report",),
    "training.run": ("resume", "train"),
    "utils.errors": ("UserError",),
}
__all__ = sorted(name for names in _NAMES_BY_MODULE.values() for name in names)


def __getattr__(name: str) -> Any:
    if name in ("train", "resume"):
        limit_spinning()  # before the import below loads torch
    for module, names in _NAMES_BY_MODULE.items():
        if name in names:
            return getattr(importlib.import_module(f".{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
