"""What a file holds is named by its first bytes; text in any script and encoding stays text."""

import bz2
import codecs
import gzip
import io
import itertools
import lzma
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from glassgpt.utils.content import HEAD_BYTES, WEB_PAGE, require_text
from glassgpt.utils.errors import UserError
from glassgpt.utils.files import decoded


def zipped(*names: str, mimetype: str = "") -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        if mimetype:
            archive.writestr(zipfile.ZipInfo("mimetype"), mimetype)
        for name in names:
            archive.writestr(name, "<xml>some text</xml>" * 20)
    return file.getvalue()


def tar() -> bytes:
    with tarfile.open(fileobj=(file := io.BytesIO()), mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a.txt"))
    return file.getvalue()


def saved_by(write: Callable[[io.BytesIO], None]) -> bytes:
    write(file := io.BytesIO())
    return file.getvalue()


FORMATS = {
    "PDF": b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj",
    "RTF": rb"{\rtf1\ansi Hello",
    "Word": zipped("[Content_Types].xml", "_rels/.rels", "word/document.xml"),
    "Excel": zipped("docProps/app.xml", "docProps/core.xml", "xl/workbook.xml"),
    "PowerPoint": zipped("[Content_Types].xml", "ppt/presentation.xml"),
    "OpenDocument file": zipped("content.xml", mimetype="application/vnd.oasis.opendocument.text"),
    "EPUB": zipped("META-INF/container.xml", mimetype="application/epub+zip"),
    "zip": zipped("passwords/all.txt"),
    "7z": b"7z\xbc\xaf\x27\x1c\0\4",
    "rar": b"Rar!\x1a\7\1\0",
    "tar": tar(),
    "gzip": gzip.compress(b"text"),
    "bzip2": bz2.compress(b"text"),
    "xz": lzma.compress(b"text"),
    "picture": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
    "audio": b"ID3\3\0\0\0\0\0",
    "video": b"\0\0\0\x20ftypisom\0\0\2\0",
    "program": b"\x7fELF\2\1\1\0",
    "SQLite": b"SQLite format 3\0\x10\0",
    "Parquet": b"PAR1\x15\x04",
    "pickle": pickle.dumps({"a": [1]}),
    "PyTorch": saved_by(lambda file: torch.save({"a": torch.zeros(2)}, file)),
    "arrays": saved_by(lambda file: np.save(file, np.zeros(2))),
    "weights": save({"a": np.zeros(2)}),
    "binary": bytes(range(256)) * 8,
}
TEXTS = {
    "English": "Call me Ishmael. Some years ago, never mind how long.\n",
    "Russian": "Все счастливые семьи похожи друг на друга.\n",
    "Chinese": "话说天下大势,分久必合,合久必分。\n",
    "Arabic": "كان يا ما كان في قديم الزمان\n",
    "Hindi": "यह एक पाठ है और यह हिंदी में है।\n",
    "emoji": "a \U0001f600 b\n",
}
WIDE = ("utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be")


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("encoding", ["utf-8", "iso8859-1"])
def test_other_formats_are_named(name: str, encoding: str) -> None:
    """Also if the user's encoding would take every byte."""
    with pytest.raises(UserError, match=rf"^FILE is .*{name}.*not text") as error:
        require_text(FORMATS[name][:HEAD_BYTES], "FILE", encoding)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=name):  # prompts, recipes and JSON pass through it
        decoded(FORMATS[name], "FILE")


@pytest.mark.parametrize("script", TEXTS)
def test_wide_encodings_are_named(script: str) -> None:
    """With and without a byte-order mark, also if the last character is cut."""
    for encoding, end in itertools.product([*WIDE, "utf-16", "utf-32"], [0, 1, 3]):
        content = (TEXTS[script] * 4).encode(encoding)
        for wrong in {"utf-8", "cp1252", "utf-16-be" if encoding == "utf-16-le" else "utf-16-le"} - {encoding}:
            if (wrong, encoding) != ("utf-16-le", "utf-16"):
                with pytest.raises(UserError, match=rf"--encoding {encoding}$"):
                    require_text(content[: len(content) - end], "FILE", wrong)
        require_text(content, "FILE", encoding)


@pytest.mark.parametrize("script", TEXTS)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gb18030", "utf-7"])
def test_text_stays_text(script: str, encoding: str) -> None:
    require_text((TEXTS[script] * 500).encode(encoding)[:HEAD_BYTES], "FILE", codecs.lookup(encoding).name)


@settings(max_examples=50)
@given(st.text(st.characters(exclude_categories=["Cc", "Cs"]) | st.sampled_from("\n\t\r"), max_size=60))
def test_any_text_without_control_characters_is_text(text: str) -> None:
    if not text.startswith(("%PDF-", "{\\rtf")):
        assert decoded(text.encode(), "FILE") == text.removeprefix("\ufeff")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "GIF89a is a format",
        "BM",
        "Rar! PK 7z MZ",
        "a\0b, a field of fixed width\0",
        "\x1b[31mred\x1b[0m" * 99,
        "b\bbo\bol\bld\bd " * 99,
    ],
)
def test_a_magic_number_in_letters_and_a_few_nuls_are_text(text: str) -> None:
    assert decoded(text.encode(), "FILE") == text


def test_the_byte_order_mark_is_dropped(tmp_path: Path) -> None:
    assert decoded("\ufeffIt was".encode(), "FILE") == "It was"


@pytest.mark.parametrize("text", ["<!DOCTYPE html>\n<p>", "\n<html lang=en>", '<?xml version="1.0"?><html>', "<HEAD>"])
def test_web_pages_are_recognised(text: str) -> None:
    assert WEB_PAGE.match(text)
    assert not WEB_PAGE.match("A text about " + text)
    assert not WEB_PAGE.match("<htmlx>")
