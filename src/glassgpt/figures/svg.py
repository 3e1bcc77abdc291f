"""What all figures are made of: `Figure`, SVG elements, text, colours, and data as NumPy arrays.

Figures work on light and dark pages: text and axes have the page's text colour, series have colours with a contrast of
at least 3 to white and to near black, and cells of a heat map are a colour over the page's background. No figure has an
id, a style sheet, a script or an address, so any number of them can be on a page.
"""

import math
import unicodedata
from dataclasses import dataclass
from typing import Any
from xml.sax.saxutils import escape, quoteattr

import numpy as np

from glassgpt.utils.errors import UserError

SERIES = ("#0072b2", "#d55e00", "#00916a", "#a35fc4", "#9a7200", "#7a7f87")
WIDTH = 480  # of a chart in pixels, on a screen that is wide enough
SIZE = 13  # of text in pixels
FONT = "system-ui,sans-serif"
# em of wide and of narrow characters; DejaVu Sans, a common font on Linux, has the widest signs
_WIDTHS = dict.fromkeys("mwMW%@…", 0.95) | dict.fromkeys("×+−±=≈<>≤≥→", 0.86) | dict.fromkeys("ijl.,:;'|() ", 0.4)
_MIN_WIDTH_SHARE = 0.72  # a figure shrinks to this share of its width, then it scrolls


@dataclass(frozen=True)
class Figure:
    """A figure as inline markup without references to other files. Jupyter and marimo show it."""

    svg: str  # one SVG element; of `tokens` and `side_by_side`, an HTML element

    def _repr_html_(self) -> str:
        return f'<div style="overflow-x:auto">{self.svg}</div>'

    def __str__(self) -> str:
        """The HTML that shows the figure, on one line."""
        return self._repr_html_()


def side_by_side(*figures: Figure) -> Figure:
    """Figures in a row, which wraps on narrow screens."""
    items = (f'<div style="flex:0 1 auto;min-width:0;max-width:100%;overflow-x:auto">{f.svg}</div>' for f in figures)
    style = "display:flex;flex-wrap:wrap;gap:12px 24px;align-items:flex-start"
    return Figure(f'<div style="{style}">{"".join(items)}</div>')


def element(name: str, *children: str, **attributes: str | float) -> str:
    """An XML element. Children are markup (see `text_of`); `_` in attribute names stands for `-`."""
    given = "".join(f" {key.strip('_').replace('_', '-')}={quoteattr(_value(v))}" for key, v in attributes.items())
    return f"<{name}{given}>{''.join(children)}</{name}>" if children else f"<{name}{given}/>"


def _value(value: str | float) -> str:
    return clean(value) if isinstance(value, str) else number(value)


def number(value: float) -> str:
    """A coordinate with at most two decimals."""
    return f"{round(value, 2) + 0.0:.2f}".rstrip("0").rstrip(".")


def clean(text: str) -> str:
    """Text on one line, without characters that XML does not allow or that no font shows."""
    return "".join(c if c.isprintable() else " " if c.isspace() else "\ufffd" for c in text)


def text_of(text: str) -> str:
    """Text as markup."""
    return escape(clean(text))


def attribute_of(text: str) -> str:
    """Text as the value of an attribute, with its quotes."""
    return quoteattr(clean(text))


def number_text(value: float, form: str) -> str:
    """A number in a format, with a real minus sign; – if it is not finite. Raises `UserError` for an invalid format."""
    try:
        return format(value, form).replace("-", "−") if math.isfinite(value) else "–"
    except ValueError as error:
        raise UserError(f"form={form!r} is not a format of a number ({error}); example: '.2f'") from None


def label(text: str, x: float, y: float, anchor: str = "start", size: float = SIZE, **attributes: str) -> str:
    """A text element whose baseline is at y."""
    sizes: dict[str, str | float] = {} if size == SIZE else {"font_size": size}
    anchors: dict[str, str | float] = {} if anchor == "start" else {"text_anchor": anchor}
    return element("text", text_of(text), x=x, y=y, **anchors, **sizes, **attributes)


def tooltip(text: str) -> str:
    """A child that browsers show when the pointer is over an element."""
    return element("title", text_of(text))


def drawing(width: float, height: float, title: str, *children: str) -> Figure:
    """A figure of one SVG element of at most `width` by `height` pixels; it shrinks on narrow screens."""
    least = f"min-width:{number(_MIN_WIDTH_SHARE * width)}px;" if width > WIDTH else ""
    attributes: dict[str, str | float] = {
        "xmlns": "http://www.w3.org/2000/svg",
        "viewBox": f"0 0 {number(width)} {number(height)}",
        "width": width,
        "role": "img",
        "style": f"{least}max-width:100%;height:auto",  # a minimum wins over a maximum
        "font_family": FONT,
        "font_size": SIZE,
        "fill": "currentColor",
    }
    return Figure(element("svg", tooltip(title), *children, **attributes))


def heading(title: str) -> tuple[str, float]:
    """A title as markup, and the height that it takes."""
    return (label(title, 0, 16, size=15, font_weight="bold"), 28) if title else ("", 6)


def text_width(text: str, size: float = SIZE) -> float:
    """Estimated width of a text in pixels, rather too large than too small: the font is not known here."""
    return size * sum(1.0 if unicodedata.east_asian_width(c) in "WF" else _WIDTHS.get(c, 0.62) for c in text)


def shortened(text: str, width: float, size: float = SIZE) -> str:
    """A text of at most this width in pixels."""
    if text_width(text, size) <= width + 0.01:
        return text
    while text and text_width(text + "…", size) > width:
        text = text[:-1]
    return text + "…"


def floats(values: Any) -> np.ndarray:
    """Values as float64: of a NumPy array, a PyTorch tensor of any dtype and device, or nested lists."""
    if "complex" in str(getattr(values, "dtype", "")):  # otherwise only the real part would be drawn
        raise UserError("a figure needs real numbers, not complex ones: use abs(), or real and imag")
    if hasattr(values, "detach"):  # a tensor; NumPy has no bfloat16, MPS no float64
        values = values.detach().cpu().double()
    elif isinstance(values, list | tuple):
        values = [floats(v) if hasattr(v, "detach") or isinstance(v, list | tuple) else v for v in values]
    try:
        return np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"a figure needs numbers: {error}") from None


def vector(values: Any, what: str) -> np.ndarray:
    """Values (N,) as float64. Raises `UserError` for another shape."""
    array = floats(values)
    if array.ndim != 1:
        raise UserError(f"{what} must be a sequence of numbers, not of shape {array.shape}; use a row or flatten()")
    return array


def matrix(values: Any, what: str) -> np.ndarray:
    """Values (R, C) as float64. Raises `UserError` for another shape or none."""
    array = floats(values)
    if array.ndim != 2 or not array.size:
        advice = "use squeeze() or an index"
        raise UserError(f"{what} must be a matrix (rows, columns), not of shape {array.shape}; {advice}")
    return array
