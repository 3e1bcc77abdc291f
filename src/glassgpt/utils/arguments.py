"""Checks of the arguments of public functions against their annotations."""

import functools
import inspect
import os
import re
import types
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar, get_args, get_origin

from glassgpt.utils.errors import UserError, shown

P = ParamSpec("P")
R = TypeVar("R")
# What a parameter accepts if not just instances of its annotation: NumPy's numbers, too, and any truth value.
_ACCEPTED: dict[Any, Any] = {int: Integral, float: Real, bool: object, Path: os.PathLike, Any: object}
# Valid integers of parameters with these names.
_RANGES = {"seed": (0, 2**63 - 1), "n": (1, 2**20), "k": (1, 2**20), "count": (1, 2**20), "size": (1, 2**20)}
_REMEDIES = {"GPT": "; `model, tokenizer = glassgpt.load(...)`", "TrainConfig": "; use glassgpt.recipe('demo')"}


def check_arguments(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function: it raises `UserError` for an argument of another type than its parameter's annotation.

    A text is not a sequence of texts, nor a truth value a number. Items that should be integers are not checked. A
    wrong name and too many arguments stay Python's `TypeError`.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def checked(*arguments: P.args, **named: P.kwargs) -> R:
        try:
            given = signature.bind(*arguments, **named).arguments
        except TypeError:
            return function(*arguments, **named)  # Python's own error names the function
        for name, value in given.items():
            parameter = signature.parameters[name]
            values = value if parameter.kind is parameter.VAR_POSITIONAL else [value]
            if parameter.kind is not parameter.VAR_KEYWORD and not all(_fits(v, parameter.annotation) for v in values):
                kind = re.sub(r"[a-z_]+\.", "", inspect.formatannotation(parameter.annotation))
                got = repr(value) if isinstance(value, str | int | float) else type(value).__name__
                raise UserError(f"{name} must be {kind}, got {got[:80]}{_REMEDIES.get(kind, '')}")
            low, high = _RANGES.get(name, (value, value))
            if isinstance(value, Integral) and not low <= value <= high:
                raise UserError(f"{name} must be at least {low:,} and at most {high:,}, got {shown(value)}")
        return function(*arguments, **named)

    return checked


def _fits(value: Any, annotation: Any) -> bool:
    if annotation is inspect.Parameter.empty:
        return True
    if get_origin(annotation) is types.UnionType:
        return any(_fits(value, choice) for choice in get_args(annotation))
    if get_origin(annotation) is Literal:
        return value in get_args(annotation)
    if get_origin(annotation) is Sequence and not isinstance(value, str | bytes):
        item = get_args(annotation)[0]
        return isinstance(value, Sequence) and (item is int or all(_fits(each, item) for each in value))
    if (isinstance(value, bool) and annotation in (int, float)) or get_origin(annotation) is Sequence:
        return False
    kind = _ACCEPTED.get(annotation, get_origin(annotation) or annotation)
    return isinstance(getattr(value, "_orig_mod", value), kind)  # a model that `torch.compile` has wrapped
