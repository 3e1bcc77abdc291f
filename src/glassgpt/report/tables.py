"""The report's tables and texts, as HTML."""

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from glassgpt.config.schema import TrainConfig
from glassgpt.report.runs import RunRecords, flat
from glassgpt.report.series import column, smoothed, smoothing_window
from glassgpt.runs.metrics import Record

MAX_SAMPLED_STEPS = 12
"""Steps whose samples the page shows: the first, the last, and some evenly between them."""
ABSENT = "–"
# What the environment tells that may explain a difference.
_COMPARED = (
    "parameters",
    "device",
    "precision",
    "processes",
    "strategy",
    "torch",
    "cpu",
    "threads",
    "data_fingerprint",
)


def damage_notices(runs: Sequence[RunRecords]) -> str:
    """A notice for each run whose metrics.jsonl has lines that cannot be read."""
    return "".join(
        f"<p class='notice'>{html.escape(run.name)}/metrics.jsonl has damaged lines, which are left out here: "
        f"{', '.join(map(str, run.damaged_lines[:10]))}{' and others' if len(run.damaged_lines) > 10 else ''}.</p>"
        for run in runs
        if run.damaged_lines
    )


# --- one run --------------------------------------------------------------------------------------------------------------


def results_of(run: RunRecords) -> str:
    """The final and the best evaluation side by side; "" where there is none."""
    if not run.evaluations:
        return ""
    final, best = run.evaluations[-1], _best(run)
    rows = [("validation loss", "val_loss"), ("perplexity", "val_perplexity"), ("bits per byte", "val_bits_per_byte")]
    if any("hellaswag_acc_norm" in record for record in (final, best)):
        rows.append(("HellaSwag, normalised", "hellaswag_acc_norm"))
    cells = [(label, *(_number(record.get(key), ".4f") for record in (final, best))) for label, key in rows]
    body = "".join(f"<tr><th>{label}</th><td>{last}</td><td>{lowest}</td></tr>" for label, last, lowest in cells)
    heads = f"<th>final<small>step {_number(final['step'])}</small></th><th>best<small>step {_number(best['step'])}</small></th>"
    return f"<table class='results'><thead><tr><td></td>{heads}</tr></thead><tbody>{body}</tbody></table>"


def facts_of(run: RunRecords) -> str:
    """What the log says about the whole run."""
    return _pairs((*_facts(run).items(), ("checkpoints kept", ", ".join(run.checkpoints) or "none yet")))


def environment_of(run: RunRecords) -> str:
    """Whatever the run recorded about its environment; "" where there is nothing."""
    return _pairs((name.replace("_", " "), _shown(value)) for name, value in flat(run.environment, ", ").items())


def samples_of(run: RunRecords) -> str:
    """A run's samples as one <details> a step, the last one open; "" where there are none."""
    chosen = _spread([step for step, _ in run.samples])
    parts = []
    for index, (step, texts) in enumerate(run.samples):
        if index in chosen:
            state = " open" if index == len(run.samples) - 1 else ""
            parts.append(
                f"<details{state}><summary>Step {step:,}</summary><div class='samples'>{_blocks(texts)}</div></details>"
            )
    if len(run.samples) > len(chosen):
        parts.append(f"<p>{len(chosen)} of {len(run.samples)} steps; samples.md has them all.</p>")
    return "".join(parts)


# --- several runs ---------------------------------------------------------------------------------------------------------


def compared_results(runs: Sequence[RunRecords]) -> str:
    """Final and best losses, and what the logs say about the whole runs: a column a run."""
    columns = [{k: v for k, v in (_results(run) | _facts(run)).items() if k != "last training loss"} for run in runs]
    notice = ""
    if len({run.environment.get("data_fingerprint") for run in runs}) > 1:
        notice = "<p class='notice'>These runs are not of the same data: what their losses say of each other depends on that.</p>"
    return notice + _table(runs, columns)


def differences(runs: Sequence[RunRecords]) -> str:
    """The settings in which the runs differ, their names aside; of their environments what may matter."""
    # A setting that a run's config lacks has its default, or came after that run.
    defaults = flat(TrainConfig(steps=1).override(steps=None, epochs=1.0).to_dict())
    for chosen in ("epochs", "name"):
        defaults.pop(chosen)
    configs = [{**defaults, **{key: value for key, value in flat(run.config).items() if key != "name"}} for run in runs]
    environments = [
        {key.replace("_", " "): value for key, value in run.environment.items() if key in _COMPARED} for run in runs
    ]
    settings, surroundings = _differing(configs), _differing(environments)
    return (_table(runs, settings) if settings else "<p>No setting differs.</p>") + (
        f"<h3>Environment</h3>{_table(runs, surroundings)}" if surroundings else ""
    )


def compared_samples(runs: Sequence[RunRecords]) -> str:
    """Samples side by side: the final ones of each run, and those of the same step; "" where there are none."""
    if not any(run.samples for run in runs):
        return ""
    by_step = [dict(run.samples) for run in runs]
    last = [run.samples[-1] if run.samples else None for run in runs]
    parts = [_side_by_side("Final", runs, last, is_open=True)]
    steps = sorted({step for samples in by_step for step in samples})
    chosen = _spread(steps)
    for index, step in enumerate(steps):
        if index in chosen:
            found = [(step, samples[step]) if step in samples else None for samples in by_step]
            parts.append(_side_by_side(f"Step {step:,}", runs, found))
    if len(steps) > len(chosen):
        parts.append(f"<p>{len(chosen)} of {len(steps)} steps; each run's samples.md has them all.</p>")
    return "".join(parts)


def configs_of(runs: Sequence[RunRecords]) -> str:
    """Each run's config as it is, folded."""
    name = ("config.toml",) if len(runs) == 1 else tuple(f"{run.name}/config.toml" for run in runs)
    pairs = zip(name, runs, strict=True)
    return "".join(
        f"<details><summary>{html.escape(n)}</summary><pre>\n{html.escape(run.config_text)}</pre></details>"
        for n, run in pairs
    )


def label_of(run: RunRecords, number: int) -> str:
    """A run's name beside its colour."""
    return f"<span class='swatch' style='--own: var(--c{number % 7})'></span>{html.escape(run.name)}"


# --- parts ----------------------------------------------------------------------------------------------------------------


def _best(run: RunRecords) -> Record:
    return min(run.evaluations, key=lambda record: math.inf if record["val_loss"] is None else record["val_loss"])


def _results(run: RunRecords) -> dict[str, str]:
    """Of a comparison: the last evaluation and the best loss."""
    final, best = (run.evaluations[-1], _best(run)) if run.evaluations else ({}, {})
    found = {
        "validation loss, final": _number(final.get("val_loss"), ".4f"),
        "validation loss, best": _number(best.get("val_loss"), ".4f"),
        "best at step": _number(best.get("step")),
        "perplexity": _number(final.get("val_perplexity"), ",.2f"),
        "bits per byte": _number(final.get("val_bits_per_byte"), ".4f"),
    }
    scores = [
        record["hellaswag_acc_norm"] for record in run.evaluations if record.get("hellaswag_acc_norm") is not None
    ]
    if scores:
        found["HellaSwag, normalised"] = _number(scores[-1], ".4f")
    if run.training:
        losses = column(run.training, "loss")
        found["training loss, smoothed"] = _number(float(smoothed(losses, smoothing_window(len(losses)))[-1]), ".4f")
    return found


def _facts(run: RunRecords) -> dict[str, str]:
    planned = run.config.get("steps")
    done = run.training[-1]["step"] if run.training else 0
    facts = {"steps": _number(done) + (f" of {_number(planned)}" if planned is not None else "")}
    if run.training:
        facts |= {
            "tokens seen": _number(run.training[-1].get("tokens_seen")),
            "last training loss": _number(run.training[-1]["loss"], ".4f"),
            "time in training steps": _duration(np.nansum(column(run.training, "seconds"))),
            "tokens per second, median": _number(_percentile(column(run.training, "tokens_per_second"), 50), ",.0f"),
            "memory, highest": _number(_percentile(column(run.training, "memory_bytes"), 100) / 2**20, ",.0f") + " MiB",
        }
    if run.evaluations:
        facts["time in evaluations"] = _duration(np.nansum(column(run.evaluations, "seconds")))
    return facts


def _differing(columns: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """The columns cut to the keys whose values are not the same in all."""
    keys = list(dict.fromkeys(key for column in columns for key in column))
    kept = [key for key in keys if any(column.get(key) != columns[0].get(key) for column in columns)]
    return (
        [{key: _shown(column[key]) if key in column else ABSENT for key in kept} for column in columns] if kept else []
    )


def _table(runs: Sequence[RunRecords], columns: Sequence[Mapping[str, str]]) -> str:
    """A row a key, a column a run; on a narrow screen it scrolls sideways under its row heads."""
    keys = list(dict.fromkeys(key for column in columns for key in column))
    heads = "".join(
        f"<th scope='col'><span class='name' title='{html.escape(run.name)}'>{label_of(run, number)}</span></th>"
        for number, run in enumerate(runs)
    )
    rows = "".join(
        f"<tr><th scope='row'>{html.escape(key)}</th>{''.join(f'<td>{html.escape(c.get(key, ABSENT))}</td>' for c in columns)}</tr>"
        for key in keys
    )
    table = f"<table><thead><tr><td></td>{heads}</tr></thead><tbody>{rows}</tbody></table>"
    return f"<div class='card wide' tabindex='0'>{table}</div>"


def _side_by_side(
    title: str, runs: Sequence[RunRecords], found: Sequence[tuple[int, list[str]] | None], is_open: bool = False
) -> str:
    columns = []
    for number, (run, samples) in enumerate(zip(runs, found, strict=True)):
        step = "" if samples is None else f" <small>step {samples[0]:,}</small>"
        body = "<p class='absent'>no samples at this step</p>" if samples is None else _blocks(samples[1])
        columns.append(f"<div><h3>{label_of(run, number)}{step}</h3>{body}</div>")
    return f"<details{' open' if is_open else ''}><summary>{title}</summary><div class='samples'>{''.join(columns)}</div></details>"


def _blocks(texts: Iterable[str]) -> str:
    # HTML drops a newline right after <pre>, so one that is not the sample's stands there.
    return "".join(f"<pre>\n{html.escape(text)}</pre>" for text in texts)


def _spread(steps: Sequence[int]) -> set[int]:
    """Indices of at most `MAX_SAMPLED_STEPS` of the steps."""
    return {round(i * (len(steps) - 1) / (MAX_SAMPLED_STEPS - 1)) for i in range(MAX_SAMPLED_STEPS)} if steps else set()


def _pairs(rows: Iterable[tuple[str, str]]) -> str:
    items = "".join(f"<div><dt>{html.escape(label)}</dt><dd>{html.escape(text)}</dd></div>" for label, text in rows)
    return f"<dl>{items}</dl>" if items else ""


def _shown(value: Any) -> str:
    """A value of a config or an environment."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    return _number(value) if isinstance(value, int) else str(value)


def _percentile(values: np.ndarray, percentile: float) -> float:
    known = values[np.isfinite(values)]
    return float(np.percentile(known, percentile)) if len(known) else math.nan


def _number(value: float | None, spec: str = ",") -> str:
    return ABSENT if value is None or not math.isfinite(value) else format(value, spec)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60:,} h {minutes % 60:02} min"
