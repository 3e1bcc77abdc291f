"""eval with its tables, and bench: what a model and this machine reach."""

import operator
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from glassgpt.cli.options import Command, File, Flag, Reference, default, require_json, say, say_aside, write_json
from glassgpt.config.validation import Length, PositiveCount
from glassgpt.utils.errors import UserError
from glassgpt.utils.formatting import ProgressLine, one_line

if TYPE_CHECKING:
    from glassgpt.interop.references import LoadedModel


class Evaluate(Command):
    """Measure a model's loss on a text: by default the run's own validation split."""

    reference: Reference
    # Text to evaluate on: any source that `prepare` takes, or a prepared dataset (its validation split).
    data: Annotated[str | None, default("the run's data", "SRC")] = None
    # Part of the text.
    split: Annotated[Literal["validation", "train", "all"] | None, default("validation; all of unprepared text")] = None
    # Column of .parquet and .csv files, or key of JSON lines, that holds the text.
    column: Annotated[str | None, default("the run's")] = None
    encoding: Annotated[str | None, default("the run's")] = None  # Encoding of text files.
    # Handling of bytes that are not valid in the encoding: refuse them, replace each by U+FFFD, or leave them out.
    errors: Annotated[Literal["strict", "replace", "ignore"] | None, default("the run's")] = None
    # Leave out rows without text (null, a number, broken JSON) instead of stopping there.
    skip_bad: Annotated[Flag, default("the run's")] = False
    delimiter: Annotated[str | None, default("the run's")] = None  # Character between the fields of .csv files.
    split_on: Annotated[str | None, default("the run's", "TEXT")] = None  # Text between the documents of a text file.
    context_length: Annotated[Length[int | None], default("the model's")] = None  # Tokens per window of text.
    hellaswag: Flag = False  # Also evaluate HellaSwag in both published styles.
    # HellaSwag's items as a .jsonl file.
    hellaswag_file: Annotated[Path | None, default("downloaded once", "FILE")] = None
    hellaswag_items: Annotated[PositiveCount[int | None], default("all")] = None  # Number of items to evaluate.
    json: File = None  # Also write the figures to this file, by position in the context and by document.
    token_losses: Flag = False  # With --json: also write the id and the loss of every predicted token.
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps.
    # Measure the loss with weights rounded to 8 bits, as generate --quantize int8 uses them.
    quantize: Annotated[str | None, default("none", "int8")] = None

    def run(self) -> None:
        if not self.hellaswag and (self.hellaswag_file is not None or self.hellaswag_items is not None):
            raise UserError("--hellaswag-file and --hellaswag-items need --hellaswag")
        if self.hellaswag and self.quantize is not None:
            raise UserError("--quantize measures the loss on text only; remove it or --hellaswag")
        if self.token_losses and self.json is None:
            raise UserError("--token-losses needs --json FILE")
        from glassgpt.evaluation.hellaswag import evaluate_both_styles
        from glassgpt.evaluation.hellaswag_items import load_items
        from glassgpt.generation.inference import device_for
        from glassgpt.interop.references import load_model
        from glassgpt.utils.device import find_device, keep_freed_memory

        keep_freed_memory()
        # Errors that need no model are reported before minutes of work.
        require_json(self.json)
        chosen = load_items(self.hellaswag_file, self.hellaswag_items) if self.hellaswag else None
        loaded = load_model(self.reference, find_device(device_for(self.quantize, self.device)))
        figures: dict[str, Any] = {}
        if not self.hellaswag or self.data is not None or loaded.config is not None:
            figures = self._evaluate_text(loaded)
        if chosen is not None:
            line = ProgressLine(say_aside, interval=10.0)

            def progress(style: str, done: int, total: int) -> None:
                line.update(f"HellaSwag, {style} style: {done:,} of {total:,}")

            figures["hellaswag"] = evaluate_both_styles(loaded, *chosen, progress)
            print("\n" + _hellaswag_table(figures["hellaswag"]))
        write_json(self.json, figures)

    def _evaluate_text(self, loaded: "LoadedModel") -> dict[str, Any]:
        from glassgpt.evaluation.perplexity import evaluate

        same = ("split", "column", "encoding", "errors", "delimiter", "split_on", "context_length", "quantize")
        settings: dict[str, Any] = {name: getattr(self, name) for name in same}
        settings |= {"source": self.data, "skip_bad": self.skip_bad or None}
        settings |= {"documents": self.json is not None, "tokens": self.token_losses}
        figures = evaluate(loaded, **settings, log=say_aside)
        print(_figures_table(figures))
        for name, details in figures.get("texts", {"": figures}).items():
            print((f"\n{name}" if name else "") + _details_table(details), flush=True)
        return figures


class Bench(Command):
    """Measure this machine: matrix products, memory bandwidth, training and generation, each with its limit."""

    device: str = "auto"  # auto, cpu, cuda, cuda:1.
    json: File = None  # File to write the figures to as JSON.

    def run(self) -> None:
        require_json(self.json)
        import torch

        from glassgpt.planning.benchmark import measure
        from glassgpt.utils.device import device_name, find_device, keep_freed_memory

        keep_freed_memory()
        device = find_device(self.device)
        if device.type == "mps":
            raise UserError("bench measures CPUs and CUDA devices; use --device cpu")
        say(f"{device_name(device)}, {torch.get_num_threads()} threads, torch {torch.__version__}")
        figures = {}
        for figure in measure(device):
            say(str(figure))
            figures[figure.name] = figure.to_dict()
        write_json(self.json, {"device": device_name(device), **figures})


def _figures_table(figures: Mapping[str, Any]) -> str:
    rows = (
        ("loss", f"{figures['loss']:.4f}", "nats per token"),
        ("perplexity", f"{figures['perplexity']:,.2f}", ""),
        ("bits per byte", f"{figures['bits_per_byte']:.4f}", ""),
        ("tokens", f"{figures['tokens']:,}", ""),
        *((name, f"{loss:.4f}", "nats per token") for name, loss in figures.get("losses", {}).items()),
    )
    step = "" if figures["step"] is None else f", step {figures['step']:,}"
    model = f"{figures['model']}{step}, {figures['quantization'] or figures['precision']}"
    text = f"{figures['data']}, {figures['split']}, windows of {figures['context_length']:,} tokens"
    table = [f"{name:<14}{value:>14} {unit}".rstrip() for name, value, unit in rows]
    return "\n".join([*table, f"model         {model}", f"data          {text}"])


def _details_table(details: Mapping[str, Any]) -> str:
    """Loss by position in the context, in ranges that double, and the documents with the highest loss."""
    losses, tokens = details["loss_by_position"], details["tokens_by_position"]
    lines = ["", "loss by position in the context"]
    for start in (2**power for power in range(len(losses).bit_length())):
        end = min(2 * start - 1, len(losses))
        counts = tokens[start - 1 : end]
        loss = sum(map(operator.mul, losses[start - 1 : end], counts)) / sum(counts)
        lines.append(f"{start if start == end else f'{start} to {end}':<14}{loss:>14.4f}")
    if worst := details.get("worst_documents"):
        lines += ["", f"highest loss of {details['document_count']:,} documents, nats per token and bits per byte"]
        for document in worst:
            figures = f"{document['loss']:>14.4f} {document['bits_per_byte']:>7.3f}"
            lines.append(f"number {document['document']:<7}{figures}  {one_line(document['text'], 90)}")
    return "\n".join(lines)


def _hellaswag_table(figures: Mapping[str, Any]) -> str:
    """The figures with their standard errors, and published scores if the items are the same."""
    from glassgpt.evaluation.hellaswag_items import PUBLISHED

    lines = [f"HellaSwag, {figures['items']:,} items       accuracy         normalised"]
    for style, divisor in (("build-nanogpt", "token"), ("lm-eval", "character")):
        own = figures[style]
        plain, normalised = (f"{own[f'acc{s}']:7.2%} ±{own[f'stderr{s}']:6.2%}" for s in ("", "_norm"))
        lines.append(f"  {style + ' style':<26}{plain}  {normalised} by loss per {divisor}")
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
