"""`glassgpt prepare` with bad input, full disks, kills and interrupts prints a short error and leaves no dataset."""

import errno
import gzip
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import psutil
import pyarrow
import pytest
from pyarrow import parquet

import glassgpt
from glassgpt.cli.main import main
from glassgpt.config.schema import DataConfig
from glassgpt.data.dataset import open_dataset
from glassgpt.data.prepare import prepare
from glassgpt.data.sources import LocalFiles
from glassgpt.data.work_units import prepare_unit
from glassgpt.data.workers import run_tasks
from glassgpt.tokenizers.builtin import BytesTokenizer, build_tokenizer
from glassgpt.utils.errors import UserError
from prepare_harness import contents

HARNESS = Path(__file__).parents[1] / "prepare_harness.py"
WORDS = "the quick brown fox jumps over the lazy dog. " * 20
KEPT = "finished files are kept"


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Four files, each a work unit."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in "abcd":
        lines = [json.dumps({"text": f"{name} {number} {WORDS}"}) + "\n" for number in range(6)]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return folder


def command(source: Path | str, out: Path, *options: str, shard_tokens: int = 2000) -> list[str]:
    """Return the arguments of `glassgpt prepare` for a byte tokenizer and small shards."""
    return ["prepare", str(source), "--out", str(out), "--tokenizer=bytes", f"--shard-tokens={shard_tokens}", *options]


def names_beside(out: Path) -> list[str]:
    """Return the sorted names in the dataset's parent directory, without lock files."""
    return sorted(path.name for path in out.parent.iterdir() if path.suffix != ".lock")


# ------------------------------------------------------------------------------------------------------------ kills


@pytest.mark.slow
def test_the_dataset_after_repeated_kills_equals_an_undisturbed_one() -> None:
    ended = subprocess.run(
        [sys.executable, str(HARNESS), "--kills", "9"], stdout=subprocess.PIPE, text=True, timeout=120
    )
    print(ended.stdout)  # shows the seed if the test fails
    outcome = json.loads(ended.stdout.splitlines()[-1])
    assert ended.returncode == 0, outcome
    assert outcome["kills"] >= 9
    assert outcome["within"] >= outcome["kills"] / 4
    assert min(outcome["between_files"], outcome["publishing"]) >= 1


def test_a_finished_build_is_not_used_for_another_request(texts: Path, tmp_path: Path) -> None:
    """The process ends while a dataset is moved into place; then the request or the text changes."""
    out = tmp_path / "sets" / "out"
    for change in ("request", "text"):
        with mock.patch("glassgpt.data.builder.DatasetBuilder._publish", side_effect=KeyboardInterrupt):
            assert main(command(texts, out, "--overwrite")) == 130
        if change == "text":
            (texts / "a.jsonl").write_text(json.dumps({"text": WORDS}))
        options = ["--validation=first_shard"] if change == "request" else []
        assert main(command(texts, out, "--overwrite", *options)) == 0
        main(command(texts, tmp_path / "expected" / "out", "--overwrite", *options))
        assert contents(out) == contents(tmp_path / "expected" / "out")


def test_a_half_removed_older_dataset_is_replaced(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "sets" / "out"
    assert main(command(texts, out, shard_tokens=5000)) == 0
    unlink = Path.unlink
    removed: list[str] = []

    def fail(path: Path, missing_ok: bool = False) -> None:
        if path.parent == out:
            if len(removed) == 3:
                raise KeyboardInterrupt
            removed.append(path.name)
        unlink(path, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", fail)
        assert main(command(texts, out, "--overwrite")) == 130
    assert len(removed) == 3
    assert main(command(texts, out, "--overwrite")) == 0
    assert names_beside(out) == ["out"]
    assert open_dataset(out).manifest["request"]["shard_tokens"] == 2000


# ---------------------------------------------------------------------------------------------------------- workers


def start(arguments: list[str], **options: Any) -> "subprocess.Popen[str]":
    """Run `glassgpt ARGUMENTS` in a new process."""
    return subprocess.Popen(
        [sys.executable, "-m", "glassgpt", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def workers_of(process: "subprocess.Popen[str]", count: int) -> list[psutil.Process]:
    """Wait for this many worker processes and return them; multiprocessing's resource tracker does not count."""
    give_up = time.monotonic() + 30
    while True:
        workers = [child for child in psutil.Process(process.pid).children() if is_worker(child)]
        if len(workers) == count:
            return workers
        assert process.poll() is None
        assert time.monotonic() < give_up
        time.sleep(0.005)


def is_worker(process: psutil.Process) -> bool:
    return any("spawn_main" in argument for argument in process.cmdline())


@pytest.mark.parametrize("moment", ["at start", "while working"])
def test_a_killed_worker_is_a_short_error(texts: Path, tmp_path: Path, moment: str) -> None:
    (texts / "a.jsonl").write_text(
        "".join(json.dumps({"text": f"{number} {WORDS}"}) + "\n" for number in range(40_000))
    )
    process = start(command(texts, tmp_path / "out", "--workers=2"))
    for worker in workers_of(process, 2):
        if moment == "while working":
            give_up = time.monotonic() + 30
            while not list(tmp_path.glob(".partial-out/train-0000[1-3]-00000.json")) and time.monotonic() < give_up:
                time.sleep(0.005)
        worker.kill()
    out, err = process.communicate(timeout=20)
    assert process.returncode == 2, err
    assert "Traceback" not in err
    assert len(err.splitlines()) == 1
    assert "--workers" in err
    assert (KEPT in out) == (moment == "while working")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.0, 0.05, 0.15, 0.4])
def test_an_interrupt_ends_all_processes(texts: Path, tmp_path: Path, delay: float) -> None:
    """Ctrl-C sends SIGINT to every process of the group, also to workers that are just starting."""
    (texts / "a.jsonl").write_text(
        "".join(json.dumps({"text": f"{number} {WORDS}"}) + "\n" for number in range(40_000))
    )
    process = start(command(texts, tmp_path / "out", "--workers=2"), start_new_session=True)
    workers = workers_of(process, 2)
    time.sleep(delay)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (130, "glassgpt: interrupted\n")
    assert not any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers)


SCRIPT = """
import sys, threading
from pathlib import Path
from glassgpt.config.schema import DataConfig
from glassgpt.data.prepare import prepare
print("once")
def work():
    data = DataConfig(source=sys.argv[1], tokenizer="bytes", shard_tokens=2000)
    print(prepare(data, Path(sys.argv[2]), workers=2).name)
thread = threading.Thread(target=work)
thread.start()
thread.join()
"""


def test_a_script_can_prepare_in_a_thread_without_a_main_guard(texts: Path, tmp_path: Path) -> None:
    """Workers neither run the script nor import the `queue.py` in its folder."""
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "queue.py").write_text("raise SystemExit('the wrong queue')")
    call = [sys.executable, "-P", "script.py", str(texts), "out"]
    environment = os.environ | {"PYTHONPATH": str(Path(glassgpt.__file__).parents[1])}
    ended = subprocess.run(call, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert (ended.stdout, ended.stderr) == ("once\nout\n", "")
    assert main(command(texts, tmp_path / "expected", "--workers=1")) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


# -------------------------------------------------------------------------------------------------------- bad input


def bad_parquet(path: Path) -> None:
    table = pyarrow.table({"text": [f"{number} {WORDS}" for number in range(100)]})
    parquet.write_table(table, path, compression="NONE", write_page_checksum=True, row_group_size=10)
    content = bytearray(path.read_bytes())
    content[len(content) * 3 // 4 : len(content) * 3 // 4 + 2000] = bytes(2000)
    path.write_bytes(content)


def null_rows(path: Path) -> None:
    parquet.write_table(pyarrow.table({"text": [WORDS, None, WORDS, None]}), path)


def truncated_gzip(path: Path) -> None:
    path.write_bytes(gzip.compress(os.urandom(3000).hex().encode())[:2000])


# Problem: name of the file, function that writes it, pattern of the error.
BAD_INPUTS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "damaged parquet": ("c.parquet", bad_parquet, r"c\.parquet is damaged.*row group [1-9]"),
    "not parquet": (
        "c.parquet",
        lambda path: path.write_bytes(b"nothing of the kind"),
        r"c\.parquet is damaged, or not a parquet",
    ),
    "truncated gzip": ("c.txt.gz", truncated_gzip, r"c\.txt\.gz is truncated"),
    "missing column": ("c.csv", lambda path: path.write_text("title,body\na,b\n"), r"c\.csv has no 'text'"),
    "null row": ("c.parquet", null_rows, r"c\.parquet, row 1 \(counted from 0\): 'text' is null"),
    "broken json": ("c.jsonl", lambda path: path.write_text('{"text": "a"}\n{"te'), r"c\.jsonl, line 2: invalid JSON"),
    "late broken json": (
        "c.jsonl",
        lambda path: path.write_text(json.dumps({"text": WORDS}) + ("\n" + json.dumps({"text": WORDS})) * 99 + "\n["),
        r"c\.jsonl, line 101: invalid JSON",
    ),
    "not utf-8": (
        "c.txt",
        lambda path: path.write_bytes(b"a" * 70 + b"\xff"),
        r"c\.txt is not valid utf-8: byte 0xff at offset 70",
    ),
}


FOUND_LATE = ("damaged parquet", "late broken json")  # not in the first rows, which are read before any work


@pytest.mark.parametrize(
    ("problem", "workers"), [*((problem, 1) for problem in BAD_INPUTS), ("damaged parquet", 2), ("not utf-8", 2)]
)
def test_bad_input_is_named_and_finished_files_are_kept(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], problem: str, workers: int
) -> None:
    name, make, message = BAD_INPUTS[problem]
    (texts / "c.jsonl").unlink()
    make(texts / name)
    out = tmp_path / "sets" / "out"
    assert main(command(texts, out, f"--workers={workers}")) == 2
    printed = capsys.readouterr()
    assert re.search(message, printed.err.replace("\n", " ")), printed.err
    assert "Traceback" not in printed.err
    assert printed.err.startswith("glassgpt: error: ")
    assert len(printed.err.splitlines()) <= 2
    kept = list((out.parent / ".partial-out").glob("train-*.json"))
    assert bool(kept) == (KEPT in printed.out)
    assert bool(kept) == (problem in FOUND_LATE) or workers == 2
    assert not out.exists()


def test_files_that_are_not_text_are_named_before_any_is_hashed(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("glassgpt.data.sources.sha256_of", mock.Mock(side_effect=AssertionError))
    for name in ("e.txt", "f.md", "g.txt", "h.txt"):
        (texts / name).write_bytes(b"%PDF-1.4\n")
    with pytest.raises(UserError) as caught:
        prepare(DataConfig(source=str(texts)), tmp_path / "out")
    assert re.findall(r"^\w\.\w+", str(caught.value), re.MULTILINE) == ["e.txt", "f.md", "g.txt", "h.txt"]


def test_rows_without_text_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.table({"text": [None, WORDS, "", None, " \n", WORDS + "x", WORDS + "y"]}), source)
    assert main(command(source, tmp_path / "out", "--skip-bad")) == 0
    printed = capsys.readouterr().out
    assert "2 rows without text" in printed
    assert "2 blank documents" in printed
    manifest = open_dataset(tmp_path / "out").manifest
    assert (manifest["documents"], manifest["bad_rows"], manifest["blank_documents"]) == (3, 2, 2)


def test_an_id_beyond_the_vocabulary_is_refused_instead_of_wrapped(texts: Path, tmp_path: Path) -> None:
    beyond = np.array([70_000], dtype=np.uint32), np.array([0, 1], dtype=np.uint64)
    with (
        mock.patch.object(BytesTokenizer, "encode_documents", return_value=beyond),
        pytest.raises(UserError, match=r"id 70000, .* 256 ids"),
    ):
        prepare(DataConfig(source=str(texts), tokenizer="bytes"), tmp_path / "out", workers=1)


@pytest.mark.parametrize("workers", [1, 2])
def test_an_unknown_character_is_named_with_its_row(texts: Path, tmp_path: Path, workers: int) -> None:
    tokenizer = build_tokenizer("characters", [WORDS + "0123456789\n"])
    (texts / "c.jsonl").write_text(json.dumps({"text": WORDS}) + "\n" + json.dumps({"text": WORDS + "\u20ac"}) + "\n")
    with pytest.raises(UserError, match=r"c\.jsonl, row 1: .*U\+20AC"):
        prepare(
            DataConfig(source=str(texts), shard_tokens=1000), tmp_path / "out", tokenizer=tokenizer, workers=workers
        )


def test_errors_of_the_first_document_name_no_row(tmp_path: Path) -> None:
    tokenizer = build_tokenizer("characters", [WORDS + "|"])
    (tmp_path / "a.txt").write_text(WORDS + "||" + WORDS + "\u20ac")
    for split_on, place in ((None, r"a\.txt, first document: "), ("||", r"a\.txt, row 1: ")):
        with pytest.raises(UserError, match=place + r".*U\+20AC"):
            prepare(
                DataConfig(source=str(tmp_path / "a.txt"), split_on=split_on), tmp_path / "out", tokenizer=tokenizer
            )


@pytest.mark.parametrize("deduplicate", [False, True])
@pytest.mark.parametrize("change", ["grown", "cut", "removed"])
def test_a_source_that_changes_during_preparation_is_refused(
    texts: Path, tmp_path: Path, change: str, deduplicate: bool
) -> None:
    out = tmp_path / "sets" / "out"
    path = texts / "d.jsonl"

    def changing(task: Any, *arguments: Any) -> Any:
        if task is prepare_unit:
            lines = path.read_text().splitlines(keepends=True)
            match change:
                case "grown":
                    path.write_text("".join([*lines, json.dumps({"text": "more"}) + "\n"]))
                case "cut":
                    path.write_text("".join(lines[:3]))
                case "removed":
                    path.unlink()
        return run_tasks(task, *arguments)

    request = DataConfig(source=str(texts), tokenizer="bytes", shard_tokens=2000, deduplicate=deduplicate)
    message = r"cannot read .*d\.jsonl" if change == "removed" else "texts changed while"
    with mock.patch("glassgpt.data.builder.run_tasks", changing), pytest.raises(UserError, match=message):
        prepare(request, out, workers=1)
    assert not out.exists()
    prepare(request, out, workers=1)
    prepare(request, tmp_path / "expected")
    assert contents(out) == contents(tmp_path / "expected")


def test_a_document_of_several_parts_and_shards_keeps_its_text(tmp_path: Path) -> None:
    text = "".join(f"{number} {WORDS}\n" for number in range(14_000))
    assert len(text) > 12e6
    source = tmp_path / "large.jsonl"
    source.write_text(json.dumps({"text": text}) + "\n" + json.dumps({"text": "another"}) + "\n")
    dataset = open_dataset(
        prepare(DataConfig(source=str(source), tokenizer="bytes", shard_tokens=5_000_000), tmp_path / "out")
    )
    assert dataset.whole.read(0, len(dataset.train)).astype(np.uint8).tobytes().decode() == text
    assert len(dataset.train.parts) == 3


def test_all_bad_files_of_a_folder_are_reported_at_once(tmp_path: Path) -> None:
    """Each is found without the others, and what remains without them is prepared."""
    bad = {
        "picture.txt": b"\x89PNG\r\n\x1a\n" + bytes(100),
        "latin.txt": "café".encode("latin-1"),
        "column.csv": b"id,body\n1,a\n",
        "ragged.csv": b"text,id\na,1\nb\n",
        "cut.jsonl": b'{"text": "a"}\n{"text": \n',
        "key.jsonl": b'{"body": "a"}\n',
        "cut.parquet": b"PAR1",
        "cut.txt.gz": gzip.compress(b"text")[:-6],
    }
    folder = tmp_path / "texts"
    folder.mkdir()
    parquet.write_table(pyarrow.table({"text": [1, 2]}), folder / "numbers.parquet")
    for name, content in bad.items():
        (folder / name).write_bytes(content)
    for name, target in (("gone.txt", "nowhere"), ("circle.md", "circle.md")):
        (folder / name).symlink_to(target)
    names = {path.name for path in folder.iterdir()}
    (folder / "good.txt").write_text(WORDS)
    (folder / "good.jsonl").write_text(json.dumps({"text": WORDS}))
    found: set[str] = set()
    while names:
        with pytest.raises(UserError) as caught:
            prepare(DataConfig(source=str(folder), tokenizer="bytes"), tmp_path / "out")
        reported = {name for name in names if re.search(rf"(^|[ /]){re.escape(name)}\b", str(caught.value), re.M)}
        assert len(reported) == min(len(names), 10)
        for name in reported:
            (folder / name).unlink()
        names, found = names - reported, found | reported
    assert len(found) == 11
    prepare(DataConfig(source=str(folder), tokenizer="bytes"), tmp_path / "out")
    assert open_dataset(tmp_path / "out").manifest["documents"] == 2


def test_rows_that_are_skipped_are_no_reason_to_refuse_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.csv").write_text("text,id\na,1\nb\n")
    (folder / "b.jsonl").write_text('{"body": "a"}\n{"text": "b"}\n')
    prepare(DataConfig(source=str(folder), tokenizer="bytes", skip_bad=True), tmp_path / "out")
    assert open_dataset(tmp_path / "out").manifest["bad_rows"] == 2
    (folder / "c.csv").write_text('text,id\n"a,1\n')  # where its row ends is not certain
    with pytest.raises(UserError, match=r"c\.csv"):
        prepare(DataConfig(source=str(folder), tokenizer="bytes", skip_bad=True), tmp_path / "out", overwrite=True)


def test_a_dataset_is_not_up_to_date_with_a_folder_that_has_a_link_to_nothing(texts: Path, tmp_path: Path) -> None:
    data = DataConfig(source=str(texts), tokenizer="bytes", shard_tokens=2000)
    prepare(data, tmp_path / "out")
    (texts / "gone.jsonl").symlink_to("nowhere")
    (texts / "e.jsonl").write_text("[")
    with pytest.raises(UserError, match=r"(?s)gone\.jsonl.*e\.jsonl"):
        prepare(data, tmp_path / "out", overwrite=True)


# -------------------------------------------------------------------------------------------------------- full disks


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of 3 MB; skip if that is not possible."""
    place = tmp_path / "small"
    place.mkdir()
    call = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(place)]
    try:
        mounted = subprocess.run(call, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("no `mount` here: a full disk cannot be made")
    if mounted.returncode:
        pytest.skip(f"no right to mount a small disk ({mounted.stderr.strip()})")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("free_bytes", [20_000, 100_000, 333_333])
def test_a_full_disk_is_reported_and_preparing_resumes_once_there_is_space(
    small_disk: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], workers: int, free_bytes: int
) -> None:
    for name in "abcd":
        lines = [json.dumps({"text": f"{name} {number} {WORDS}"}) + "\n" for number in range(60)]
        (texts / f"{name}.jsonl").write_text("".join(lines))
    (small_disk / "ballast").write_bytes(bytes((3 << 20) - free_bytes))
    out = small_disk / "out"
    arguments = command(texts, out, f"--workers={workers}", shard_tokens=10_000)
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert "the disk is full" in printed.err
    assert len(printed.err.splitlines()) == 1
    assert (KEPT in printed.out) == (
        free_bytes > 100_000 or bool(list((small_disk / ".partial-out").glob("train-*.json")))
    )
    assert not out.exists()
    kept = {path.name: path.stat().st_ino for path in small_disk.glob(".partial-out/*-*.json")}
    (small_disk / "ballast").unlink()
    assert main(arguments) == 0
    assert main(command(texts, tmp_path / "expected", "--workers=1", shard_tokens=10_000)) == 0
    assert contents(out) == contents(tmp_path / "expected")
    assert names_beside(out) == ["out"]
    assert kept or free_bytes < 333_333


@pytest.mark.parametrize("workers", [1, 2])
def test_a_file_size_limit_is_reported_as_ulimit(texts: Path, tmp_path: Path, workers: int) -> None:
    out = tmp_path / "out"
    arguments = command(texts, out, f"--workers={workers}", shard_tokens=4000)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, resource.RLIM_INFINITY))

    process = start(arguments, preexec_fn=limit)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 2, err
    assert "ulimit -f" in err
    assert len(err.splitlines()) == 1
    assert main(arguments) == 0


def test_a_full_disk_while_an_index_is_written_is_reported(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The index is written by `write_bytes`, because the errors of NumPy's `tofile` do not give a reason."""
    real = Path.write_bytes

    def full(path: Path, data: Any) -> int:
        if path.suffix == ".idx":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match="the disk is full"):
        prepare(DataConfig(source=str(texts), tokenizer="bytes"), tmp_path / "out")


# --------------------------------------------------------------------------------------------------------- odd sizes


def text_of(out: Path) -> str:
    """Return the text of a dataset of bytes."""
    dataset = open_dataset(out)
    return dataset.whole.read(0, len(dataset.whole)).astype(np.uint8).tobytes().decode()


def test_shards_of_one_token_are_the_same_with_more_workers_than_work_units(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for name, content in (("a.txt", "abc"), ("b.txt", ""), ("c.txt", "d"), ("e.txt", "")):
        (folder / name).write_text(content)
    assert main(command(folder, tmp_path / "one", "--workers=1", shard_tokens=1)) == 0
    assert main(command(folder, tmp_path / "nine", "--workers=9", shard_tokens=1)) == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "nine")
    assert text_of(tmp_path / "one") == "abcd"  # each is the first document of its split, so there is no separator
    assert {path.stat().st_size for path in (tmp_path / "one").glob("*.bin")} == {2}


@pytest.mark.parametrize(
    ("content", "message"), [("x", "too short: it has no text besides the validation split"), ("", "has no text")]
)
def test_too_little_text_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, message: str
) -> None:
    (tmp_path / "text.txt").write_text(content)
    assert main(command(tmp_path / "text.txt", tmp_path / "sets" / "out")) == 2
    assert message in capsys.readouterr().err
    assert names_beside(tmp_path / "sets" / "out") == []


def test_a_thousand_tiny_files_are_prepared(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(1000):
        (folder / f"{number:04}.txt").write_text(f"text {number}")
    assert main(command(folder, tmp_path / "out", "--workers=2")) == 0
    manifest = open_dataset(tmp_path / "out").manifest
    assert manifest["documents"] == 1000
    assert manifest["splits"]["validation"]["documents"] in (99, 100)  # one document more or less per work unit


NAMES = (
    "two words.txt",
    "new\nline.txt",
    "Ünï-日本.txt",
    "-x.txt",
    "--out.txt",
    "[a].txt",
    "a'\"$`.txt",
    "tab\t.jsonl",
)


@pytest.mark.parametrize("workers", [1, 2])
def test_file_names_with_special_characters_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    folder = tmp_path / "a folder\nwith [all] of it"
    folder.mkdir()
    for number, name in enumerate(NAMES):
        text = f"{number} {WORDS * 3}"
        (folder / name).write_text(json.dumps({"text": text}) if name.endswith("jsonl") else text)
    monkeypatch.chdir(tmp_path)
    assert main(command(folder.name, Path("out ö\n"), f"--workers={workers}")) == 0  # relative
    assert open_dataset(tmp_path / "out ö\n").manifest["documents"] == len(NAMES)


def test_file_names_that_are_not_unicode_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in (b"a\xff.txt", b"b\xfe.txt"):
        (folder / os.fsdecode(name)).write_text(WORDS * 3)
    for workers in (1, 2):
        assert main(command(folder, tmp_path / f"out{workers}", f"--workers={workers}")) == 0
    assert contents(tmp_path / "out1") == contents(tmp_path / "out2")


def test_a_file_that_a_pattern_matches_twice_counts_once(tmp_path: Path) -> None:
    deep = tmp_path / "texts" / "a" / "b"
    deep.mkdir(parents=True)
    (deep / "x.txt").write_text(WORDS)
    files = LocalFiles(tmp_path / "texts", "**/**/*.txt").files()
    assert [file.name for file in files] == ["a/b/x.txt"]


def test_a_dataset_inside_its_source_folder_is_not_read(tmp_path: Path) -> None:
    """The dataset in the source folder, and its partial files there, are not read as text."""
    (tmp_path / "a.txt").write_text(WORDS)
    (tmp_path / "b.txt").write_text(WORDS)
    out = tmp_path / "dataset"
    for _ in range(2):
        assert main(command(tmp_path, out, "--overwrite")) == 0
        (tmp_path / "b.txt").write_text(WORDS * 2)
    assert open_dataset(out).manifest["documents"] == 2


def test_out_may_be_a_link_but_not_the_root_of_a_file_system(
    small_disk: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "link").symlink_to(small_disk / "there")
    for options in ((), ("--validation=first_shard",)):
        assert main(command(texts, tmp_path / "link", "--overwrite", *options)) == 0
        assert (tmp_path / "link").is_symlink()
        open_dataset(small_disk / "there")
    assert main(command(texts, small_disk)) == 2
    assert "the root of a file system" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a file system without new files")
@pytest.mark.parametrize("out", ["/proc/x", "/proc/x/y", "/dev/null/x"])
def test_an_out_where_nothing_can_be_created_is_refused(
    out: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text(WORDS)
    assert main(command(tmp_path, Path(out))) == 2
    assert out in capsys.readouterr().err


def test_a_source_on_a_read_only_file_system_is_prepared(small_disk: Path, tmp_path: Path) -> None:
    (small_disk / "a.txt").write_text(WORDS)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert main(command(small_disk, tmp_path / "out")) == 0
