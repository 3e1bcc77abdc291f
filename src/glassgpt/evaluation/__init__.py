"""Evaluation: loss, perplexity and bits per byte of any text; HellaSwag."""

from glassgpt.evaluation.hellaswag import evaluate_hellaswag
from glassgpt.evaluation.perplexity import evaluate_data, evaluate_reference, measure_stream

__all__ = ["evaluate_data", "evaluate_hellaswag", "evaluate_reference", "measure_stream"]
