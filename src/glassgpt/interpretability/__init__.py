"""The glass: look inside a model, from outside its code."""

from glassgpt.interpretability.capture import (
    ActivationCache,
    AttentionPicture,
    LayerActivations,
    attention_picture,
    capture,
)
from glassgpt.interpretability.head_scores import KINDS, head_kinds
from glassgpt.interpretability.interventions import Edit, Effects, edited, effects
from glassgpt.interpretability.logit_lens import (
    Attribution,
    Lens,
    Part,
    Predictions,
    logit_attribution,
    logit_lens,
    predictions,
)
from glassgpt.interpretability.weights import (
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
    "ActivationCache",
    "AttentionPicture",
    "Attribution",
    "Components",
    "Edit",
    "Effects",
    "Gradients",
    "LayerActivations",
    "Lens",
    "Neighbours",
    "ParameterNorms",
    "Part",
    "Predictions",
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
