"""Request bodies and parameters, validated before any work is done. `model` is a number in the catalog.

Unknown names, wrong types and numbers out of range are a `UserError`. The handlers check what depends on the model,
such as token ids.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NoReturn, TypeVar

from glassgpt.config.schema import SamplingConfig
from glassgpt.config.validation import StrictConfig, build
from glassgpt.utils.errors import UserError

MAX_TOKENS = 1024
MAX_SAMPLES = 8
MAX_NEW_TOKENS = 1024

LENGTHS = {"ids": (1, MAX_TOKENS), "source": (1, MAX_TOKENS), "text": (1, 20_000), "edits": (0, 256), "watch": (0, 32)}
"""Least and most items of lists, and characters of texts."""
RANGES = {
    "k": (1, 200),
    "size": (1, 1024),
    "n": (1, MAX_SAMPLES),
    "max_new_tokens": (1, MAX_NEW_TOKENS),
    "temperature": (0, 100),
    "seed": (-(2**63), 2**64 - 1),
}
"""Least and greatest values of numbers."""


@dataclass(frozen=True, kw_only=True)
class LoginRequest(StrictConfig):
    token: str


@dataclass(frozen=True, kw_only=True)
class ModelRequest(StrictConfig):
    model: int
    step: int | None = None
    """Of a run's checkpoint; None is the newest."""


@dataclass(frozen=True, kw_only=True)
class EncodeRequest(ModelRequest):
    text: str


@dataclass(frozen=True, kw_only=True)
class TextRequest(ModelRequest):
    ids: list[int]


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
class CaptureRequest(TextRequest):
    """The activations over a text, with edits; `source` is the text whose activations are patched in."""

    edits: list[EditRequest] = field(default_factory=list)
    source: list[int] | None = None


@dataclass(frozen=True, kw_only=True)
class HeadRequest(CaptureRequest):
    layer: int
    head: int


@dataclass(frozen=True, kw_only=True)
class LensRequest(CaptureRequest):
    start: int
    stop: int
    k: int = 5
    watch: list[int] = field(default_factory=list)
    """Tokens whose probability and rank are wanted, too."""


@dataclass(frozen=True, kw_only=True)
class AttributionRequest(CaptureRequest):
    position: int
    token: int
    against: int | None = None


@dataclass(frozen=True, kw_only=True)
class NextRequest(CaptureRequest):
    position: int | None = None
    """None is the last one."""


@dataclass(frozen=True, kw_only=True)
class GenerateRequest(TextRequest, SamplingConfig):
    n: int = 1
    seed: int = 1337


@dataclass(frozen=True, kw_only=True)
class TableRequest(ModelRequest):
    table: Literal["embedding", "head", "positions"]


@dataclass(frozen=True, kw_only=True)
class NeighboursRequest(TableRequest):
    id: int
    k: int = 12


@dataclass(frozen=True, kw_only=True)
class WeightRequest(ModelRequest):
    name: str
    size: int = 256
    """Most rows and columns of its picture."""


R = TypeVar("R", bound=StrictConfig)


def parse_body(schema: type[R], body: bytes) -> R:
    """A request from a JSON body. Raises `UserError` for anything else."""
    try:
        values = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError:
        raise UserError("the body is not UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"the body is not JSON: {error}") from None
    if not isinstance(values, Mapping):
        raise UserError("the body must be a JSON object")
    for name, value in values.items():
        # Before anything else looks at the items, of which a body can hold 100,000.
        if isinstance(value, list) or (isinstance(value, str) and name in LENGTHS):
            least, most = LENGTHS.get(name, (0, MAX_TOKENS))
            unit = "characters" if isinstance(value, str) else "items"
            _require_range(f"{name[:40]} must have", len(value), least, most, f" {unit}")
        if isinstance(value, int | float) and name in RANGES:
            _require_range(f"{name} must be", value, *RANGES[name])
    return build(schema, values)


def parse_query(parameters: list[tuple[str, str]], *names: str) -> list[int]:
    """The whole numbers that an address gives for these names. Raises `UserError` for anything else."""
    values = dict(parameters)
    is_complete = len(parameters) == len(names) and set(values) == set(names)
    if not is_complete or not all(text.isascii() and text.isdigit() and len(text) <= 18 for text in values.values()):
        raise UserError(f"this address takes whole numbers as parameters: {', '.join(names)}")
    return [int(values[name]) for name in names]


def _require_range(what: str, value: float, least: float, most: float, unit: str = "") -> None:
    if not least <= value <= most:
        raise UserError(f"{what} from {least:,} to {most:,}{unit}, got {value:,}")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number")
