"""The report's page: HTML, style and script put together around what the runs recorded."""

import html
import json
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from glassgpt.report import tables
from glassgpt.report.charts import charts_of
from glassgpt.report.runs import RunRecords, read_runs
from glassgpt.runs.metrics import Record
from glassgpt.runs.run_directory import RunDirectory
from glassgpt.utils.errors import UserError
from glassgpt.utils.files import explain_os_errors, user_path, write_atomic

# In the page's head, by which a report is known for one.
MARK = '<meta name="generator" content="glassgpt report">'
_HEAD = 2000


def write_report(run: str | Path, *others: str | Path, out: str | Path | None = None) -> Path:
    """Write the report of a run, or of several compared, and return its path.

    `out` is a file; left out, it is the run's own `report.html`, of several runs the current directory's. Raises `UserError` where
    one is no run or is named twice, the file cannot be written, or one is there already that is no report.
    """
    runs = read_runs([run, *others])
    path = (
        RunDirectory(run).report_path
        if out is None and not others
        else user_path(out if out is not None else "report.html")
    )
    if out is not None or others:
        _require_report(path)
    # A lone surrogate, which JSON can carry, must not stop the page.
    write_atomic(path, _page(runs).encode(errors="replace"))
    return path


def _require_report(path: Path) -> None:
    """Raise `UserError` where something else would be lost."""
    with explain_os_errors("write", path):
        if path.is_dir():
            raise UserError(f"{path} is a directory: name a file (--out {path / 'report.html'})")
        if not path.parent.is_dir():
            raise UserError(f"there is no directory {path.parent}: make it, or choose another --out")
        if path.is_file():
            with open(path, "rb") as file:
                head = file.read(_HEAD)
            if head and MARK.encode() not in head:
                raise UserError(f"{path} is there already and is no report of glassgpt: choose another --out")


def _page(runs: Sequence[RunRecords]) -> str:
    from plotly.offline import get_plotlyjs  # here: 5 MB that only a page needs

    charts = charts_of(runs)
    return string.Template(_file("page.html")).substitute(
        mark=MARK,
        title=html.escape(", ".join(run.name for run in runs)),
        heading=html.escape(runs[0].name) if len(runs) == 1 else f"{len(runs)} runs",
        kind="glassgpt run" if len(runs) == 1 else "compared by glassgpt",
        results=tables.damage_notices(runs) + (_one(runs[0]) if len(runs) == 1 else _several(runs)),
        runs="".join(_chip(run, number) for number, run in enumerate(runs)) if len(runs) > 1 else "",
        figures=_figures(charts) or "<p>No training step yet.</p>",
        samples=(tables.samples_of(runs[0]) if len(runs) == 1 else tables.compared_samples(runs))
        or "<p>No samples yet.</p>",
        config=tables.configs_of(runs),
        charts=script_json(charts),
        style=_file("page.css"),
        script=_file("page.js"),
        plotly=get_plotlyjs(),
    )


def _one(run: RunRecords) -> str:
    results = tables.results_of(run) or "<p>No evaluation yet.</p>"
    environment = tables.environment_of(run) or "<p>No environment.json.</p>"
    return f"<div class='grid'><div class='card'>{results}{tables.facts_of(run)}</div><div class='card'>{environment}</div></div>"


def _several(runs: Sequence[RunRecords]) -> str:
    return f"{tables.compared_results(runs)}<h2>What differs</h2>{tables.differences(runs)}"


def _chip(run: RunRecords, number: int) -> str:
    """A button that shows and hides a run in all charts."""
    return f"<button type='button' class='run' data-run='{number}' aria-pressed='true'>{tables.label_of(run, number)}</button>"


def _figures(charts: Sequence[Record]) -> str:
    """Places for the charts, in the order of the charts, under their sections' headings."""
    parts = []
    for section in dict.fromkeys(chart["section"] for chart in charts):
        figures = "".join(
            f"<figure{' class=tall' if chart['tall'] else ''}><figcaption>{html.escape(chart['title'])}</figcaption><div></div></figure>"
            for chart in charts
            if chart["section"] == section
        )
        parts.append(f"<h2>{html.escape(section)}</h2><div class='grid'>{figures}</div>")
    return "".join(parts)


def script_json(value: Any) -> str:
    """JSON that may stand inside <script>: there, only a "<" can end the element, or open a comment that swallows the page."""
    return json.dumps(value, allow_nan=False).replace("<", "\\u003c")


def _file(name: str) -> str:
    """A file beside this one."""
    return Path(__file__).with_name(name).read_text(encoding="utf-8")
