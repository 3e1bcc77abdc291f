"""metrics.jsonl and samples.md: writing, reading, following, truncating, and damaged or half-written lines."""

import errno
import json
import math
from pathlib import Path

import pytest

from glassgpt.runs.metrics import (
    LINE,
    SECTION,
    FollowedFile,
    MetricsWriter,
    append_samples,
    read_metrics,
    read_samples,
    truncate_metrics,
    truncate_samples,
)
from glassgpt.utils.errors import UserError

# Texts that are hard to store: an empty one, some with headings of the file, and every kind of line end.
AWKWARD = ["", "## Step 000000\n", "\n\n## Step 999999", "\r\r## Step 000009", "a\x0cb\u2028c\r\n# d"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Return the path of a metrics.jsonl with an evaluation, two updates and an evaluation."""
    path = tmp_path / "metrics.jsonl"
    records = [{"step": 0, "val_loss": 3.0}, {"step": 1, "loss": 2.5}, {"step": 2, "loss": 2.0}]
    path.write_text("".join(json.dumps(record) + "\n" for record in [*records, {"step": 2, "val_loss": 1.5}]))
    return path


def test_a_record_is_flushed_immediately_and_always_valid_json(tmp_path: Path) -> None:
    metrics = MetricsWriter(tmp_path / "metrics.jsonl")
    norms = {"head": -math.inf, "norms": 2.0}
    metrics.write({"step": 1, "loss": math.nan, "grad_norm": math.inf, "grad_norms": norms, "lr": 1e-3})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    line = (tmp_path / "metrics.jsonl").read_text()  # before the file is closed
    expected = {"step": 1, "loss": None, "grad_norm": None, "grad_norms": {"head": None, "norms": 2.0}, "lr": 1e-3}
    assert json.loads(line, parse_constant=refuse) == expected
    metrics.close()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's always full device")
def test_a_full_disk_while_metrics_are_written_raises_one_explained_error() -> None:
    metrics = MetricsWriter(Path("/dev/full"))

    def use() -> None:
        try:
            metrics.write({"step": 1})
        finally:
            metrics.close()  # the record is still in the buffer: a second attempt must not hide the first error

    with pytest.raises(UserError, match="/dev/full: the disk is full") as caught:
        use()
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.ENOSPC


@pytest.mark.parametrize("ending", ["", '{"step": 7, "lo', '{"step": 7, "loss": 1.0, "lr": 1', "\xff"])
def test_a_half_written_last_line_is_ignored(path: Path, ending: str) -> None:
    with open(path, "ab") as file:
        file.write(ending.encode("latin-1"))
    metrics = read_metrics(path)
    assert metrics.training == [{"step": 1, "loss": 2.5}, {"step": 2, "loss": 2.0}]
    assert metrics.evaluations == [{"step": 0, "val_loss": 3.0}, {"step": 2, "val_loss": 1.5}]
    assert metrics.damaged == []
    assert read_metrics(path.with_name("none.jsonl")).training == []


@pytest.mark.parametrize(
    "line",
    [
        b"garbage",
        b"\x00\xff",
        b"[1]",
        b'{"loss": 1}',
        b'{"step": 1, "val_loss": "x"}',
        b'{"step": "a", "loss": 1.0}',
        b'{"step": 1, "loss": ' + b"9" * 400 + b"}",
        b'{"step": 1, "loss": ' + b"9" * 10_000 + b"}",
        b'{"step": true, "loss": 1}',
        b"[" * 10**5,
    ],
    ids=["text", "bytes", "list", "no step", "loss", "step", "large", "digits", "bool", "deep"],
)
def test_a_damaged_line_is_skipped_by_readers_and_kept_in_a_copy(path: Path, line: bytes) -> None:
    original = read_metrics(path)
    content = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*content[:2], line + b"\n", b"\n", *content[2:]]))
    metrics = read_metrics(path)
    assert (metrics.training, metrics.evaluations) == (original.training, original.evaluations)
    assert metrics.damaged == [3]
    before = path.read_bytes()
    copy = truncate_metrics(path, 9, 9)
    assert copy == path.with_name("edited-metrics.jsonl")
    assert copy.read_bytes() == before
    assert path.read_bytes() == b"".join(content)


def test_numbers_that_are_not_json_read_as_null(path: Path) -> None:
    path.write_text('{"step": 1, "loss": NaN}\n{"step": 2, "loss": -Infinity, "note": "unknown keys are kept"}\n')
    assert [record["loss"] for record in read_metrics(path).training] == [None, None]
    assert read_metrics(path).training[1]["note"] == "unknown keys are kept"


def test_truncation_removes_later_records_and_a_half_written_line(path: Path) -> None:
    original = path.read_text()
    path.write_text(original + '{"step": 3, "loss": 1.0}\n{"step": 4, "lo')
    assert truncate_metrics(path, 2, 2) is None
    assert path.read_text() == original
    truncate_metrics(path, 0, 0)
    assert path.read_text() == '{"step": 0, "val_loss": 3.0}\n'


def test_samples_are_read_back_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "samples.md"
    assert read_samples(path) == []
    truncate_samples(path, 0)
    append_samples(path, 0, ["one\n\n## Step 000007\n  indented", "two"])
    append_samples(path, 250, AWKWARD)
    # Carriage returns end lines, too; all other characters stay.
    texts = [text.replace("\r\n", "\n").replace("\r", "\n") for text in AWKWARD]
    assert read_samples(path) == [(0, ["one\n\n## Step 000007\n  indented", "two"]), (250, texts)]
    # An independent reading of the format: sections, samples, and an indented code block each.
    content = path.read_bytes().decode().split("\n")
    assert content[:5] == ["# Samples", "", "## Step 000000", "", "### Sample 1"]
    assert [line for line in content if line.startswith("#")] == [
        "# Samples",
        "## Step 000000",
        "### Sample 1",
        "### Sample 2",
        "## Step 000250",
        *(f"### Sample {number}" for number in range(1, 6)),
    ]


@pytest.mark.parametrize(
    "tail",
    ["\n", "\n## Ste", "\n## Step 00", "\n## Step 000009\n\n### Sam", "\n## Step 000009\n\n### Sample 1\n\n    Д"],
)
def test_truncation_removes_samples_that_a_full_disk_cut_off(tmp_path: Path, tail: str) -> None:
    path = tmp_path / "samples.md"
    truncate_samples(path, 0)
    append_samples(path, 4, ["Да", *AWKWARD])
    before = path.read_bytes()
    for cut in (0, 1):  # at the end of a character, and inside the Cyrillic letter
        path.write_bytes(before + tail.encode()[: len(tail.encode()) - cut])
        assert truncate_samples(path, 8) is None
        assert path.read_bytes() == before
    truncate_samples(path, 3)
    assert path.read_text() == "# Samples\n"


def test_following_a_file_returns_each_complete_line_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    content = b'{"step": 1, "loss": 2.0}\n' * 40 + b'{"step": 2, "lo'
    followed = FollowedFile(path, LINE)
    assert followed.read() == b""  # it does not exist yet
    pieces = []
    for end in range(0, len(content) + 1, 7):
        path.write_bytes(content[:end])
        piece = followed.read(limit=60)
        assert piece is not None
        assert piece == b"" or piece.endswith(b"\n")
        pieces.append(piece)
        followed = FollowedFile(
            path, LINE, *map(int, followed.cursor.split("-"))
        )  # a new object continues at the cursor
    assert b"".join(pieces) == content[: content.rindex(b"\n") + 1]
    path.write_bytes(content.replace(b"2.0", b"2.5"))  # the same length, other bytes
    assert followed.read() is None
    path.write_bytes(content[:50])
    assert followed.read() is None


def test_following_samples_returns_only_complete_sections(tmp_path: Path) -> None:
    path = tmp_path / "samples.md"
    append_samples(path, 1, ["é\nb"])
    content = path.read_bytes()
    append_samples(path, 2, ["c"])
    section = path.read_bytes()[len(content) :]
    followed = FollowedFile(path, SECTION)
    path.write_bytes(content)
    assert read_samples(followed.read() or b"") == [(1, ["é\nb"])]
    for end in range(1, len(section)):
        if section[end - 1 : end] != b"\n":  # one write call per section, so no cut at the end of a line
            path.write_bytes(content + section[:end])
            assert read_samples(followed.read() or b"") == []
    path.write_bytes(content + section)
    assert read_samples(followed.read() or b"") == [(2, ["c"])]
