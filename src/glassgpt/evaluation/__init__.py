"""Evaluation: loss, perplexity and bits per byte of any text; HellaSwag."""

from glassgpt.evaluation.hellaswag import evaluate_hellaswag
from glassgpt.evaluation.perplexity import evaluate, evaluate_data, measure_stream

__all__ = ["evaluate", "evaluate_data", "evaluate_hellaswag", "measure_stream"]
