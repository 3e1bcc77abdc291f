"""Reading documents from files: every format and compression, and the errors of bad files."""

import bz2
import csv
import gzip
import io
import itertools
import json
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from glassgpt.config.schema import ReadingConfig
from glassgpt.data import readers, text_files
from glassgpt.data.readers import PART_CHARACTERS, SUFFIXES, Counts, Part, read_documents
from glassgpt.utils.errors import UserError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

PLAIN = ReadingConfig()
COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".zst": lambda data: zstd.compress(data, options={zstd.CompressionParameter.checksum_flag: True}),
}
COMPRESSED = {suffix: compress for suffix, compress in COMPRESSIONS.items() if suffix}
# The second and third are blank, so readers leave them out.
TEXTS = ["Call me Ishmael.", "", "  \n", "two\nlines\r\nand \"quotes\", 'so'", "méow\u2028 \U0001f600", "<|endoftext|>"]


def without_blank(texts: list[str]) -> list[str]:
    return [text for text in texts if text.strip()]


def jsonl(texts: list[str]) -> bytes:
    return "".join(json.dumps({"id": 1, "text": text}, ensure_ascii=False) + "\n" for text in texts).encode()


def csv_of(texts: list[str]) -> bytes:
    file = io.StringIO(newline="")
    csv.writer(file).writerows([["id", "text"], *([str(i), text] for i, text in enumerate(texts))])
    return file.getvalue().encode()


def parquet_of(texts: list[str | None] | pa.Array, row_group_size: int = 2, **options: Any) -> bytes:
    file = io.BytesIO()
    parquet.write_table(
        pa.table({"id": range(len(texts)), "text": texts}), file, row_group_size=row_group_size, **options
    )
    return file.getvalue()


def saved(folder: Path, name: str, content: bytes) -> Path:
    """Write a file and return its path."""
    path = folder / name
    path.write_bytes(content)
    return path


def texts_in(path: Path, options: ReadingConfig = PLAIN) -> list[str]:
    parts = list(read_documents(path, options))
    assert all(part.starts for part in parts)
    return [part.text for part in parts]


def error_of(path: Path, options: ReadingConfig = PLAIN, **arguments: Any) -> str:
    """Return the error's message; check that it names the file and has at most two lines."""
    with pytest.raises(UserError) as caught:
        list(read_documents(path, options, **arguments))
    message = str(caught.value)
    assert path.name in message
    assert message.count("\n") <= 1
    return message


# ----------------------------------------------------------------------------------------------- formats, compressions


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize(
    ("suffix", "content"),
    [(".jsonl", jsonl(TEXTS)), (".json", jsonl(TEXTS)), (".NDJSON", jsonl(TEXTS)), (".csv", csv_of(TEXTS))],
)
def test_rows_are_documents(tmp_path: Path, suffix: str, content: bytes, compression: str) -> None:
    path = saved(tmp_path, f"texts{suffix}{compression}", COMPRESSIONS[compression](content))
    assert texts_in(path) == without_blank(TEXTS)
    assert [part.row for part in read_documents(path, PLAIN)] == [0, 3, 4, 5]


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("suffix", [".txt", ".MD", ".log", ""])
def test_a_file_of_text_is_one_document(tmp_path: Path, suffix: str, compression: str) -> None:
    text = "".join(TEXTS)
    path = saved(tmp_path, f"text{suffix}{compression}", COMPRESSIONS[compression](text.encode()))
    assert list(read_documents(path, PLAIN)) == [Part(text, 0, True)]


@pytest.mark.parametrize(
    "kind",
    [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())],
    ids=lambda kind: str(kind)[:12],
)
@pytest.mark.parametrize("row_group_size", [1, 4, 100])
def test_every_string_type_of_parquet_is_read(tmp_path: Path, kind: pa.DataType, row_group_size: int) -> None:
    array = pa.array(TEXTS).dictionary_encode() if pa.types.is_dictionary(kind) else pa.array(TEXTS, kind)
    assert texts_in(saved(tmp_path, "texts.parquet", parquet_of(array, row_group_size))) == without_blank(TEXTS)


@settings(max_examples=40)
@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=12), max_size=6), st.integers(1, 9))
def test_texts_do_not_depend_on_the_chunks_of_the_file(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], chunk: int
) -> None:
    folder = tmp_path_factory.mktemp("texts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_files, "_CHUNK", chunk * 8)  # a few bytes: within characters, lines and escapes
        assert texts_in(saved(folder, "a.jsonl", jsonl(texts))) == without_blank(texts)
        assert texts_in(saved(folder, "a.csv", csv_of(texts))) == without_blank(texts)
        assert texts_in(saved(folder, "a.csv.bz2", bz2.compress(csv_of(texts)))) == without_blank(texts)
        path = saved(folder, "a.txt.zst", zstd.compress("".join(texts).encode("utf-16")))
        text = "".join(texts).removeprefix("\ufeff")
        assert texts_in(path, ReadingConfig(encoding="utf-16")) == without_blank([text])


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_line_of_json_that_is_not_plain_changes_no_other_row(tmp_path: Path, newline: str) -> None:
    """Plain lines are decoded together. Two records in a line, or one in two lines, must not pass for two rows."""
    plain = [json.dumps({"text": text}) for text in ("a\u2028b", "é😀", 'q"', "\\ud800")]
    rows: dict[str, str | None] = {
        ' {"text": "space"}\t': "space",
        '{"text": "a"} {"text": "b"}': None,
        '{"text": "a"}, {"text": "b"}': None,
        '{"text": [1': None,
        ", 2]}": None,
        '{"text": "\\ud83d"}': None,
        '{"text": "\\ude00"}': None,
        '"text"': None,
        '{"text": null}': None,
        '{"text": "x", "text": "last"}': "last",
        "[" * 100_000: None,
    }
    lines = [*plain, *itertools.chain.from_iterable((line, plain[0], "") for line in rows), *plain]
    path = saved(tmp_path, "a.jsonl", newline.join(lines).encode())
    counts = Counts()
    texts = [json.loads(line)["text"] for line in plain]
    expected = [*texts, *(text for own in rows.values() for text in (own, texts[0]) if text is not None), *texts]
    parts = read_documents(path, ReadingConfig(skip_bad=True), counts=counts)
    assert [part.text for part in parts] == expected
    assert (counts.bad, counts.documents) == (list(rows.values()).count(None), len(expected))
    assert counts.first_bad.startswith("line 8: ")


def test_batches_have_limited_sizes_and_hold_documents_of_many_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches of single documents would cost as much time as documents that are read one by one."""
    files = [(f"{i}.txt", saved(tmp_path, f"{i}.txt", b"word " * (i + 1))) for i in range(30)]
    rows = saved(tmp_path, "a.jsonl", jsonl(["", "x", "y" * 3000, " ", *(str(i) for i in range(40))]))
    monkeypatch.setattr(readers, "PART_CHARACTERS", 1000)
    batches = list(readers.read_batches([*files, ("a.jsonl", rows)], PLAIN, Counts()))
    found = [(place, text) for batch in batches for place, text in zip(batch.places, batch.texts, strict=True)]
    places = [*((i, 0) for i in range(30)), *((30, row) for row in (1, 2, 2, 2, *range(4, 44)))]
    assert [place for place, _ in found] == places
    assert [len(batch.texts) for batch in batches if not batch.starts] == [1, 1]
    assert len(batches) < len(found) / 3
    assert all(sum(map(len, batch.texts)) < 2000 for batch in batches)


def test_the_name_argument_selects_the_format_and_appears_in_errors(tmp_path: Path) -> None:
    path = saved(tmp_path, "5f2e", gzip.compress(jsonl(["a", "b"]) + b"{}\n"))
    assert [part.text for part in itertools.islice(read_documents(path, PLAIN, name="hub/x.JSONL.gz"), 2)] == ["a", "b"]
    with pytest.raises(UserError, match=r"^hub/x\.JSONL\.gz, line 3: .*'text'"):
        list(read_documents(path, PLAIN, name="hub/x.JSONL.gz"))


def test_suffixes_of_readable_files() -> None:
    assert [
        name
        for name in ("a.csv.gz", "b.parquet", "c.parquet.gz", "d.json", "e.json.gz", "e.gz", "f.py", "txt")
        if name.lower().endswith(SUFFIXES)
    ] == [
        "a.csv.gz",
        "b.parquet",
        "d.json",
        "e.json.gz",
    ]


def test_the_column_is_chosen_by_name(tmp_path: Path) -> None:
    options = ReadingConfig(column="id")
    assert texts_in(saved(tmp_path, "a.csv", csv_of(["x", "y"])), options) == ["0", "1"]
    file = io.BytesIO()
    parquet.write_table(pa.table({"meta": [{"id": "no"}], "a.b": ["dotted"], "id": ["yes"]}), file)
    path = saved(tmp_path, "a.parquet", file.getvalue())
    assert texts_in(path, options) == ["yes"]
    assert texts_in(path, ReadingConfig(column="a.b")) == ["dotted"]


def test_csv_and_json_variants_of_other_programs_are_read(tmp_path: Path) -> None:
    content = b'\xef\xbb\xbftext,id\r\n"one\r\ntwo",1\r\n\r\n"three ""3"" \r",2'
    assert texts_in(saved(tmp_path, "a.csv", content)) == ["one\r\ntwo", 'three "3" \r']
    assert texts_in(saved(tmp_path, "mac.csv", b"text\rone\rtwo\r")) == ["one", "two"]
    lines = b'\xef\xbb\xbf{"text": "one\\ud83d\\ude00"}\r\n\r\n  {"text": "\\u00e9", "x": [NaN]}'
    assert texts_in(saved(tmp_path, "a.jsonl", lines)) == ["one\U0001f600", "é"]
    assert texts_in(
        saved(tmp_path, "b.jsonl", jsonl(["a", "b"]).decode().encode("utf-16")), ReadingConfig(encoding="utf-16")
    ) == ["a", "b"]


@pytest.mark.parametrize(
    ("suffix", "content"), [(".jsonl", b""), (".csv", csv_of([])), (".parquet", parquet_of(pa.array([], pa.string())))]
)
def test_a_file_without_rows_has_no_documents(tmp_path: Path, suffix: str, content: bytes) -> None:
    assert texts_in(saved(tmp_path, f"a{suffix}", content)) == []


# --------------------------------------------------------------------------------------------------------------- parts


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv", ".parquet"])
def test_a_long_document_comes_in_parts(tmp_path: Path, suffix: str) -> None:
    text = "All work and no play makes Jack a dull boy.\n" * (12_000_000 // 44)
    make = {".txt": lambda texts: texts[0].encode(), ".jsonl": jsonl, ".csv": csv_of, ".parquet": parquet_of}[suffix]
    parts = list(read_documents(saved(tmp_path, f"long{suffix}", make([text, "b"])), PLAIN))
    if suffix != ".txt":
        assert parts.pop() == Part("b", 1, True)
    assert [(part.row, part.starts) for part in parts] == [(0, True), (0, False), (0, False)]
    assert all(
        PART_CHARACTERS - 44 < len(part.text) <= PART_CHARACTERS and part.text[-1] == "\n" for part in parts[:-1]
    )
    assert "".join(part.text for part in parts) == text


def test_a_long_text_takes_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading 32 MB, compressed to a few kilobytes, in parts of a megabyte peaks below 10 MB."""
    path = saved(tmp_path, "long.txt.zst", zstd.compress(b"word " * 6_400_000))
    monkeypatch.setattr(readers, "PART_CHARACTERS", 1 << 20)
    tracemalloc.start()
    characters = sum(len(part.text) for part in read_documents(path, PLAIN))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert characters == 32_000_000
    assert peak < 10_000_000


# ------------------------------------------------------------------------------------------------ bad rows, bad files

BAD_JSON = [
    ("{", "invalid JSON (Expecting property name enclosed in double quotes, column 2)"),
    ("nonsense", "invalid JSON"),
    ("[" * 10_000, "unreadable JSON"),
    ('{"text": ' + "9" * 5000 + "}", "unreadable JSON"),
    ('["text"]', 'a list instead of an object such as {"text": ...}'),
    ('"text"', "a string instead of an object"),
    ("null", "null instead of an object"),
    ('{"txet": "a", "id": 1}', "has no 'text'; did you mean 'txet'? (it has 'txet', 'id')"),
    ("{}", "has no 'text' (it has nothing)"),
    ('{"text": null}', "'text' is null, not text"),
    ('{"text": 1.5}', "'text' is a number, not text"),
    ('{"text": true}', "'text' is a boolean, not text"),
    ('{"text": ["a"]}', "'text' is a list, not text"),
    ('{"text": {"a": "b"}}', "'text' is an object, not text"),
    ('{"text": "a\\ud800b"}', "half a surrogate pair, \\ud800, and is not valid Unicode"),
    ('{"text": "\\uDE00\\uD83D"}', "half a surrogate pair, \\ude00"),
]
BAD_CSV = [
    ("1,2,3", "3 fields instead of the header's 2"),
    ("alone", "1 fields instead of the header's 2"),
]


@pytest.mark.parametrize(
    ("suffix", "content", "message"),
    [(".jsonl", f'\n{{"text": "first"}}\n{bad}\n{{"text": "last"}}\n', message) for bad, message in BAD_JSON]
    + [(".csv", f"id,text\n0,first\n{bad}\n2,last\n", message) for bad, message in BAD_CSV],
    ids=[message for _, message in BAD_JSON + BAD_CSV],
)
def test_a_bad_row_is_an_error_or_skipped(tmp_path: Path, suffix: str, content: str, message: str) -> None:
    path = saved(tmp_path, f"a{suffix}", content.encode())
    problem, advice = error_of(path).splitlines()
    assert problem.startswith(f"{path}, line 3: ")
    assert message in problem
    assert "--skip-bad" in advice
    counts = Counts()
    parts = list(read_documents(path, ReadingConfig(skip_bad=True), counts=counts))
    assert parts == [Part("first", 0, True), Part("last", 2, True)]
    assert (counts.bad, counts.documents) == (1, 2)
    assert counts.first_bad.startswith("line 3: ")


@pytest.mark.parametrize(
    "bad",
    [
        '{"text": "a"},{"text": "b"}\n{"text": "c", "x": [1\n2]}',
        '{"text": "a\nb"}',
        '-Infinity,{"text": "a"}',
        '{"text": "a"},-Infinity,{"text": "b"}\n{"text": "c"',
    ],
)
def test_each_line_of_json_is_decoded_alone(tmp_path: Path, bad: str) -> None:
    """Lines that are valid only together, or with the same number of values, are bad rows."""
    counts = Counts()
    path = saved(tmp_path, "a.jsonl", f'{{"text": "x", "y": -Infinity}}\n{bad}\n{{"text": "z"}}\n'.encode())
    parts = list(read_documents(path, ReadingConfig(skip_bad=True), counts=counts))
    assert [part.text for part in parts] == ["x", "z"]
    assert counts.bad == len(bad.splitlines())
    path.write_text(f'{{"text": "x"}}\n{bad}\n')
    with pytest.raises(UserError, match="line 2"):
        list(read_documents(path, PLAIN))


def test_a_missing_key_names_the_keys_and_the_option(tmp_path: Path) -> None:
    """The error does not suggest --skip-bad, which would drop every row."""
    path = saved(tmp_path, "a.jsonl", b'{"prompt": "a", "id": 1}\n' * 3)
    message = error_of(path)
    assert "'prompt', 'id'" in message
    assert "--data.column" in message
    assert "--skip-bad" not in message


@pytest.mark.parametrize("chunk", [1, 1 << 20])
@pytest.mark.parametrize("skip_bad", [False, True])
@pytest.mark.parametrize(
    "content", ['[{"text": "a"}]', '\ufeff\n \r\n  [\n  {"text": "a"},\n  {"text": "b"}\n]\n', "[]", "["]
)
def test_a_json_array_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, skip_bad: bool, chunk: int
) -> None:
    monkeypatch.setattr(text_files, "_CHUNK", chunk)
    message = error_of(saved(tmp_path, "a.json", content.encode()), ReadingConfig(skip_bad=skip_bad))
    assert "is a JSON array" in message
    assert "jq" in message


def test_a_null_in_parquet_is_an_error_or_skipped(tmp_path: Path) -> None:
    path = saved(tmp_path, "a.parquet", parquet_of(["a", "b", None, "d"]))
    assert "row 2 (counted from 0): 'text' is null" in error_of(path)
    counts = Counts()
    parts = list(read_documents(path, ReadingConfig(skip_bad=True), counts=counts))
    assert parts == [Part("a", 0, True), Part("b", 1, True), Part("d", 3, True)]
    assert counts.bad == 1
    assert "row 2 (counted from 0)" in counts.first_bad


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_a_text_that_parquet_has_once_for_many_rows_is_read_a_few_rows_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: pa.DataType
) -> None:
    monkeypatch.setattr(readers, "_LONGEST_LINE", 10_000)
    monkeypatch.setattr(readers, "_PARQUET_BATCH", 4000)
    texts = ["a", *["word " * 200] * 500]
    path = saved(tmp_path, "a.parquet", parquet_of(pa.array(texts).cast(kind), 501))
    blocks = list(readers._parquet_rows(path, "a.parquet", "text"))
    assert list(itertools.chain(*blocks)) == texts
    assert max(len(block) for block in blocks) == 4


def test_only_entirely_blank_documents_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A document whose first part is blank is kept if a later part has text."""
    monkeypatch.setattr(readers, "PART_CHARACTERS", 4)
    path = saved(tmp_path, "a.jsonl", jsonl(["    word", " ", "", "x", "\n"]))
    counts = Counts()
    parts = list(read_documents(path, PLAIN, counts=counts))
    assert parts == [Part("   ", 0, True), Part(" wor", 0, False), Part("d", 0, False), Part("x", 3, True)]
    assert (counts.documents, counts.blank, counts.bad) == (2, 3, 0)


def test_invalid_utf8_in_parquet_is_named_by_row_group_and_position(tmp_path: Path) -> None:
    array = pa.array([b"good", b"ma\xf1ana"], pa.binary()).view(pa.string())
    message = error_of(saved(tmp_path, "a.parquet", parquet_of(array, 1)))
    assert "row group 1" in message
    assert "0xf1 in position 2" in message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"a\.csv has no 'text' .*nothing.*--data\.column"),
        (b"\n\n", "nothing"),
        (b"id;body\n1;a\n", r"a\.csv has no 'text' .*'id', 'body'"),
        (b"id,Text\n1,a\n", r"'text'; did you mean 'Text'\?"),
        (b'"text', r"line 1: unclosed quote"),
        (b'text\na\n"b\nc\nd', r"line 3: unclosed quote"),
    ],
)
def test_a_bad_csv_is_explained(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(UserError, match=message):
        list(read_documents(saved(tmp_path, "a.csv", content), PLAIN))


@pytest.mark.parametrize("chunk", [1, 3, 1 << 20])
@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv", ".txt.gz"])
@pytest.mark.parametrize(
    ("content", "encoding", "message"),
    [
        (b"\xef\xbb\xbfma\xf1ana", "utf-8", "is not valid utf-8: byte 0xf1 at offset 5 (invalid continuation byte)"),
        (b"\xef\xbb\xbfma\xf1ana", "UTF_8_sig", "is not valid utf-8-sig: byte 0xf1 at offset 5 "),
        ("aé€".encode()[:-1], "utf-8", "byte 0xe2 at offset 3 (unexpected end of data)"),
        ("aé".encode("utf-16")[:-1], "utf-16", "is not valid utf-16: byte 0xe9 at offset 4 "),
        (b"a\x82\xa0\x82", "shift_jis", "byte 0x82 at offset 3 "),
        (b"ab\x81", "cp1252", "byte 0x81 at offset 2 "),
    ],
)
def test_invalid_bytes_are_named_by_offset(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    content: bytes,
    encoding: str,
    message: str,
    suffix: str,
    chunk: int,
) -> None:
    monkeypatch.setattr(text_files, "_CHUNK", chunk)
    path = saved(tmp_path, f"a{suffix}", gzip.compress(content) if suffix.endswith(".gz") else content)
    text = error_of(path, ReadingConfig(encoding=encoding))
    assert message in text
    assert "--encoding" in text.splitlines()[1]
    if suffix == ".txt":
        for errors in ("replace", "ignore"):
            (part,) = read_documents(path, ReadingConfig(encoding=encoding, errors=errors))
            assert part.text == content.decode(encoding, errors).removeprefix("\ufeff")


@pytest.mark.parametrize(("suffix", "compress"), COMPRESSED.items())
def test_concatenated_members_are_one_file(tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes]) -> None:
    path = saved(tmp_path, f"a.txt{suffix}", b"".join(map(compress, [b"", b"one ", b"", b"two"])))
    assert texts_in(path) == ["one two"]
    assert texts_in(saved(tmp_path, f"b.txt{suffix}", compress(b""))) == []
    assert texts_in(saved(tmp_path, f"b.jsonl{suffix}", compress(b""))) == []


@pytest.mark.parametrize(("suffix", "compress"), COMPRESSED.items())
def test_a_truncated_file_is_refused(tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes]) -> None:
    first, second = compress(b"one two three " * 3), compress(os.urandom(40).hex().encode())
    whole = first + second
    for end in {*range(len(whole))} - {len(first)}:
        message = error_of(saved(tmp_path, f"a.txt{suffix}", whole[:end]))
        # After half of a member's magic number, the error is "damaged" instead.
        assert "is truncated" in message or end in (0, 1, len(first) + 1), end


@pytest.mark.parametrize(("suffix", "compress"), COMPRESSED.items())
def test_a_flipped_byte_in_a_compressed_file_never_changes_the_text(
    tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes]
) -> None:
    text = b"It was the best of times, it was the worst of times. " * 3
    whole = compress(text) + compress(text)
    for place in range(len(whole)):
        content = bytearray(whole)
        content[place] ^= 0x55
        path = saved(tmp_path, f"a.txt{suffix}", bytes(content))
        try:
            assert texts_in(path) == [text.decode() * 2]  # the flipped byte may not matter, as in gzip's timestamp
        except UserError as error:
            assert "a.txt" in str(error)  # noqa: PT017
    assert "is damaged, or not" in error_of(saved(tmp_path, f"b.txt{suffix}", b"plain text, and no more than that"))
    assert "is damaged, or not" in error_of(saved(tmp_path, f"b.txt{suffix}", whole + b"and something after it"))


@pytest.mark.parametrize("compression", ["none", "zstd", "snappy"])
def test_a_damaged_parquet_file_is_a_user_error(tmp_path: Path, compression: str) -> None:
    texts = [f"{i} green bottles hanging on the wall" for i in range(20)]
    whole = parquet_of(texts, 10, compression=compression, write_page_checksum=True)
    for place in range(0, len(whole), 3):
        content = bytearray(whole)
        content[place] ^= 0x55
        path = saved(tmp_path, "a.parquet", bytes(content))
        try:
            assert texts_in(path) == texts
        except UserError as error:
            assert "a.parquet" in str(error)  # noqa: PT017
    for end in range(0, len(whole), 40):
        assert "is damaged, or not a parquet file" in error_of(saved(tmp_path, "a.parquet", whole[:end]))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"Text": ["a"], "id": [1]}, r"'text'; did you mean 'Text'\? .*'Text', 'id'.*--data\.column"),
        ({"text": [1]}, "'text' .* int64"),
        ({"text": [b"a"]}, "'text' .* binary"),
        ({"text": [["a"]]}, "'text' .* list<.*>"),
        ({"text": [None]}, "'text' .* null"),
    ],
)
def test_a_column_that_is_missing_or_not_text_is_refused(tmp_path: Path, table: dict[str, Any], message: str) -> None:
    parquet.write_table(pa.table(table), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=message):
        list(read_documents(tmp_path / "a.parquet", PLAIN))


def test_a_compressed_parquet_file_is_refused(tmp_path: Path) -> None:
    assert "decompress it first" in error_of(saved(tmp_path, "a.parquet.gz", gzip.compress(parquet_of(["a"]))))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl.gz", "a.csv.zst", "a.parquet"])
def test_a_file_that_cannot_be_opened_is_named(tmp_path: Path, name: str) -> None:
    assert error_of(tmp_path / name).startswith(f"cannot read {tmp_path / name}: ")
    (tmp_path / name).mkdir()
    assert "directory" in error_of(tmp_path / name)


def test_an_endless_line_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "_LONGEST_LINE", 1000)
    monkeypatch.setattr(text_files, "_CHUNK", 100)
    before = csv.field_size_limit()
    try:
        assert "a line of more than 1,000 characters" in error_of(saved(tmp_path, "a.jsonl", b'{"text": "a"}, ' * 200))
        assert "field larger than field limit" in error_of(saved(tmp_path, "a.csv", b'text\n"' + b"word\n" * 300))
    finally:
        csv.field_size_limit(before)


@pytest.mark.parametrize(("name", "package"), [("a.parquet", "pyarrow"), ("a.txt.zst", "backports.zstd")])
def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, package: str) -> None:
    if package == "backports.zstd" and sys.version_info >= (3, 14):
        pytest.skip("this Python has zstd itself")
    content = parquet_of(["a"]) if package == "pyarrow" else zstd.compress(b"a")
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delattr("backports.zstd", raising=False)
    with pytest.raises(UserError, match=rf"needs {package}: pip install 'glassgpt\[data\]'"):
        list(read_documents(saved(tmp_path, name, content), PLAIN))


def test_pyarrow_and_zstd_are_imported_only_if_needed(tmp_path: Path) -> None:
    saved(tmp_path, "a.csv.gz", gzip.compress(csv_of(["a"])))
    code = (
        "import sys, pathlib; from glassgpt.data.readers import *; "
        "[*read_documents(pathlib.Path('a.csv.gz'), ReadingConfig())]; "
        "assert not {'pyarrow', 'backports', 'compression.zstd', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


def test_utf_16_without_a_byte_order_mark_is_explained(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"plain text")
    with pytest.raises(UserError, match=r"(?s)a\.txt .* utf-16: .*BOM.*--encoding"):
        list(read_documents(path, ReadingConfig(encoding="utf-16"), name="a.txt"))


def test_an_unclosed_quote_is_never_skipped(tmp_path: Path) -> None:
    """`skip_bad` does not help, because all later rows are inside the quotes and would be lost."""
    path = tmp_path / "a.csv"
    path.write_text('id,text\n1,one\n2,"two\n' + "3,three\n" * 100)
    for skip_bad in (False, True):
        with pytest.raises(UserError, match=r"a\.csv, line 3: unclosed quote"):
            list(read_documents(path, ReadingConfig(skip_bad=skip_bad), name="a.csv"))


def test_a_duplicate_column_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,text\none,two\n")
    table = pa.Table.from_arrays([pa.array(["one"]), pa.array(["two"])], names=["text", "text"])
    parquet.write_table(table, tmp_path / "a.parquet")
    for name in ("a.csv", "a.parquet"):
        with pytest.raises(UserError, match=r"'text'.*rename all but one"):
            list(read_documents(tmp_path / name, ReadingConfig(), name=name))


# ------------------------------------------------------------------------------------------- content against its name


@pytest.mark.parametrize(("suffix", "compress"), COMPRESSED.items())
def test_compression_is_recognised_by_content(tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes]) -> None:
    other = next(each for each in COMPRESSED if each != suffix)
    for name in ("a.txt", "a", f"a.txt{other}"):
        assert texts_in(saved(tmp_path, name, compress(b"some text"))) == ["some text"]
    assert texts_in(saved(tmp_path, "a.jsonl", compress(jsonl(["one", "two"])))) == ["one", "two"]
    for content in (compress(compress(b"some text")), COMPRESSED[other](compress(b"some text"))):
        message = error_of(saved(tmp_path, f"a.txt{suffix}", content), ReadingConfig(encoding="latin-1"))
        assert "compressed data, not text" in message


@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.jsonl", "a.parquet"])
def test_another_format_is_named_whatever_the_name(tmp_path: Path, name: str) -> None:
    assert "a PDF document" in error_of(saved(tmp_path, name, b"%PDF-1.7 ..."))
    if name != "a.parquet":
        assert "a Parquet file" in error_of(saved(tmp_path, name, parquet_of(["text"])))
        utf_16 = "Some text in lines.\n".encode("utf-16-le") * 9
        assert "--encoding utf-16-le" in error_of(saved(tmp_path, name, utf_16))


def test_data_that_expands_beyond_reason_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "_MOST_EXPANDED", 1 << 20)
    for compress in (bz2.compress, zstd.compress):
        path = saved(tmp_path, "a.txt", compress(b"word " * 400_000))
        assert "expands to more than" in error_of(path)
    line = os.urandom(5000).hex() + "\n"
    assert len(
        "".join(part.text for part in read_documents(saved(tmp_path, "b", gzip.compress(line.encode() * 800)), PLAIN))
    ) == 800 * len(line)
    assert "expands" in error_of(saved(tmp_path, "a.parquet", parquet_of(["word " * 400_000], compression="zstd")))


@pytest.mark.parametrize("content", [bytes(1 << 20), b" " * 5_000_000, b"a" * 5_000_000, b"\r\n" * 2_500_000])
def test_endless_repetition_takes_little_memory(tmp_path: Path, content: bytes) -> None:
    path = saved(tmp_path, "a.txt", content)
    tracemalloc.start()
    try:
        characters = sum(len(part.text) for part in read_documents(path, PLAIN))
        assert content[:1] != b"\0"
        assert characters == len(content)
    except UserError as error:
        assert "binary data" in str(error)  # noqa: PT017
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60_000_000


def test_special_files_are_refused_at_once(tmp_path: Path) -> None:
    for name in ("a.txt", "a.jsonl.gz", "a.parquet"):
        os.mkfifo(tmp_path / name)
        assert "named pipe or a device" in error_of(tmp_path / name)
        (tmp_path / f"link-{name}").symlink_to("/dev/zero")
        with pytest.raises(UserError, match="named pipe or a device"):
            list(read_documents(tmp_path / f"link-{name}", PLAIN))


# ---------------------------------------------------------------------------------------- delimiters and damaged rows


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".tsv.gz"])
def test_the_delimiter_is_found_by_the_header(tmp_path: Path, delimiter: str, suffix: str) -> None:
    texts = ["one; two", "three, four|five", 'six\tseven "eight"\nnine']
    file = io.StringIO(newline="")
    rows = [["id", "text", "note"], *([str(i), text, "a,b;c"] for i, text in enumerate(texts))]
    csv.writer(file, delimiter=delimiter).writerows(rows)
    compress = gzip.compress if suffix.endswith(".gz") else bytes
    path = saved(tmp_path, f"a{suffix}", compress(b"\n" + file.getvalue().encode()))
    assert texts_in(path) == texts
    assert texts_in(path, ReadingConfig(delimiter=delimiter.replace("\t", "\\t"))) == texts
    assert "'text'" in error_of(path, ReadingConfig(delimiter="^"))


def test_another_delimiter_can_be_set(tmp_path: Path) -> None:
    path = saved(tmp_path, "a.csv", b"id:text\n1:one, two\n")
    assert texts_in(path, ReadingConfig(delimiter=":")) == ["one, two"]


DAMAGED = [
    r'2,"he said \"hi, you\" and went' + '\nover, the hill\nfar,away"',  # quotes escaped by backslashes
    r'2,"he said \", then' + '\nover, the hill"',
    '2,"he said "hi, you" and went\nover, the hill"',  # quotes not escaped
    '2,"he said ", then\nover, the hill',
    '2,"he said\nover, the hill\nfar,"away',  # a quote not closed
    '2,he said "hi, you and went\nover, the hill"',
    '2,"he said\r\nover, the hill\r\nfar,"away',
    '2,"he\0said "hi, you" and went\nover, the hill"',
]


@pytest.mark.parametrize("damaged", DAMAGED)
@pytest.mark.parametrize("skip_bad", [False, True])
def test_the_inside_of_a_damaged_record_is_not_a_document(tmp_path: Path, damaged: str, skip_bad: bool) -> None:
    path = saved(tmp_path, "a.csv", f"id,text\n1,first\n{damaged}\n3,third\n".encode())
    received: list[str] = []
    with pytest.raises(UserError, match=r"a\.csv, line 3: "):
        received.extend(part.text for part in read_documents(path, ReadingConfig(skip_bad=skip_bad)))
    assert received == ["first"]


@pytest.mark.parametrize(
    "bad", ['2,Smith, John,"A text, quoted"', '2,Smith, John,"two\nlines, ""quoted"""', "2,Smith, John,x"]
)
def test_a_row_with_another_number_of_fields_is_skipped_whole(tmp_path: Path, bad: str) -> None:
    good = "".join(f'{number},Lee,"text {number},\n""so"""\n' for number in range(9))
    path = saved(tmp_path, "a.csv", f"id,name,text\n{good}{bad}\n{good}".encode())
    counts = Counts()
    texts = [part.text for part in read_documents(path, ReadingConfig(skip_bad=True), counts=counts)]
    assert texts == [f'text {number},\n"so"' for number in range(9)] * 2
    assert (counts.bad, counts.first_bad.partition(":")[0]) == (1, "line 20")


# ---------------------------------------------------------------------------------------------- documents within a text


@settings(max_examples=100)
@given(
    st.lists(st.text("<|e> \n", max_size=8), max_size=8),
    st.sampled_from(["<|e|>", "\n\n", "|", "<<"]),
    st.integers(1, 9),
)
def test_documents_between_separators_do_not_depend_on_chunks(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], separator: str, chunk: int
) -> None:
    text = separator.join(texts)
    path = saved(tmp_path_factory.mktemp("texts"), "a.txt", text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_files, "_CHUNK", chunk)
        parts = list(read_documents(path, ReadingConfig(split_on=separator)))
    expected = [Part(document, row, True) for row, document in enumerate(text.split(separator)) if document.strip()]
    assert parts == expected


def test_a_long_document_between_separators_comes_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "PART_CHARACTERS", 10)
    path = saved(tmp_path, "a.md", b"one two three four<|endoftext|>five")
    parts = list(read_documents(path, ReadingConfig(split_on="<|endoftext|>")))
    assert parts == [Part("one two", 0, True), Part(" three four", 0, False), Part("five", 1, True)] or (
        "".join(part.text for part in parts) == "one two three fourfive"
        and [part.row for part in parts if part.starts] == [0, 1]
    )


def test_rows_are_not_split(tmp_path: Path) -> None:
    path = saved(tmp_path, "a.jsonl", jsonl(["one<|endoftext|>two"]))
    assert texts_in(path, ReadingConfig(split_on="<|endoftext|>")) == ["one<|endoftext|>two"]


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv", ".parquet"])
def test_special_tokens_in_a_text_are_counted(tmp_path: Path, suffix: str) -> None:
    texts = ["a <|endoftext|> b <|im_start|>", "</s>", "a < b | c > d <s>", "<||>"]
    make = {".txt": lambda texts: "".join(texts).encode(), ".jsonl": jsonl, ".csv": csv_of, ".parquet": parquet_of}
    counts = Counts()
    list(read_documents(saved(tmp_path, f"a{suffix}", make[suffix](texts)), PLAIN, counts=counts))
    assert counts.special_tokens == 3


def test_web_pages_are_counted(tmp_path: Path) -> None:
    counts = Counts()
    list(read_documents(saved(tmp_path, "a.txt", b"\n<!doctype html>\n<p>text</p>"), PLAIN, counts=counts))
    list(read_documents(saved(tmp_path, "b.txt", b"<p>text</p>"), PLAIN, counts=counts))
    assert counts.web_pages == 1
