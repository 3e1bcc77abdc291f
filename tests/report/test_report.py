"""The report shows exactly the run's records in any state of the run, and loads no other resources."""

import json
import math
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from plotly.offline import get_plotlyjs

from glassgpt.config.model import ModelConfig
from glassgpt.config.schema import DataConfig, OptimConfig, TrainConfig
from glassgpt.figures.axes import thinned
from glassgpt.report.charts import GPT2_FINEWEB_LOSS
from glassgpt.report.page import write_report
from glassgpt.report.runs import MAX_POINTS, smoothed
from glassgpt.utils.errors import UserError
from page_harness import chromium
from report_harness import Page

HOSTILE = "</script><script>alert(1)</script>\n<!-- <img src='http://example.org/x.png'> & </pre>\r## Step 000099"


def training_record(step: int, **changes: Any) -> dict[str, Any]:
    record = {
        "step": step,
        "loss": 4 / step + 0.1,
        "lr": 1e-3 / step,
        "grad_norm": 2.0 / step,
        "seconds": 0.05,
        "tokens_seen": 768 * step,
    }
    return record | {"tokens_per_second": 15000.0 + step, "memory_bytes": 512_000_000} | changes


def evaluation(step: int, loss: float) -> dict[str, Any]:
    return {
        "step": step,
        "val_loss": loss,
        "val_perplexity": math.exp(loss),
        "val_bits_per_byte": loss / 2,
        "seconds": 1.0,
    }


ENVIRONMENT = {"threads": 1, "data_fingerprint": "ab12"}  # what each has


def make_run(folder: Path, records: list[dict[str, Any]]) -> Path:
    folder.mkdir()
    (folder / "config.toml").write_text(TrainConfig(steps=2000).to_toml())
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A small finished run. Its best evaluation is not its last, and its texts contain HTML that must be escaped."""
    records = [
        evaluation(0, 4.2),
        *map(training_record, range(1, 6)),
        evaluation(5, 1.25),
        training_record(6),
        evaluation(6, 1.5),
    ]
    run = make_run(tmp_path / "demo & <b>", records)
    sample = "\n".join("    " + line for line in HOSTILE.split("\n"))
    (run / "samples.md").write_bytes(
        f"## Step 000000\n\n### Sample 1\n\n    x\n\n## Step 000006\n\n### Sample 1\n\n{sample}\n".encode()
    )
    more = {"torch": "2.13.0", "parameters": 811776, "cpu": "</script><i>", "data": {"fingerprint": "ab12"}}
    (run / "environment.json").write_text(json.dumps(ENVIRONMENT | more))
    (run / "checkpoints" / "000006").mkdir(parents=True)
    return run


def test_charts_contain_the_recorded_numbers(run: Path) -> None:
    charts = Page(write_report(run)).charts
    loss = charts["Loss (nats per token)"]
    assert loss["each step"]["x"] == [1, 2, 3, 4, 5, 6]
    assert loss["each step"]["y"] == [4 / step + 0.1 for step in range(1, 7)]
    assert (loss["validation"]["x"], loss["validation"]["y"]) == ([0, 5, 6], [4.2, 1.25, 1.5])
    assert charts["Learning rate"]["each step"]["y"] == [1e-3 / step for step in range(1, 7)]
    assert charts["Gradient norm before clipping"]["each step"]["y"] == [2.0 / step for step in range(1, 7)]
    assert charts["Tokens per second"]["each step"]["y"] == [15000.0 + step for step in range(1, 7)]
    assert charts["Memory (bytes)"]["each step"]["y"] == [512e6] * 6


FINEWEB: dict[str, Any] = {"source": "fineweb-edu", "validation": "first_shard", "tokenizer": "gpt2"}


@pytest.mark.parametrize(
    "change",
    [
        {"source": "my.txt"},
        {"validation": "fraction"},
        {"tokenizer": "bytes"},
        {"mixture": {"my.txt": 1.0}},
        {"shard_tokens": 1000},
        {"column": "url"},
        {"deduplicate": True},
        {"validation": "fraction", "validation_source": "my.txt"},
    ],
)
def test_gpt2_loss_is_drawn_only_for_the_same_validation_text(run: Path, change: dict[str, Any]) -> None:
    def reference() -> dict[str, Any] | None:
        return Page(write_report(run)).charts["Loss (nats per token)"].get("GPT-2 124M")

    (run / "config.toml").write_text(TrainConfig(steps=2000, data=DataConfig(**FINEWEB)).to_toml())
    drawn = reference()
    assert drawn is not None
    assert (drawn["style"], drawn["y"]) == ("reference", [GPT2_FINEWEB_LOSS] * 2)
    (run / "config.toml").write_text(TrainConfig(steps=2000, data=DataConfig(**(FINEWEB | change))).to_toml())
    assert reference() is None


def test_summary_has_final_and_best_evaluation_and_the_environment(run: Path) -> None:
    page = Page(write_report(run))
    assert page.texts["td"][1:3] == ["1.5000", "1.2500"]
    facts = dict(zip(page.texts["dt"], page.texts["dd"], strict=True))
    assert facts["steps"] == "6 of 2,000"
    assert facts["tokens seen"] == "4,608"
    assert facts["checkpoints kept"] == "000006"
    assert facts["parameters"] == "811,776"
    assert facts["data, fingerprint"] == "ab12"


def test_html_in_texts_is_escaped(run: Path) -> None:
    page = Page(write_report(run))
    assert page.texts["h1"][0].strip() == "demo & <b>"
    assert page.texts["pre"][1] == "\n" + HOSTILE
    assert len(page.texts["script"]) == 3
    assert not {"img", "b", "i"} & {tag for tag, _ in page.tags}
    assert page.texts["summary"] == ["Step 0", "Step 6", "config.toml"]


def test_the_page_loads_no_other_resources(run: Path) -> None:
    path = write_report(run)
    page = Page(path)
    for tag, attributes in page.tags:
        assert not {"src", "srcset", "action"} & attributes.keys(), tag
        assert (attributes.get("href") or "data:").startswith("data:"), tag
    policy = next(
        a["content"] for tag, a in page.tags if tag == "meta" and a.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert "http" not in policy
    # Apart from plotly's bundle, which the policy confines, only the sample's text names another machine.
    assert re.findall(r"https?://[\w./]*", path.read_text().replace(get_plotlyjs(), "")) == ["http://example.org/x.png"]
    assert not re.search(r"url\(|@import", page.texts["style"][0])


def test_damaged_lines_of_the_metrics_are_skipped_and_listed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = run / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + '{"step": 7, "lo')  # incomplete: still being written
    write_report(run)
    assert capsys.readouterr().err == ""
    metrics.write_text(metrics.read_text().replace('{"step": 2,', "[2,"))
    page = Page(write_report(run))
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1
    assert "<b>/metrics.jsonl has damaged lines" in warning
    assert page.charts["Loss (nats per token)"]["each step"]["x"] == [1, 3, 4, 5, 6]
    notice = page.texts["p"][0]
    assert notice.startswith("demo & <b>/metrics.jsonl")
    assert notice.endswith(": 3.")


@pytest.mark.parametrize("replacement", ["nothing", "directory", "empty"])
def test_a_run_without_records_is_reported_with_a_warning(
    run: Path, capsys: pytest.CaptureFixture[str], replacement: str
) -> None:
    (run / "metrics.jsonl").unlink()
    if replacement != "nothing":
        (run / "metrics.jsonl").mkdir() if replacement == "directory" else (run / "metrics.jsonl").touch()
    write_report(run)
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1
    assert "<b>/metrics.jsonl" in warning


def test_a_non_finite_number_leaves_a_gap(tmp_path: Path) -> None:
    records = [
        training_record(1),
        training_record(2, loss=None, grad_norm=None),
        training_record(3),
        evaluation(3, 2.0),
    ]
    run = make_run(tmp_path / "run", [*records, evaluation(4, 1.0) | {"val_loss": None, "val_perplexity": None}])
    page = Page(write_report(run))
    loss = page.charts["Loss (nats per token)"]
    assert loss["each step"]["y"] == [4.1, None, 4 / 3 + 0.1]
    assert loss["mean of 3 steps"]["y"][1] is None
    assert page.texts["td"][1:3] == ["–", "2.0000"]


@pytest.mark.parametrize("records", [[], [evaluation(0, 4.0)], [training_record(1)], [training_record(1, loss=None)]])
def test_a_report_of_a_run_that_has_just_started_is_written(tmp_path: Path, records: list[dict[str, Any]]) -> None:
    run = make_run(tmp_path / "run", records)
    Page(write_report(run))
    if not records:
        (run / "metrics.jsonl").unlink()
        (run / "environment.json").write_text('{"torch": "2.')
        assert Page(write_report(run)).charts == {}


@pytest.mark.linux
def test_a_report_neither_waits_for_a_pipe_nor_writes_what_it_cannot(run: Path, tmp_path: Path) -> None:
    (run / "environment.json").unlink()
    os.mkfifo(run / "environment.json")
    Page(write_report(run))
    (run / "environment.json").unlink()
    (run / "environment.json").write_text("[" * 100_000)
    Page(write_report(run))
    os.mkfifo(tmp_path / "pipe")
    for out in (tmp_path, tmp_path / "pipe", Path("/dev/full"), Path("/proc/x")):
        with pytest.raises(UserError, match=re.escape(str(out))):
            write_report(run, out=out)


def test_a_folder_that_is_not_a_run_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match=re.escape(str(folder))):
            write_report(folder)
    assert list(tmp_path.iterdir()) == []


def test_a_long_series_is_thinned_without_losing_its_extremes() -> None:
    values = np.random.default_rng(0).normal(size=600_000)
    values[123_456], values[234_567], values[345_678] = 50.0, -50.0, np.nan
    kept = thinned(values, MAX_POINTS)
    assert len(kept) <= MAX_POINTS
    assert {0, 123_456, 234_567, 345_678, 599_999} <= set(kept.tolist())
    assert (np.diff(kept) > 0).all()
    assert thinned(np.full(10_000, np.nan), 100).size <= 100


def test_smoothing_is_the_mean_of_the_window() -> None:
    """The reference is the definition as a loop; 1e-12 is far above float64's rounding error for these sums."""
    values = np.random.default_rng(1).normal(size=200)
    values[[0, 50, 51]] = np.nan
    for i, value in enumerate(smoothed(values, 9)):
        half = min(4, i)
        expected = math.nan if math.isnan(values[i]) else float(np.nanmean(values[i - half : i + half + 1]))
        assert value == pytest.approx(expected, abs=1e-12, nan_ok=True)
    assert smoothed(np.array([]), 9).size == 0


# --- several runs


@pytest.fixture
def pair(tmp_path: Path) -> list[Path]:
    """Two runs that differ in length, batch size, speed and config; one of them has norms."""
    norms = {"weight_norms": {"embedding": 3.0, "attention": 5.0}, "grad_norms": {"embedding": 0.5, "attention": 0.25}}
    one = [
        evaluation(0, 4.0) | {"weight_norms": norms["weight_norms"]},
        *map(training_record, range(1, 5)),
        evaluation(4, 2.0) | norms,
    ]
    other = [
        evaluation(0, 4.1),
        *(training_record(step, seconds=0.5, tokens_seen=100 * step) for step in range(1, 4)),
        evaluation(2, 3.0),
    ]
    runs = [make_run(tmp_path / "one", one), make_run(tmp_path / "other", other)]
    changed = TrainConfig(steps=30, name="other", optim=OptimConfig(lr=1e-3), model=ModelConfig(n_kv_head=3))
    (runs[1] / "config.toml").write_text(changed.to_toml())
    for run, steps in zip(runs, ((0, 4), (0, 2)), strict=True):
        sections = (f"\n## Step {step:06d}\n\n### Sample 1\n\n    {run.name} at {step}\n" for step in steps)
        (run / "samples.md").write_text("# Samples\n" + "".join(sections))
    return runs


def table_rows(path: Path) -> dict[str, list[str]]:
    """Return the other cells of each table row by the row's first cell."""
    rows = {}
    for row in re.findall(r"<tr>(.*?)</tr>", path.read_text()):
        first, *others = (re.sub("<[^>]*>", "", cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row))
        rows[first] = others
    return rows


def test_a_comparison_has_each_runs_numbers_over_steps_tokens_and_time(pair: list[Path], tmp_path: Path) -> None:
    charts = Page(write_report(*pair, out=tmp_path / "report.html")).charts
    one, other = (charts["Training loss, smoothed (nats per token)"][name] for name in ("one", "other"))
    # The mean of three values; at the left end, the window is shorter.
    losses = [4 / step + 0.1 for step in range(1, 5)]
    assert one["y"] == pytest.approx([losses[0], np.mean(losses[:3]), np.mean(losses[1:]), np.mean(losses[2:])])
    assert (one["x"], one["tokens"], one["seconds"]) == ([1, 2, 3, 4], [768, 1536, 2304, 3072], [0.05, 0.1, 0.15, 0.2])
    assert (other["x"], other["tokens"], other["seconds"]) == ([1, 2, 3], [100, 200, 300], [0.5, 1, 1.5])
    validation = charts["Validation loss (nats per token)"]
    assert (validation["other"]["y"], validation["other"]["tokens"], validation["other"]["seconds"]) == (
        [4.1, 3.0],
        [0, 200],
        [0, 1],
    )
    assert charts["Embedding-gradient norm before clipping"]["one"]["y"] == [0.5]
    assert charts["Embedding-gradient norm before clipping"]["one"]["x"] == [4]
    assert charts["Weight norm: attention"]["one"]["y"] == [5.0, 5.0]
    assert charts["Weight norm: attention"]["other"]["y"] == []
    assert [len({trace["color"] for trace in traces.values()}) for traces in charts.values()] == [2] * len(charts)


def test_a_comparison_lists_only_settings_that_differ(pair: list[Path], tmp_path: Path) -> None:
    path = write_report(*pair, out=tmp_path / "report.html")
    rows = table_rows(path)
    settings = {key for key in rows if "." in key or key in TrainConfig(steps=1).to_dict()}
    # The row "steps" of the results has the number of updates.
    assert settings == {"steps", "optim.lr", "model.n_kv_head"}
    assert rows["steps"] == ["2,000", "30"]
    assert rows["optim.lr"] == ["0.0006", "0.001"]
    assert rows["model.n_kv_head"] == ["–", "3"]
    assert rows["validation loss, best"] == ["2.0000", "3.0000"]
    assert rows["tokens seen"] == ["3,072", "300"]
    config = pair[1] / "config.toml"
    config.write_text(
        "".join(line for line in config.read_text().splitlines(keepends=True) if not line.startswith("qk_norm"))
    )
    assert "model.qk_norm" not in table_rows(
        write_report(*pair, out=tmp_path / "report.html")
    )  # written before this setting existed


def test_samples_of_compared_runs_are_side_by_side(pair: list[Path], tmp_path: Path) -> None:
    page = Page(write_report(*pair, out=tmp_path / "report.html"))
    assert page.texts["summary"] == ["Final", "Step 0", "Step 2", "Step 4", "one/config.toml", "other/config.toml"]
    texts = [text.strip() for text in page.texts["pre"][:-2]]
    assert texts == ["one at 4", "other at 2", "one at 0", "other at 0", "other at 2", "one at 4"]
    assert page.texts["p"].count("no samples at this step") == 2


def test_a_comparison_escapes_html_and_shows_unfinished_runs(run: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    twin = make_run(tmp_path / "elsewhere" / run.name, [])
    path = write_report(run, twin, out=tmp_path / "report.html")
    page = Page(path)
    names = [f"{tmp_path.name}/{run.name}", f"elsewhere/{run.name}"]
    assert page.texts["title"] == [f"{', '.join(names)} · glassgpt"]
    assert list(page.charts["Training loss, smoothed (nats per token)"]) == names
    assert page.texts["pre"][0] == "\n" + HOSTILE
    assert not {"img", "b", "i"} & {tag for tag, _ in page.tags}
    assert all(
        not {"src", "srcset", "action", "href"} & attributes.keys() for tag, attributes in page.tags if tag != "link"
    )


def test_a_run_is_not_compared_with_itself(run: Path) -> None:
    with pytest.raises(UserError, match="named twice"):
        write_report(run, run / ".." / run.name)


def test_a_report_replaces_only_a_report(pair: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert write_report(pair[0]) == pair[0] / "report.html"
    assert write_report(*pair) == Path("report.html")
    first = Path("report.html").read_bytes()
    write_report(*reversed(pair))
    assert Path("report.html").read_bytes() != first
    notes = tmp_path / "notes.html"
    notes.write_text("<title>mine</title>")
    for taken in (notes, tmp_path, tmp_path / "nowhere" / "report.html", pair[0] / "config.toml"):
        before = taken.read_bytes() if taken.is_file() else b""
        with pytest.raises(UserError, match=re.escape(str(taken.parent))):
            write_report(pair[0], out=taken)
        assert (taken.read_bytes() if taken.is_file() else b"") == before


def test_long_fingerprints_are_shortened(pair: list[Path], tmp_path: Path) -> None:
    for run, digit in zip(pair, "ab", strict=True):
        (run / "environment.json").write_text(json.dumps(ENVIRONMENT | {"data_fingerprint": digit * 64}))
    rows = table_rows(write_report(*pair, out=tmp_path / "report.html"))
    assert rows["data fingerprint"] == ["a" * 12 + "…", "b" * 12 + "…"]
    assert "torch" not in rows


@pytest.mark.slow
def test_the_page_works_in_a_browser(pair: list[Path], tmp_path: Path) -> None:
    """Runs and axes can be selected, nothing is loaded, and no table is cut off at widths of 390 and 1280 pixels."""
    for run, digit in zip(pair, "ab", strict=True):
        (run / "environment.json").write_text(
            json.dumps(ENVIRONMENT | {"data_fingerprint": digit * 64, "cpu": digit * 60})
        )
    path = write_report(*pair, out=tmp_path / "report.html")
    messages: list[str] = []

    def note_request(request: Any) -> None:
        if request.url.partition(":")[0] not in ("file", "data", "blob"):
            messages.append(request.url)

    with chromium() as browser:
        page = browser.new_page(viewport={"width": 390, "height": 800}, color_scheme="dark")
        page.on("console", lambda message: messages.append(message.text))
        page.on("pageerror", lambda error: messages.append(str(error)))
        page.on("request", note_request)
        page.goto(path.as_uri())
        traces = "(p.data ?? []).map(t => [t.name, t.visible, t.x])"
        drawn = f"[...document.querySelectorAll('figure > div')].map(p => {traces})"
        page.wait_for_function(f"{drawn}.every(traces => traces.length)")
        assert page.evaluate(drawn)[0] == [["one", True, [1, 2, 3, 4]], ["other", True, [1, 2, 3]]]
        page.get_by_label("tokens", exact=True).check(force=True)
        page.locator(".run").nth(1).click()
        page.wait_for_function(f"!{drawn}[0][1][1]")
        assert page.evaluate(drawn)[0] == [["one", True, [768, 1536, 2304, 3072]], ["other", False, [100, 200, 300]]]
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        page.set_viewport_size({"width": 1280, "height": 900})
        cut_off = "[...document.querySelectorAll('.wide')].filter(e => e.scrollWidth > e.clientWidth).length"
        assert page.evaluate(cut_off) == 0
    assert messages == []
