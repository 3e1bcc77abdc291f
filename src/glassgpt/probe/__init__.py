"""The glass: look inside a model, from outside its code."""

from .capture import AttentionPicture, LayerSeen, Seen, attention_picture, capture
from .head_kinds import KINDS, head_kinds
from .lens import Attribution, Lens, Part, Predictions, logit_attribution, logit_lens, predictions

__all__ = [
    "KINDS",
    "AttentionPicture",
    "Attribution",
    "LayerSeen",
    "Lens",
    "Part",
    "Predictions",
    "Seen",
    "attention_picture",
    "capture",
    "head_kinds",
    "logit_attribution",
    "logit_lens",
    "predictions",
]
