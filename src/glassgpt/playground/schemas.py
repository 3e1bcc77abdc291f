"""What a page may ask, checked before anything is done for it: unknown names, wrong types and numbers out of range are a `UserError`.

Nothing in a question is a path. What depends on the model (its ids, layers, heads) is checked where the model is at hand.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn, TypeVar

from glassgpt.config.validation import StrictConfig, build
from glassgpt.utils.errors import UserError

MOST_TOKENS = 1024
"""Tokens of a text."""
MOST_LISTED = MOST_TOKENS
"""Items of any list, looked at before the items themselves are."""
MOST_CHARACTERS = 20_000
"""Characters of a text that is to be cut into tokens."""
MOST_MERGED = 64
"""Characters whose merges are shown."""
MOST_SAMPLES = 8
MOST_NEW_TOKENS = 1024
MOST_EDITS = 256
MOST_WATCHED = 32
MOST_EXPECTED = 50
MOST_NEIGHBOURS = 200
MOST_CELLS = 1024
"""Rows, or columns, of a picture."""


@dataclass(frozen=True, kw_only=True)
class LoginRequest(StrictConfig):
    """The token, to be exchanged for a cookie."""

    token: str

    @classmethod
    def name_of(cls, field_name: str) -> str:
        return field_name


@dataclass(frozen=True, kw_only=True)
class RunQuestion(StrictConfig):
    """What every question names: a run or a model, by the number of its offer."""

    model: int

    @classmethod
    def name_of(cls, field_name: str) -> str:
        return field_name

    def within(self, name: str, lowest: float, highest: float) -> None:
        """Raise `UserError` unless a number, where there is one, is in a range."""
        value = getattr(self, name)
        self.require(name, value is None or lowest <= value <= highest, f"from {lowest:g} to {highest:g}")

    def not_longer(self, name: str, most: int, what: str) -> None:
        """Raise `UserError` for a list or text that is too long, without repeating it."""
        length = len(getattr(self, name) or ())
        if length > most:
            raise UserError(f"{name} has {length:,} {what}, and {most:,} are the most")


@dataclass(frozen=True, kw_only=True)
class Question(RunQuestion):
    """A question about a model: of a run, that of one of its steps, None for the newest."""

    step: int | None = None


@dataclass(frozen=True, kw_only=True)
class TextQuestion(Question):
    """A question of what a model makes of token ids."""

    ids: list[int]

    def check(self) -> None:
        if not self.ids:
            raise UserError("ids is empty: the model needs at least one token")
        self.not_longer("ids", MOST_TOKENS, "tokens")


@dataclass(frozen=True, kw_only=True)
class EditChoice(StrictConfig):
    """A part of the model to change: as in `probe.intervention`."""

    kind: Literal["head", "attention", "feed_forward", "block", "position", "residual"]
    layer: int | None = None
    head: int | None = None
    position: int | None = None
    by: Literal["zero", "mean", "patch"] = "zero"

    @classmethod
    def name_of(cls, field_name: str) -> str:
        return f"edits.{field_name}"


@dataclass(frozen=True, kw_only=True)
class SeenQuestion(TextQuestion):
    """What a model computes over a text, with parts of it changed; `source` is the text whose values are patched in."""

    edits: list[EditChoice] = field(default_factory=list)
    source: list[int] | None = None

    def check(self) -> None:
        super().check()
        self.not_longer("edits", MOST_EDITS, "edits")
        self.not_longer("source", MOST_TOKENS, "tokens")
        if self.source is not None and not self.source:
            raise UserError("source is empty: leave it out where nothing is patched in")


@dataclass(frozen=True, kw_only=True)
class HeadQuestion(SeenQuestion):
    layer: int
    head: int


@dataclass(frozen=True, kw_only=True)
class LensQuestion(SeenQuestion):
    start: int
    stop: int
    k: int = 5
    watch: list[int] = field(default_factory=list)

    def check(self) -> None:
        super().check()
        self.within("k", 1, MOST_EXPECTED)
        self.not_longer("watch", MOST_WATCHED, "ids")


@dataclass(frozen=True, kw_only=True)
class AttributionQuestion(SeenQuestion):
    position: int
    token: int
    against: int | None = None


@dataclass(frozen=True, kw_only=True)
class NextQuestion(SeenQuestion):
    position: int | None = None


@dataclass(frozen=True, kw_only=True)
class CutQuestion(Question):
    """A text to be cut into tokens."""

    text: str

    def check(self) -> None:
        if not self.text:
            raise UserError("the text is empty: write something")
        self.not_longer("text", MOST_CHARACTERS, "characters")


@dataclass(frozen=True, kw_only=True)
class MergesQuestion(CutQuestion):
    def check(self) -> None:
        super().check()
        self.not_longer("text", MOST_MERGED, "characters")


@dataclass(frozen=True, kw_only=True)
class WriteQuestion(TextQuestion):
    """How to continue a text: as `glassgpt generate`, which checks what depends on the model."""

    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    n: int = 1
    seed: int = 1337
    max_new_tokens: int = 256

    def check(self) -> None:
        super().check()
        self.within("temperature", 0, 100)
        self.within("n", 1, MOST_SAMPLES)
        self.within("seed", -(2**63), 2**64)
        self.within("max_new_tokens", 1, MOST_NEW_TOKENS)


@dataclass(frozen=True, kw_only=True)
class TableQuestion(Question):
    table: Literal["embedding", "head", "positions"]


@dataclass(frozen=True, kw_only=True)
class NearQuestion(TableQuestion):
    id: int
    k: int = 12

    def check(self) -> None:
        self.within("k", 1, MOST_NEIGHBOURS)


@dataclass(frozen=True, kw_only=True)
class WeightQuestion(Question):
    name: str


@dataclass(frozen=True, kw_only=True)
class PictureQuestion(WeightQuestion):
    size: int = 256

    def check(self) -> None:
        self.within("size", 1, MOST_CELLS)


@dataclass(frozen=True, kw_only=True)
class SnapshotQuestion(RunQuestion):
    step: int


Q = TypeVar("Q", bound=StrictConfig)


def read_question(question: type[Q], body: bytes) -> Q:
    """A question from a request's body, JSON in UTF-8. Raises `UserError` for anything else."""
    try:
        values = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError:
        raise UserError("the body is not UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"the body is no JSON: {error}") from None
    if not isinstance(values, Mapping):
        raise UserError("the body must be a JSON object")
    for name, value in values.items():
        if isinstance(value, list) and len(value) > MOST_LISTED:
            raise UserError(f"{name[:40]} has {len(value):,} items, and {MOST_LISTED:,} are the most")
    return build(question, values)


def read_parameters(question: type[Q], parameters: list[tuple[str, str]]) -> Q:
    """A question from an address's parameters, whole numbers all of them, each given once. Raises `UserError` for anything else."""
    values: dict[str, Any] = {}
    for name, text in parameters:
        if name in values:
            raise UserError(f"{name} is given twice")
        if not (text.isascii() and text.isdigit() and len(text) <= 18):
            raise UserError(f"{name} must be a whole number")
        values[name] = int(text)
    return build(question, values)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")
