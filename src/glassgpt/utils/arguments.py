"""Checks of the arguments of public functions against their annotations."""

import functools
import inspect
import os
import re
import types
from collections.abc import Callable
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar, get_args, get_origin

from glassgpt.utils.errors import UserError

P = ParamSpec("P")
R = TypeVar("R")
# What a parameter accepts if not just instances of its annotation: NumPy's numbers, too, and any truth value.
_ACCEPTED: dict[Any, Any] = {int: Integral, float: Real, bool: object, Path: os.PathLike, Any: object}
_REMEDIES = {"GPT": "; `model, tokenizer = glassgpt.load(...)`", "TrainConfig": "; use glassgpt.recipe('demo')"}


def check_arguments(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function: it raises `UserError` for an argument of another type than its parameter's annotation.

    Types of the items of a sequence are not checked. A wrong name and too many arguments stay Python's `TypeError`.
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
        return function(*arguments, **named)

    return checked


def _fits(value: Any, annotation: Any) -> bool:
    if annotation is inspect.Parameter.empty:
        return True
    if get_origin(annotation) is types.UnionType:
        return any(_fits(value, choice) for choice in get_args(annotation))
    if get_origin(annotation) is Literal:
        return value in get_args(annotation)
    kind = _ACCEPTED.get(annotation, get_origin(annotation) or annotation)
    return isinstance(getattr(value, "_orig_mod", value), kind)  # a model that `torch.compile` has wrapped
