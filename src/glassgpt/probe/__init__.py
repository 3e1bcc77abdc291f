"""The glass: look inside a model, from outside its code."""

from .capture import AttentionPicture, LayerSeen, Seen, attention_picture, capture

__all__ = ["AttentionPicture", "LayerSeen", "Seen", "attention_picture", "capture"]
