"""HellaSwag for a model reference: found, scored in both ways, gone on with where an earlier call was stopped, told in a table."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from glassgpt.evaluation.baselines import PUBLISHED
from glassgpt.evaluation.hellaswag import evaluate_hellaswag
from glassgpt.evaluation.hellaswag_items import STYLES, find_items, fingerprint, is_published, read_items, subset
from glassgpt.evaluation.hellaswag_results import Identity
from glassgpt.interop.references import load_source, read_reference
from glassgpt.utils.device import find_device, find_precision
from glassgpt.utils.download import cache_directory
from glassgpt.utils.errors import UserError

_NORMALISED = {"build-nanogpt": "a token", "lm-eval": "a character"}


def hellaswag_of_reference(
    reference: str | Path,
    *,
    path: str | Path | None = None,
    count: int | None = None,
    device: str = "auto",
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """The figures of a model reference on HellaSwag: those of `summarize` for each style, and `published`.

    path: the items as a .jsonl file, downloaded where left out. count: only that many of them (see `subset`). `published` tells
    whether these are all items of the published file, so that published figures compare. What was scored is kept in the cache by
    the model's weights: the next call goes on there. `progress` is told the style, the items done and all of them. Raises `UserError`.
    """
    target = find_device(device)
    file = find_items(path)
    items = read_items(file)
    model, tokenizer = read_reference(reference, lambda source: load_source(source, target))
    if tokenizer is None:
        raise UserError(f"{reference} has no tokenizer, so HellaSwag's texts cannot be put to it")
    chosen = items if count is None else subset(items, count)
    precision = find_precision("auto", target)
    figures: dict[str, Any] = {"items": len(chosen), "published": len(chosen) == len(items) and is_published(file)}
    for style in STYLES:
        identity = Identity.of(model, tokenizer, fingerprint(chosen), style, precision)
        key = hashlib.sha256(json.dumps(asdict(identity)).encode()).hexdigest()[:32]
        figures[style] = evaluate_hellaswag(
            model,
            tokenizer,
            chosen,
            style=style,
            precision=precision,
            results_path=cache_directory() / "hellaswag" / f"{key}.jsonl",
            progress=None
            if progress is None
            else lambda done, all_of_them, style=style: progress(style, done, all_of_them),  # type: ignore[misc]
        )
    return figures


def hellaswag_table(figures: Mapping[str, Any]) -> str:
    """The figures with their standard errors, and those published for GPT-2 beside them where the items are the same."""
    lines = [f"HellaSwag, {figures['items']:,} items       accuracy         normalised"]
    for style in STYLES:
        if style in figures:
            own = figures[style]
            plain, normalised = (f"{own[f'acc{s}']:7.2%} ±{own[f'stderr{s}']:6.2%}" for s in ("", "_norm"))
            lines.append(f"  {style + chr(39) + 's way':<26}{plain}  {normalised} by the loss {_NORMALISED[style]}")
            if figures["published"]:
                lines += [
                    f"    {row.model:<24}{'' if row.acc is None else f'{row.acc:7.2%}':<16}  {row.acc_norm:7.2%}          ({row.source})"
                    for row in PUBLISHED
                    if row.style == style
                ]
            if own["near_ties"] or own["near_ties_norm"]:
                lines.append(
                    f"    near ties: {own['near_ties']} and {own['near_ties_norm']} items whose best two endings lie within 1e-4"
                )
            if own["cut"]:
                lines.append(f"    {own['cut']:,} items are longer than the model's context and were cut from the left")
    if not figures["published"]:
        lines.append("  (not all items of the published file, so these are not comparable with published figures)")
    return "\n".join(lines)
