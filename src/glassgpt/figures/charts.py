"""Line charts and bar charts."""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from glassgpt.figures.axes import Scale, placed, scale_of, thinned, tick_texts
from glassgpt.figures.cells import NEGATIVE, POSITIVE
from glassgpt.figures.svg import (
    SERIES,
    WIDTH,
    Figure,
    drawing,
    element,
    floats,
    heading,
    label,
    number,
    number_text,
    shortened,
    text_width,
    tooltip,
    vector,
)
from glassgpt.utils.errors import UserError

HEIGHT = 210  # of the area of a line chart
MAX_POINTS = 600  # of a line: more than one per pixel
MAX_TOOLTIPS = 200  # points of a chart that show their values under the pointer
Style = dict[str, str | float]  # attributes of a stroke
_DASHES = ("", "7 3", "2 3", "10 3 2 3", "4 2", "12 4")  # a second sign besides the colour


def lines(
    series: Mapping[str, tuple[Any, Any]],
    *,
    title: str = "",
    x: str = "",
    y: str = "",
    log_x: bool = False,
    log_y: bool = False,
    points: bool | Collection[str] = False,
    faint: Collection[str] = (),
) -> Figure:
    """Draw curves by their names: each a pair of numbers xs (N,) and ys (N,), as arrays, tensors or lists.

    `points` marks the values of all curves, or of the named ones; `faint` names curves in the background. A value that
    is not finite, or not above 0 on a log axis, is a gap. Curves of more than 600 values are thinned, and their
    extremes stay. Raises `UserError` if a curve's xs and ys differ in length.
    """
    data = {str(name): _pair(f"{name}", pair, log_x, log_y) for name, pair in series.items()}
    marked = set(data) if points is True else set(points or ())
    styles = _styles(list(data), faint)
    head, top = heading(title)
    legend, taken = _legend(styles, marked, top) if len(data) > 1 else ("", 0.0)
    top += taken + (20 if y else 6)
    all_x, all_y = (np.concatenate([pair[i] for pair in data.values()] or [np.zeros(0)]) for i in (0, 1))
    y_scale = scale_of(all_y, top + HEIGHT, top, log_y)
    y_ticks = y_scale.ticks(5)
    left = 10 + max(text_width(text) for text in tick_texts(y_ticks))
    x_scale = scale_of(all_x, left, WIDTH - 12, log_x, pad=0.02 if marked else 0.0)
    parts = [head, legend, _grid(x_scale, y_scale, y_ticks)]
    parts += [label(y, 0, top - 8)] if y else []
    parts += [label(x, (left + WIDTH - 12) / 2, top + HEIGHT + 36, "middle")] if x else []
    has_tooltips = len(all_x) <= MAX_TOOLTIPS
    for name, (xs, ys) in data.items():
        parts.append(_curve(x_scale(xs), y_scale(ys), styles[name]))
        if name in marked or has_tooltips:
            color = styles[name]["stroke"]
            parts.append(_points(name if len(data) > 1 else "", xs, ys, x_scale, y_scale, color, name in marked))
    return drawing(WIDTH, top + HEIGHT + (44 if x else 24), title or f"Line chart of {', '.join(data)}", *parts)


def _pair(name: str, pair: tuple[Any, Any], log_x: bool, log_y: bool) -> tuple[np.ndarray, np.ndarray]:
    if len(pair) != 2:
        raise UserError(f"the series {name!r} needs a pair (xs, ys), not {len(pair)} values")
    xs, ys = vector(pair[0], f"the xs of {name!r}"), vector(pair[1], f"the ys of {name!r}")
    if len(xs) != len(ys):
        raise UserError(f"the series {name!r} has {len(xs)} xs and {len(ys)} ys; give as many of both")
    kept = thinned(np.where(np.isnan(placed(xs, log_x)), np.nan, placed(ys, log_y)), MAX_POINTS)
    return xs[kept], ys[kept]


def _styles(names: list[str], faint: Collection[str]) -> dict[str, Style]:
    """How each curve is drawn: by colour and by dashes, the faint ones thin and in the text's colour."""
    styles: dict[str, Style] = {}
    clear = [name for name in names if name not in faint]
    for name in names:
        if name in faint:
            styles[name] = {"stroke": "currentColor", "stroke_width": 1, "stroke_opacity": 0.35}
        else:
            i = clear.index(name)
            dashes = _DASHES[i % len(_DASHES)]
            styles[name] = {"stroke": SERIES[i % len(SERIES)], "stroke_width": 2}
            styles[name] |= {"stroke_dasharray": dashes} if dashes else {}
    return styles


def _legend(styles: dict[str, Style], marked: Collection[str], top: float) -> tuple[str, float]:
    """Names with a piece of their line, in rows, and the height that they take."""
    parts, x, y = [], 0.0, top + 12
    for original, style in styles.items():
        name = shortened(original, WIDTH - 40)
        width = 34 + text_width(name) + 12
        if x and x + width > WIDTH:
            x, y = 0.0, y + 20
        parts.append(element("path", d=f"M{number(x)} {number(y - 4)}h28", fill="none", **style))
        if original in marked:
            parts.append(element("circle", cx=x + 14, cy=y - 4, r=3, fill=style["stroke"]))
        parts.append(label(name, x + 34, y))
        x += width
    return "".join(parts), y - top + 10


def _grid(x: Scale, y: Scale, y_ticks: list[float]) -> str:
    """Grid lines and the ticks' texts."""
    parts, grid = [], []
    for place, text in zip(y(np.array(y_ticks)), tick_texts(y_ticks), strict=True):
        grid.append(f"M{number(x.start)} {number(place)}H{number(x.stop)}")
        parts.append(label(text, x.start - 6, place + 4, "end"))
    x_ticks = x.ticks(6)
    last = -np.inf
    for place, text in zip(x(np.array(x_ticks)), tick_texts(x_ticks), strict=True):
        grid.append(f"M{number(place)} {number(y.start)}v4")
        if place - text_width(text) / 2 > last + 6:
            last = place + text_width(text) / 2
            parts.append(label(text, min(place, WIDTH - text_width(text) / 2), y.start + 18, "middle"))
    axis = f"M{number(x.start)} {number(y.start)}H{number(x.stop)}"
    return _rule("".join(grid), 0.2) + _rule(axis, 0.6) + "".join(parts)


def _rule(path: str, opacity: float) -> str:
    """A thin line in the text's colour."""
    return element("path", d=path, stroke="currentColor", stroke_opacity=opacity)


def _curve(px: np.ndarray, py: np.ndarray, style: Style) -> str:
    """A path through points in pixels, interrupted at NaN."""
    is_placed = np.pad(np.isfinite(px) & np.isfinite(py), 1)
    commands = []
    for k in np.flatnonzero(is_placed[1:-1]):
        is_alone = not is_placed[k] and not is_placed[k + 2]
        commands.append(f"{'L' if is_placed[k] else 'M'}{px[k]:.1f} {py[k]:.1f}{'h0' if is_alone else ''}")
    ends: Style = {"stroke_linejoin": "round", "stroke_linecap": "round"}
    return element("path", d="".join(commands), fill="none", **ends, **style) if commands else ""


def _points(name: str, xs: np.ndarray, ys: np.ndarray, x: Scale, y: Scale, color: str | float, is_visible: bool) -> str:
    """A mark at each point that has a place, with its values as tooltip."""
    marks = []
    for value, other, px, py in zip(xs, ys, x(xs), y(ys), strict=True):
        if np.isfinite(px) and np.isfinite(py):
            text = tooltip(f"{name}: {value:.6g}, {other:.6g}".removeprefix(": "))
            marks.append(element("circle", text, cx=px, cy=py, r=3 if is_visible else 6))
    return element("g", *marks, fill=color, fill_opacity=1 if is_visible else 0) if marks else ""


def bars(values: Mapping[str, Any], *, title: str = "", y: str = "", form: str = ".3g") -> Figure:
    """Draw a horizontal bar per name, from 0 to its value, with the value by the format `form`.

    `y` names the quantity and its unit. If a value is negative, the colours show the signs, as in `heatmap`. A value
    that is not finite has no bar.
    """
    numbers = {str(name): _number(f"{name}", value) for name, value in values.items()}
    head, top = heading(title)
    top += 18 if y else 0
    finite = placed(np.array([0.0, *numbers.values()]))
    low, high = float(np.nanmin(finite)), float(np.nanmax(finite))
    texts = [number_text(v, form) for v in numbers.values()]
    left = min(0.4 * WIDTH, 8 + max(map(text_width, numbers), default=0))
    room = 8 + max(map(text_width, texts), default=0)
    scale = Scale(low, high if high > low else low + 1, left + (room if low < 0 else 0), WIDTH - room)
    zero = float(scale(np.zeros(1))[0])
    parts = [head] + ([label(y, left, top - 4)] if y else [])
    for i, ((name, v), text) in enumerate(zip(numbers.items(), texts, strict=True)):
        at = top + 22 * i
        parts.append(label(shortened(name, left - 8), left - 8, at + 15, "end"))
        end = float(np.nan_to_num(scale(np.array([v])), nan=zero)[0])
        color = SERIES[0] if low >= 0 else NEGATIVE if v < 0 else POSITIVE
        box = {"x": min(zero, end), "y": at + 3, "width": abs(end - zero), "height": 16}
        parts.append(element("rect", tooltip(f"{name}: {v:.6g}"), fill=color, **box))
        place, anchor = (end - 5, "end") if v < 0 else (end + 5, "start")
        parts.append(label(text, place, at + 15, anchor))
    height = top + 22 * len(numbers) + 4
    parts.append(_rule(f"M{number(zero)} {number(top)}V{number(height - 4)}", 0.6))
    return drawing(WIDTH, height, title or y or f"Bars of {', '.join(numbers)}", *parts)


def _number(name: str, value: Any) -> float:
    array = floats(value)
    if array.size != 1:
        raise UserError(f"the value of {name!r} must be one number, not of shape {array.shape}")
    return float(array.item())
