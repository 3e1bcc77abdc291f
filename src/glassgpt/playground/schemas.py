"""Request bodies and parameters, validated before any work is done. `model` is a number in the catalog.

Unknown names, wrong types and numbers out of range are a `UserError`. The handlers check what depends on the model,
such as token ids.
"""

import inspect
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, make_dataclass
from typing import Any, Literal, TypeVar

from glassgpt.config.schema import SamplingConfig
from glassgpt.config.validation import StrictConfig, build
from glassgpt.utils.errors import UserError

MAX_TOKENS = 1024
MAX_SAMPLES = 8
MAX_NEW_TOKENS = 1024

LIMITS = {
    "ids": (1, MAX_TOKENS), "source": (1, MAX_TOKENS), "text": (1, 20_000), "edits": (0, 256), "watch": (0, 32),
    "k": (1, 200), "size": (1, 1024), "n": (1, MAX_SAMPLES), "max_new_tokens": (1, MAX_NEW_TOKENS),
    "temperature": (0, 100), "seed": (-(2**63), 2**64 - 1),
}  # fmt: skip
"""Least and most items of lists and characters of texts, least and greatest values of numbers."""


@dataclass(frozen=True, kw_only=True)
class LoginRequest(StrictConfig):
    token: str


@dataclass(frozen=True, kw_only=True)
class ModelRequest(StrictConfig):
    model: int
    step: int | None = None
    """Of a run's checkpoint; None is the newest."""


@dataclass(frozen=True, kw_only=True)
class EditRequest(StrictConfig):
    """A change inside the model, as `interpretability.Edit`."""

    section = "edits"

    kind: Literal["head", "attention", "feed_forward", "block", "position", "residual"]
    layer: int | None = None
    head: int | None = None
    position: int | None = None
    by: Literal["zero", "mean", "patch"] = "zero"


@dataclass(frozen=True, kw_only=True)
class CaptureRequest(ModelRequest):
    """The activations over a text, with edits; `source` is the text whose activations are patched in."""

    ids: list[int]
    edits: list[EditRequest] = field(default_factory=list)
    source: list[int] | None = None


@dataclass(frozen=True, kw_only=True)
class GenerateRequest(ModelRequest, SamplingConfig):
    ids: list[int]
    n: int = 1
    seed: int = 1337


R = TypeVar("R", bound=StrictConfig)


def schema_of(handler: Callable[..., Any]) -> type[ModelRequest]:
    """The schema of a handler's body: its parameters, in which `request` stands for the fields of `CaptureRequest`."""
    parameters = inspect.signature(handler).parameters
    base = CaptureRequest if "request" in parameters else ModelRequest
    own = [parameter for name, parameter in parameters.items() if name not in ("loaded", "request")]
    fields = [(p.name, p.annotation) if p.default is p.empty else (p.name, p.annotation, p.default) for p in own]
    return make_dataclass(f"{handler.__name__}_body", fields, bases=(base,), frozen=True, kw_only=True)


def parse_body(schema: type[R], body: bytes) -> R:
    """A request from a JSON body. Raises `UserError` for anything else."""
    try:
        values = json.loads(body.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"the body is not JSON in UTF-8: {error}") from None
    if not isinstance(values, Mapping):
        raise UserError("the body must be a JSON object")
    for name, value in values.items():
        # Before anything else looks at the items, of which a body can hold 100,000.
        limits = LIMITS.get(name, (0, MAX_TOKENS) if isinstance(value, list) else None)
        size = len(value) if isinstance(value, list | str) else value
        if limits and isinstance(size, int | float) and not limits[0] <= size <= limits[1]:
            verb, unit = (
                ("be", "") if size is value else ("have", " characters" if isinstance(value, str) else " items")
            )
            raise UserError(f"{name[:40]} must {verb} from {limits[0]:,} to {limits[1]:,}{unit}, got {size:,}")
    return build(schema, values)


def parse_query(parameters: list[tuple[str, str]], *names: str) -> list[int]:
    """The whole numbers that an address gives for these names. Raises `UserError` for anything else."""
    values = dict(parameters)
    is_complete = len(parameters) == len(names) and set(values) == set(names)
    if not is_complete or not all(re.fullmatch("[0-9]{1,18}", text) for text in values.values()):
        raise UserError(f"this address takes whole numbers as parameters: {', '.join(names)}")
    return [int(values[name]) for name in names]
