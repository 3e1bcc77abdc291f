"""HellaSwag for `glassgpt eval`: both styles, resumable, and a table next to published scores."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from glassgpt.evaluation.baselines import PUBLISHED
from glassgpt.evaluation.hellaswag import evaluate_hellaswag, hash_model, results_name
from glassgpt.evaluation.hellaswag_items import STYLES, find_items, is_published, read_items, subset
from glassgpt.interop.references import LoadedModel
from glassgpt.utils.device import find_precision
from glassgpt.utils.download import cache_directory
from glassgpt.utils.errors import UserError

_DIVISORS = {"build-nanogpt": "token", "lm-eval": "character"}


def evaluate_both_styles(
    loaded: LoadedModel,
    path: Path | None,
    count: int | None,
    progress: Callable[[str, int, int], None] = lambda style, done, total: None,
) -> dict[str, Any]:
    """The figures of `summarize` by style, `items`, `precision`, and `published`: whether published scores compare.

    path: the items as a .jsonl file, by default downloaded. count: only this many of them (see `subset`). Scores are
    kept in the cache, and the next call continues there. `progress` is called with the style and the numbers of scored
    and of all items.
    """
    model, tokenizer, file = loaded.model, loaded.tokenizer, find_items(path)
    if tokenizer is None:
        raise UserError(f"{loaded.reference} has no tokenizer, so it cannot be evaluated on HellaSwag")
    items = read_items(file)
    chosen = items if count is None else subset(items, count)
    precision = find_precision("auto", model.embedding.weight.device)
    model_hash = hash_model(model)
    published = len(chosen) == len(items) and is_published(file)
    figures: dict[str, Any] = {"items": len(chosen), "published": published, "precision": precision}
    figures |= loaded.provenance
    for style in STYLES:

        def report(done: int, total: int, style: str = style) -> None:
            progress(style, done, total)

        results = cache_directory() / "hellaswag" / results_name(model_hash, tokenizer, chosen, style, precision)
        figures[style] = evaluate_hellaswag(
            model, tokenizer, chosen, style=style, precision=precision, results=results, progress=report
        )
    return figures


def hellaswag_table(figures: Mapping[str, Any]) -> str:
    """The figures with their standard errors, and published scores if the items are the same."""
    lines = [f"HellaSwag, {figures['items']:,} items       accuracy         normalised"]
    for style in STYLES:
        own = figures[style]
        plain, normalised = (f"{own[f'acc{s}']:7.2%} ±{own[f'stderr{s}']:6.2%}" for s in ("", "_norm"))
        lines.append(f"  {style + ' style':<26}{plain}  {normalised} by loss per {_DIVISORS[style]}")
        for row in PUBLISHED if figures["published"] else ():
            if row.style == style:
                accuracy = "" if row.acc is None else f"{row.acc:7.2%}"
                lines.append(f"    {row.model:<24}{accuracy:<16}  {row.acc_norm:7.2%}          ({row.source})")
        if own["near_ties"] or own["near_ties_norm"]:
            ties = f"{own['near_ties']} and {own['near_ties_norm']}"
            lines.append(f"    near ties: {ties} items whose two best endings differ by at most 1e-4")
        if own["cut"]:
            lines.append(f"    {own['cut']:,} items exceed the model's context and were cut on the left")
    if not figures["published"]:
        lines.append("  (not all items of the published file: do not compare with published scores)")
    return "\n".join(lines)
