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
    from glassgpt.config.model import ModelConfig
    from glassgpt.config.recipes import recipe, recipe_names
    from glassgpt.config.schema import DataConfig, OptimConfig, ProbeConfig, SampleConfig, TrainConfig
    from glassgpt.evaluation.perplexity import evaluate
    from glassgpt.generation.generate import GeneratedToken, generate
    from glassgpt.generation.inference import quantize
    from glassgpt.interop.references import export, load
    from glassgpt.interpretability.capture import capture
    from glassgpt.model.gpt import GPT
    from glassgpt.report.page import write_report
    from glassgpt.training.run import resume, train
    from glassgpt.utils.errors import UserError

__all__ = [
    "GPT",
    "DataConfig",
    "GeneratedToken",
    "ModelConfig",
    "OptimConfig",
    "ProbeConfig",
    "SampleConfig",
    "TrainConfig",
    "UserError",
    "capture",
    "evaluate",
    "export",
    "generate",
    "load",
    "quantize",
    "recipe",
    "recipe_names",
    "resume",
    "train",
    "write_report",
]

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


def __getattr__(name: str) -> Any:
    if name in ("train", "resume"):
        limit_spinning()  # before the import below loads torch
    for module, names in _NAMES_BY_MODULE.items():
        if name in names:
            return getattr(importlib.import_module(f".{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
