"""Figures: what they draw equals the data; their markup is valid and refers to nothing."""

import re
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from glassgpt.figures import Figure, bars, heatmap, lines, side_by_side, tokens
from glassgpt.utils.errors import UserError

HOSTILE = "<b>&\"'\x00\x1b\ud800\uffff\n]]> --"


def titles(figure: Figure) -> list[str]:
    """Return the tooltips of a figure's elements."""
    root = ElementTree.fromstring(figure.svg)
    return [element.text or "" for element in root.iter() if element.tag.endswith("title")][1:]


def hostile() -> list[Figure]:
    """Return a figure of each kind in which every text is hostile."""
    texts, pair = [HOSTILE, "b"], {HOSTILE: ([1, 2], [3, 4]), "b": ([1], [2])}
    figures = [
        lines(pair, title=HOSTILE, x=HOSTILE, y=HOSTILE, points=True),
        bars({HOSTILE: 1, "b": -2}, title=HOSTILE, y=HOSTILE, highlight=[HOSTILE]),
        heatmap([[1, 2], [-3, np.nan]], rows=texts, columns=texts, title=HOSTILE, x=HOSTILE, y=HOSTILE, signed=True),
        heatmap(np.eye(2), texts=[texts, texts]),
        tokens(texts, [1, np.inf], title=HOSTILE),
    ]
    return [*figures, side_by_side(*figures)]


@pytest.mark.parametrize("figure", hostile())
def test_markup_is_valid_and_refers_to_nothing(figure: Figure) -> None:
    for markup in (figure.svg, str(figure), figure._repr_html_()):
        root = ElementTree.fromstring(markup)
        assert not [e.tag for e in root.iter() if e.tag.endswith(("script", "style", "b", "image", "use"))]
        assert not re.search(r"\b(id|href|src|on\w+)=|url\(", markup.replace("xmlns=", ""))
        assert "\n" not in markup


@pytest.mark.parametrize("signed", [False, True])
def test_a_heat_map_of_64_by_64_is_small(signed: bool) -> None:
    values = np.random.default_rng(0).normal(size=(64, 64))
    assert len(heatmap(values, signed=signed).svg) < 60_000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_tensors_arrays_and_lists_are_drawn_alike(dtype: torch.dtype) -> None:
    values = torch.tensor([[1, 2], [3, 5]], dtype=dtype, requires_grad=dtype.is_floating_point)
    expected = heatmap([[1, 2], [3, 5]])
    assert heatmap(values) == heatmap(values.detach().double().numpy()) == heatmap(list(values)) == expected
    assert bars({"a": values[1, 1]}) == bars({"a": 5})


def test_tooltips_of_a_heat_map_are_its_values() -> None:
    values = np.random.default_rng(0).normal(size=(9, 7))
    for shown in (False, True):
        shown_values = [
            float(tip.rpartition(": ")[2]) for tip in titles(heatmap(values, form=".6f", show_values=shown))
        ]
        np.testing.assert_allclose(shown_values, values.ravel(), atol=1e-6)


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(UserError, match="3 xs and 2 ys"):
        lines({"a": ([1, 2, 3], [1, 2])})
    with pytest.raises(UserError, match=r"\(3,\)"):
        heatmap([1, 2, 3])
    with pytest.raises(UserError, match="rows"):
        heatmap(np.eye(2), rows=["a"])
    with pytest.raises(UserError, match="2 tokens and 1 values"):
        tokens(["a", "b"], [1])
