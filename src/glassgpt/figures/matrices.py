"""Heat maps, and texts whose tokens are coloured by a value."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from glassgpt.figures.svg import (
    FONT,
    NEGATIVE,
    POSITIVE,
    SIZE,
    STRONGEST,
    WIDTH,
    Figure,
    clean,
    drawing,
    element,
    floats,
    heading,
    label,
    matrix,
    number,
    shortened,
    text_of,
    text_width,
    tooltip,
    vector,
)
from glassgpt.utils.errors import UserError
from glassgpt.utils.formatting import escape_token

LEVELS = 32  # of opacity in a heat map with many cells
MAX_TOOLTIPS = 256  # cells that show their value under the pointer; more cells are merged into paths
MAX_SHOWN = 12  # rows and columns up to which values are printed
_SMALL = 11  # size of text in and beside small cells


Limits = tuple[float, float]


def shares(values: np.ndarray, signed: bool, limits: Limits | None = None) -> tuple[np.ndarray, float, float]:
    """Values as colour strengths from -1 to 1, NaN if not finite, and the values with strengths 0 (or -1) and 1.

    Signed: 0 is 0, and the largest absolute value has strength 1. Otherwise the largest value has strength 1, and 0 is
    0, or the smallest value if it is negative or above half of the largest. `limits` replaces these two values.
    """
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    if limits is not None:
        low, high = limits
    elif signed:
        high = max(abs(low), abs(high))
        low = -high
    elif 0 <= low <= high / 2:
        low = 0.0
    zero = 0.0 if signed else low
    with np.errstate(invalid="ignore"):
        strengths = (values - zero) / ((high - zero) or 1.0)
    return np.where(np.isfinite(values), strengths.clip(-1 if signed else 0, 1), np.nan), low, high


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
    texts: Sequence[Sequence[str]] | None = None,
    limits: Limits | None = None,
) -> Figure:
    """Draw values (R, C) as cells: row 0 at the top, the larger the stronger the colour.

    `rows` (R) and `columns` (C) label the cells, `x` and `y` name what columns and rows are. `signed` colours positive
    and negative values differently. Cells hold their values by the format `form` if there are at most 12 by 12, or as
    `show_values` says; or `texts` (R, C), of one line or more. `limits` are the values without colour and with the
    strongest; default: 0 and the largest. Cells without a number (NaN, -inf) are hatched. Raises `UserError` if there
    are more or fewer labels than rows or columns.
    """
    data = matrix(values, "the values of a heat map")
    R, C = data.shape
    for name, given, count in (("rows", rows, R), ("columns", columns, C), ("texts", texts, R)):
        if given is not None and len(given) != count:
            raise UserError(f"{name} has {len(given)} entries for values of shape {data.shape}; give {count}")
    printed = _printed(data, form, show_values, texts)
    printed_lines = [line for row in printed for text in row for line in text.split("\n")]
    wide = max((text_width(line, _SMALL) + 8 for line in printed_lines), default=0)
    tall = 8 + 13 * max((text.count("\n") + 1 for row in printed for text in row), default=1)
    rows, columns = ([clean(str(t)) for t in given] if given is not None else None for given in (rows, columns))
    left = min(130.0, 8 + max((text_width(text, _SMALL) for text in rows or ()), default=-8))
    width = max(wide, min(28.0, (WIDTH - left - 2) / C))
    height = max(22.0, tall) if printed else width
    head, top = heading(title)
    axis_names = "   ".join(text for text in (f"{y} ↓" if y else "", f"{x} →" if x else "") if text)
    parts = [head] + ([label(axis_names, 0, top + 10)] if axis_names else [])
    top += 18 if axis_names else 0
    drawn, taken = _column_labels(columns, left, top, width)
    top += taken
    strengths, low, high = shares(data, signed, limits)
    parts += [drawn, _row_labels(rows, left, top, height)]
    tips = _tooltips(data, rows, columns, form, texts) if R * C <= MAX_TOOLTIPS else None
    parts.append(cells(strengths, left, top, width, height, tips))
    for r, row in enumerate(printed):
        for c, text in enumerate(row):
            across, down = left + (c + 0.5) * width, top + (r + 0.5) * height + 4
            for i, line in enumerate(text.split("\n")):
                shift = 13 * (i - text.count("\n") / 2)
                parts.append(label(line, across, down + shift, "middle", _SMALL, pointer_events="none"))
    bottom = top + R * height
    total = max(left + C * width + 2, text_width(axis_names), 1.2 * text_width(title), left + 200)
    parts.append(_color_bar(low, high, signed, form, left, bottom + 8))
    return drawing(total, bottom + 26, title or f"Heat map of {R} rows and {C} columns", *parts)


def _printed(
    data: np.ndarray, form: str, show_values: bool | None, texts: Sequence[Sequence[str]] | None
) -> Sequence[Sequence[str]]:
    """The texts in the cells; none if values are not shown."""
    if texts is not None:
        return texts
    is_shown = max(data.shape) <= MAX_SHOWN if show_values is None else show_values
    return [[_text(v, form) for v in row] for row in data.tolist()] if is_shown else []


def _text(value: float, form: str) -> str:
    return format(value, form).replace("-", "−") if np.isfinite(value) else ""


def _tooltips(
    data: np.ndarray,
    rows: Sequence[str] | None,
    columns: Sequence[str] | None,
    form: str,
    texts: Sequence[Sequence[str]] | None,
) -> list[list[str]]:
    def tip(r: int, c: int) -> str:
        place = f"{rows[r] if rows else r}, {columns[c] if columns else c}"
        return f"{place}: {texts[r][c] + ', ' if texts else ''}{format(data[r, c], form)}"

    return [[tip(r, c) for c in range(data.shape[1])] for r in range(data.shape[0])]


def cells(
    strengths: np.ndarray, x: float, y: float, width: float, height: float, tips: list[list[str]] | None = None
) -> str:
    """Cells (R, C) of strengths from -1 to 1 in pixels from (x, y): one by one with tooltips, or merged into paths."""
    R, C = strengths.shape
    frame = element("path", d=f"M0 0H{C}V{R}H0z", fill="none", stroke="currentColor", stroke_opacity=0.4,
                    vector_effect="non-scaling-stroke")  # fmt: skip
    if tips is None:
        drawn = _merged(strengths)
    else:
        drawn = "".join(
            element("rect", tooltip(tips[r][c]), x=c, y=r, width=1, height=1, **_fill(float(strengths[r, c])))
            for r in range(R)
            for c in range(C)
        )
    place = f"translate({number(x)} {number(y)}) scale({width:.4g} {height:.4g})"
    return element("g", drawn, _hatching(~np.isfinite(strengths)), frame, transform=place, shape_rendering="crispEdges")


def _fill(strength: float) -> dict[str, str | float]:
    opacity = STRONGEST * min(1.0, abs(strength)) if np.isfinite(strength) else 0.0
    return {"fill": NEGATIVE if strength < 0 else POSITIVE, "fill_opacity": f"{opacity:.3g}"}


def _merged(strengths: np.ndarray) -> str:
    """A path per level of opacity; a run of equal cells in a row is one stroke."""
    levels = np.nan_to_num(np.round(strengths * LEVELS)).astype(int)
    strokes: dict[int, list[str]] = {}
    for r, row in enumerate(levels):
        starts = np.flatnonzero(np.diff(row, prepend=row[0] - 1))
        for start, stop in zip(starts, [*starts[1:], len(row)], strict=True):
            strokes.setdefault(int(row[start]), []).append(f"M{start} {r}h{stop - start}")
    return element("g", *(
        element("path", d="".join(d), stroke=NEGATIVE if level < 0 else POSITIVE,
                stroke_opacity=f"{STRONGEST * abs(level) / LEVELS:.3g}")
        for level, d in sorted(strokes.items()) if level
    ), transform="translate(0 .5)") if any(strokes) else ""  # fmt: skip


def _hatching(is_hatched: np.ndarray) -> str:
    """A diagonal line through each of these cells; one line through cells that touch at their corners."""
    R, C = is_hatched.shape
    commands = []
    for total in range(R + C - 1):  # the cells (r, c) with r + c = total, from the bottom left to the top right
        run = 0
        for c in range(max(0, total - R + 1), min(C, total + 1) + 1):
            inside = c < C and total - c >= 0 and bool(is_hatched[total - c, c])
            if inside:
                run += 1
            elif run:
                commands.append(f"M{c - run} {total - c + run + 1}l{run} -{run}")
                run = 0
    if not commands:
        return ""
    return element("path", d="".join(commands), fill="none", stroke="currentColor", stroke_opacity=0.3,
                   vector_effect="non-scaling-stroke", shape_rendering="auto")  # fmt: skip


def _row_labels(rows: Sequence[str] | None, left: float, top: float, height: float) -> str:
    if not rows:
        return ""
    every = max(1, int(np.ceil(_SMALL / height)))
    return "".join(
        label(shortened(text, left - 8, _SMALL), left - 6, top + (r + 0.5) * height + 4, "end", _SMALL)
        for r, text in enumerate(rows)
        if r % every == 0
    )


def _column_labels(columns: Sequence[str] | None, left: float, top: float, width: float) -> tuple[str, float]:
    """Labels above the columns, upright if they do not fit, and the height that they take."""
    if not columns:
        return "", 0.0
    if max(text_width(text, _SMALL) for text in columns) <= width - 2:
        places = [(text, left + (c + 0.5) * width) for c, text in enumerate(columns)]
        return "".join(label(text, x, top + 12, "middle", _SMALL) for text, x in places), 18.0
    every = max(1, int(np.ceil(_SMALL / width)))
    texts = [shortened(text, 110, _SMALL) for text in columns]
    taken = 6 + max(text_width(text, _SMALL) for text in texts)
    parts = []
    for c, text in enumerate(texts):
        if c % every == 0:
            x, y = left + (c + 0.5) * width + 4, top + taken - 4
            parts.append(label(text, x, y, size=_SMALL, transform=f"rotate(-90 {number(x)} {number(y)})"))
    return "".join(parts), taken


def _color_bar(low: float, high: float, signed: bool, form: str, x: float, y: float) -> str:
    """The colours between the lowest and the highest value."""
    first, last = (text or "0" for text in (_text(low, form), _text(high, form)))
    start = x + text_width(first, _SMALL) + 6
    steps = np.linspace(-1 if signed else 0, 1, 12)[None]
    return (
        label(first, x, y + 10, size=_SMALL)
        + cells(steps, start, y, 8, 12)
        + label(last, start + 8 * 12 + 6, y + 10, size=_SMALL)
    )


def tokens(texts: Sequence[str], values: Any, *, title: str = "", signed: bool = False, form: str = ".2f") -> Figure:
    """Draw a text's tokens (N) in lines that wrap, coloured by their values (N,), with the values below them.

    Spaces, newlines and other invisible characters become visible. A value that is not finite has no colour. Raises
    `UserError` if there are more values than tokens, or fewer.
    """
    numbers = vector(values, "the values of tokens")
    if len(numbers) != len(texts):
        raise UserError(f"there are {len(texts)} tokens and {len(numbers)} values; give one value per token")
    strengths, low, high = shares(numbers, signed) if len(numbers) else (numbers, 0.0, 0.0)
    items = "".join(_token(t, v, s, form) for t, v, s in zip(texts, numbers.tolist(), strengths.tolist(), strict=True))
    name = f'<div style="font-weight:bold;font-size:15px;margin-bottom:4px">{text_of(title)}</div>' if title else ""
    legend = f"{_text(low, form)} to {_text(high, form)}" if len(numbers) else ""
    row = f'<div style="display:flex;flex-wrap:wrap;gap:3px 2px">{items}</div>'
    small = f'<div style="font-size:{_SMALL}px;margin-top:4px">{legend}</div>'
    style = f"font-family:{FONT};font-size:{SIZE}px;line-height:1.3"
    spoken = escape_attribute(title or "Tokens with values")
    return Figure(f'<div role="group" aria-label="{spoken}" style="{style}">{name}{row}{small}</div>')


def _token(text: str, value: float, strength: float, form: str) -> str:
    shown = escape_token(text.encode("utf-8", "surrogatepass"))
    fill = _fill(strength)
    red, green, blue = (int(str(fill["fill"])[i : i + 2], 16) for i in (1, 3, 5))
    color = f"rgb({red} {green} {blue} / {fill['fill_opacity']})"
    below = f'<span style="display:block;font-size:10px;text-align:center">{text_of(_text(value, form)) or "–"}</span>'
    style = f"padding:1px 3px;border-radius:3px;font-family:ui-monospace,monospace;background:{color}"
    tip = escape_attribute(f"{shown}: {value:.6g}")
    return f'<span title="{tip}" style="{style}">{text_of(shown)}{below}</span>'


def escape_attribute(text: str) -> str:
    """Text for an attribute in double quotes."""
    return text_of(text).replace('"', "&quot;")


def heatmap_grid(
    values: Any,
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    tooltips: Sequence[Sequence[str]] | None = None,
    title: str = "",
) -> Figure:
    """Draw matrices (R, C, M, N) as R rows of C small heat maps with the same colours, from 0 to the largest value.

    `rows` (R) and `columns` (C) label them; `tooltips` (R, C) are shown under the pointer.
    """
    data = floats(values)
    if data.ndim != 4 or data.shape[:2] != (len(rows), len(columns)):
        raise UserError(f"a grid of {len(rows)} rows and {len(columns)} columns needs 4 axes, not shape {data.shape}")
    strengths, low, high = shares(data, signed=False)
    head, top = heading(title)
    left = 8 + max(text_width(text, _SMALL) for text in rows)
    step = min(120.0, (WIDTH - left) / len(columns))
    side = step - 4
    parts = [head]
    parts += [label(text, left + c * step + side / 2, top + 10, "middle", _SMALL) for c, text in enumerate(columns)]
    top += 16
    for r, row in enumerate(rows):
        parts.append(label(row, left - 6, top + r * step + side / 2 + 4, "end", _SMALL))
        for c, column in enumerate(columns):
            name = tooltip(tooltips[r][c] if tooltips else f"{row} {column}")
            area = element(
                "path",
                d="M0 0H1V1H0z",
                fill_opacity=0,
                transform=f"translate({left + c * step:.1f} {top + r * step:.1f}) scale({side:.4g})",
            )
            picture = cells(
                strengths[r, c], left + c * step, top + r * step, side / data.shape[3], side / data.shape[2]
            )
            parts.append(element("g", name, picture, area))
    bottom = top + len(rows) * step
    parts.append(_color_bar(low, high, False, ".2f", left, bottom + 4))
    return drawing(max(left + len(columns) * step, 220), bottom + 22, title or "Grid of heat maps", *parts)
