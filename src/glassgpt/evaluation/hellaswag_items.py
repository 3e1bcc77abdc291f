"""HellaSwag's items (Zellers et al., 2019), contexts with four endings, and the two published styles of their text."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from glassgpt.utils.download import cache_directory, download
from glassgpt.utils.errors import UserError
from glassgpt.utils.files import decoded, read_file, readable, sha256_of

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
SHA256 = "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"  # 12,246,618 bytes, 10,042 items

Style = Literal["build-nanogpt", "lm-eval"]
"""build-nanogpt (hellaswag.py of github.com/karpathy/build-nanogpt): texts unchanged, endings encoded alone, normalised
by tokens. lm-eval (task `hellaswag` of github.com/EleutherAI/lm-evaluation-harness): WikiHow's markup removed, the
activity before the text, context and ending encoded together, normalised by characters.
"""
STYLES: tuple[Style, ...] = ("build-nanogpt", "lm-eval")


class Published(NamedTuple):
    """The scores of a published model on all items; None: not published."""

    model: str
    style: str
    acc: float | None
    acc_norm: float
    source: str


_SCRIPT, _NOTEBOOK = "build-nanogpt, hellaswag.py", "build-nanogpt, play.ipynb"
PUBLISHED = (
    Published("GPT-2 124M", "build-nanogpt", 0.2859, 0.2955, _SCRIPT),
    Published("GPT-2 350M", "build-nanogpt", None, 0.375224, _NOTEBOOK),
    Published("GPT-2 774M", "build-nanogpt", None, 0.431986, _NOTEBOOK),
    Published("GPT-2 1558M", "build-nanogpt", 0.3842, 0.4893, _SCRIPT),
    Published("GPT-2 124M", "lm-eval", 0.2892, 0.3114, _SCRIPT),
    Published("GPT-2 1558M", "lm-eval", 0.4004, 0.5089, _SCRIPT),
    # Scored in OpenAI's own style; the notebook plots them next to build-nanogpt's.
    Published("GPT-3 124M", "GPT-3 paper", None, 0.337, _NOTEBOOK),
    Published("GPT-3 350M", "GPT-3 paper", None, 0.436, _NOTEBOOK),
    Published("GPT-3 774M", "GPT-3 paper", None, 0.510, _NOTEBOOK),
    Published("GPT-3 1558M", "GPT-3 paper", None, 0.547, _NOTEBOOK),
)


@dataclass(frozen=True)
class Item:
    """One item. `number`: its place in the file, from 0. `ctx_a`: whole sentences; `ctx_b`: start of the next one."""

    number: int
    activity_label: str
    ctx: str
    ctx_a: str
    ctx_b: str
    endings: tuple[str, ...]
    label: int


def find_items(path: str | Path | None = None) -> Path:
    """The given file, or the published validation file, downloaded to the cache once."""
    if path is not None:
        return Path(path).expanduser()
    target = cache_directory() / "downloads" / "hellaswag_val.jsonl"
    manual = f"Without network: download that file on another machine and copy it to {target}, or pass its path"
    return download(URL, target, SHA256, what="HellaSwag's validation items", manual=manual)


def read_items(path: Path) -> list[Item]:
    """All items of a JSON lines file with the published file's fields. Raises `UserError` with the first wrong line."""
    with readable(path):
        lines = decoded(read_file(path), str(path)).split("\n")
    items: list[Item] = []
    for line, text in enumerate(lines, start=1):
        try:
            if text.strip():
                items.append(_item(len(items), json.loads(text)))
        except (ValueError, RecursionError) as error:
            reason = error if isinstance(error, UserError) else f"broken JSON ({error})"
            raise UserError(f"{path}, line {line}: {reason}") from None
    if not items:
        raise UserError(f"{path} is empty; HellaSwag's validation file has 10,042 lines of JSON")
    return items


def load_items(path: str | Path | None, count: int | None = None) -> tuple[list[Item], bool]:
    """All items of a file (see `find_items`), or a `subset`; and whether these are all of the published ones."""
    file = find_items(path)
    items = read_items(file)
    chosen = items if count is None else subset(items, count)
    return chosen, len(chosen) == len(items) and sha256_of(file) == SHA256


def _item(number: int, record: Any) -> Item:
    needed = ("activity_label", "ctx", "endings", "label")
    if not isinstance(record, dict) or not record.keys() >= set(needed):
        raise UserError(f"an item must be a JSON object with {', '.join(needed)}")
    texts = {name: record[name] for name in ("activity_label", "ctx")}
    has_parts = "ctx_a" in record and "ctx_b" in record  # otherwise all of `ctx` is `ctx_a`
    texts |= {"ctx_a": record["ctx_a" if has_parts else "ctx"], "ctx_b": record["ctx_b"] if has_parts else ""}
    for name, text in texts.items():
        if not isinstance(text, str) or (name == "ctx" and not text.strip()):
            raise UserError(f"{name} must be text, got {text!r:.60}")
    endings, label = record["endings"], record["label"]
    if not (isinstance(endings, list) and len(endings) == 4 and all(isinstance(e, str) and e.strip() for e in endings)):
        raise UserError("endings must be exactly four texts, none of them empty")
    if isinstance(label, bool) or label not in (0, 1, 2, 3, "0", "1", "2", "3"):  # text on the hub
        raise UserError(f"label must be 0, 1, 2 or 3, the number of the right ending, got {label!r}")
    return Item(number=number, **texts, endings=tuple(endings), label=int(label))


def subset(items: Sequence[Item], count: int) -> list[Item]:
    """The first `count` items, or all, in the order of sha256("hellaswag NUMBER").

    The file starts with captions of videos and ends with WikiHow, so its first lines are not a sample of it. This order
    is the same on every machine, and a smaller subset is the start of a larger one.
    """
    if count < 1:
        raise UserError(f"a subset of HellaSwag needs at least one item, got {count}")
    return sorted(items, key=lambda item: hashlib.sha256(f"hellaswag {item.number}".encode()).digest())[:count]


def fingerprint(items: Sequence[Item]) -> str:
    """sha256 of the items' contents and order."""
    return hashlib.sha256(json.dumps([astuple(item) for item in items]).encode()).hexdigest()


def prompt_of(item: Item, style: Style) -> tuple[str, list[str], list[int]]:
    """The item's context and endings in a style, and for lm-eval the characters of each ending, which normalise."""
    if style == "build-nanogpt":
        return item.ctx, [f" {ending}" for ending in item.endings], []
    text = without_markup(f"{item.activity_label}: {item.ctx_a} {item.ctx_b.capitalize()}")
    context = text.rstrip()  # spaces at the end move to the ending, since tokens begin with them
    cleaned = [without_markup(ending) for ending in item.endings]
    return context, [f"{text[len(context) :]} {ending}" for ending in cleaned], list(map(len, cleaned))


def without_markup(text: str) -> str:
    """Text without WikiHow's bracketed markup, by lm-eval's exact steps, with which published scores were computed."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")
