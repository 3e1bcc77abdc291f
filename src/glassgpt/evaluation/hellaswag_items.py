"""HellaSwag's items (Zellers et al., 2019): a beginning and four endings, of which one is right. Read, downloaded, put into words.

Two published ways to put an item into words give two sets of scores, so each has its name here; see `Style`.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, Literal

from glassgpt.utils.download import cache_directory, download
from glassgpt.utils.errors import UserError, did_you_mean
from glassgpt.utils.files import explain_os_errors, sha256_of

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
SHA256 = "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"  # 12,246,618 bytes, 10,042 items

Style = Literal["build-nanogpt", "lm-eval"]
"""`build-nanogpt`: the texts as they are, the ending's tokens encoded by themselves, normalised by their number
(hellaswag.py of github.com/karpathy/build-nanogpt). `lm-eval`: WikiHow's markup taken out, the activity before the text, both
encoded together, normalised by the ending's characters (task `hellaswag` of github.com/EleutherAI/lm-evaluation-harness)."""
STYLES: tuple[Style, ...] = ("build-nanogpt", "lm-eval")


@dataclass(frozen=True)
class Item:
    """One item. `number` is its place in the file, from 0; `ctx_a` and `ctx_b` are whole sentences and the start of the next."""

    number: int
    activity_label: str
    ctx: str
    ctx_a: str
    ctx_b: str
    endings: tuple[str, ...]
    label: int


@dataclass(frozen=True)
class Wording:
    """What a model reads of an item: the context, the four continuations, and what a normalised score divides by.

    `together`: a continuation's tokens are those that it adds to the context's, else those that it has by itself.
    `characters` is None where a score is divided by the number of tokens.
    """

    context: str
    continuations: tuple[str, ...]
    together: bool
    characters: tuple[int, ...] | None


# ------------------------------------------------------------------------------------------------------------------ files


def find_items(path: str | Path | None = None) -> Path:
    """The file of that name, or the published validation file in glassgpt's cache, downloaded where it is missing."""
    if path is not None:
        return Path(path).expanduser()
    target = cache_directory() / "downloads" / "hellaswag_val.jsonl"
    manual = f"Without network: get that file on another machine and put it at {target}, or name it"
    return download(URL, target, SHA256, what="HellaSwag's validation items", manual=manual)


def is_published(path: Path) -> bool:
    """Whether the file is the published one, byte by byte: published figures are for its texts, markup included."""
    with explain_os_errors("read", path):
        return sha256_of(path) == SHA256


def read_items(path: Path) -> list[Item]:
    """All items of a file of JSON lines, in its order; empty lines are left out.

    The fields are those of the published file, of which `activity_label`, `ctx`, `endings` and `label` (also as "2", as the hub
    has it) must be there. Without `ctx_a` and `ctx_b` all of `ctx` is `ctx_a`. Raises `UserError`, naming file and line.
    """
    if not path.is_file():
        raise UserError(f"there is no file {path}; name HellaSwag's items as a .jsonl file")
    items: list[Item] = []
    with explain_os_errors("read", path):
        lines = path.read_bytes().split(b"\n")
    for line, text in enumerate(lines, start=1):
        if text.strip():
            try:
                items.append(_item(len(items), json.loads(text)))
            except RecursionError:
                raise UserError(f"{path}, line {line}: broken JSON (nested too deep)") from None
            except UserError as error:
                raise UserError(f"{path}, line {line}: {error}") from None
            except ValueError as error:  # also UnicodeDecodeError
                raise UserError(f"{path}, line {line}: broken JSON ({error})") from None
    if not items:
        raise UserError(f"{path} is empty; HellaSwag's validation file has 10,042 lines of JSON")
    return items


def _item(number: int, record: object) -> Item:
    if not isinstance(record, dict):
        raise UserError("an item is a JSON object with ctx, endings and label")
    needed = ("activity_label", "ctx", "endings", "label")
    if missing := [name for name in needed if name not in record]:
        raise UserError(f"no {' and no '.join(missing)}; an item of HellaSwag has {', '.join(needed)}")
    endings, label = record["endings"], record["label"]
    if not (isinstance(endings, list) and len(endings) == 4 and all(isinstance(e, str) and e.strip() for e in endings)):
        raise UserError("endings must be exactly four texts, none empty")
    if isinstance(label, bool) or label not in (0, 1, 2, 3, "0", "1", "2", "3"):
        raise UserError(
            f"label must be 0, 1, 2 or 3, the number of the right ending, got {label!r} (the test split has none)"
        )
    if not _text(record, "ctx").strip():
        raise UserError("ctx is empty")
    ctx_a, ctx_b = (
        (_text(record, "ctx_a"), _text(record, "ctx_b"))
        if "ctx_a" in record and "ctx_b" in record
        else (record["ctx"], "")
    )
    return Item(number, _text(record, "activity_label"), record["ctx"], ctx_a, ctx_b, tuple(endings), int(label))


def _text(record: Mapping[str, Any], name: str) -> str:
    value = record[name]
    if not isinstance(value, str):
        raise UserError(f"{name} must be text, got {value!r:.60}")
    return value


# --------------------------------------------------------------------------------------------------------------- choosing


def subset(items: Sequence[Item], count: int) -> list[Item]:
    """The first `count` items in the order of sha256("hellaswag NUMBER"), all of them where there are no more.

    A file begins with one kind of text (captions of videos) and ends with the other (WikiHow), so its first lines are no
    sample of it. This order is the same everywhere, and a smaller subset is the start of a larger one.
    """
    if count < 1:
        raise UserError(f"a subset of HellaSwag has at least one item, got {count}")
    return sorted(items, key=lambda item: hashlib.sha256(f"hellaswag {item.number}".encode()).digest())[:count]


def fingerprint(items: Sequence[Item]) -> str:
    """sha256 over all that the items say, and their order."""
    return hashlib.sha256(json.dumps([astuple(item) for item in items]).encode()).hexdigest()


# ---------------------------------------------------------------------------------------------------------------- wording


def as_build_nanogpt(item: Item) -> Wording:
    """The texts as they are: `ctx`, and each ending behind a space."""
    return Wording(item.ctx, tuple(f" {ending}" for ending in item.endings), together=False, characters=None)


def as_lm_eval(item: Item) -> Wording:
    """`activity: ctx_a Ctx_b`, and each ending behind a space, both without markup."""
    context = without_markup(f"{item.activity_label}: {item.ctx_a} {item.ctx_b.capitalize()}")
    endings = [without_markup(ending) for ending in item.endings]
    kept = context.rstrip()  # spaces at the end belong to the continuation, where tokenizers have them
    continuations = tuple(f"{context[len(kept) :]} {ending}" for ending in endings)
    return Wording(kept, continuations, together=True, characters=tuple(len(ending) for ending in endings))


def without_markup(text: str) -> str:
    """Text without WikiHow's `[header]`, `[title]`, `[step]` and `[substeps]`, and whatever else stands in brackets.

    In these very steps, though more than one space may stay: the scores of others were made with them.
    """
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


WORDINGS: dict[str, Callable[[Item], Wording]] = {"build-nanogpt": as_build_nanogpt, "lm-eval": as_lm_eval}


def wording_of(style: str) -> Callable[[Item], Wording]:
    """How a style puts an item into words. Raises `UserError` for another name."""
    if style not in WORDINGS:
        raise UserError(
            f"there is no way {style!r} to score HellaSwag{did_you_mean(style, WORDINGS)} (ways: {', '.join(WORDINGS)})"
        )
    return WORDINGS[style]
