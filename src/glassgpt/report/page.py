"""The report of one run or of several compared: one HTML file with charts, summary, samples and config.

It opens from the disk without a network. It only reads the runs' files, so it can be written at any time.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from glassgpt.report import tables
from glassgpt.report.charts import charts_of
from glassgpt.report.runs import RunRecords, read_runs
from glassgpt.runs.run_directory import RunDirectory
from glassgpt.utils.arguments import check_arguments
from glassgpt.utils.errors import UserError
from glassgpt.utils.files import explain_os_errors, require_writable, user_path, write_atomic

_MARK = '<meta name="generator" content="glassgpt report">'  # by which a report is recognised before it is overwritten


@check_arguments
def write_report(run: str | Path, *others: str | Path, out: str | Path | None = None) -> Path:
    """Write the report of a run, or of several compared, and return its path.

    `out`: the file to write. Default: `report.html` in the run, or for several runs in the current directory. Raises
    `UserError` for a directory that is not a run or is named twice, and if `out` exists and is not a report.
    """
    runs = read_runs([run, *others])
    if out is None and not others:
        path = RunDirectory(run).report_path
    else:
        path = user_path("report.html" if out is None else out)
        _require_report(path)
    require_writable(path)
    for name in (each.name for each in runs if each.damaged):
        print(f"glassgpt: warning: {name}/metrics.jsonl has damaged lines; the report names them", file=sys.stderr)
    for each in runs:
        if not (each.training or each.evaluations):
            print(f"glassgpt: warning: {each.name}/metrics.jsonl has no records (or is missing)", file=sys.stderr)
    # JSON can contain a lone surrogate, which UTF-8 cannot.
    write_atomic(path, _render(runs).encode(errors="replace"))
    return path


def _require_report(path: Path) -> None:
    """Raise `UserError` if another file would be overwritten."""
    with explain_os_errors("write", path):
        if not path.parent.is_dir():
            raise UserError(f"there is no directory {path.parent}; create it, or choose another --out")
        if path.is_file():
            with open(path, "rb") as file:
                head = file.read(2000)
            if head and _MARK.encode() not in head:
                raise UserError(f"{path} exists and is not a report; choose another --out")


def _render(runs: Sequence[RunRecords]) -> str:
    import jinja2  # here, so that `--help` does not import it
    from plotly.offline import get_plotlyjs

    folder = Path(__file__).parent
    loader, undefined = jinja2.FileSystemLoader(folder), jinja2.StrictUndefined
    environment = jinja2.Environment(
        autoescape=True, loader=loader, undefined=undefined, trim_blocks=True, lstrip_blocks=True
    )
    style, script = ((folder / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    values = {"runs": runs, "tables": tables, "charts": charts_of(runs), "mark": _MARK, "plotly": get_plotlyjs()}
    return environment.get_template("page.html").render(values, style=style, script=script)
