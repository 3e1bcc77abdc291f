"""Figures: what they draw equals the data; their markup is valid, small, and refers to nothing."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from figure_harness import hatched, merged_strengths, parts, texts, tooltip_values, tooltips
from glassgpt.figures import Figure, bars, heatmap, heatmap_grid, lines, side_by_side, tokens
from glassgpt.figures.cells import LEVELS, NEGATIVE, POSITIVE, STRONGEST, shares
from glassgpt.figures.charts import MAX_POINTS
from glassgpt.figures.svg import SERIES
from glassgpt.utils.errors import UserError
from page_harness import chromium

HOSTILE = "<b>&\"'\x00\x1b\ud800\uffff\n]]> --" + 60 * "x"
TRIPLE: Any = [1, 2, 3]
GAPS = [np.nan, np.inf, -np.inf]


def numbers(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape)


def examples(text: str = "name") -> list[Figure]:
    """Return figures of each kind, with `text` as every text."""
    names, pair = [text, "b", "c"], {text: ([1, 2, 4], [3, 4, 1e-5]), "b": ([1], [2])}
    figures = [
        lines(pair, title=text, x=text, y=text, log_x=True, log_y=True, points=True),
        lines({**pair, **{f"{text}{i}": ([0, 1], [i, 2]) for i in range(9)}}, title=text, faint=[text]),
        lines({"gaps": (range(3), GAPS)}),
        lines({}),
        bars({text: 1, "b": -2, "c": np.nan}, title=text, y=text),
        bars({}),
        heatmap(numbers(3, 3), rows=names, columns=names, title=text, x=text, y=text, signed=True),
        heatmap([GAPS, GAPS], texts=[names, names]),
        heatmap(numbers(40, 50), columns=50 * [text], rows=40 * [text], title=text),
        heatmap_grid(numbers(3, 3, 20, 20), rows=names, columns=names, tooltips=[names, names, names], title=text),
        tokens(40 * names, [1, -3, np.nan] * 40, title=text, signed=True),
        tokens([], []),
    ]
    return [*figures, side_by_side(*figures)]


@pytest.mark.parametrize("figure", examples(HOSTILE))
def test_markup_is_valid_and_refers_to_nothing(figure: Figure) -> None:
    for markup in (figure.svg, str(figure), figure._repr_html_()):
        root = ElementTree.fromstring(markup)
        assert not [e.tag for e in root.iter() if e.tag.endswith(("script", "style", "}b", "image", "use"))]
        assert not re.search(r"\s(id|href|src|on\w+)=|url\(", markup)
        assert "\n" not in markup


@pytest.mark.parametrize("figure", examples()[:-3])
def test_a_figure_has_a_role_a_title_and_fits_a_phone(figure: Figure) -> None:
    root = ElementTree.fromstring(figure.svg)
    width, height = map(float, root.attrib["viewBox"].split()[2:])
    assert root.get("role") == "img"
    assert root[0].tag.endswith("title")
    assert root[0].text
    assert height > 0
    assert 0 < width <= 480 or "min-width" in root.attrib["style"]
    assert "max-width:100%" in root.attrib["style"]


@pytest.mark.parametrize("signed", [False, True])
def test_large_heat_maps_are_small_files(signed: bool) -> None:
    assert len(heatmap(numbers(64, 64), signed=signed).svg) < 60_000
    grid = numbers(12, 12, 12, 12) * np.tril(np.ones((12, 12)))
    assert len(heatmap_grid(grid, rows=12 * ["L"], columns=12 * ["H"]).svg) < 200_000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_tensors_arrays_and_lists_are_drawn_alike(dtype: torch.dtype) -> None:
    values = torch.tensor([[1, 2], [3, 5]], dtype=dtype, requires_grad=dtype.is_floating_point)
    expected = heatmap([[1, 2], [3, 5]])
    assert heatmap(values) == heatmap(values.detach().double().numpy()) == heatmap(list(values)) == expected
    assert bars({"a": values[1, 1]}) == bars({"a": 5})
    assert lines({"a": (range(2), values[0])}) == lines({"a": (np.arange(2), [1, 2])})


def axis_values(figure: Figure, pixels: list[float], log: bool) -> np.ndarray:
    """Return the values at places on the y axis, as its first and last ticks show them."""
    ticks = [text for text in parts(figure, "text") if text.get("text-anchor") == "end"]
    places = [float(tick.attrib["y"]) - 4 for tick in ticks]
    values = np.array([float((tick.text or "").replace("−", "-").replace(",", "")) for tick in ticks])
    values = np.log10(values) if log else values
    slope = (values[-1] - values[0]) / (places[-1] - places[0])
    result: np.ndarray = values[0] + slope * (np.array(pixels) - places[0])
    return 10**result if log else result


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e7])
def test_points_are_where_the_axis_says(log: bool, scale: float) -> None:
    ys = scale * np.exp(numbers(20) * 2)
    figure = lines({"a": (range(20), ys)}, log_y=log, points=True)
    circles = parts(figure, "circle")
    shown = axis_values(figure, [float(circle.attrib["cy"]) for circle in circles], log)
    np.testing.assert_allclose(shown, ys, rtol=2e-3 if log else 0, atol=0 if log else 2e-3 * ys.max())
    np.testing.assert_allclose([float(tip.split(", ")[1]) for tip in tooltips(figure)], ys, rtol=1e-5)
    assert np.ptp(np.diff([float(circle.attrib["cx"]) for circle in circles])) < 0.03


def test_a_gap_interrupts_a_curve_and_a_lone_point_stays_visible() -> None:
    (path,) = [p for p in parts(lines({"a": (range(6), [1, 2, np.nan, 3, np.inf, 4])}), "path") if p.get("fill")]
    assert re.sub(r"[\d. ]+", "", path.attrib["d"]) == "MLMhMh"
    values = [1, 0, -1, 10]
    assert len(parts(lines({"a": (range(4), values)}, log_y=True), "circle")) == 2


def test_a_long_curve_is_thinned_and_keeps_its_extremes() -> None:
    values = numbers(100_000)
    values[[50_001, 70_003]] = -30, 40
    figure = lines({"a": (range(100_000), values)})
    (path,) = [p for p in parts(figure, "path") if p.get("fill")]
    shown = axis_values(figure, [float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", path.attrib["d"])], log=False)
    assert len(shown) <= MAX_POINTS
    np.testing.assert_allclose([shown.min(), shown.max()], [-30, 40], atol=0.1)
    assert len(figure.svg) < 15_000


def test_extremes_and_gaps_of_a_logarithmic_curve_survive_thinning() -> None:
    values = np.ones(3000)
    values[1500:1502] = 1e-6, -5
    figure = lines({"a": (range(3000), values)}, log_y=True)
    (path,) = [p for p in parts(figure, "path") if p.get("fill")]
    shown = axis_values(figure, [float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", path.attrib["d"])], log=True)
    np.testing.assert_allclose([shown.min(), shown.max()], [1e-6, 1], rtol=0.05)
    assert path.attrib["d"].count("M") == 2


@pytest.mark.parametrize("log", [False, True])
def test_values_at_the_limits_have_places(log: bool) -> None:
    assert "nan" not in lines({"a": ([1, 2], [1e-249, 9e249])}, log_y=log, log_x=log).svg


def test_names_may_be_numbers_and_a_value_any_array_of_one() -> None:
    names: list[Any] = [1, 2]
    curves = [lines({n: ([1], [2]) for n in given}, points=True).svg for given in (names, ["1", "2"])]
    assert curves[0] == curves[1]
    assert bars({names[0]: torch.ones(1)}).svg == bars({"1": 1.0}).svg
    grids = [heatmap_grid(np.ones((1, 1, 2, 2)), rows=given, columns=given).svg for given in (names[:1], ["1"])]
    assert grids[0] == grids[1]
    assert tokens(names, [0, 1]).svg == tokens(["1", "2"], [0, 1]).svg


def test_bars_are_as_long_as_their_values() -> None:
    values = {"a": 3.0, "b": -1.5, "c": np.nan, "d": 0.75}
    figure = bars(values, form="+.2f")
    boxes = parts(figure, "rect")
    widths = np.array([float(box.attrib["width"]) for box in boxes])
    np.testing.assert_allclose(widths / widths[0], [1, 0.5, 0, 0.25], atol=1e-3)
    starts = [float(box.attrib["x"]) for box in boxes]
    assert starts[0] == starts[3] == pytest.approx(starts[1] + widths[1], abs=0.02)
    assert [text for text in texts(figure) if text not in values] == ["+3.00", "−1.50", "–", "+0.75"]
    assert {box.attrib["fill"] for box in boxes} == {POSITIVE, NEGATIVE}


@pytest.mark.parametrize("signed", [False, True])
def test_cells_show_their_values(signed: bool) -> None:
    values = numbers(9, 7) if signed else np.exp(numbers(9, 7))
    figure = heatmap(values, form=".6f", signed=signed)
    np.testing.assert_allclose(tooltip_values(figure), values.ravel(), atol=1e-6)
    assert [text.replace("−", "-") for text in texts(figure)[:63]] == [f"{v:.6f}" for v in values.ravel()]
    cells = [cell for cell in parts(figure, "rect") if cell.get("fill-opacity")]
    strengths = np.array([float(cell.attrib["fill-opacity"]) for cell in cells]) / STRONGEST
    np.testing.assert_allclose(strengths, np.abs(values.ravel()) / np.abs(values).max(), atol=2e-3)
    assert [cell.get("fill") == NEGATIVE for cell in cells] == (values.ravel() < 0).tolist()
    assert heatmap(values, show_values=False).svg.count("<text") == 2


@pytest.mark.parametrize("signed", [False, True])
def test_merged_cells_show_their_values(signed: bool) -> None:
    values = numbers(30, 20)
    values[numbers(30, 20) < -1] = -np.inf
    figure = heatmap(values, signed=signed)
    expected, _, _ = shares(values, signed)
    drawn = merged_strengths(parts(figure, "g")[0], values.shape)
    np.testing.assert_allclose(drawn, np.abs(np.nan_to_num(expected)), atol=0.53 / LEVELS)
    np.testing.assert_array_equal(hatched(figure, values.shape), np.isinf(values))


def test_limits_make_heat_maps_comparable() -> None:
    halves, full = (heatmap([[0, value]], limits=(0, 1)) for value in (0.5, 1.0))
    strongest = [max(float(c.get("fill-opacity", 0)) for c in parts(f, "rect")) for f in (halves, full)]
    np.testing.assert_allclose(strongest, [STRONGEST / 2, STRONGEST], atol=1e-3)


def test_a_grid_shows_each_matrix() -> None:
    values = np.abs(numbers(2, 3, 8, 8))
    figure = heatmap_grid(values, rows=["L0", "L1"], columns=["H0", "H1", "H2"])
    pictures = [group for group in parts(figure, "g") if len(group) and group[0].tag.endswith("title")]
    drawn = np.array([merged_strengths(picture, (8, 8)) for picture in pictures]).reshape(values.shape)
    np.testing.assert_allclose(drawn, values / values.max(), atol=0.53 / 12)
    assert tooltips(figure) == [f"L{r} H{c}" for r in range(2) for c in range(3)]


def test_tokens_show_texts_and_values() -> None:
    figure = tokens([" the", "\n", "a\u200b"], [2.0, 1.0, np.nan], form=".1f")
    spans = parts(figure, "span")
    assert [span.text for span in spans] == ["␣the", "2.0", "⏎", "1.0", "a<U+200B>", "–"]
    opacities = [float(value) for value in re.findall(r"/ ([\d.]+)\)", figure.svg)]
    np.testing.assert_allclose(opacities, [STRONGEST, STRONGEST / 2, 0], atol=1e-3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: lines({"a": ([1, 2, 3], [1, 2])}), "3 xs and 2 ys"),
        (lambda: lines({"a": ([[1]], [[2]])}), r"\(1, 1\)"),
        (lambda: lines({"a": TRIPLE}), "not 3 values"),
        (lambda: lines({"a": ([1], [10**400])}), "needs numbers"),
        (lambda: bars({"a": "b"}), "needs numbers"),
        (lambda: bars({"a": torch.ones(2)}), r"\(2,\)"),
        (lambda: bars({"a": torch.tensor(1j)}), "complex"),
        (lambda: heatmap(np.eye(2) * 1j), "complex"),
        (lambda: bars({"a": 1}, form="d d"), "d d"),
        (lambda: heatmap([1, 2, 3]), r"\(3,\)"),
        (lambda: heatmap([[1], [1, 2]]), "needs numbers"),
        (lambda: heatmap(np.eye(2), rows=["a"]), "rows has 1"),
        (lambda: heatmap(np.eye(2), texts=[["a", "b"], ["c"]]), "row 1 of texts has 1"),
        (lambda: heatmap_grid(np.zeros((2, 2, 3, 3)), rows=["a"], columns=["b", "c"]), r"\(1, 2, M, N\)"),
        (lambda: heatmap_grid(np.zeros((0, 1, 3, 3)), rows=[], columns=["b"]), r"\(R, 1, M, N\)"),
        (lambda: heatmap_grid(np.zeros((1, 1, 0, 0)), rows=["a"], columns=["b"]), r"\(1, 1, 0, 0\)"),
        (lambda: tokens(["a", "b"], [1]), "2 tokens and 1 values"),
    ],
)
def test_input_that_does_not_fit_is_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        call()


def luminance(color: tuple[float, ...]) -> float:
    """Return the relative luminance of an sRGB colour (0 to 1 each), as WCAG 2.2 defines it."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in color]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(*colors: tuple[float, ...]) -> float:
    low, high = sorted(map(luminance, colors))
    return (high + 0.05) / (low + 0.05)


def rgb(color: str) -> tuple[float, ...]:
    return tuple(int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))


@pytest.mark.parametrize(("page", "ink"), [("#ffffff", "#1d2127"), ("#131416", "#e8eaed"), ("#1d2127", "#e8eaed")])
def test_colours_have_contrast_on_light_and_dark_pages(page: str, ink: str) -> None:
    for color in (*SERIES, POSITIVE, NEGATIVE):
        assert contrast(rgb(color), rgb(page)) >= 2.9 if page == "#1d2127" else 3.0
    for color in (POSITIVE, NEGATIVE):
        cell = tuple(STRONGEST * c + (1 - STRONGEST) * p for c, p in zip(rgb(color), rgb(page), strict=True))
        assert contrast(cell, rgb(ink)) >= 4.0


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("colors", ["background:#fff;color:#111", "background:#131416;color:#ccc"])
def test_figures_in_a_browser_fit_the_page_and_request_nothing(colors: str, width: int, tmp_path: Path) -> None:
    body = "".join(map(str, examples("a name")))
    path = tmp_path / "page.html"
    path.write_text(f'<!doctype html><meta charset="utf-8"><body style="{colors}">{body}', encoding="utf-8")
    with chromium() as browser:
        page = browser.new_page(viewport={"width": width, "height": 800})
        requests: list[str] = []
        page.on("request", lambda request: requests.append(request.url))
        page.goto(path.as_uri())
        assert requests == [path.as_uri()]
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        outside = """() => [...document.querySelectorAll('svg')].flatMap(svg => {
            const frame = svg.getBoundingClientRect();
            return [...svg.querySelectorAll('text, rect, circle')].filter(e => {
                const box = e.getBoundingClientRect();
                return box.left < frame.left - 1 || box.right > frame.right + 1
                    || box.top < frame.top - 1 || box.bottom > frame.bottom + 1;
            }).map(e => [svg.getAttribute('viewBox'), e.outerHTML]);
        })"""
        assert page.evaluate(outside) == []
