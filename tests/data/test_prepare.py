"""`prepare`: datasets are complete or absent, are rebuilt only if necessary, and hold the source's text."""

import errno
import itertools
import json
import os
import random
import signal
import string
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glassgpt.config.schema import DataConfig
from glassgpt.data import readers, work_units
from glassgpt.data.dataset import Dataset, TokenStream, open_dataset, verify
from glassgpt.data.inspect import dataset_facts
from glassgpt.data.prepare import prepare, require_tokenizer
from glassgpt.data.shards import ShardWriter
from glassgpt.data.source_files import SourceFile, fetch_all
from glassgpt.data.work_units import WorkUnit
from glassgpt.tokenizers.builtin import BPETokenizer, build_tokenizer
from glassgpt.utils.errors import UserError
from prepare_harness import contents

TEXT = "The quick brown fox jumps over the lazy dog. " * 20 + "Ça va?\r\n"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_bytes(TEXT.encode())
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLASSGPT_CACHE", str(tmp_path / "cache"))


def config(source: Path, **changes: Any) -> DataConfig:
    return DataConfig(source=str(source), **changes)


def all_tokens(stream: TokenStream) -> list[int]:
    return [int(token) for token in stream.read(0, len(stream))]


def decoded(dataset: Dataset) -> str:
    """Return the text of the training split followed by that of the validation split."""
    return dataset.tokenizer.decode_bytes(all_tokens(dataset.train) + all_tokens(dataset.validation)).decode()


def end_of_text_tokenizer() -> BPETokenizer:
    """Return a BPE tokenizer with the 256 bytes as GPT-2's files spell them, no merges, and end-of-text as id 256."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    vocab = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
    return BPETokenizer.from_merges(vocab | {"<|endoftext|>": 256}, [])


def test_a_single_text_has_nanogpts_split_and_character_ids(tmp_path: Path) -> None:
    """As Tiny Shakespeare, the text has 1,115,394 characters, 65 of them distinct; nanoGPT splits it 90/10."""
    path = tmp_path / "input.txt"
    letters = "\n !$&',-.3:;?" + string.ascii_letters
    path.write_text("".join(random.Random(0).choices(letters, k=1_115_394)))
    dataset = open_dataset(prepare(config(path)))
    data = path.read_text()
    number_of = {character: i for i, character in enumerate(sorted(set(data)))}
    expected = [number_of[character] for character in data]
    assert (len(dataset.train), len(dataset.validation)) == (1_003_854, 111_540)
    assert all_tokens(dataset.train) == expected[: int(len(data) * 0.9)]
    assert all_tokens(dataset.validation) == expected[int(len(data) * 0.9) :]


@pytest.mark.parametrize("kind", ["characters", "bytes"])
@pytest.mark.parametrize("shard_tokens", [7, 90, 10**8])
def test_shards_decode_to_the_text(text: Path, kind: str, shard_tokens: int) -> None:
    directory = prepare(config(text, tokenizer=kind, validation_fraction=0.3, shard_tokens=shard_tokens))
    dataset = open_dataset(directory)
    assert decoded(dataset) == TEXT
    verify(directory)
    manifest = dataset.manifest
    assert {split: manifest["splits"][split]["bytes"] for split in ("train", "validation")} == {
        "train": 635,
        "validation": 274,
    }
    sizes = [shard["tokens"] for shard in manifest["splits"]["train"]["shards"]]
    assert max(sizes) <= shard_tokens
    assert all(size == shard_tokens for size in sizes[:-1])


def test_documents_are_joined_and_the_vocabulary_covers_all_text(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for name, content in (("a.txt", "aaa"), ("b.txt", " \n"), ("c.txt", "ccc"), ("d.txt", "only here: z")):
        (folder / name).write_text(content)
    lines: list[str] = []
    dataset = open_dataset(prepare(config(folder, validation_fraction=0.1), log=lines.append))
    assert decoded(dataset) == "aaa\n\nccconly here: z"
    assert dataset.tokenizer.decode(all_tokens(dataset.train)) == "aaa\n\nccc"
    assert dataset.manifest["documents"] == 3
    assert any("1 blank documents" in line for line in lines)


def documents_in(stream: TokenStream, dataset: Dataset) -> list[str]:
    """Return the texts of a split's documents, located by the index."""
    starts = stream.document_starts()
    assert starts is not None
    return [
        dataset.tokenizer.decode(stream.read(a, b - a)) for a, b in itertools.pairwise([*starts.tolist(), len(stream)])
    ]


@settings(deadline=None, max_examples=30)
@given(
    texts=st.lists(st.text("ab", min_size=1, max_size=9), min_size=2, max_size=40, unique=True),
    percent=st.integers(1, 99),
    shard_tokens=st.sampled_from([5, 50, 10_000]),
)
def test_each_document_is_whole_in_one_split(texts: list[str], percent: int, shard_tokens: int) -> None:
    """Each split keeps the source's order; validation has its fraction of the documents, to within one document."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "texts.jsonl")
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        request = config(source, tokenizer="bytes", validation_fraction=percent / 100, shard_tokens=shard_tokens)
        try:
            dataset = open_dataset(prepare(request, Path(folder, "out"), tokenizer=end_of_text_tokenizer()))
        except UserError as error:
            if percent <= 50 or "no text besides the validation split" not in str(error):
                raise
            return
        train, validation = (documents_in(stream, dataset) for stream in (dataset.train, dataset.validation))
        assert abs(len(validation) - len(texts) * percent / 100) <= 1
        remaining = {"train": train, "validation": validation}
        for text in texts:
            split = next(split for split in remaining if remaining[split][:1] == [f"<|endoftext|>{text}"])
            remaining[split].pop(0)
        assert not any(remaining.values())


def test_end_of_text_comes_before_each_document_and_not_at_the_cut(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for name, content in (("a.txt", "aa"), ("b.txt", "bbbb"), ("c.txt", "cc")):
        (folder / name).write_text(content)
    tokenizer = end_of_text_tokenizer()
    several = open_dataset(prepare(config(folder, validation_fraction=0.1), tokenizer=tokenizer))
    single = open_dataset(prepare(config(folder / "b.txt", validation_fraction=0.25), tokenizer=tokenizer))
    end, a, b, c = 256, *b"abc"
    assert all_tokens(several.train) == [end, a, a, end, b, b, b, b]
    assert all_tokens(several.validation) == [end, c, c]
    assert all_tokens(single.train) == [end, b, b, b]
    assert all_tokens(single.validation) == [b]  # the rest of a cut document has no end-of-text before it
    assert [documents_in(stream, single) for stream in (single.train, single.validation)] == [["<|endoftext|>bbb"], []]


def test_a_document_in_parts_has_one_added_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = json.loads(end_of_text_tokenizer().to_json())
    content["pre_tokenizer"]["add_prefix_space"] = True
    (tmp_path / "spaced.json").write_text(json.dumps(content))
    words = "the\nquick\nbrown\nfox\n" * 10
    (tmp_path / "a.jsonl").write_text(f"{json.dumps({'text': words})}\n" * 2)
    monkeypatch.setattr(readers, "PART_CHARACTERS", 30)
    dataset = open_dataset(prepare(config(tmp_path / "a.jsonl", tokenizer=str(tmp_path / "spaced.json"))))
    assert decoded(dataset) == f"<|endoftext|> {words}" * 2


def test_a_document_starts_with_the_tokenizers_prefix(tmp_path: Path) -> None:
    """End-of-text comes first, then the prefix (such as Llama's <s>); if both are the same id, it comes once."""
    (tmp_path / "texts").mkdir()
    for name, content in (("a.txt", "aa"), ("b.txt", "bb")):
        (tmp_path / "texts" / name).write_text(content)
    a, b = b"ab"
    for prefix, marks in ((97, [256, 97]), (256, [256])):
        content = json.loads(end_of_text_tokenizer().to_json())
        single = [{"SpecialToken": {"id": "mark", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
        named = {"mark": {"id": "mark", "ids": [prefix], "tokens": ["mark"]}}
        content["post_processor"] = {
            "type": "TemplateProcessing",
            "single": single,
            "pair": single,
            "special_tokens": named,
        }
        tokenizer = BPETokenizer(json.dumps(content))
        assert tokenizer.prompt_prefix == (prefix,)
        dataset = open_dataset(
            prepare(config(tmp_path / "texts"), tokenizer=tokenizer, out=tmp_path / f"out-{len(marks)}")
        )
        assert [*all_tokens(dataset.train), *all_tokens(dataset.validation)] == [*marks, a, a, *marks, b, b]


@settings(deadline=None, max_examples=30)
@given(text=st.text("ab\u00e9", min_size=2, max_size=40), percent=st.integers(1, 99))
def test_the_cut_through_a_single_document_is_exact(text: str, percent: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "text.txt")
        source.write_text(text)
        kept = len(text) * (100 - percent) // 100
        if kept == 0:
            with pytest.raises(UserError, match="no text besides the validation split"):
                prepare(config(source, validation_fraction=percent / 100), Path(folder, "out"))
            return
        dataset = open_dataset(prepare(config(source, validation_fraction=percent / 100), Path(folder, "out")))
        assert dataset.tokenizer.decode(all_tokens(dataset.train)) == text[:kept]
        assert dataset.tokenizer.decode(all_tokens(dataset.validation)) == text[kept:]


def test_vocabularies_above_65536_ids_take_four_bytes_per_token(text: Path) -> None:
    """Two bytes hold only 65,536 different ids; larger ones would wrap around."""
    wide = "".join(map(chr, [*range(32, 0xD800), *range(0xE000, 0xE000 + 20_000)])) + TEXT
    content = wide[-1500:]
    text.write_bytes(content.encode())
    tokenizer = build_tokenizer("characters", [wide])
    assert tokenizer.vocab_size > 1 << 16
    dataset = open_dataset(prepare(config(text), tokenizer=tokenizer))
    assert decoded(dataset) == content
    assert max(all_tokens(dataset.train)) >= 1 << 16
    assert dataset.train.parts[0].dtype == np.dtype("<u4")


# -------------------------------------------------------------------------------------------- special tokens in a text

MARK = "<|endoftext|>"


@pytest.mark.parametrize("workers", [1, 2])
def test_special_tokens_in_a_text_are_said_and_split_on_request(tmp_path: Path, workers: int) -> None:
    """In one file or several, the documents are those of the same texts in rows."""
    texts = [f"Document {number} of this text. {TEXT}" for number in range(40)]
    (tmp_path / "texts").mkdir()
    for name, part in (("a.txt", texts[:25]), ("b.md", texts[25:])):
        (tmp_path / "texts" / name).write_bytes(MARK.join(part).encode())
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    lines: list[str] = []
    plain = open_dataset(prepare(config(tmp_path / "texts"), log=lines.append, workers=workers)).manifest
    assert plain["special_tokens"] == 38
    assert len([line for line in "\n".join(lines).split("\n") if MARK in line and "38" in line]) == 1
    split = open_dataset(prepare(config(tmp_path / "texts", split_on=MARK, shard_tokens=2000), workers=workers))
    assert (split.manifest["special_tokens"], split.manifest["documents"]) == (0, 40)
    rows = open_dataset(prepare(config(tmp_path / "rows.jsonl", tokenizer="characters")))
    assert sorted(documents_of(split)) == sorted(documents_of(rows)) == sorted(texts)


def documents_of(dataset: Dataset) -> list[str]:
    """Return the text of each document; without an end-of-text token, an empty line is between them."""
    texts = []
    for stream in (dataset.train, dataset.validation):
        starts = stream.document_starts()
        assert starts is not None
        for begin, end in itertools.pairwise([*starts.tolist(), len(stream)]):
            texts.append(
                dataset.tokenizer.decode([int(i) for i in stream.read(begin, end - begin)]).removeprefix("\n\n")
            )
    return texts


# ------------------------------------------------------------------------------------------------ up to date or rebuilt


def test_a_dataset_that_is_up_to_date_is_not_touched(text: Path) -> None:
    first = prepare(config(text))
    before = (first / "manifest.json").stat()
    os.utime(text, (1, 1))  # another modification time, the same text
    lines: list[str] = []
    assert prepare(config(text), log=lines.append) == first
    after = (first / "manifest.json").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert lines == []


def test_another_text_or_request_rebuilds_the_dataset(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    fingerprints = []
    for change in ({}, {"validation_fraction": 0.2}, {"tokenizer": "bytes"}):
        assert prepare(config(text, **change), out, overwrite=True) == out
        dataset = open_dataset(out)
        assert decoded(dataset) == TEXT
        fingerprints.append(dataset.fingerprint)
    text.write_text("another text")
    prepare(config(text), out, overwrite=True)
    fingerprints.append(open_dataset(out).fingerprint)
    assert len(set(fingerprints)) == 4
    prepare(config(text, encoding="latin-1"), out, overwrite=True)
    assert open_dataset(out).fingerprint == fingerprints[-1]
    assert open_dataset(out).manifest["request"]["encoding"] == "latin-1"


def test_another_dataset_is_replaced_only_on_request(text: Path, tmp_path: Path) -> None:
    """Its runs could neither resume nor be evaluated. A damaged one of the same text is prepared again."""
    out = prepare(config(text), tmp_path / "out")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    (tmp_path / "other.txt").write_text("another text")
    for wanted, reason in (
        (config(tmp_path / "other.txt"), r"source is .*text\.txt', not .*other\.txt'"),
        (config(text, tokenizer="bytes"), "tokenizer is 'characters', not 'bytes';.*--overwrite"),
        (config(text, encoding="latin-1"), "encoding is 'utf-8', not 'latin-1'"),
    ):
        with pytest.raises(UserError, match=reason):
            prepare(wanted, out)
    next(out.glob("train*.bin")).unlink()
    prepare(config(text), out)
    assert {path.name: path.read_bytes() for path in out.iterdir()}.keys() == before.keys()
    assert decoded(open_dataset(out)) == TEXT
    text.write_text("changed")
    with pytest.raises(UserError, match="its text has changed"):
        prepare(config(text), out)


@pytest.mark.parametrize("damage", ["missing", "short", "tokenizer", "manifest"])
def test_a_damaged_dataset_is_rebuilt(text: Path, damage: str) -> None:
    directory = prepare(config(text))
    undamaged = contents(directory)
    match damage:
        case "missing":
            (directory / "validation-00000-00000.bin").unlink()
        case "short":
            os.truncate(directory / "train-00000-00000.bin", 10)
        case "tokenizer":
            (directory / "tokenizer.json").write_text("{}")
        case "manifest":
            (directory / "manifest.json").write_text("{")
    with pytest.raises(UserError):
        open_dataset(directory)
    assert prepare(config(text)) == directory
    assert contents(directory) == undamaged


def test_verify_detects_a_flipped_bit(text: Path) -> None:
    directory = prepare(config(text))
    content = bytearray((directory / "train-00000-00000.bin").read_bytes())
    content[100] ^= 1
    (directory / "train-00000-00000.bin").write_bytes(content)
    with pytest.raises(UserError, match=r"train-00000-00000\.bin"):
        verify(directory)


def test_the_bytes_do_not_depend_on_the_directory(text: Path, tmp_path: Path) -> None:
    first, second = prepare(config(text), tmp_path / "one"), prepare(config(text), tmp_path / "deep" / "two")
    assert contents(first) == contents(second)
    elsewhere = tmp_path / "renamed.txt"
    elsewhere.write_bytes(text.read_bytes())
    fingerprints = {open_dataset(prepare(config(path), tmp_path / path.stem)).fingerprint for path in (text, elsewhere)}
    assert fingerprints == {open_dataset(first).fingerprint}


def test_each_source_and_request_has_its_own_directory(text: Path, tmp_path: Path) -> None:
    namesake = tmp_path / "folder" / "text.txt"
    namesake.parent.mkdir()
    namesake.write_text("another text of the same name")
    requests = [config(text), config(namesake), config(text, validation_fraction=0.2), config(text, tokenizer="bytes")]
    places = [prepare(request) for request in requests]
    assert len(set(places)) == 4
    assert [prepare(request) for request in requests] == places
    assert all(place.name.startswith("text-") for place in places)


def test_a_relative_and_an_absolute_path_are_the_same_source(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(text.parent)
    assert prepare(config(Path("text.txt"))) == prepare(config(text))


def test_a_models_tokenizer_is_used_for_other_text(text: Path, tmp_path: Path) -> None:
    own = build_tokenizer("characters", [TEXT, "0123456789"])
    dataset = open_dataset(prepare(config(text), tokenizer=own))
    assert dataset.tokenizer.to_json() == own.to_json()
    assert decoded(dataset) == TEXT
    assert dataset.directory != prepare(config(text))
    with pytest.raises(UserError, match="U\\+"):
        prepare(config(text), tokenizer=build_tokenizer("characters", ["abc"]))


# ------------------------------------------------------------------------------------------- a dataset as the source


def test_a_prepared_dataset_is_a_source(text: Path, tmp_path: Path) -> None:
    directory = prepare(config(text), tmp_path / "ready")
    assert prepare(config(directory)) == directory
    assert prepare(config(directory), tokenizer=open_dataset(directory).tokenizer) == directory
    assert (
        prepare(config(directory, tokenizer="bytes")) == directory
    )  # the value may come from a recipe: the dataset's tokenizer is used
    require_tokenizer(config(directory))
    with pytest.raises(UserError, match=r"another tokenizer \(characters\) than bytes"):
        require_tokenizer(config(directory, tokenizer="bytes"))
    with pytest.raises(UserError, match="another tokenizer"):
        prepare(config(directory), tokenizer=build_tokenizer("characters", ["abc"]))
    with pytest.raises(UserError, match="already a prepared dataset"):
        prepare(config(directory), tmp_path / "copy")
    os.truncate(directory / "train-00000-00000.bin", 10)
    with pytest.raises(UserError, match=r"train-00000-00000\.bin has 10 bytes"):
        prepare(config(directory))


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("content", [b"", b" \n\t\r\n", b"\xef\xbb\xbf"])
def test_a_file_without_text_is_refused(text: Path, tmp_path: Path, content: bytes) -> None:
    text.write_bytes(content)
    with pytest.raises(UserError, match=r"text\.txt has no text"):
        prepare(config(text), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_out_with_other_content_is_left_alone(text: Path, tmp_path: Path) -> None:
    precious = tmp_path / "thesis" / "chapter.tex"
    precious.parent.mkdir()
    precious.write_text("years of work")
    for out in (precious.parent, precious):
        with pytest.raises(UserError, match="is not a prepared dataset"):
            prepare(config(text), out)
    assert not list(tmp_path.rglob("*.lock"))
    with pytest.raises(UserError, match=r"^/ is the root of a file system"):
        prepare(config(text), Path("/"))
    with pytest.raises(UserError, match=r"chapter\.tex.*not a directory"):
        prepare(config(text), precious / "out")
    assert precious.read_text() == "years of work"
    (tmp_path / "empty").mkdir()
    open_dataset(prepare(config(text), tmp_path / "empty"))


# ------------------------------------------------------------------------------------------- interrupted and concurrent


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_an_interruption_leaves_no_files(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    out = tmp_path / "sets" / "out"

    def fail(writer: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "close", fail)
        with pytest.raises((KeyboardInterrupt, UserError), match=r"^$|the disk is full"):
            prepare(config(text), out)
    assert [path for path in out.parent.iterdir() if path.suffix != ".lock"] == []
    open_dataset(prepare(config(text), out))


KILLED = """
import os, signal, sys
from pathlib import Path
from glassgpt.config.schema import DataConfig
from glassgpt.data.prepare import prepare
from glassgpt.data.shards import ShardWriter

source, out = sys.argv[1:]
ShardWriter.close = lambda writer: os.kill(os.getpid(), signal.SIGKILL)
prepare(DataConfig(source=source), Path(out))
"""

# The process that prepares waits until the two others wait for it.
CONCURRENT = """
import os, sys, time
from pathlib import Path
from glassgpt.config.schema import DataConfig
from glassgpt.data.dataset import open_dataset
from glassgpt.data.prepare import DatasetBuilder, prepare

source, out, folder = sys.argv[1:]
build = DatasetBuilder.build

def wait_and_build(*arguments):
    while len(list(Path(folder).iterdir())) < 2:
        time.sleep(0.01)
    build(*arguments)

def log(line):
    print(line.partition(" ")[0])
    if line.startswith("waiting"):
        Path(folder, str(os.getpid())).touch()

DatasetBuilder.build = wait_and_build
print(open_dataset(prepare(DataConfig(source=source), Path(out), log=log)).fingerprint)
"""


def start(script: str, *arguments: Path) -> "subprocess.Popen[str]":
    """Run a script in a new Python process."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_a_killed_process_leaves_no_dataset_and_no_lock(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "sets" / "out"
    killed = start(KILLED, text, out)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    assert not out.exists()
    assert (out.parent / ".partial-out").exists()
    assert decoded(open_dataset(prepare(config(text), out))) == TEXT
    assert not (out.parent / ".partial-out").exists()


def test_one_of_several_concurrent_processes_prepares(text: Path, tmp_path: Path) -> None:
    (tmp_path / "waiting").mkdir()
    processes = [start(CONCURRENT, text, tmp_path / "out", tmp_path / "waiting") for _ in range(3)]
    lines = [line for process in processes for line in process.communicate()[0].split()]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert lines.count("prepared") == 1
    assert lines.count("waiting") == 2
    assert lines.count(open_dataset(tmp_path / "out").fingerprint) == 3


def prepare_until_the_last_shard(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prepare, but with a disk that is full just before the work unit is marked as finished."""
    with monkeypatch.context() as patch:
        full = OSError(errno.ENOSPC, "No space left on device")
        patch.setattr(work_units, "write_atomic", mock.Mock(side_effect=full))
        with pytest.raises(UserError, match="the disk is full"):
            prepare(config(source, tokenizer="bytes", shard_tokens=100), out)


def test_the_rest_of_a_single_document_is_not_written_twice(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rest of a cut document has no start, so its finished shard counts no document but must still be skipped."""
    uninterrupted = prepare(config(text, tokenizer="bytes", shard_tokens=100), tmp_path / "whole")
    prepare_until_the_last_shard(text, tmp_path / "stopped", monkeypatch)
    again = prepare(config(text, tokenizer="bytes", shard_tokens=100), tmp_path / "stopped")
    assert contents(again) == contents(uninterrupted)
    verify(again)


def test_files_of_finished_work_units_are_not_fetched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}.txt").write_text(f"{number} " * 300)
    request = config(folder, tokenizer="bytes", shard_tokens=100)
    prepare_unit, finished = work_units.prepare_unit, []

    def fail_at_the_third_unit(plan: Any, unit: WorkUnit, *arguments: Any) -> None:
        if unit.number == 2:
            raise KeyboardInterrupt
        prepare_unit(plan, unit, *arguments)
        finished.append(unit.number)

    with monkeypatch.context() as patch:
        patch.setattr(work_units, "prepare_unit", fail_at_the_third_unit)
        with pytest.raises(KeyboardInterrupt):
            prepare(request, tmp_path / "out")
    assert finished == [0, 1]
    fetched: list[str] = []

    def recording_fetch_all(files: Sequence[SourceFile], *, log: Callable[[str], None]) -> Any:
        fetched.extend(file.name for file in files)
        return fetch_all(files, log=log)

    monkeypatch.setattr("glassgpt.data.builder.fetch_all", recording_fetch_all)
    prepare(request, tmp_path / "out")
    assert fetched == ["2.txt", "3.txt"]


def test_a_split_without_a_document_is_refused(tmp_path: Path) -> None:
    """`prepare` refuses it, because otherwise training would fail much later."""
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("A", "B", "A")))
    with pytest.raises(UserError, match=r"no document left for validation.*data\.validation_fraction"):
        prepare(config(texts, deduplicate=True), tmp_path / "out")
    (tmp_path / "blank.txt").write_text(" ")
    with pytest.raises(UserError, match=r"blank\.txt has no document left for validation"):
        prepare(config(texts, validation_source=str(tmp_path / "blank.txt")), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / ".partial-out").exists()


def test_a_first_shard_that_would_cut_a_document_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("a" * 250)
    with pytest.raises(UserError, match=r"first document of .* is larger than a shard"):
        prepare(config(tmp_path / "text.txt", validation="first_shard", shard_tokens=100), tmp_path / "out")


def test_files_of_other_types_are_logged(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in ("a.txt", "b.txt", "picture.png"):
        (folder / name).write_text(f"text of {name}")
    lines: list[str] = []
    prepare(config(folder), tmp_path / "out", log=lines.append)
    assert any("picture.png" in line and "a.txt" not in line for line in lines)


def test_a_dataset_with_other_files_is_not_replaced(text: Path, tmp_path: Path) -> None:
    out = prepare(config(text), tmp_path / "out")
    lines: list[str] = []
    prepare(config(text, validation_fraction=0.2), out, log=lines.append, overwrite=True)
    assert any(line.startswith(f"replacing the dataset {out}") and str(text) in line for line in lines)
    (out / "NOTES.md").write_text("hours of thought")
    prepare(config(text, validation_fraction=0.2), out)  # an unchanged request: nothing is replaced
    with pytest.raises(UserError, match=r"NOTES\.md"):
        prepare(config(text), out, overwrite=True)
    assert (out / "NOTES.md").read_text() == "hours of thought"


def test_a_text_whose_rows_are_all_skipped_is_refused(tmp_path: Path) -> None:
    """The error names the column, which may be misspelt."""
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' * 3)
    with pytest.raises(UserError, match=r"all 3 rows.*line 1: .*'nope'"):
        prepare(config(tmp_path / "a.jsonl", column="nope", skip_bad=True), tmp_path / "out")


def test_a_dataset_of_version_0_2_has_the_same_request(text: Path, tmp_path: Path) -> None:
    """The request lacks the settings that came later; the manifest may lack the counts."""
    out = prepare(config(text), tmp_path / "out")
    manifest = json.loads((out / "manifest.json").read_text())
    assert not {"delimiter", "split_on"} & set(manifest["request"])
    for name in ("special_tokens", "web_pages", "checksum"):
        del manifest[name]
    (out / "manifest.json").write_text(json.dumps(manifest))
    assert dataset_facts(out, lambda line: None)["source_counts"]["documents"] == 1
    prepare(config(text, split_on="dog"), out, overwrite=True)
    assert open_dataset(out).manifest["documents"] > 1
