"""Damaged and hostile run files: no reader hangs, fills the memory, shows a file of another place, or ends in a bug."""

import json
import os
import re
import threading
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from glassgpt.interop.references import describe, load
from glassgpt.interpretability.snapshots import prompt_of, take_probe, write_probe
from glassgpt.playground import event_stream
from glassgpt.playground.event_stream import START, Follower, history
from glassgpt.playground.model_pool import find_entry
from glassgpt.report.page import write_report
from glassgpt.runs.checkpoint import tensor_file
from glassgpt.runs.metrics import LINE, MOST_RECORD_BYTES, FollowedFile, append_samples, read_metrics
from glassgpt.runs.run_directory import RunDirectory
from glassgpt.utils.errors import UserError
from glassgpt.utils.files import finite
from page_harness import VIEWS, chromium, monitored_page
from play_harness import GPT2_LIKE, ServerThread, serving, write_run

TRAINING: dict[str, Any] = {
    "step": 3,
    "loss": 2.0,
    "lr": 1e-3,
    "grad_norm": 1.0,
    "seconds": 0.5,
    "tokens_per_second": 9.0,
}
TRAINING |= {"tokens_seen": 72, "peak_share": None, "memory_bytes": 100}
EVALUATION: dict[str, Any] = {"step": 3, "val_loss": 2.5, "val_perplexity": 12.2, "val_bits_per_byte": 3.6}
EVALUATION |= {"hellaswag_acc_norm": 0.3, "hellaswag_items": 10, "seconds": 1.0, "val_losses": {"a.txt": 2.5}}
EVALUATION |= {"weight_norms": {"embedding": 1.0}, "grad_norms": {"embedding": 0.5}}
ENVIRONMENT = {"threads": 1, "data_fingerprint": "ab12", "parameters": 1000, "device": "cpu", "processes": 1}
SECRET = "a-text-of-another-folder"
WRONG: list[Any] = ["x", True, [1], {"a": "x"}, {"a": {"b": 1}}]


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """Return a run with two checkpoints, records, samples, an environment and a status."""
    run = write_run(tmp_path / "run", GPT2_LIKE, steps=(1, 2))
    run.metrics_path.write_text(f"{json.dumps(TRAINING)}\n{json.dumps(EVALUATION)}\n", encoding="utf-8")
    append_samples(run.samples_path, 3, ["a sample"])
    run.write_environment(ENVIRONMENT)
    run.write_status("finished", step=3, steps=100)
    return run


def shown(run: RunDirectory) -> list[str]:
    """Return everything that the page and the report show of a run as texts; of an error, its text."""

    def report() -> str:
        return write_report(run.path).read_text(encoding="utf-8").partition('<script id="charts"')[0]

    def text(read: Any) -> str:
        try:
            return str(read())
        except UserError as error:
            return str(error)

    reads = (lambda: history(run), lambda: list(Follower(run, START).poll()), lambda: list(Follower(run).poll()))
    return [*map(text, reads), text(lambda: find_entry(str(run.path)).describe(0)), text(report)]


def within(seconds: float, work: Any) -> Any:
    """Return the result of a function. Fails if it takes longer."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(work()), daemon=True)
    thread.start()
    thread.join(seconds)
    assert results, "it hangs, or it raised"
    return results[0]


@pytest.mark.linux
@pytest.mark.parametrize("name", ["config.toml", "environment.json", "status.json", "metrics.jsonl", "samples.md"])
@pytest.mark.parametrize("kind", ["pipe", "endless device", "huge file", "link out of the run"])
def test_only_regular_files_of_the_run_are_read(run: RunDirectory, name: str, kind: str) -> None:
    path, secret = run.path / name, run.path.parent / "secret"
    content = path.read_text(encoding="utf-8")
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "endless device":
        path.symlink_to("/dev/zero")
    elif kind == "huge file":
        path.touch()
        os.truncate(path, 1 << 40)  # sparse: it takes no room on the disk
    else:  # valid content, into which a marker is put
        marked = {
            "config.toml": f'name = "{SECRET}"\n{content}',
            "samples.md": content.replace("a sample", SECRET),
            "metrics.jsonl": content.replace('"step"', f'"note": "{SECRET}", "step"'),
        }
        secret.write_text(marked.get(name, content.replace("{", f'{{"note": "{SECRET}", ', 1)), encoding="utf-8")
        path.symlink_to(secret)
    tracemalloc.start()
    try:
        texts = within(60, lambda: shown(run))
        assert tracemalloc.get_traced_memory()[1] < 500e6
    finally:
        tracemalloc.stop()
    assert SECRET not in "".join(texts)
    if name in ("metrics.jsonl", "samples.md") and kind != "huge file":
        assert str(path) in texts[0]  # the page says which file is wrong
        path.unlink()
        path.write_text(content, encoding="utf-8")
        assert "a sample" in shown(run)[0]


def test_a_link_within_the_run_is_followed(run: RunDirectory) -> None:
    before = finite(history(run))
    run.metrics_path.rename(run.path / "log.jsonl")
    run.metrics_path.symlink_to("log.jsonl")
    assert finite(history(run)["training"]) == before["training"]
    outside = run.path.parent / "linked"
    outside.symlink_to(run.path)  # the user names this link
    assert finite(history(RunDirectory(outside))["training"]) == before["training"]


@pytest.mark.linux
def test_a_file_that_becomes_a_pipe_resets_the_follower(run: RunDirectory) -> None:
    follower = Follower(run, history(run)["cursor"])
    list(follower.poll())
    content = run.metrics_path.read_bytes()
    run.metrics_path.unlink()
    os.mkfifo(run.metrics_path)
    assert [name for name, _ in within(10, lambda: list(follower.poll()))] == ["reset"]
    run.metrics_path.unlink()
    run.metrics_path.write_bytes(content + json.dumps({**TRAINING, "step": 4}).encode() + b"\n")
    (event,) = [value for name, value in follower.poll() if name == "metrics"]
    assert [record["step"] for record in event["training"]] == [4]


@pytest.mark.parametrize("length", [(1 << 20) + 10, MOST_RECORD_BYTES + 10])
def test_a_long_line_of_metrics_stops_nothing(run: RunDirectory, length: int) -> None:
    """A line of more than one read is read whole; one of more than `MOST_RECORD_BYTES` is skipped as damaged."""
    follower, steps = Follower(run, history(run)["cursor"]), []
    long = json.dumps({**TRAINING, "step": 4, "note": "x" * length}).encode()
    with open(run.metrics_path, "ab") as file:
        file.write(long + b"\n" + json.dumps({**TRAINING, "step": 5}).encode() + b"\n")
    for _ in range(6):
        steps += [
            record["step"] for name, value in follower.poll() if name == "metrics" for record in value["training"]
        ]
    expected = [4, 5] if len(long) <= MOST_RECORD_BYTES else [5]
    assert steps == expected
    metrics = read_metrics(run.metrics_path)
    assert ([r["step"] for r in metrics.training], metrics.damaged) == ([3, *expected], [3][: 2 - len(expected)])
    assert event_stream.history(run)["training"]["step"] == [3, *expected] or len(long) > MOST_RECORD_BYTES


def test_the_end_of_a_large_log_is_found_without_reading_it(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.touch()
    os.truncate(path, 1 << 40)
    line = json.dumps(TRAINING).encode() + b"\n"
    with open(path, "ab") as file:
        file.write(b"\n" + line)
    followed = FollowedFile(path, LINE)
    followed.skip_to_end()
    assert followed.read() == b""
    with open(path, "ab") as file:
        file.write(line)
    assert followed.read() == line


@pytest.mark.parametrize("record", [TRAINING, EVALUATION], ids=["training", "evaluation"])
def test_a_record_with_a_value_of_a_wrong_type_is_damaged_for_page_and_report(
    run: RunDirectory, record: dict[str, Any]
) -> None:
    before, content = finite(history(run)), run.metrics_path.read_bytes()
    for key in record:
        for wrong in [*WRONG, 5] if isinstance(record[key], dict) else [*WRONG, {}]:
            line = json.dumps({**record, "step": 2, key: wrong}).encode() + b"\n"
            run.metrics_path.write_bytes(line + content)
            assert read_metrics(run.metrics_path).damaged == [1], (key, wrong)
            now = finite(history(run))
            assert (now["training"], now["evaluations"]) == (before["training"], before["evaluations"])
    write_report(run.path)  # with the last of these lines
    deep = b'{"step": 2, "loss": 1.0, "note": ' + b"[" * 900 + b"]" * 900 + b"}\n"
    for line in (deep, b'{"step": -1, "loss": 1.0}\n', b'{"step": 1' + b"0" * 200 + b', "loss": 1.0}\n'):
        run.metrics_path.write_bytes(line + content)
        assert read_metrics(run.metrics_path).damaged == [1]


@pytest.mark.parametrize("name", ["parameters", "device", "processes", "precision", "threads", "cpu", "torch"])
def test_an_environment_with_a_value_of_a_wrong_type_is_damaged_for_page_and_report(
    run: RunDirectory, name: str
) -> None:
    assert history(run)["environment"] == ENVIRONMENT
    for wrong in [*WRONG[1:], "many" if name in ENVIRONMENT and name != "device" else 5]:
        run.environment_path.write_text(json.dumps({**ENVIRONMENT, name: wrong}), encoding="utf-8")
        assert history(run)["environment"] == {}
        with pytest.raises(UserError, match=re.escape(str(run.environment_path))):
            run.read_environment()
        assert "ab12" not in write_report(run.path).read_text(encoding="utf-8")


def test_a_status_keeps_only_values_of_the_right_type(run: RunDirectory) -> None:
    for wrong in WRONG:
        run.status_path.write_text(json.dumps({"state": "failed", "steps": wrong, "processes": wrong, "step": 7}))
        assert history(run)["status"] == {"state": "failed", "step": 7}
    run.status_path.write_text(json.dumps({"state": "failed", "error": {"a": 1}, "steps": 9}))
    assert history(run)["status"] == {"state": "failed", "steps": 9}


@pytest.mark.parametrize("config", ['steps = "x"', "data = 5", "[data]\nsource = [1]", "steps = [[1]]", "name = 3"])
def test_a_report_of_a_config_with_wrong_types_is_written(run: RunDirectory, tmp_path: Path, config: str) -> None:
    other = write_run(tmp_path / "other", GPT2_LIKE, steps=())
    run.config_path.write_text(config + "\n", encoding="utf-8")
    write_report(run.path)
    write_report(run.path, other.path, out=tmp_path / "report.html")


STRAY = ["000999", "0000000500", "9" * 200, "٠٠٠٥٠٠", "²²²²²²", "1e5", "-00001"]


@pytest.fixture
def stray(run: RunDirectory) -> Iterator[ServerThread]:
    """Serve a run with a snapshot of step 2, and stray names among its checkpoints and snapshots."""
    model, tokenizer = load(run.path)
    assert tokenizer is not None
    write_probe(run.probe_path(2), take_probe(model, [prompt_of([1, 2, 3], tokenizer)], ["x"], 2))
    for name in STRAY:
        (run.checkpoints / name).mkdir()
        snapshot = run.probes / f"{name}.safetensors"
        snapshot.mkdir() if name == "000999" else snapshot.touch()
    (run.checkpoints / "000777").touch()
    with serving(run.path) as served:
        yield served


def test_stray_names_do_not_count_as_the_newest(stray: ServerThread, run: RunDirectory, tmp_path: Path) -> None:
    assert stray.client.get("/api/catalog")[1]["entries"][0]["steps"] == [1, 2]
    assert stray.client.answer("model", model=0)["step"] == 2
    shown = stray.client.get("/api/history?model=0")[1]
    assert (shown["checkpoints"], shown["snapshots"]) == ([1, 2], [2])
    assert stray.client.get("/api/snapshot?model=0&step=2")[0] == 200
    assert "000002" in describe(run.path)
    write_report(run.path)
    run.config_path.unlink()
    with pytest.raises(UserError, match=re.escape(str(run.checkpoints / "000002" / "config.toml"))):
        run.require_run()


@pytest.mark.parametrize("depth", [150, 900, 990, 100_000])
def test_deeply_nested_metadata_of_a_snapshot_is_refused(stray: ServerThread, run: RunDirectory, depth: int) -> None:
    deep = "[" * depth + "]" * depth
    for values in (f'"prompts": {deep}, "kinds": []', f'"prompts": [], "kinds": {deep}'):
        metadata = f'{{"step": 2, "samples": [], {values}}}'
        content = tensor_file({"head_kinds": torch.zeros(1, 1, 1)}, {"snapshot": metadata})
        run.probe_path(2).write_bytes(content)
        status, refused = stray.client.get("/api/snapshot?model=0&step=2")
        assert (status, "nested too deeply" in refused["error"]) == (400, True)


@pytest.mark.parametrize("temperature", [1e-300, 5e-324, 1e-40])
def test_a_tiny_temperature_samples_the_most_likely_token(stray: ServerThread, temperature: float) -> None:
    body = {"model": 0, "ids": [1, 2, 3], "max_new_tokens": 4}
    written, greedy = (
        [line["token"] for line in stray.client.answer("write", **body, temperature=each) if "token" in line]
        for each in (temperature, 0.0)
    )
    assert written == greedy
    assert len(greedy) == 4


@pytest.mark.linux
@pytest.mark.parametrize("name", ["manifest.json", "state.json", "config.toml", "tokenizer.json", "model.safetensors"])
def test_a_pipe_in_a_checkpoint_is_damage(run: RunDirectory, name: str) -> None:
    path = run.checkpoints / "000002" / name
    path.unlink()
    os.mkfifo(path)
    assert within(20, lambda: find_entry(str(run.path)).describe(0)["best"]) == 1
    with serving(run.path) as served:
        assert served.client.ask("model", model=0)[0] == 400  # the newest is damaged
        assert served.client.answer("model", model=0, step=1)["step"] == 1


# --- in a browser -----------------------------------------------------------------------------------------------------

# Clicks every visible export button, and returns its card, its kind, what was saved (null: nothing), and the message.
SAVE_ALL = """async () => {
  const results = [], contents = new Map(), addressOf = URL.createObjectURL;
  let saved = null;
  URL.createObjectURL = content => {
    const address = addressOf.call(URL, content);
    contents.set(address, content);
    return address;
  };
  HTMLAnchorElement.prototype.click = function() { saved = contents.get(this.href); };
  for (const button of document.querySelectorAll('[data-export]')) {
    if (!button.checkVisibility()) continue;
    saved = null;
    const status = button.closest('.exports').previousElementSibling;
    button.click();
    for (let i = 0; i < 100 && !saved && !status.textContent; i++) await new Promise(done => setTimeout(done, 20));
    const text = saved?.type.startsWith('image/png') ? '' : await saved?.text();
    results.push([button.closest('.exports').ariaLabel, button.dataset.export, saved?.size ?? null, text ?? '',
      status.textContent]);
  }
  return results;
}"""


@pytest.mark.slow
def test_exports_before_their_first_use_say_that_there_is_nothing_to_save(run: RunDirectory) -> None:
    with serving(run.path) as served, chromium() as browser, monitored_page(browser, served.url) as page:
        for view, state, empty in (
            ("interventions", {}, {"Save changes", "Save heads"}),
            ("interventions", {"source": "abx"}, {"Save changes", "Save heads", "Save patching"}),
            ("generation", {}, {"Save generated", "Save matches", "Save continuations"}),
            ("training", {}, {"Save peak-share"}),
        ):
            page.open(view, text="abc", model=str(run.path), **state)
            page.wait("document.getElementById('busy').hidden")
            results = page.page.evaluate(SAVE_ALL)
            assert len(results) > 8
            assert {name for name, kind, size, _, _ in results if size is None and kind != "csv"} <= empty
            assert {name for name, _, size, _, _ in results if size is None} == empty
            for name, _, size, text, message in results:
                assert bool(message) == (size is None), name
                assert "undefined" not in text, name
        page.open("interventions", text="abc", model=str(run.path), source="abx")
        page.page.get_by_role("button", name="Measure all heads").click()
        page.wait("document.querySelector('[data-test=heads-sweep-start]').nextElementSibling.disabled")
        heads = [result for result in page.page.evaluate(SAVE_ALL) if result[0] == "Save heads"]
        assert all(size for _, _, size, _, _ in heads)
        assert len(heads) == 3


@pytest.mark.slow
def test_names_in_run_files_are_text_in_charts(run: RunDirectory) -> None:
    markup = '<a href="http://elsewhere.invalid/">link</a>'
    norms = {markup: 2.0, "constructor": 3.0, "__proto__": 4.0, "embedding": 1.0}
    run.metrics_path.write_text(f"{json.dumps({**EVALUATION, 'weight_norms': norms, 'grad_norms': norms})}\n")
    with serving(run.path) as served, chromium() as browser, monitored_page(browser, served.url) as page:
        opened = page.open("training", model=str(run.path))
        for name in ("weight-norms", "gradient-norms"):
            chart = opened.locator(f'[data-test="chart-{name}"]')
            chart.scroll_into_view_if_needed()
            chart.locator(".legendtext").first.wait_for()
            assert set(chart.locator(".legendtext").all_text_contents()) == {
                *(norms.keys() - {"embedding"}),
                "token embedding",
            }
            assert chart.locator("svg a").count() == 0


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
def test_a_visitor_without_a_token_gets_a_page_that_asks_for_it(run: RunDirectory, width: int) -> None:
    with serving(run.path) as served, chromium() as browser:
        page_of = monitored_page(browser, served.url, width=width, token=None)
        with page_of as page:
            page.page.goto(served.url)
            page.ready("login")
            field = page.page.get_by_label("Access token")
            field.fill(f"{served.url}#token={served.policy.token}")  # the address that was printed
            field.press("Enter")
            page.page.wait_for_selector("body[data-ready]:not([data-ready=login])")
            assert page.page.locator("body").get_attribute("data-ready") in VIEWS
            page.problems = [problem for problem in page.problems if "401" not in problem]
