"""The files of folders and patterns: each once, through links, and nothing that this package wrote."""

import glob
import os
import socket
from pathlib import Path

import pytest

from glassgpt.config.schema import DataConfig
from glassgpt.data.folders import is_below
from glassgpt.data.prepare import prepare
from glassgpt.data.sources import LocalFiles
from glassgpt.utils.errors import UserError

WORDS = "The quick brown fox jumps over the lazy dog. " * 20
# As a source: the folder itself, or a pattern in it that matches all its texts.
PATTERNS = pytest.mark.parametrize("pattern", ["", "**/*.txt"])


def write(path: Path, text: str = WORDS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def names_in(root: Path, pattern: str) -> list[str]:
    return [file.name for file in LocalFiles(root, pattern).files()]


@PATTERNS
@pytest.mark.parametrize("link", [".", "..", "deep/loop", "../texts/deep"])
def test_a_circular_link_repeats_no_file(tmp_path: Path, pattern: str, link: str) -> None:
    root = tmp_path / "texts"
    write(root / "deep" / "a.txt")
    write(root / "b.txt")
    for name in ("loop", "deep/loop", "deep/other"):
        (root / name).symlink_to(root / link)
    assert names_in(root, pattern) == ["b.txt", "deep/a.txt"]
    assert any("loop" in name for name in LocalFiles(root, pattern).left_out)


@PATTERNS
def test_a_linked_folder_is_read_and_a_second_name_of_a_file_is_not(tmp_path: Path, pattern: str) -> None:
    outside = tmp_path / "outside"
    write(outside / "below" / "c.txt")
    root = tmp_path / "texts"
    write(root / "z.txt")
    (root / "linked").symlink_to(outside)
    (root / "a.txt").symlink_to("z.txt")
    (root / "c.txt").symlink_to(outside / "below" / "c.txt")
    os.link(root / "z.txt", root / "hard.txt")
    source = LocalFiles(root, pattern)
    assert [file.name for file in source.files()] == ["c.txt", "hard.txt"]  # one file, one name
    assert {name.partition(" (")[0] for name in source.left_out} == {"a.txt", "linked/below/c.txt", "z.txt"}


@PATTERNS
def test_a_link_to_nothing_is_named(tmp_path: Path, pattern: str) -> None:
    write(tmp_path / "a.txt")
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"gone\.txt"):
        names_in(tmp_path, pattern)
    (tmp_path / "gone.txt").unlink()
    (tmp_path / "self.txt").symlink_to("self.txt")
    with pytest.raises(UserError, match=r"self\.txt"):
        names_in(tmp_path, pattern)


@PATTERNS
def test_only_regular_files_are_read(tmp_path: Path, pattern: str) -> None:
    write(tmp_path / "a.txt")
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "zero.txt").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(tmp_path / "socket.txt"))
    assert names_in(tmp_path, pattern) == ["a.txt"]
    left_out = " ".join(LocalFiles(tmp_path, pattern).left_out)
    assert all(name in left_out for name in ("pipe.txt", "socket.txt", "zero.txt"))


def write_run(path: Path) -> None:
    for name in ("config.toml", "environment.json", "metrics.jsonl", "samples.md", "below/notes.txt"):
        write(path / name)


def write_half_removed_run(path: Path) -> None:
    for name in (".partial-removed-config.toml", "metrics.jsonl", "samples.md", "notes.txt"):
        write(path / name)


def write_model(path: Path) -> None:
    for name in ("config.json", "model.safetensors", "merges.txt", "README.md"):
        write(path / name)


def write_cache(path: Path) -> None:
    for name in ("downloads/tinyshakespeare.txt", "datasets/x/notes.txt", "scans/0.json"):
        write(path / name)


def write_dataset(path: Path) -> None:
    prepare(DataConfig(source=str(write(path.parent.parent / "source.txt"))), path)
    write(path / "notes.txt")


@pytest.mark.parametrize("pattern", ["", "**/*", "*/*", "*/*.txt"])
@pytest.mark.parametrize("kind", [write_run, write_half_removed_run, write_model, write_cache, write_dataset])
def test_what_this_package_wrote_is_no_text(tmp_path: Path, kind, pattern: str) -> None:  # type: ignore[no-untyped-def]
    root = tmp_path / "texts"
    kind(root / "odd name")
    write(root / "deep" / "a.txt")
    source = LocalFiles(root, pattern)
    assert [file.name for file in source.files()] == ["deep/a.txt"]
    assert "odd name (" in source.left_out[0]


def test_the_cache_is_no_text_whatever_it_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLASSGPT_CACHE", str(tmp_path / "odd"))
    write(tmp_path / "odd" / "downloads" / "shakespeare.txt")
    write(tmp_path / "a.txt")
    assert names_in(tmp_path, "") == names_in(tmp_path, "**/*.txt") == ["a.txt"]


def test_a_run_named_as_text_is_refused_but_its_files_are_read_by_name(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    for pattern in ("", "*.md", "**/*.txt"):
        with pytest.raises(UserError, match="run"):
            names_in(tmp_path / "run", pattern)
    assert names_in(tmp_path / "run" / "samples.md", "") == ["samples.md"]


def test_texts_beside_a_model_or_a_config_are_read(tmp_path: Path) -> None:
    write_model(tmp_path)
    write(tmp_path / "site" / "config.toml")
    write(tmp_path / "site" / "page.md")
    assert names_in(tmp_path, "") == ["README.md", "merges.txt", "site/page.md"]


NAMES = ("a.txt", "b.md", "d/a.txt", "d/e/b.txt", "d/e/f/a.txt", "d/.h/a.txt", ".h/a.txt", "d/.a.txt", "[x]/a.txt")
WILD = (
    *("*", "**", "**/*", "*.txt", "**/*.txt", "*/*.txt", "d/**", "**/e/*", "**/e/**/a.txt", "?/e/*", "[!a].md"),
    *(".*/*", "**/.h/*", "d/.*", "*/.h/*", "**/**/*.txt", "d/**/**", "**/a.txt", "[[]x]/*", "d/e/**/*", "*/*/*"),
)


@pytest.mark.parametrize("pattern", WILD)
def test_patterns_match_as_glob_does(tmp_path: Path, pattern: str) -> None:
    for name in NAMES:
        write(tmp_path / name)
    files = {name for name in glob.glob(pattern, root_dir=tmp_path, recursive=True) if (tmp_path / name).is_file()}
    assert {name for name in NAMES if is_below(name, pattern)} == files
    if files:
        assert names_in(tmp_path, pattern) == sorted(files)
