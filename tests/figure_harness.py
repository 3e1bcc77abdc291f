"""Reads figures back: the values that their markup shows."""

import re
from xml.etree import ElementTree

import numpy as np

from glassgpt.figures import Figure
from glassgpt.figures.cells import STRONGEST

Element = ElementTree.Element


def parts(figure: Figure | str, tag: str) -> list[Element]:
    """Return a figure's elements with this tag, in the order of drawing."""
    root = ElementTree.fromstring(figure if isinstance(figure, str) else figure.svg)
    return [element for element in root.iter() if element.tag.rpartition("}")[2] == tag]


def texts(figure: Figure | str) -> list[str]:
    """Return the texts that a figure shows."""
    return [element.text or "" for element in parts(figure, "text")]


def tooltips(figure: Figure | str) -> list[str]:
    """Return the tooltips of a figure's elements, without its own title."""
    return [element.text or "" for element in parts(figure, "title")][1:]


def tooltip_values(figure: Figure | str) -> list[float]:
    """Return the number that each tooltip ends with."""
    return [float(tip.split()[-1]) for tip in tooltips(figure)]


def merged_strengths(group: Element, shape: tuple[int, int]) -> np.ndarray:
    """Return the strengths (R, C) that the paths of one `merged_cells` draw, without signs."""
    strengths = np.zeros(shape)
    for path in group.iter():
        if path.get("stroke-opacity") and path.get("vector-effect") is None:
            for column, row, length in re.findall(r"M(\d+) (\d+)h(\d+)", path.get("d", "")):
                cells = strengths[int(row), int(column) : int(column) + int(length)]
                assert not cells.any()
                cells[:] = float(path.get("stroke-opacity", "")) / STRONGEST
    return strengths


def hatched(figure: Figure, shape: tuple[int, int]) -> np.ndarray:
    """Return which cells (R, C) of a heat map a diagonal crosses."""
    crossed = np.zeros(shape, dtype=bool)
    for path in parts(figure, "path"):
        for x, y, length, rise in re.findall(r"M(\d+) (\d+)l(\d+) (-\d+)", path.get("d", "")):
            assert int(length) == -int(rise)
            for i in range(int(length)):
                crossed[int(y) - 1 - i, int(x) + i] = True
    return crossed
