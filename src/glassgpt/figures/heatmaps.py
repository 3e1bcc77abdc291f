"""Heat maps of a matrix, and grids of small ones."""

from collections.abc import Sequence, Sized
from typing import Any

import numpy as np

from glassgpt.figures.cells import SMALL, Limits, cells, color_bar, merged_cells, shares
from glassgpt.figures.svg import (
    WIDTH,
    Figure,
    clean,
    drawing,
    floats,
    heading,
    label,
    matrix,
    number,
    number_text,
    shortened,
    text_width,
)
from glassgpt.utils.errors import UserError

MAX_TOOLTIPS = 256  # cells up to which each shows its value under the pointer; more are merged into paths
MAX_SHOWN = 12  # rows and columns up to which values are printed
_GRID_LEVELS = 12  # of opacity in the small maps of a grid
_LINE = 13  # height of a line of text in a cell
_LONGEST = 120  # of a label in pixels
Texts = Sequence[Sequence[str]]


def heatmap(
    values: Any,
    *,
    rows: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
    title: str = "",
    x: str = "",
    y: str = "",
    signed: bool = False,
    form: str = ".2f",
    show_values: bool | None = None,
    texts: Texts | None = None,
    limits: Limits | None = None,
) -> Figure:
    """Draw values (R, C) as cells: row 0 at the top, larger values in a stronger colour.

    `rows` (R) and `columns` (C) label the cells; `x` and `y` name what columns and rows are. `signed` gives positive
    and negative values different colours. Cells show their values in the format `form` if there are at most 12 by 12,
    or as `show_values` says; or they show `texts` (R, C). `limits` are the values without colour and of the strongest;
    default: 0 and the largest. Cells without a finite value are hatched. Raises `UserError` if labels or texts do not
    fit the shape.
    """
    data = matrix(values, "the values of a heat map")
    R, C = data.shape
    _require_fit(data.shape, rows, columns, texts)
    row_texts, column_texts = _cleaned(rows), _cleaned(columns)
    printed = _printed(data, form, show_values, texts)
    left = 8 + max((text_width(text, SMALL) for text in row_texts), default=-8)
    width, height = _cell_size(printed, column_texts, C, left)
    head, top = heading(title)
    names = "   ".join(name for name in (f"{y} ↓" if y else "", f"{x} →" if x else "") if name)
    parts = [head, label(names, 0, top + 10) if names else ""]
    top += 18 if names else 0
    drawn, taken = _column_labels(column_texts, left, top, width)
    top += taken
    parts += [drawn, _row_labels(row_texts, left, top, height)]
    strengths, low, high = shares(data, signed, limits)
    if R * C <= MAX_TOOLTIPS:
        parts.append(cells(strengths, left, top, width, height, _tooltips(data, row_texts, column_texts, form, texts)))
    else:
        parts.append(merged_cells(strengths, left, top, width, height))
    parts.append(_cell_texts(printed, left, top, width, height))
    bottom = top + R * height + 8
    parts.append(color_bar(number_text(low, form), number_text(high, form), signed, left, bottom))
    total = max(left + C * width + 2, text_width(names), text_width(title, 16), left + 200)
    return drawing(total, bottom + 18, title or f"Heat map of {R} rows and {C} columns", *parts)


def _require_fit(shape: tuple[int, ...], rows: Sized | None, columns: Sized | None, texts: Texts | None) -> None:
    (R, C), counts = shape, dict[str, tuple[Sized | None, int]]()
    counts |= {"rows": (rows, R), "columns": (columns, C), "texts": (texts, R)}
    counts |= {f"row {r} of texts": (row, C) for r, row in enumerate(texts or ())}
    for name, (given, count) in counts.items():
        if given is not None and len(given) != count:
            raise UserError(f"{name} has {len(given)} entries for values of shape {shape}; give {count}")


def _cleaned(texts: Sequence[str] | None) -> list[str]:
    return [shortened(clean(str(text)), _LONGEST, SMALL) for text in texts or ()]


def _printed(data: np.ndarray, form: str, show_values: bool | None, texts: Texts | None) -> list[list[list[str]]]:
    """The lines in each cell; no rows if values are not shown."""
    if texts is not None:
        return [[text.split("\n") for text in row] for row in texts]
    if not (max(data.shape) <= MAX_SHOWN if show_values is None else show_values):
        return []
    return [[[number_text(v, form) if np.isfinite(v) else ""] for v in row] for row in data.tolist()]


def _cell_size(printed: list[list[list[str]]], columns: list[str], C: int, left: float) -> tuple[float, float]:
    """Width and height of a cell: square without text; otherwise the text fits, and the columns' labels if possible."""
    room = (WIDTH - left - 2) / C
    if not printed:
        return min(28.0, room), min(28.0, room)
    texts = [cell for row in printed for cell in row]
    width = max(28.0, *(8 + text_width(line, SMALL) for lines in texts for line in lines))
    labelled = max((4 + text_width(text, SMALL) for text in columns), default=0)
    return labelled if width < labelled <= room else width, 8.0 + _LINE * max(map(len, texts))


def _cell_texts(printed: list[list[list[str]]], left: float, top: float, width: float, height: float) -> str:
    parts = []
    for r, row in enumerate(printed):
        for c, lines in enumerate(row):
            across, down = left + (c + 0.5) * width, top + (r + 0.5) * height + 4 - _LINE * (len(lines) - 1) / 2
            for i, line in enumerate(lines):
                parts.append(label(line, across, down + i * _LINE, "middle", SMALL, pointer_events="none"))
    return "".join(parts)


def _tooltips(data: np.ndarray, rows: list[str], columns: list[str], form: str, texts: Texts | None) -> list[list[str]]:
    def tip(r: int, c: int) -> str:
        place = f"{rows[r] if rows else r}, {columns[c] if columns else c}"
        return f"{place}: {texts[r][c] if texts else format(data[r, c], form)}"

    return [[tip(r, c) for c in range(data.shape[1])] for r in range(data.shape[0])]


def _row_labels(rows: list[str], left: float, top: float, height: float) -> str:
    shown = [(text, top + (r + 0.5) * height + 4) for r, text in enumerate(rows)][:: _every(height)]
    return "".join(label(text, left - 6, y, "end", SMALL) for text, y in shown)


def _column_labels(columns: list[str], left: float, top: float, width: float) -> tuple[str, float]:
    """Labels above the columns, upright if they do not fit, and the height that they take."""
    if not columns:
        return "", 0.0
    middles = [(text, left + (c + 0.5) * width) for c, text in enumerate(columns)]
    longest = max(text_width(text, SMALL) for text in columns)
    if longest <= width - 2:
        return "".join(label(text, x, top + 12, "middle", SMALL) for text, x in middles), 18.0
    y = top + longest + 2
    parts = []
    for text, x in middles[:: _every(width)]:
        parts.append(label(text, x + 4, y, size=SMALL, transform=f"rotate(-90 {number(x + 4)} {number(y)})"))
    return "".join(parts), longest + 6


def _every(size: float) -> int:
    """Of cells of this size, each how many-th has room for a label."""
    return max(1, int(np.ceil(SMALL / size)))


def heatmap_grid(
    values: Any, *, rows: Sequence[str], columns: Sequence[str], tooltips: Texts | None = None, title: str = ""
) -> Figure:
    """Draw matrices (R, C, M, N) as R rows of C small heat maps of the same colours, from 0 to the largest value.

    `rows` (R) and `columns` (C) label them; `tooltips` (R, C) appear under the pointer. Raises `UserError` for another
    shape.
    """
    data = floats(values)
    rows, columns = _cleaned(rows), _cleaned(columns)
    if data.ndim != 4 or data.shape[:2] != (len(rows), len(columns)) or not data.size:
        wanted = f"({len(rows) or 'R'}, {len(columns) or 'C'}, M, N)"
        raise UserError(f"a grid needs values of shape {wanted} for its labels, not {data.shape}")
    strengths, low, high = shares(data, signed=False)
    head, top = heading(title)
    left = 8 + max(text_width(text, SMALL) for text in rows)
    step = min(120.0, (WIDTH - left) / len(columns))
    side = step - 4
    parts = [head]
    parts += [label(text, left + c * step + side / 2, top + 10, "middle", SMALL) for c, text in enumerate(columns)]
    top += 16
    size = (side / data.shape[3], side / data.shape[2])
    for r, row in enumerate(rows):
        y = top + r * step
        parts.append(label(row, left - 6, y + side / 2 + 4, "end", SMALL))
        for c, column in enumerate(columns):
            tip = tooltips[r][c] if tooltips else f"{row} {column}"
            parts.append(merged_cells(strengths[r, c], left + c * step, y, *size, levels=_GRID_LEVELS, tip=tip))
    bottom = top + len(rows) * step
    parts.append(color_bar(number_text(low, ".2f"), number_text(high, ".2f"), False, left, bottom + 4))
    width = max(left + len(columns) * step, left + 200, text_width(title, 16))
    return drawing(width, bottom + 22, title or "Grid of heat maps", *parts)
