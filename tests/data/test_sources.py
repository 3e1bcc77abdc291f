"""Sources: finding one by name, and reading its text."""

import os
import re
import socket
import string
import sys
from collections import Counter
from pathlib import Path

import pytest

from glassgpt.config.schema import DataConfig, ReadingConfig
from glassgpt.data import builtin_texts as module
from glassgpt.data import sources
from glassgpt.data.builder import text_identity
from glassgpt.data.builtin_texts import PythonDocs, RepeatedStrings, Shakespeare, repeated_strings
from glassgpt.data.dataset import open_dataset
from glassgpt.data.prepare import prepare
from glassgpt.data.sources import LocalFiles, PreparedDataset, Source, read_source, resolve
from glassgpt.utils.download import cache_directory
from glassgpt.utils.errors import UserError
from glassgpt.utils.files import sha256_of


def source_of(path: Path) -> Source:
    source = resolve(str(path))
    assert not isinstance(source, PreparedDataset)
    return source


def text_of(path: Path, encoding: str = "utf-8") -> str:
    return "".join(part.text for _, part in read_source(source_of(path), ReadingConfig(encoding=encoding)))


@pytest.mark.parametrize(
    ("content", "encoding", "expected"),
    [
        (b"one\r\ntwo\rthree\n\n", "utf-8", "one\r\ntwo\rthree\n\n"),  # newlines are not translated
        ("\ufeffméow".encode(), "utf-8", "méow"),
        ("\ufeffméow".encode(), "utf-8-sig", "méow"),
        ("méow".encode("utf-16"), "utf-16", "méow"),
        (b"m\xe9ow", "latin-1", "méow"),
    ],
)
def test_a_file_is_decoded_without_changes(tmp_path: Path, content: bytes, encoding: str, expected: str) -> None:
    path = tmp_path / "text.dat"
    path.write_bytes(content)
    assert text_of(path, encoding) == expected


def test_a_folder_gives_its_text_files_in_order_of_name(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.md", "a/b/c.TXT", "B.txt", ".hidden.txt", ".git/x.txt", "picture.png", "d.parquet.md"):
        path = tmp_path / "texts" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    folder = tmp_path / "texts"
    names = ["B.txt", "a/b/c.TXT", "a/z.md", "b.txt", "d.parquet.md"]
    assert [file.name for file in source_of(folder).files()] == names
    assert [part.text for _, part in read_source(source_of(folder), ReadingConfig())] == names


def test_a_pattern_gives_the_files_that_match(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a/one.txt", "a/two.txt", "b/c/three.txt", "four.md"):
        path = tmp_path / "texts" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    monkeypatch.chdir(tmp_path)
    for pattern, names in (
        ("texts/*/*.txt", ["a/one.txt", "a/two.txt"]),
        ("texts/**/*.txt", ["a/one.txt", "a/two.txt", "b/c/three.txt"]),
        ("texts/a/t[vw]o.txt", ["two.txt"]),
    ):
        source = source_of(Path(pattern))
        assert [file.name for file in source.files()] == names
        assert source.is_unchanged(source.identity())
        assert sources.absolute_source(pattern) == str(tmp_path / pattern)
    with pytest.raises(UserError, match=r"no file matches .*\*\.csv; name a"):
        source_of(Path("texts/*.csv")).files()
    Path("odd[1].txt").write_text("a file of that very name comes first")
    assert source_of(Path("odd[1].txt")) == LocalFiles(tmp_path / "odd[1].txt")


@pytest.mark.parametrize("folder", ["a[1]b", "a[", "a*?", "[[]"])
def test_only_the_patterns_own_wildcards_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str) -> None:
    """Wildcards in the names of the working or home directory are literal; the location works from any directory."""
    for name in ("texts/one.txt", "texts/below/two.txt", "three.txt"):
        (tmp_path / folder / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / name).write_text(name)
    monkeypatch.setenv("HOME", str(tmp_path / folder))
    for pattern, below, label, names in (
        ("texts/**/*.txt", "", "texts", ["below/two.txt", "one.txt"]),
        ("~/texts/*.txt", "", "texts", ["one.txt"]),
        ("*.txt", "", folder, ["three.txt"]),
        ("../*.txt", "texts", "..", ["three.txt"]),
    ):
        monkeypatch.chdir(tmp_path / folder / below)
        source = source_of(Path(pattern))
        assert ([file.name for file in source.files()], source.name) == (names, label)
        monkeypatch.chdir("/")
        assert resolve(source.location) == source
        assert sources.absolute_source(source.location) == source.location
        assert [part.text for _, part in read_source(source, ReadingConfig())] == [
            f"texts/{name}".replace("texts/three", "three") for name in names
        ]


def test_other_files_of_a_folder_are_listed(tmp_path: Path) -> None:
    for name in ("a.txt", "paper.pdf", "below/LICENSE", "config.json", ".hidden/x.pdf", ".x.pdf"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert source_of(tmp_path).left_out == ("below/LICENSE", "config.json", "paper.pdf")
    for source in (source_of(tmp_path / "paper.pdf"), source_of(tmp_path / "*"), Shakespeare(), PythonDocs()):
        assert source.left_out == ()


def test_text_identity_ignores_times_and_commits(tmp_path: Path) -> None:
    """`text_identity` ignores the modification times of files and the commit of a Hub dataset, and nothing else."""
    path = tmp_path / "text.txt"
    path.write_text("one")
    source = source_of(tmp_path)
    first = source.identity()
    os.utime(path, (1, 1))
    touched = source.identity()
    assert first != touched
    assert text_identity(first) == text_identity(touched)
    path.write_text("two")
    assert text_identity(first) != text_identity(source.identity())
    path.write_text("one")
    path.rename(tmp_path / "other.txt")
    assert text_identity(first) != text_identity(source.identity())
    (tmp_path / "text.txt").write_text("one")
    assert text_identity(first) != text_identity(source.identity())
    for identity in (
        PythonDocs().identity(),
        Shakespeare().identity(),
        RepeatedStrings().identity(),
        {"repository": "a/b", "files": [{"name": "c"}]},
    ):
        assert text_identity(identity) == text_identity({**identity, "commit": "1"})
        assert text_identity(identity) != text_identity({**identity, "other": 1})


def test_identity_follows_the_content(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("one")
    source = source_of(tmp_path)
    recorded = source.identity()
    assert source.is_unchanged(recorded)
    os.utime(path, (1, 1))
    assert source.is_unchanged(recorded)  # another modification time, the same text
    path.write_text("two")
    assert not source.is_unchanged(recorded)  # the same size, another text
    path.write_text("one")
    assert source.is_unchanged(recorded)
    (tmp_path / "more.txt").write_text("")
    assert not source.is_unchanged(recorded)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("shakespear", "there is no file, folder or registered source 'shakespear'; did you mean 'shakespeare'"),
        ("missing.txt", "there is no file, folder or registered source 'missing.txt'"),
        ("text.txt/below", "there is no file, folder or registered source"),
        ("", "no text: use --data"),
        ("x" * 5000, "File name too long"),
        ("dangling.txt", r"dangling\.txt is a link to nowhere, which"),
        ("socket", "neither a regular file nor a folder"),
        ("https://example.org/a.txt?raw=true", r"URL.*curl -LO 'https://example\.org/a\.txt\?raw=true'"),
    ],
)
def test_an_invalid_source_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("text")
    Path("dangling.txt").symlink_to("nowhere")
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind("socket")
        with pytest.raises(UserError, match=message) as caught:
            resolve(name)
    assert "python-docs, shakespeare" in str(caught.value)


def test_a_folder_without_text_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"folder .* has no readable text file"):
        source_of(tmp_path).files()


def test_a_plain_json_file_in_a_folder_is_not_text(tmp_path: Path) -> None:
    """A .json file is usually metadata of other files, so it is read only if the source names it."""
    for name in ("config.json", "dataset_infos.json", "a.json", "b.json.gz"):
        (tmp_path / name).write_bytes(b"{}")
    assert [file.name for file in source_of(tmp_path).files()] == ["b.json.gz"]
    for named in (tmp_path / "a.json", tmp_path / "[a].json"):
        assert [file.name for file in source_of(named).files()] == ["a.json"]


def test_a_broken_link_is_named(tmp_path: Path) -> None:
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"cannot read .*gone\.txt: "):
        source_of(tmp_path).files()
    with pytest.raises(UserError, match=r"cannot read .*gone\.txt: "):
        source_of(tmp_path).identity()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_or_folder_without_permission_is_named(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("text")
    (tmp_path / "text.txt").chmod(0)
    (tmp_path / "folder").mkdir(mode=0)
    with pytest.raises(UserError, match=r"text\.txt: Permission denied"):
        text_of(tmp_path / "text.txt")
    with pytest.raises(UserError, match="folder: Permission denied"):
        source_of(tmp_path / "folder").identity()


def test_shakespeare_is_read_from_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """The config's column and encoding do not apply to this source."""
    path = cache_directory() / "downloads" / "tinyshakespeare.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"First Citizen:\nBefore we proceed any further, hear me speak.\n")
    monkeypatch.setattr(module, "SHAKESPEARE_SHA256", sha256_of(path))
    ((_, part),) = read_source(Shakespeare(), ReadingConfig(encoding="ascii", column="other"))
    assert part.text.encode() == path.read_bytes()
    path.unlink()


def test_shakespeare_without_network_names_the_manual_steps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GLASSGPT_CACHE", str(tmp_path))
    monkeypatch.setattr(module, "SHAKESPEARE_URL", "http://127.0.0.1:9/input.txt")
    monkeypatch.setattr("glassgpt.utils.download._PAUSE", 0.0)
    with pytest.raises(UserError, match=r"(?s)shakespeare.*tinyshakespeare\.txt.*--data FILE"):
        Shakespeare().files()[0].fetch()


def test_python_docs_are_written_to_the_cache_once(python_docs: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The config's column and encoding do not apply to this source."""
    monkeypatch.setattr(module, "python_docs", lambda: python_docs)
    (file,) = PythonDocs().files()
    written = file.fetch().stat()
    assert [
        part.text for _, part in read_source(PythonDocs(), ReadingConfig(column="other", encoding="utf-16"))
    ] == python_docs
    assert file.fetch().stat().st_mtime_ns == written.st_mtime_ns


def test_python_docs_is_about_a_megabyte_of_plain_english(python_docs: list[str]) -> None:
    text = "\n\n".join(python_docs)
    assert 700_000 < len(text) < 2_000_000
    assert set(text) <= set(map(chr, range(32, 127))) | {"\n"}
    assert len(set(text)) <= 80
    words = re.findall(r"[a-z]+", text.lower())
    # The most common English word makes up 6 to 7 % of English prose, and 1 or 2 % of source code and lists of names.
    assert words.count("the") > 0.05 * len(words)
    assert not re.search(r">>>|::=|``|:class:|={4}|-{4}|  ", text)


def test_python_docs_repeats_no_paragraph(python_docs: list[str]) -> None:
    paragraphs = "\n\n".join(python_docs).split("\n\n")
    assert len(paragraphs) == len(set(paragraphs))


def test_the_end_of_python_docs_is_a_fair_sample(python_docs: list[str]) -> None:
    text = "\n\n".join(python_docs)
    cut = len(text) * 9 // 10
    # Nearly all common words occur at the end. In the order of files, a tenth would hold only a few modules.
    counts, at_the_end = (Counter(re.findall(r"[a-z]{4,}", part)) for part in (text, text[cut:]))
    common = [word for word, count in counts.items() if count >= 60]
    assert len(common) > 150
    assert sum(word not in at_the_end for word in common) <= 0.02 * len(common)


def test_a_missing_pydoc_data_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(UserError, match=r"pydoc_data is missing.*\n.*--data FILE"):
        module.python_docs()


def test_python_docs_is_another_text_under_another_python(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = PythonDocs().identity()
    assert PythonDocs().is_unchanged(recorded)
    monkeypatch.setattr(sys, "version", "3.99.0")
    assert not PythonDocs().is_unchanged(recorded)


# The beginnings of the first two documents.
REPEATED = ["tkgnkuhmpxnhtqgxzvxisxtkgn", "mclpxzmwguoaskvramwmclpxzm"]


def period(text: str) -> int:
    """Return the shortest period of a text."""
    return next(p for p in range(1, len(text) + 1) if text[p:] == text[:-p])


def test_repeated_strings_repeat_with_different_periods() -> None:
    """Each document repeats at least four times, and each of the 17 periods has its share of the documents."""
    texts = repeated_strings()
    assert set("".join(texts)) == set(string.ascii_lowercase)
    periods = Counter(map(period, texts))
    assert sorted(periods) == list(range(8, 25))
    assert max(periods) * 4 <= min(map(len, texts))
    assert all(0.7 < count * 17 / len(texts) < 1.3 for count in periods.values())


def test_repeated_strings_are_reproducible() -> None:
    """The numbers are of the generator of Python 3.11, and another seed gives other strings."""
    assert repeated_strings(count=2, length=26) == REPEATED
    assert repeated_strings() == repeated_strings()
    assert not set(repeated_strings()) & set(repeated_strings(seed=1))
    ((_, first), (_, second), *rest) = read_source(RepeatedStrings(), ReadingConfig(column="other"))
    assert [first.text[:26], second.text[:26]] == REPEATED
    assert len(rest) == 4998


def test_no_repeated_string_is_in_both_splits() -> None:
    """No 8 letters in a row occur in both splits, so that no string does, at whatever letter it begins."""
    dataset = open_dataset(prepare(DataConfig(source="repeated-strings")))
    train, validation = (
        dataset.tokenizer.decode(split.read(0, len(split))) for split in (dataset.train, dataset.validation)
    )
    assert 8 < len(train) / len(validation) < 10
    pieces = {train[i : i + 8] for i in range(len(train) - 7)}
    pieces = {piece for piece in pieces if piece.isalpha()}
    assert not pieces & {validation[i : i + 8] for i in range(len(validation) - 7)}
