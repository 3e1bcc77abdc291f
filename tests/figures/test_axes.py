"""Ticks are round, inside the axis, and enough to read values."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glassgpt.figures.axes import Scale, linear_ticks, scale_of, tick_texts

finite = st.floats(-1e12, 1e12)


@given(st.lists(finite, min_size=1, max_size=5), st.booleans())
def test_an_axis_has_round_ticks_inside_and_its_texts_are_exact(values: list[float], log: bool) -> None:
    data = np.abs(values) + 1e-9 if log else np.array(values)
    scale = scale_of(data, 0, 100, log)
    places = scale(data)
    assert ((places >= -1e-6) & (places <= 100 + 1e-6)).all()
    ticks = scale.ticks(5)
    assert 2 <= len(ticks) <= 20
    assert ticks == sorted(set(ticks))
    at = scale(np.array(ticks))
    assert ((at > -0.01) & (at < 100.01)).all()
    shown = [float(text.replace("−", "-").replace(",", "")) for text in tick_texts(ticks)]
    np.testing.assert_allclose(shown, ticks, rtol=1e-5, atol=1e-9 * max(map(abs, ticks)))
    assert len(set(shown)) == len(shown)


@given(finite, st.floats(1e-6, 1e12))
def test_linear_ticks_are_multiples_of_a_round_step(low: float, length: float) -> None:
    if length < 1e-6 * abs(low):
        return
    ticks = linear_ticks(low, low + length, 5)
    step = (ticks[-1] - ticks[0]) / (len(ticks) - 1)
    mantissa = step / 10 ** math.floor(math.log10(step) + 1e-6)
    assert min(abs(mantissa - round_) for round_ in (1, 2, 5)) < 1e-3
    np.testing.assert_allclose(np.array(ticks) / step, np.round(np.array(ticks) / step), atol=1e-3)


@pytest.mark.parametrize("values", [[], [np.nan], [0.0], [3.0, 3.0], [1e308, -1e308], [5e-324], [1.0, 1.0 + 2**-52]])
def test_degenerate_data_still_have_an_axis(values: list[float]) -> None:
    for log in (False, True):
        scale = scale_of(np.array(values), 0, 100, log)
        assert isinstance(scale, Scale)
        assert len(tick_texts(scale.ticks(5))) >= 2
