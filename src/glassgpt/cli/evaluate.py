"""eval, with its tables."""

import operator
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import FlagCreatePairsOff, arg

from glassgpt.cli.options import Reference, parse, require_json, say_aside, write_json
from glassgpt.utils.errors import UserError
from glassgpt.utils.formatting import one_line


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """Options of `glassgpt eval`."""

    reference: Reference
    data: Annotated[str | None, arg(metavar="SRC", help_behavior_hint="(default: what the run was trained on)")] = None
    """Text to evaluate on: any source that `prepare` takes, or a prepared dataset (its validation split)."""
    split: Annotated[
        Literal["validation", "train", "all"] | None,
        arg(help_behavior_hint="(default: validation; all for a text not trained on)"),
    ] = None
    """Which part of the text."""
    column: Annotated[str | None, arg(help_behavior_hint="(default: the run's)")] = None
    """Column of .parquet and .csv files, or key of .jsonl files, that holds the text."""
    encoding: Annotated[str | None, arg(help_behavior_hint="(default: the run's)")] = None
    """Encoding of text files."""
    errors: Annotated[Literal["strict", "replace", "ignore"] | None, arg(help_behavior_hint="(default: the run's)")] = (
        None
    )
    """What to do with bytes that are not valid in the encoding."""
    skip_bad: Annotated[FlagCreatePairsOff[bool], arg(help_behavior_hint="(default: as the run does)")] = False
    """Leave out rows that hold no text (null, a number, broken JSON) instead of stopping there."""
    hellaswag: FlagCreatePairsOff[bool] = False
    """Answer HellaSwag's questions too, in both published ways."""
    hellaswag_file: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="(default: downloaded once)")] = None
    """HellaSwag's items as a .jsonl file."""
    hellaswag_items: Annotated[int | None, arg(help_behavior_hint="(default: all)")] = None
    """Answer only so many of them."""
    json: Annotated[Path | None, arg(metavar="FILE")] = None
    """Write the figures to this file too, by place in the context and by document."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    quantize: Annotated[str | None, arg(metavar="int8", help_behavior_hint="(default: the weights as they are)")] = None
    """What the matrices rounded to 8 bits, as generate --quantize int8 has them, cost in loss."""


def evaluate(arguments: Sequence[str]) -> None:
    """Measure a model's loss on a text: the run's own validation split by default."""
    options = parse(EvalOptions, "eval", evaluate, arguments)
    if not options.hellaswag and (options.hellaswag_file is not None or options.hellaswag_items is not None):
        raise UserError("--hellaswag-file and --hellaswag-items go with --hellaswag: give that too")
    if options.hellaswag and options.quantize is not None:
        raise UserError("--quantize is for the loss on a text: leave it or --hellaswag out")
    from glassgpt.utils.device import keep_freed_memory

    keep_freed_memory()
    if options.json is not None:
        require_json(options.json)  # now, not after minutes of work
    if options.hellaswag:
        _require_items(options)  # likewise
    figures = _evaluate_text(options)
    if options.hellaswag:
        figures["hellaswag"] = _evaluate_hellaswag(options)
    if options.json is not None:
        write_json(options.json, figures)


def _evaluate_text(options: EvalOptions) -> dict[str, Any]:
    """Figures on a text, printed; none where HellaSwag is all that a model without a run of its own is asked."""
    from glassgpt import evaluation
    from glassgpt.interop.references import find_model
    from glassgpt.runs.checkpoint import Checkpoint

    if options.hellaswag and options.data is None and not isinstance(find_model(options.reference), Checkpoint):
        return {}
    figures = evaluation.evaluate(
        options.reference,
        source=options.data,
        split=options.split,
        column=options.column,
        encoding=options.encoding,
        errors=options.errors,
        skip_bad=options.skip_bad or None,
        documents=options.json is not None,
        device=options.device,
        quantize=options.quantize,
        log=say_aside,
    )
    print(_figures_table(figures))
    for name, details in figures.get("texts", {"": figures}).items():
        print((f"\n{name}" if name else "") + _details_table(details), flush=True)
    return figures


def _require_items(options: EvalOptions) -> None:
    """Raise `UserError` where HellaSwag's items are not to be had, or not so many were asked for as there can be."""
    from glassgpt.evaluation.hellaswag_items import find_items, read_items, subset

    subset(
        read_items(find_items(options.hellaswag_file)),
        1 if options.hellaswag_items is None else options.hellaswag_items,
    )


def _evaluate_hellaswag(options: EvalOptions) -> dict[str, Any]:
    """Figures on HellaSwag, printed."""
    from glassgpt.evaluation.hellaswag_run import hellaswag_of_reference, hellaswag_table

    said = time.monotonic()

    def progress(style: str, done: int, items: int) -> None:
        nonlocal said
        if time.monotonic() - said > 10:
            said = time.monotonic()
            say_aside(f"HellaSwag, {style}'s way: {done:,} of {items:,}")

    figures = hellaswag_of_reference(
        options.reference,
        path=options.hellaswag_file,
        count=options.hellaswag_items,
        device=options.device,
        progress=progress,
    )
    print(("" if options.data is None else "\n") + hellaswag_table(figures))
    return figures


def _figures_table(figures: Mapping[str, Any]) -> str:
    rows = (
        ("loss", f"{figures['loss']:.4f}", "nats a token"),
        ("perplexity", f"{figures['perplexity']:,.2f}", ""),
        ("bits per byte", f"{figures['bits_per_byte']:.4f}", ""),
        ("tokens", f"{figures['tokens']:,}", ""),
        *((name, f"{loss:.4f}", "nats a token") for name, loss in figures.get("losses", {}).items()),
    )
    return "\n".join(f"{name:<14}{value:>14} {unit}".rstrip() for name, value, unit in rows)


def _details_table(details: Mapping[str, Any]) -> str:
    """Loss by place in the context, in stretches that double, and the worst documents."""
    losses, tokens = details["loss_by_position"], details["tokens_by_position"]
    lines = ["", "loss by place in the context"]
    start = 1
    while start <= len(losses):
        end = min(2 * start - 1, len(losses))
        counts = tokens[start - 1 : end]
        loss = sum(map(operator.mul, losses[start - 1 : end], counts)) / sum(counts)
        lines.append(f"{start if start == end else f'{start} to {end}':<14}{loss:>14.4f}")
        start = end + 1
    if worst := details.get("worst_documents"):
        lines += ["", f"worst of {details['document_count']:,} documents, nats a token and bits a byte"]
        for document in worst:
            figures = f"{document['loss']:>14.4f} {document['bits_per_byte']:>7.3f}"
            lines.append(f"number {document['document']:<7}{figures}  {one_line(document['text'], 90)}")
    return "\n".join(lines)
