"""The cells of heat maps: values as colour strengths, drawn one by one or merged into paths."""

from collections.abc import Iterator

import numpy as np

from glassgpt.figures.svg import element, label, number, text_width, tooltip

POSITIVE, NEGATIVE = "#cc5a00", "#2b7bc8"  # as on the playground's page
STRONGEST = 0.85  # opacity of the strongest cell: text on it stays readable on light and on dark pages
LEVELS = 32  # of opacity of each sign in merged cells
SMALL = 11  # size of text in and beside cells
Limits = tuple[float, float]


def shares(values: np.ndarray, signed: bool, limits: Limits | None = None) -> tuple[np.ndarray, float, float]:
    """Values as colour strengths from -1 to 1, NaN if not finite; and the ends of the colour bar.

    Signed: 0 has strength 0, and the largest absolute value 1 or -1. Otherwise the largest value has strength 1, and
    0 has strength 0, or the smallest value if it is negative or above half of the largest. `limits` replaces the ends.
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
    with np.errstate(invalid="ignore", over="ignore"):
        strengths = ((values - zero) / ((high - zero) or 1.0)).clip(-1 if signed else 0, 1)
    return np.where(np.isfinite(values), strengths, np.nan), low, high


def fill(strength: float) -> dict[str, str | float]:
    """The colour of a strength over the page's background."""
    opacity = STRONGEST * abs(strength) if np.isfinite(strength) else 0.0
    return {"fill": NEGATIVE if strength < 0 else POSITIVE, "fill_opacity": f"{opacity:.3g}"}


def cells(strengths: np.ndarray, x: float, y: float, width: float, height: float, tips: list[list[str]]) -> str:
    """Cells of strengths (R, C) from (x, y) on, in pixels, each with a tooltip."""
    R, C = strengths.shape
    boxes = (
        element("rect", tooltip(tips[r][c]), x=c, y=r, width=1, height=1, **fill(float(strengths[r, c])))
        for r in range(R)
        for c in range(C)
    )
    return _placed("".join(boxes) + _hatching(strengths) + _frame(R, C, fill="none"), x, y, width, height)


def merged_cells(
    strengths: np.ndarray, x: float, y: float, width: float, height: float, levels: int = LEVELS, tip: str = ""
) -> str:
    """Cells of strengths (R, C) as few paths, a path per level of opacity; with one tooltip for all of them."""
    R, C = strengths.shape
    steps = np.nan_to_num(np.round(strengths * levels)).astype(int)
    strokes: dict[int, list[str]] = {}
    for r, start, stop in _runs(steps):
        strokes.setdefault(int(steps[r, start]), []).append(f"M{start} {r}h{stop - start}")
    drawn = tooltip(tip) if tip else ""
    for sign, color in ((1, POSITIVE), (-1, NEGATIVE)):
        signed = [(abs(level), "".join(d)) for level, d in sorted(strokes.items()) if level * sign > 0]
        paths = [element("path", d=d, stroke_opacity=f"{STRONGEST * level / levels:.3g}") for level, d in signed]
        drawn += element("g", *paths, stroke=color, transform="translate(0 .5)") if paths else ""
    drawn += _minuses(strengths) + _hatching(strengths) + _frame(R, C, fill_opacity=0)
    return _placed(drawn, x, y, width, height)


def _placed(drawn: str, x: float, y: float, width: float, height: float) -> str:
    place = f"translate({number(x)} {number(y)}) scale({width:.4g} {height:.4g})"
    return element("g", drawn, transform=place, shape_rendering="crispEdges")


def _runs(values: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """Runs of equal values in the rows of (R, C): the row, the first column, and the column after the last."""
    for r, row in enumerate(values):
        starts = np.flatnonzero(np.diff(row, prepend=row[0] - 1)).tolist()
        yield from ((r, start, stop) for start, stop in zip(starts, [*starts[1:], len(row)], strict=True))


def _frame(R: int, C: int, **attributes: str | float) -> str:
    return _thin(f"M0 0H{C}V{R}H0z", 0.4, **attributes)


def _minuses(strengths: np.ndarray) -> str:
    """A line through the cells that are clearly negative: a second sign besides the colour."""
    is_negative = (np.nan_to_num(strengths) < -0.1).astype(int)
    commands = [f"M{start} {r}h{stop - start}" for r, start, stop in _runs(is_negative) if is_negative[r, start]]
    return _thin("".join(commands), 0.3, transform="translate(0 .5)") if commands else ""


def _hatching(strengths: np.ndarray) -> str:
    """A diagonal through each cell without a number; one line through cells that touch at their corners."""
    is_hatched = np.pad(np.isnan(strengths), 1)  # a margin ends each line
    R, C = is_hatched.shape
    commands = []
    for total in range(R + C - 1):  # the diagonal of the cells (r, c) with r + c = total, upwards
        columns = np.arange(max(0, total - R + 1), min(C, total + 1))
        ends = np.flatnonzero(np.diff(is_hatched[total - columns, columns].astype(int)))
        for first, last in zip(columns[ends[::2]].tolist(), columns[ends[1::2]].tolist(), strict=True):
            commands.append(f"M{first} {total - first - 1}l{last - first} {first - last}")
    return _thin("".join(commands), 0.3, shape_rendering="auto") if commands else ""


def _thin(path: str, opacity: float, **attributes: str | float) -> str:
    """A line in the text's colour, of one pixel in any coordinates."""
    style: dict[str, str | float] = {"stroke": "currentColor", "stroke_opacity": opacity}
    return element("path", d=path, vector_effect="non-scaling-stroke", **style, **attributes)


def color_bar(low: str, high: str, signed: bool, x: float, y: float) -> str:
    """The colours between the lowest and the highest value."""
    start = x + text_width(low, SMALL) + 6
    colors = merged_cells(np.linspace(-1 if signed else 0, 1, 12)[None], start, y, 8, 12)
    return label(low, x, y + 10, size=SMALL) + colors + label(high, start + 8 * 12 + 6, y + 10, size=SMALL)
