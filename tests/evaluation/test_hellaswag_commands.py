"""HellaSwag in a run's log and report, and in `glassgpt eval`."""

import dataclasses
import io
import json
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from glassgpt.cli.main import main
from glassgpt.evaluation import hellaswag, hellaswag_items
from glassgpt.evaluation.hellaswag import score_hellaswag, summarize
from glassgpt.evaluation.hellaswag_items import PUBLISHED, Item, read_items, subset
from glassgpt.interop.references import load
from glassgpt.report.page import write_report
from glassgpt.training.progress import Progress
from glassgpt.training.run import train
from glassgpt.utils.errors import UserError
from glassgpt.utils.files import sha256_of
from hellaswag_harness import some_items
from kill_harness import Quiet, fast_training, records_of, tiny_config, write_text
from report_harness import Page


@pytest.fixture(autouse=True, scope="module")
def fast() -> Iterator[None]:
    """Use one thread for the whole module."""
    with fast_training():
        yield


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Return a file of twelve items."""
    path = tmp_path / "items.jsonl"
    path.write_text("".join(json.dumps(line_of(item)) + "\n" for item in some_items(12)))
    return path


def line_of(item: Item) -> dict[str, Any]:
    """Return the record of an item in the published format."""
    return {**dataclasses.asdict(item), "ind": item.number}


def train_with_hellaswag(tmp_path: Path, file: Path, progress: Progress | None = None, **changes: Any) -> Path:
    """Train a run of ten steps that evaluates 8 HellaSwag items every 10 steps, and return it."""
    settings = {
        "data": {"tokenizer": "bytes"},
        "eval_every": 5,
        "hellaswag_every": 10,
        "hellaswag_items": 8,
        "hellaswag_file": str(file),
    }
    config = tiny_config(write_text(tmp_path / "text.txt"), **(settings | changes))
    return train(config, tmp_path / "run", progress=progress or Quiet())


def test_a_run_evaluates_a_subset_at_its_interval_and_logs_it(tmp_path: Path, file: Path) -> None:
    stream = io.StringIO()
    run = train_with_hellaswag(tmp_path, file, Progress(stream=stream))
    records = {record["step"]: record for record in records_of(run) if "val_loss" in record}
    assert [step for step, record in records.items() if "hellaswag_acc" in record] == [0, 10]
    model, tokenizer = load(run)
    assert tokenizer is not None
    expected = summarize(score_hellaswag(model, tokenizer, subset(read_items(file), 8)))
    record_10 = records[10]
    assert (record_10["hellaswag_acc"], record_10["hellaswag_acc_norm"]) == (expected["acc"], expected["acc_norm"])
    assert (record_10["hellaswag_items"], record_10["hellaswag_published"]) == (8, False)
    (line,) = [line for line in stream.getvalue().splitlines() if line.startswith("step 10/10  validation")]
    assert line.endswith(f"HellaSwag {expected['acc_norm']:.1%} of 8")


def test_hellaswag_does_not_change_a_run(tmp_path: Path, file: Path) -> None:
    (tmp_path / "other").mkdir()
    runs = [train_with_hellaswag(tmp_path, file), train_with_hellaswag(tmp_path / "other", file, hellaswag_every=0)]
    losses = [
        [(record["step"], record.get("loss"), record.get("val_loss")) for record in records_of(run)] for run in runs
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 13


def test_hellaswag_every_must_be_a_multiple_of_eval_every(tmp_path: Path, file: Path) -> None:
    with pytest.raises(UserError, match="must be a multiple of eval_every = 5"):
        train_with_hellaswag(tmp_path, file, hellaswag_every=7)
    with pytest.raises(UserError, match="must be a multiple of eval_every = 0"):
        train_with_hellaswag(tmp_path, file, eval_every=0)


def test_a_missing_items_file_is_an_error_before_the_run_starts(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.jsonl.*\n\(--hellaswag-every 0 trains without HellaSwag\)"):
        train_with_hellaswag(tmp_path, tmp_path / "gone.jsonl")
    assert not (tmp_path / "run").exists()


def test_the_report_shows_published_scores_only_for_the_published_items(tmp_path: Path, file: Path) -> None:
    run = train_with_hellaswag(tmp_path, file)
    page = write_report(run).read_text()
    assert '"title": "HellaSwag"' in page
    assert "GPT-3 350M" not in page
    metrics = run / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"hellaswag_published": false', '"hellaswag_published": true'))
    drawn = Page(write_report(run)).charts["HellaSwag"]
    assert drawn.pop("HellaSwag, normalised")["x"] == [0, 10]
    expected = {row.model: [row.acc_norm] * 2 for row in PUBLISHED if row.style != "lm-eval"}
    assert {name: trace["y"] for name, trace in drawn.items()} == expected


def test_eval_prints_and_saves_both_styles_and_reuses_scores(
    tmp_path: Path, file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train_with_hellaswag(tmp_path, file)
    command = ["eval", str(run), "--hellaswag", "--hellaswag-file", str(file), "--json", str(tmp_path / "out.json")]
    assert main(command) == 0
    printed = capsys.readouterr().out
    figures = json.loads((tmp_path / "out.json").read_text())
    build_nanogpt = figures["hellaswag"]["build-nanogpt"]
    assert build_nanogpt["n"] == 12
    assert figures["hellaswag"]["glassgpt"] == version("glassgpt")
    assert (figures["hellaswag"]["step"], figures["hellaswag"]["precision"]) == (10, "float32")
    assert f"{build_nanogpt['acc']:.2%}" in printed
    assert "loss per character" in printed
    assert "do not compare with published scores" in printed
    assert printed.startswith("loss ")
    # The scores are in the cache, so nothing is computed again.
    monkeypatch.setattr(hellaswag, "score_batch", lambda *arguments: pytest.fail("computed again"))
    assert main(command) == 0
    assert json.loads((tmp_path / "out.json").read_text()) == figures


def test_eval_shows_published_scores_only_for_the_published_file(
    tmp_path: Path, file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hellaswag_items, "SHA256", sha256_of(file))
    run = train_with_hellaswag(tmp_path, file)
    assert main(["export", str(run), "--out", str(tmp_path / "hf")]) == 0
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "hf"), "--hellaswag", "--hellaswag-file", str(file)]) == 0
    printed = capsys.readouterr().out
    assert "28.59%" in printed
    assert "31.14%" in printed
    assert "loss by position" not in printed  # an exported model has no training text to evaluate on
    assert (
        main(["eval", str(tmp_path / "hf"), "--hellaswag", "--hellaswag-file", str(file), "--hellaswag-items", "5"])
        == 0
    )
    assert "28.59%" not in capsys.readouterr().out


def test_a_missing_items_file_is_an_error_before_anything_is_measured(
    tmp_path: Path, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train_with_hellaswag(tmp_path, file)
    capsys.readouterr()
    assert main(["eval", str(run), "--hellaswag", "--hellaswag-file", str(tmp_path / "gone.jsonl")]) == 2
    assert main(["eval", str(run), "--hellaswag", "--hellaswag-file", str(file), "--hellaswag-items", "0"]) == 2
    assert capsys.readouterr().out == ""


def test_hellaswag_options_need_hellaswag_and_exclude_quantization(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "runs/x", "--hellaswag-items", "5"]) == 2
    assert "--hellaswag" in capsys.readouterr().err
    assert main(["eval", "runs/x", "--hellaswag", "--quantize", "int8"]) == 2
    assert "--quantize" in capsys.readouterr().err
