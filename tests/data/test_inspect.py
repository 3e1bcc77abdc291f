"""`glassgpt data info` against an independent count, errors that name damaged files, and text read back from shards."""

import itertools
import json
import pickle
import tempfile
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from glassgpt.cli.main import main
from glassgpt.config.schema import DataConfig
from glassgpt.data import readers
from glassgpt.data import shards as shards_module
from glassgpt.data.dataset import Dataset, TokenStream, open_dataset, verify
from glassgpt.data.inspect import dataset_facts, facts_text, length_facts
from glassgpt.data.prepare import prepare
from glassgpt.data.tokenizer_training import train_bpe
from glassgpt.data.work_units import SEPARATOR
from glassgpt.tokenizers.builtin import BPETokenizer, CharacterTokenizer, Tokenizer
from glassgpt.utils.errors import UserError
from glassgpt.utils.formatting import escape_token

Capture = pytest.CaptureFixture[str]
BPE = train_bpe(["the low lower lowest " * 5, "naïve Größe " * 5], 280)
END = 279
SPLITS = ("train", "validation")
OTHER_KINDS = ("characters", "bytes")


@pytest.fixture(autouse=True, scope="module")
def small_chunks() -> Iterator[None]:
    """Read files 7 tokens at a time, so that documents span several chunks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards_module, "_CHUNK_TOKENS", 7)
        yield


def write_rows(path: Path, texts: list[str]) -> Path:
    """Write the texts as rows of a JSON Lines file; return its path."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def all_tokens(stream: TokenStream) -> list[int]:
    return [int(token) for token in stream.read(0, len(stream))]


def document_lengths(dataset: Dataset) -> list[int]:
    """Return the lengths in tokens of all documents in the index, those of the training split first."""
    lengths = []
    for stream in (dataset.train, dataset.validation):
        starts = stream.document_starts()
        assert starts is not None
        lengths += [after - start for start, after in itertools.pairwise([*starts.tolist(), len(stream)])]
    return lengths


def check_lengths(actual: dict[str, Any] | None, lengths: list[int]) -> None:
    """Compare the facts about document lengths with values computed by NumPy."""
    if not lengths:
        assert actual is None
        return
    assert actual is not None
    assert actual["longest"] == max(lengths)
    assert actual["median"] == np.percentile(lengths, 50, method="inverted_cdf")
    assert actual["percentile_90"] == np.percentile(lengths, 90, method="inverted_cdf")
    assert sum(documents for *_, documents in actual["histogram"]) == len(lengths)
    for least, longest, documents in actual["histogram"]:
        assert documents == sum(least <= length <= longest for length in lengths)
        assert longest == max(2 * least - 1, 0)
    for (_, before, _), (after, _, _) in itertools.pairwise(actual["histogram"]):
        assert after == before + 1
    assert actual["histogram"][0][2] > 0
    assert actual["histogram"][-1][2] > 0


def check_tokens(facts: dict[str, Any], ids: list[int], tokenizer: Tokenizer) -> None:
    """Compare the facts about frequent and unused tokens with counts of `ids`."""
    counts = Counter(ids)
    expected = sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))[:20]
    assert [(token["id"], token["count"]) for token in facts["frequent"]] == expected
    for token in facts["frequent"]:
        assert token["share"] == pytest.approx(token["count"] / len(ids))
        assert token["piece"] == escape_token(tokenizer.decode_bytes([token["id"]], after=token["id"]))
    assert facts["unused_ids"] == tokenizer.vocab_size - len(counts)
    assert facts["unknown_tokens"] == 0


# ----------------------------------------------------------------------------------------------------------- facts


@settings(deadline=None, max_examples=40)
@given(
    texts=st.lists(st.text("ab\u00e9 \u65e5", min_size=1, max_size=70).filter(str.strip), min_size=1, max_size=12),
    kind=st.sampled_from(["characters", "bytes", "bpe"]),
    shard_tokens=st.sampled_from([5, 50, 10_000]),
    percent=st.sampled_from([10, 50]),
)
def test_the_facts_equal_an_independent_count(texts: list[str], kind: str, shard_tokens: int, percent: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        source = write_rows(Path(folder, "rows.jsonl"), texts)
        data = DataConfig(
            source=str(source),
            tokenizer="bytes" if kind == "bpe" else kind,
            validation_fraction=percent / 100,
            shard_tokens=shard_tokens,
        )
        try:
            dataset = open_dataset(prepare(data, Path(folder, "out"), tokenizer=BPE if kind == "bpe" else None))
        except UserError as error:
            if "no text besides the validation split" not in str(error):
                raise
            return
        facts = dataset_facts(dataset.directory)
        for split, stream in zip(SPLITS, (dataset.train, dataset.validation), strict=True):
            recorded, shown = dataset.manifest["splits"][split], facts["splits"][split]
            assert (shown["tokens"], shown["shards"]) == (len(all_tokens(stream)), len(recorded["shards"]))
            assert (shown["documents"], shown["characters"], shown["bytes"]) == tuple(
                recorded[k] for k in ("documents", "characters", "bytes")
            )
            starts = stream.document_starts()
            assert starts is not None
            assert shown["tokens_before"] == [*starts.tolist(), len(stream)][0]
        check_lengths(facts["lengths"], document_lengths(dataset))
        check_tokens(facts, all_tokens(dataset.train) + all_tokens(dataset.validation), dataset.tokenizer)
        assert facts["disk_bytes"] == sum(path.stat().st_size for path in dataset.directory.iterdir())
        assert facts["fingerprint"] == dataset.fingerprint
        assert facts["source"] == str(source)
        for sample in facts["samples"]:
            assert not sample["begins_document"] or sample["text"] in [SEPARATOR + text for text in texts] + texts


@settings(deadline=None)
@given(st.lists(st.integers(0, 40) | st.integers(0, 5000), max_size=30))
@example([0])
@example([1, 2, 3, 4, 7, 8, 15, 16, 17])
@example([15, 16])
@example([1, 4096])
def test_the_histogram_of_document_lengths_has_power_of_two_bins(lengths: list[int]) -> None:
    check_lengths(length_facts(np.array(lengths, dtype=np.int64)), lengths)


def test_samples_are_the_first_the_middle_and_the_last_document(tmp_path: Path) -> None:
    texts = [f"document {number} " + "x" * 300 for number in range(10)]
    for tokenizer in (BPE, None):
        out = prepare(
            DataConfig(source=str(write_rows(tmp_path / "rows.jsonl", texts)), validation_fraction=0.1),
            tokenizer=tokenizer,
        )
        facts = dataset_facts(out)
        numbers = [sample["text"].strip().split()[1] for sample in facts["samples"]]
        assert numbers in (["0", "4", "9"], ["0", "6", "9"])  # the fifth or sixth of ten is for validation
        assert all(sample["begins_document"] and "<|endoftext|>" not in sample["text"] for sample in facts["samples"])
        assert all(line.startswith("token") and "…" in line for line in facts_text(facts).splitlines()[-3:])


def test_samples_omit_the_special_tokens_that_start_a_document(tmp_path: Path) -> None:
    """Besides end-of-text, the tokenizer here adds a prefix token, as Llama's <s>."""
    content = json.loads(BPE.to_json())
    single = [{"SpecialToken": {"id": "mark", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    named = {"mark": {"id": "mark", "ids": [A], "tokens": ["mark"]}}
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": single,
        "pair": single,
        "special_tokens": named,
    }
    source = write_rows(tmp_path / "rows.jsonl", [f"{number}" for number in range(9)])
    facts = dataset_facts(prepare(DataConfig(source=str(source)), tokenizer=BPETokenizer(json.dumps(content))))
    assert [sample["text"] for sample in facts["samples"]] == ["0", "5", "8"]  # the fifth is for validation
    assert facts["lengths"] is not None
    assert facts["lengths"]["histogram"] == [[2, 3, 9]]


def test_a_single_document_is_sampled_at_three_places(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("a" * 500 + "b" * 500 + "日" * 500)
    facts = dataset_facts(prepare(DataConfig(source=str(path), tokenizer="bytes", validation_fraction=0.1)))
    assert [sample["text"][:1] for sample in facts["samples"]] == ["a", "日", "日"]
    assert not any(sample["begins_document"] or "\ufffd" in sample["text"] for sample in facts["samples"])
    assert facts["splits"]["validation"]["tokens_before"] == facts["splits"]["validation"]["tokens"]
    assert "validation continue a document" in facts_text(facts)


# ------------------------------------------------------------------------------------ token files of other projects

A, B = 64, 65  # the ids of "a" and "b" in this tokenizer, as in GPT-2's
# End-of-text before each document, or after each.
BEFORE = {"train": [A, A, END, A, B, END, B, *[A] * 30], "val": [END, B, B]}
AFTER = {"train": [A, A, END, A, B, END, *[A] * 30, END], "val": [B, B, END]}
SAMPLES = {"before": [(2, "ab"), (5, "b" + "a" * 30)], "after": [(0, "aa"), (6, "a" * 30)]}
LENGTHS = {"before": [3, 32, 3], "after": [3, 3, 31, 3]}


def write_token_files(folder: Path, kind: str, tokens: dict[str, list[int]]) -> None:
    for split, ids in tokens.items():
        array = np.array(ids, dtype=np.uint16)
        if kind == "nanoGPT":
            array.tofile(folder / f"{split}.bin")
        elif kind == "build-nanogpt":
            np.save(folder / f"text_{split}_000000.npy", array)
        else:
            header = np.zeros(256, dtype="<i4")
            header[:3] = 20240520, 1, len(array)
            (folder / f"text_{split}_000000.bin").write_bytes(header.tobytes() + array.tobytes())


@pytest.mark.parametrize("kind", ["nanoGPT", "build-nanogpt", "llm.c"])
@pytest.mark.parametrize("place", ["before", "after"])
def test_end_of_text_tokens_before_or_after_documents_separate_them(kind: str, place: str, tmp_path: Path) -> None:
    tokens = BEFORE if place == "before" else AFTER
    write_token_files(tmp_path, kind, tokens)
    (tmp_path / "tokenizer.json").write_text(BPE.to_json())
    facts = dataset_facts(tmp_path)
    check_lengths(facts["lengths"], LENGTHS[place])
    check_tokens(facts, tokens["train"] + tokens["val"], BPE)
    train = facts["splits"]["train"]
    assert (facts["made_by"], facts["source"], facts["source_counts"]) == (kind, None, None)
    assert (train["documents"], train["tokens_before"]) == ((2, 2) if place == "before" else (3, 0))
    assert (train["bytes"], train["characters"]) == (len(tokens["train"]) - tokens["train"].count(END), None)
    assert "unknown" in facts_text(facts)
    assert [(sample["token"], sample["text"]) for sample in facts["samples"]] == SAMPLES[place]


def test_the_bytes_do_not_include_a_space_that_the_tokenizer_puts_before_each_document(tmp_path: Path) -> None:
    content = json.loads(BPE.to_json())
    content["pre_tokenizer"]["add_prefix_space"] = True
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    a, spaced = (BPETokenizer(json.dumps(content)).encode(text).tolist() for text in ("a", " a b"))
    write_token_files(tmp_path, "nanoGPT", {"train": [*a, END, *a, END, *spaced], "val": [END, *a]})
    splits = dataset_facts(tmp_path)["splits"]
    assert (splits["train"]["bytes"], splits["validation"]["bytes"]) == (1 + 1 + 3, 1)


def test_nanogpt_character_files_have_no_document_boundaries(tmp_path: Path, capsys: Capture) -> None:
    write_token_files(tmp_path, "nanoGPT", {"train": [0, 1, 2, 1] * 20, "val": [1, 1]})
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"itos": {0: "a", 1: "é", 2: "\n", 3: "z"}}))
    assert main(["data", "info", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    facts = dataset_facts(tmp_path)
    assert facts["splits"]["train"]["documents"] is None
    assert facts["lengths"] is None
    assert facts["splits"]["train"]["bytes"] == 120
    assert facts["unused_ids"] == 1
    for line in (
        "format            nanoGPT",
        "document lengths are unknown",
        "1 of 4 ids never occur",
    ):
        assert line in out


# ---------------------------------------------------------------------------------------------------------- command


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    source = write_rows(tmp_path / "rows.jsonl", [f"the lower {number}" for number in range(30)] + ["the lower 1", " "])
    return prepare(DataConfig(source=str(source), shard_tokens=100), tmp_path / "out", tokenizer=BPE)


def test_the_command_prints_all_facts_and_checks(dataset: Path, tmp_path: Path, capsys: Capture) -> None:
    assert main(["data", "info", str(dataset), "--json", str(tmp_path / "new" / "facts.json")]) == 0
    out = capsys.readouterr().out
    facts = dataset_facts(dataset)
    assert out.startswith(facts_text(facts))
    files = sum(path.name != "manifest.json" for path in dataset.iterdir())
    assert f"verified {files} files" in out.splitlines()[-1]
    assert verify(dataset) == files >= 7
    for row in (
        "1  duplicates in the dataset",
        "1  blank documents, left out",
        "␣lower",
        "bpe, 280 tokens, end of text 279",
    ):
        assert row in out
    assert out.isascii() or all(line.isprintable() for line in out.splitlines())
    written = json.loads((tmp_path / "new" / "facts.json").read_text())
    assert written.pop("glassgpt") == version("glassgpt")
    assert written == json.loads(json.dumps(facts))


def flip(path: Path, offset: int, bit: int = 1) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= bit
    path.write_bytes(content)


@pytest.mark.parametrize(("suffix", "offset"), [("bin", 3), ("bin", -1), ("idx", 9), ("idx", -1)])
def test_a_flipped_bit_is_reported_after_the_facts(suffix: str, offset: int, dataset: Path, capsys: Capture) -> None:
    """A flip in a shard makes an id outside the vocabulary; a flip in an index changes a document's hash."""
    flip(dataset / f"train-00000-00001.{suffix}", offset, 128)
    assert main(["data", "info", str(dataset)]) == 2
    printed = capsys.readouterr()
    assert "most frequent tokens" in printed.out
    assert ("1 tokens are not ids" in printed.out) == (suffix == "bin")
    assert f"train-00000-00001.{suffix}" in printed.err
    assert main(["data", "info", str(dataset), "--skip-check"]) == 0
    assert "verified" not in capsys.readouterr().out


def test_a_damaged_id_near_four_billion_is_counted_as_unknown(tmp_path: Path) -> None:
    source = tmp_path / "text.txt"
    wide = "".join(map(chr, range(0x10000, 0x10000 + 70_000)))
    source.write_text(wide[-100:])
    directory = prepare(DataConfig(source=str(source)), tokenizer=CharacterTokenizer(wide))
    flip(directory / "train-00000-00000.bin", 7, 255)
    facts = dataset_facts(directory)
    assert (facts["dtype"], facts["unknown_tokens"], facts["unused_ids"]) == ("uint32", 1, 70_000 - 99)


def test_an_unordered_index_is_named(dataset: Path, capsys: Capture) -> None:
    for offset in (16, 16 * 3 + 7, -15, -9):  # -15, -9: the last document starts after the last token
        content = (dataset / "train-00000-00000.idx").read_bytes()
        flip(dataset / "train-00000-00000.idx", offset, 128)
        assert main(["data", "info", str(dataset)]) == 2
        assert "train-00000-00000.idx" in capsys.readouterr().err
        (dataset / "train-00000-00000.idx").write_bytes(content)


@pytest.mark.parametrize("name", ["train-00000-00000.bin", "validation-00000-00000.idx", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["shorter", "missing"])
def test_a_short_or_missing_file_is_named(name: str, damage: str, dataset: Path, capsys: Capture) -> None:
    content = (dataset / name).read_bytes()
    (dataset / name).unlink()
    if damage == "shorter":
        (dataset / name).write_bytes(content[:-2])
    assert main(["data", "info", str(dataset)]) == 2
    assert name in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("data", "commands: data info"),
        ("data inof x", "did you mean 'data info'"),
        ("data info", "DIR is missing"),
        ("data info missing", "missing is not a folder"),
        ("data info .", "is not a dataset"),
        ("data info out --json out", "--json out is a directory; name a file"),
        ("data info out --json rows.jsonl --json out/train-00000-00000.bin", "name another file"),
    ],
)
def test_errors_name_the_mistake_in_the_command(
    arguments: str, expected: str, dataset: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(dataset.parent)
    assert main(arguments.split()) == 2
    assert expected in capsys.readouterr().err


def test_long_tasks_log_their_progress(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(step=3)
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    lines: list[str] = []
    dataset_facts(dataset, lines.append)
    counted = len(lines)
    verify(dataset, lines.append)
    assert lines[0].startswith("counted 0M of 0M tokens")
    assert counted < len(lines)
    assert lines[-1].startswith("verified ")


# --------------------------------------------------------------------------------------------------- reconstruction


def file_texts() -> st.SearchStrategy[list[list[str]]]:
    """Generate the texts of 1 to 4 files, all different, with any Unicode, newlines and a special token's spelling."""
    text = st.lists(
        st.sampled_from(["\n\n", "<|endoftext|>", " the", "日本", "\r\n", "🙂"]) | st.characters(codec="utf-8"),
        max_size=40,
    )
    written = st.sampled_from(["", "\n\n", "x"]).flatmap(lambda head: text.map(lambda pieces: head + "".join(pieces)))
    files = st.lists(st.lists(written, min_size=1, max_size=12), min_size=1, max_size=4)
    return files.map(
        lambda files: [[f"{text}{i}.{j}" for j, text in enumerate(texts)] for i, texts in enumerate(files)]
    )


def read_back(dataset: Dataset) -> dict[str, list[str]]:
    """Return each split's documents as text, located by the index, without end-of-text but with separators."""
    documents = {}
    for split, stream in zip(SPLITS, (dataset.train, dataset.validation), strict=True):
        starts = stream.document_starts()
        assert starts is not None
        bounds = itertools.pairwise([*starts.tolist(), len(stream)])
        ids = [stream.read(begin, end - begin).tolist() for begin, end in bounds]
        if dataset.tokenizer.end_of_text is not None:
            assert all(each.count(END) == 1 and each[0] == END for each in ids)
            ids = [each[1:] for each in ids]
        documents[split] = [dataset.tokenizer.decode_bytes(each).decode() for each in ids]
    return documents


@pytest.mark.parametrize("kind", ["bpe", "characters", "bytes"])
@settings(deadline=None, max_examples=15)
@given(
    files=file_texts(),
    shard_tokens=st.sampled_from([16, 60, 10_000]),
    part=st.sampled_from([10, 1 << 22]),
    with_validation=st.booleans(),
)
def test_shards_hold_the_text_of_every_document(
    kind: str, files: list[list[str]], shard_tokens: int, part: int, with_validation: bool
) -> None:
    """Texts located by the index equal the source's in order, also if a document spans several parts or shards."""
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "PART_CHARACTERS", part)
        dataset = prepared_from(Path(name), kind, files, shard_tokens, with_validation, workers=1)
        texts = [text for file in files for text in file]
        compare_texts(dataset, texts, ["only for validation"] if with_validation else None)


@pytest.mark.parametrize("kind", ["bpe", *(pytest.param(kind, marks=pytest.mark.slow) for kind in OTHER_KINDS)])
def test_shards_written_by_two_processes_hold_the_text_of_every_document(kind: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    alphabet = [*"abc \n", "é", "日", "🙂", "\u0301", "<|endoftext|>"]
    files = [["x" + "".join(rng.choice(alphabet, rng.integers(1, 200))) for _ in range(40)] for _ in range(6)]
    dataset = prepared_from(tmp_path, kind, files, 1000, False, workers=2)
    assert len(dataset.manifest["splits"]["train"]["shards"]) > 12
    assert len({shard["name"].split("-")[1] for shard in dataset.manifest["splits"]["train"]["shards"]}) == 6
    compare_texts(dataset, [text for file in files for text in file], None)


def prepared_from(
    folder: Path, kind: str, files: list[list[str]], shard_tokens: int, with_validation: bool, workers: int
) -> Dataset:
    (folder / "rows").mkdir()
    for number, texts in enumerate(files):
        write_rows(folder / "rows" / f"{number}.jsonl", texts)
    extra: dict[str, Any] = {}
    if with_validation:
        extra["validation_source"] = str(write_rows(folder / "validation.jsonl", ["only for validation"]))
    data = DataConfig(
        source=str(folder / "rows"),
        tokenizer="bytes" if kind == "bpe" else kind,
        shard_tokens=shard_tokens,
        validation_fraction=0.2,
        **extra,
    )
    return open_dataset(prepare(data, folder / "out", tokenizer=BPE if kind == "bpe" else None, workers=workers))


def compare_texts(dataset: Dataset, texts: list[str], validation: list[str] | None) -> None:
    """Check that the splits hold each document once and in order, or the two pieces of a single document."""
    if len(texts) == 1 and validation is None:
        ids = [*all_tokens(dataset.train), *all_tokens(dataset.validation)]
        marks = 0 if dataset.tokenizer.end_of_text is None else 1
        assert dataset.tokenizer.decode_bytes(ids[marks:]).decode() == texts[0]
        return
    documents = read_back(dataset)
    separator = SEPARATOR if dataset.tokenizer.end_of_text is None else ""
    read = dict.fromkeys(SPLITS, 0)
    for text in [*texts, *(validation or [])]:
        # The first document of a split has no separator before it.
        split = next(
            s for s in SPLITS if documents[s][:1] == [separator + text] or (read[s] == 0 and documents[s][:1] == [text])
        )
        documents[split].pop(0)
        read[split] += 1
    assert not any(documents.values())
    assert validation is None or read == {"train": len(texts), "validation": len(validation)}


def test_facts_do_not_replace_a_datasets_own_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text("some text " * 50)
    dataset = prepare(DataConfig(source=str(tmp_path / "text.txt"), tokenizer="bytes"), tmp_path / "out")
    for name in ("manifest.json", "tokenizer.json"):
        before = (dataset / name).read_bytes()
        assert main(["data", "info", str(dataset), "--json", str(dataset / name)]) == 2
        assert str(dataset / name) in capsys.readouterr().err
        assert (dataset / name).read_bytes() == before
