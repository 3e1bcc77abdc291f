"""glassgpt: train GPT-2-class language models from any text, evaluate them, write with them.

The whole of it in a few lines:

    import glassgpt as g
    run = g.train(g.recipe("demo"))
    model, tokenizer = g.load(run)
    for piece in g.generate(model, tokenizer, "The "):
        print(piece, end="")
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import DataConfig, ModelConfig, OptimConfig, ProbeConfig, SampleConfig, TrainConfig, recipe, recipe_names
    from .errors import UserError
    from .evaluate import evaluate_reference
    from .generation import Piece, generate
    from .model import GPT
    from .probe import capture
    from .reference import export, load
    from .report import write_report
    from .training import resume, train
    from .writing import quantized

__all__ = [
    "GPT",
    "DataConfig",
    "ModelConfig",
    "OptimConfig",
    "Piece",
    "ProbeConfig",
    "SampleConfig",
    "TrainConfig",
    "UserError",
    "capture",
    "evaluate_reference",
    "export",
    "generate",
    "load",
    "quantized",
    "recipe",
    "recipe_names",
    "resume",
    "train",
    "write_report",
]

# Where each name lives. Loaded when first asked for, since torch takes 1.6 s and `glassgpt --help` does not need it.
_HOMES = {
    "GPT": "model",
    "DataConfig": "config",
    "ModelConfig": "config",
    "OptimConfig": "config",
    "Piece": "generation",
    "ProbeConfig": "config",
    "SampleConfig": "config",
    "TrainConfig": "config",
    "UserError": "errors",
    "capture": "probe",
    "evaluate_reference": "evaluate",
    "export": "reference",
    "generate": "generation",
    "load": "reference",
    "quantized": "writing",
    "recipe": "config",
    "recipe_names": "config",
    "resume": "training",
    "train": "training",
    "write_report": "report",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
