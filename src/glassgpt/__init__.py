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
    from glassgpt.config.model import ModelConfig
    from glassgpt.config.recipes import recipe, recipe_names
    from glassgpt.config.schema import DataConfig, OptimConfig, ProbeConfig, SampleConfig, TrainConfig
    from glassgpt.evaluation import evaluate_reference
    from glassgpt.generation.generate import Piece, generate
    from glassgpt.generation.inference import quantized
    from glassgpt.interop.references import export, load
    from glassgpt.interpretability import capture
    from glassgpt.model.gpt import GPT
    from glassgpt.report import write_report
    from glassgpt.training.loop import resume, train
    from glassgpt.utils.errors import UserError

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

# Where each name lives. Names load on first use: importing torch takes 1.6 s, and `glassgpt --help` does not need it.
_HOMES = {
    "GPT": "model.gpt",
    "DataConfig": "config.schema",
    "ModelConfig": "config.model",
    "OptimConfig": "config.schema",
    "Piece": "generation.generate",
    "ProbeConfig": "config.schema",
    "SampleConfig": "config.schema",
    "TrainConfig": "config.schema",
    "UserError": "utils.errors",
    "capture": "interpretability",
    "evaluate_reference": "evaluation",
    "export": "interop.references",
    "generate": "generation.generate",
    "load": "interop.references",
    "quantized": "generation.inference",
    "recipe": "config.recipes",
    "recipe_names": "config.recipes",
    "resume": "training.loop",
    "train": "training.loop",
    "write_report": "report",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
