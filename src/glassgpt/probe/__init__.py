"""The glass: look inside a model, from outside its code."""

from .intervention import Edit, Effects, edited, effects
from .kinds import KINDS, head_kinds
from .lens import Attribution, Lens, Part, Predictions, logit_attribution, logit_lens, predictions
from .seeing import AttentionPicture, LayerSeen, Seen, attention_picture, capture
from .weights import (
    Components,
    Gradients,
    Neighbours,
    ParameterNorms,
    Statistics,
    gradient_norms,
    nearest,
    picture,
    principal_components,
    singular_values,
    statistics,
    tables,
    weight_of,
)

__all__ = [
    "KINDS",
    "AttentionPicture",
    "Attribution",
    "Components",
    "Edit",
    "Effects",
    "Gradients",
    "LayerSeen",
    "Lens",
    "Neighbours",
    "ParameterNorms",
    "Part",
    "Predictions",
    "Seen",
    "Statistics",
    "attention_picture",
    "capture",
    "edited",
    "effects",
    "gradient_norms",
    "head_kinds",
    "logit_attribution",
    "logit_lens",
    "nearest",
    "picture",
    "predictions",
    "principal_components",
    "singular_values",
    "statistics",
    "tables",
    "weight_of",
]
