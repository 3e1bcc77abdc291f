"""Bounded reads: regular files of a limited size, JSON and TOML of a limited depth."""

import os
from pathlib import Path

import pytest

from glassgpt.utils.errors import UserError
from glassgpt.utils.files import open_regular, parse_json, parse_toml, read_file, read_json


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    (tmp_path / "zero").symlink_to("/dev/zero")
    for path in (pipe, tmp_path / "zero"):
        with pytest.raises(UserError, match=path.name):
            open_regular(path)
    with pytest.raises(IsADirectoryError):
        open_regular(tmp_path)
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "missing")


def test_a_file_over_the_limit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    assert read_file(path, 5) == b"12345"
    with pytest.raises(UserError, match="more than 4 bytes"):
        read_file(path, 4)


@pytest.mark.parametrize("depth", [101, 3_000, 200_000])
def test_deep_nesting_is_an_error_of_one_line(depth: int, tmp_path: Path) -> None:
    path = tmp_path / "deep.json"
    path.write_text("[" * depth + "]" * depth)
    with pytest.raises(UserError, match="nested too deeply"):
        read_json(path)
    with pytest.raises(UserError, match="nested too deeply"):
        parse_toml(f"a = {'[' * depth}{']' * depth}", "a.toml")


def test_what_is_not_deep_is_read() -> None:
    text = '{"a": [1, {"b": null}], "c": "\\ud83d\\ude00"}'
    assert parse_json(text, "text") == parse_json(text.encode(), "text") == {"a": [1, {"b": None}], "c": "😀"}
    assert parse_toml("a.b = [1, {c = 2}]", "text") == {"a": {"b": [1, {"c": 2}]}}
    for damaged in (b"\xff", b"{", b"", b"9" * 10_000):
        with pytest.raises(UserError, match="origin"):
            parse_json(damaged, "origin")
