"""The JavaScript computations of the page, in node or a browser; sampling and visibility equal the library's."""

import json
import math
import shutil
import subprocess
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch

from glassgpt.config.schema import SamplingConfig
from glassgpt.generation.generate import sampling_distribution, window_start
from glassgpt.model.attention import Span
from page_harness import chromium

TESTS = Path(__file__).parent / "javascript"
SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.8},
    {"temperature": 1.3, "top_k": 5},
    {"temperature": 1.0, "top_p": 0.7},
    {"temperature": 0.9, "min_p": 0.2},
    {"temperature": 0.1, "top_k": 3},
    {"temperature": 1e-300, "top_k": 3, "min_p": 0.1},
    {"temperature": 1.7, "top_k": 20, "top_p": 0.9, "min_p": 0.01},
]


def fixtures() -> dict[str, Any]:
    """Return the values that the library computes, by the name of the JSON file that the JavaScript tests read."""
    logits = torch.randn(3, 40, generator=torch.Generator().manual_seed(1)) * 3
    logits[1] = logits[1].round()  # ties
    spans = [Span(None), Span(3), Span(2, n_global=2), Span(1)]
    positions = torch.arange(8)
    p, q = logits[0].double(), logits[2].double()
    log_p, log_q = p.log_softmax(dim=-1), q.log_softmax(dim=-1)
    return {
        "sampling.json": [
            {
                "logits": row.tolist(),
                "settings": {
                    "temperature": settings["temperature"],
                    "topK": settings.get("top_k"),
                    "topP": settings.get("top_p"),
                    "minP": settings.get("min_p"),
                },
                "expected": sampling_distribution(row[None], SamplingConfig(**settings))[0].tolist(),
            }
            for row in logits
            for settings in SETTINGS
        ],
        "divergence.json": {
            "p": p.tolist(),
            "q": q.tolist(),
            "entropy": float(torch.special.entr(log_p.exp()).sum()) / math.log(2),
            "kl": float((log_p.exp() * (log_p - log_q)).sum()) / math.log(2),
        },
        "window_start.json": [
            [length, context, window_start(length, context)] for length in range(1, 40) for context in (1, 2, 7, 16)
        ],
        "spans.json": [
            {
                "span": {"window": span.window, "globals": span.n_global},
                "visible": span.visible(positions[:, None], positions[None, :]).tolist(),
            }
            for span in spans
        ],
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with the JavaScript tests, the page's modules and the JSON fixtures."""
    static = Path(str(resources.files("glassgpt.playground") / "static"))
    shutil.copytree(static / "core", tmp_path / "core")
    shutil.copytree(TESTS, tmp_path, dirs_exist_ok=True)
    (tmp_path / "package.json").write_text('{"type": "module"}')
    for name, value in fixtures().items():
        (tmp_path / name).write_text(json.dumps(value))
    return tmp_path


def test_javascript_in_node_or_else_in_a_browser(folder: Path) -> None:
    names = sorted(path.name for path in folder.glob("*.test.js"))
    assert len(names) == 3
    node = shutil.which("node")
    if node is None:
        assert run_in_browser(folder, names) == []
        return
    result = subprocess.run([node, "--test", *names], cwd=folder, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.slow
def test_javascript_in_a_browser(folder: Path) -> None:
    assert run_in_browser(folder, sorted(path.name for path in folder.glob("*.test.js"))) == []


def run_in_browser(folder: Path, names: list[str]) -> list[list[str]]:
    """Run the tests in a browser and return the names and errors of those that fail. Skip if there is no browser."""

    def serve(route: Any) -> None:
        path = urlsplit(route.request.url).path.lstrip("/")
        kind = {"js": "text/javascript", "json": "application/json"}.get(path.rpartition(".")[2], "text/html")
        route.fulfill(content_type=kind, body=(folder / path).read_text() if path else "<!doctype html>")

    with chromium() as browser:
        page = browser.new_page()
        page.route("**/*", serve)
        page.goto("http://tests.invalid/")
        script = """async names => {
            const harness = await import('/harness.js');
            for (const name of names) await import(`/${name}`);
            await harness.finished();
            return harness.results;
        }"""
        results: list[list[str]] = page.evaluate(script, names)
    assert len(results) > 20
    return [result for result in results if result[1] is not None]
