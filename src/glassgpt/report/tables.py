"""The report's tables and texts as plain values, which page.html lays out. Rows are label -> one text per column."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from glassgpt.config.schema import TrainConfig
from glassgpt.config.validation import flatten
from glassgpt.report.runs import RunRecords, column, smoothed, smoothing_window
from glassgpt.runs.metrics import Record
from glassgpt.utils.formatting import format_bytes, format_duration

Rows = dict[str, list[str]]

MAX_SAMPLED_STEPS = 12  # steps whose samples the page shows: the first, the last, and some evenly between them
ABSENT = "–"
# Values of environment.json that may explain a difference.
_COMPARED = "parameters device precision processes strategy torch cpu threads data_fingerprint".split()


def results_of(run: RunRecords) -> Rows:
    """The final and the best evaluation of a run."""
    by_loss = sorted(run.evaluations, key=lambda record: math.inf if record["val_loss"] is None else record["val_loss"])
    records = [run.evaluations[-1], by_loss[0]] if run.evaluations else []
    rows = {"step": "step", "validation loss": "val_loss", "perplexity": "val_perplexity"}
    rows |= {"bits per byte": "val_bits_per_byte", "HellaSwag, normalised": "hellaswag_acc_norm"}
    return {
        label: [_number(record.get(key), "," if key == "step" else ".4f") for record in records]
        for label, key in rows.items()
        if any(key in record for record in records)
    }


def facts_of(run: RunRecords) -> dict[str, str]:
    """What the log contains about the whole run."""
    planned = run.config.get("steps")
    done = run.training[-1]["step"] if run.training else 0
    facts = {"steps": _number(done) + (f" of {_number(planned)}" if planned is not None else "")}
    if run.training:
        losses, seconds = column(run.training, "loss"), column(run.training, "seconds")
        known = (column(run.training, key) for key in ("tokens_per_second", "memory_bytes"))
        speeds, memory = (values[np.isfinite(values)] for values in known)
        facts |= {
            "tokens seen": _number(run.training[-1].get("tokens_seen")),
            "training loss, smoothed": _number(smoothed(losses, smoothing_window(len(losses)))[-1], ".4f"),
            "time in training steps": format_duration(np.nansum(seconds)),
            "tokens per second, median": _number(np.median(speeds), ",.0f") if len(speeds) else ABSENT,
            "memory, highest": format_bytes(memory.max()) if len(memory) else ABSENT,
        }
    if run.evaluations:
        facts["time in evaluations"] = format_duration(np.nansum(column(run.evaluations, "seconds")))
    return facts | {"checkpoints kept": ", ".join(run.checkpoints) or "none yet"}


def environment_of(run: RunRecords) -> dict[str, str]:
    """Everything that the run recorded about its environment."""
    return {name.replace("_", " "): _shown(value) for name, value in flatten(run.environment, ", ")}


def compared_results(runs: Sequence[RunRecords]) -> Rows:
    """The final and the best evaluation of each run, and facts about the whole runs."""
    columns = []
    for run in runs:
        pairs = ((name, zip(("final", "best"), texts, strict=True)) for name, texts in results_of(run).items())
        columns.append({f"{name}, {which}": text for name, both in pairs for which, text in both} | facts_of(run))
    return _rows(columns)


def differing_settings(runs: Sequence[RunRecords]) -> Rows:
    """The settings in which the runs differ, except their names. A setting that a config lacks has its default."""
    defaults = dict(flatten(TrainConfig(epochs=1.0).to_dict())) | {"epochs": None}
    configs = [{**defaults, **dict(flatten(run.config))} for run in runs]
    return _differing([{k: v for k, v in config.items() if k != "name" and v is not None} for config in configs])


def differing_environments(runs: Sequence[RunRecords]) -> Rows:
    """What differs in the runs' environments, and may explain a difference in their results."""
    columns = [{name: run.environment[name] for name in _COMPARED if name in run.environment} for run in runs]
    return {name.replace("_", " "): texts for name, texts in _differing(columns).items()}


def samples_of(runs: Sequence[RunRecords]) -> tuple[list[Record], str]:
    """Sections of samples (`columns`: step and texts of each run, or None), and a note if some steps are left out."""
    by_step = [dict(run.samples) for run in runs]
    steps = sorted({step for samples in by_step for step in samples})
    # Evenly spread, the first and the last included.
    numbers = {round(i * (len(steps) - 1) / (MAX_SAMPLED_STEPS - 1)) for i in range(MAX_SAMPLED_STEPS)}
    chosen = [step for number, step in enumerate(steps) if number in numbers]
    sections: list[Record] = []
    if len(runs) > 1 and steps:
        final = [run.samples[-1] if run.samples else None for run in runs]
        sections.append({"title": "Final", "open": True, "columns": final})
    for step in chosen:
        columns = [(step, samples[step]) if step in samples else None for samples in by_step]
        is_open = len(runs) == 1 and step == steps[-1]
        sections.append({"title": f"Step {step:,}", "open": is_open, "columns": columns})
    left_out = len(steps) > len(chosen)
    return sections, f"{len(chosen)} of {len(steps)} steps; samples.md has all of them." if left_out else ""


def _differing(columns: Sequence[Mapping[str, Any]]) -> Rows:
    rows = _rows([{key: _shown(value) for key, value in column.items()} for column in columns])
    keys = [key for key in rows if any(column.get(key) != columns[0].get(key) for column in columns)]
    return {key: rows[key] for key in keys}


def _rows(columns: Sequence[Mapping[str, str]]) -> Rows:
    keys = dict.fromkeys(key for column in columns for key in column)
    return {key: [column.get(key, ABSENT) for column in columns] for key in keys}


def _number(value: float | None, spec: str = ",") -> str:
    return ABSENT if value is None or not math.isfinite(value) else format(value, spec)


def _shown(value: Any) -> str:
    """A value of a config or an environment; of a long hash, its beginning."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    return _number(value) if isinstance(value, int) else re.sub(r"\b([0-9a-f]{12})[0-9a-f]{20,}\b", r"\1…", str(value))
