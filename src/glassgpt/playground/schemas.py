"""The format of requests, which are validated before any work is done, and of answers with arrays (`pack`).

Unknown names, wrong types and numbers out of range are a `UserError`. The handlers check token ids and the like.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, make_dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from torch import Tensor

from glassgpt.config.schema import SamplingConfig
from glassgpt.config.validation import StrictConfig
from glassgpt.interpretability.interventions import Edit
from glassgpt.utils.errors import UserError
from glassgpt.utils.files import json_text, parse_json

MAX_TOKENS = 1024
MAX_SAMPLES = 8
MAX_NEW_TOKENS = 1024

LIMITS = {
    "ids": (1, MAX_TOKENS), "source": (1, MAX_TOKENS), "text": (1, 20_000), "edits": (0, 256), "watch": (0, 32),
    "k": (1, 200), "size": (1, 1024), "n": (1, MAX_SAMPLES), "max_new_tokens": (1, MAX_NEW_TOKENS),
    "temperature": (0, 100), "seed": (-(2**63), 2**64 - 1),
}  # fmt: skip
"""Least and most items of lists and characters of texts, least and greatest values of numbers."""
SENT_AS = {"float64": "float32", "float16": "float32", "int64": "int32"}  # other dtypes are sent as they are


@dataclass(frozen=True, kw_only=True)
class LoginRequest(StrictConfig):
    token: str


@dataclass(frozen=True, kw_only=True)
class ModelRequest(StrictConfig):
    model: int  # number in the catalog
    step: int | None = None  # of a run's checkpoint; None is the newest


@dataclass(frozen=True, kw_only=True)
class CaptureRequest(ModelRequest):
    """The activations over a text, with edits; `source` is the text whose activations are patched in."""

    ids: list[int]
    edits: list[Edit] = field(default_factory=list)
    source: list[int] | None = None


@dataclass(frozen=True, kw_only=True)
class GenerateRequest(ModelRequest, SamplingConfig):
    ids: list[int]
    n: int = 1
    seed: int = 1337


R = TypeVar("R", bound=StrictConfig)


@functools.cache
def schema_of(handler: Callable[..., Any]) -> type[ModelRequest]:
    """The schema of a handler's body: its parameters, in which `request` stands for the fields of its annotation."""
    parameters = inspect.signature(handler).parameters
    base = parameters["request"].annotation if "request" in parameters else ModelRequest
    own = [parameter for name, parameter in parameters.items() if name not in ("loaded", "request")]
    fields = [(p.name, p.annotation) if p.default is p.empty else (p.name, p.annotation, p.default) for p in own]
    return make_dataclass(f"{handler.__name__}_body", fields, bases=(base,), frozen=True, kw_only=True)


def parse_body(schema: type[R], body: bytes) -> R:
    """A request from a JSON body. Raises `UserError` for anything else."""
    values = parse_json(body, "the body")
    if not isinstance(values, Mapping):
        raise UserError("the body must be a JSON object")
    for name, value in values.items():
        # Before anything else looks at the items, of which a body can hold 100,000.
        limits = LIMITS.get(name, (0, MAX_TOKENS) if isinstance(value, list) else None)
        size = len(value) if isinstance(value, list | str) else value
        if limits and isinstance(size, int | float) and not limits[0] <= size <= limits[1]:
            what = name[:40] if size is value else f"the length of {name[:40]}"
            raise UserError(f"{what} must be from {limits[0]:,} to {limits[1]:,}, got {size:,}")
    return schema.from_dict(values)


def pack(arrays: Mapping[str, Tensor | npt.NDArray[Any]], values: Mapping[str, Any]) -> bytes:
    """Arrays and plain values as one body, which the browser reads without parsing the numbers.

    uint32 length of the header; the header, JSON; zero bytes up to a multiple of 8; the arrays, each at a multiple of 8
    from the first. All little-endian, in C order. The header has the plain values and, under `arrays`, each array's
    dtype, shape and offset.
    """
    descriptions: dict[str, dict[str, Any]] = {}
    parts: list[bytes] = []
    for name, array in arrays.items():
        numbers = array.detach().cpu().numpy() if isinstance(array, Tensor) else array
        dtype = np.dtype(SENT_AS.get(numbers.dtype.name, numbers.dtype.name))
        assert dtype.name in ("float32", "int32", "uint16", "uint8"), dtype
        descriptions[name] = {"dtype": dtype.name, "shape": list(numbers.shape), "offset": sum(map(len, parts))}
        parts.append(_pad(np.asarray(numbers, dtype.newbyteorder("<")).tobytes()))
    header = json_text({**values, "arrays": descriptions}).encode()
    return b"".join([_pad(len(header).to_bytes(4, "little") + header), *parts])


def _pad(data: bytes) -> bytes:
    return data + bytes(-len(data) % 8)
