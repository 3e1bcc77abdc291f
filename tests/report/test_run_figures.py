"""Curves of runs show the numbers in metrics.jsonl."""

import json
from pathlib import Path

import numpy as np
import pytest

from figure_harness import parts, texts, tooltips
from glassgpt.figures import Figure
from glassgpt.report.figures import curve, losses
from glassgpt.report.runs import smoothed, smoothing_window
from glassgpt.utils.errors import UserError
from play_harness import GPT2_LIKE, write_run

STEPS = 20


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    for seed, name in enumerate("ab"):
        run = write_run(tmp_path / name, GPT2_LIKE)
        values = np.random.default_rng(seed).random(STEPS)
        records = [
            {"step": i + 1, "loss": v, "lr": v / 100, "grad_norm": v + 1, "tokens_seen": i, "seconds": 1}
            for i, v in enumerate(values)
        ]
        records += [{"step": step, "val_loss": 2.0 + seed + step} for step in (0, 10, 20)]
        run.metrics_path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return [tmp_path / "a", tmp_path / "b"]


def points(figure: Figure, name: str) -> list[tuple[float, float]]:
    """Return the points of a curve from its tooltips."""
    tips = [tip.removeprefix(name).removeprefix(": ") for tip in tooltips(figure) if tip.startswith(name)]
    return [(float(x), float(y)) for x, y in (tip.split(", ") for tip in tips)]


def losses_of(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random(STEPS)


def test_losses_of_one_run(runs: list[Path]) -> None:
    figure = losses(runs[0])
    window = smoothing_window(STEPS)
    np.testing.assert_allclose([y for _, y in points(figure, "each step")], losses_of(0), rtol=1e-5)
    mean = [y for _, y in points(figure, f"mean of {window} steps")]
    np.testing.assert_allclose(mean, smoothed(losses_of(0), window), rtol=1e-5)
    assert points(figure, "validation") == [(0, 2), (10, 12), (20, 22)]


def test_losses_of_two_runs(runs: list[Path]) -> None:
    figure = losses(*runs)
    assert points(figure, "b, validation") == [(0, 3), (10, 13), (20, 23)]
    assert {"a", "b", "a, validation", "b, validation"} < set(texts(figure))


def test_a_curve_is_any_recorded_number(runs: list[Path]) -> None:
    np.testing.assert_allclose(points(curve(runs[0], "lr"), ""), [*enumerate(losses_of(0) / 100, 1)], rtol=1e-5)
    assert points(curve(runs[1], "val_loss"), "") == [(0, 3), (10, 13), (20, 23)]
    assert len(parts(curve(list(runs), "grad_norm"), "circle")) == 2 * STEPS
    with pytest.raises(UserError, match="grad_norm"):
        curve(runs[0], "grad_nrom")
    with pytest.raises(UserError):
        losses(runs[0].parent)
