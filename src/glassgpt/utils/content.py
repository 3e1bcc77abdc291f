"""What a file holds if it is not plain text: recognised by its first bytes, never by its name."""

import codecs
import re

from glassgpt.utils.errors import UserError

HEAD_BYTES = 1 << 14
"""Bytes at the beginning of a file by which its content is recognised."""

COMPRESSIONS = {".gz": rb"\x1f\x8b\x08", ".zst": rb"\x28\xb5\x2f\xfd", ".bz2": rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)"}
"""How the compressed files begin that are read, by their suffixes."""

_TEXT = "save its text as a .txt file first, for example with LibreOffice or pandoc"
_TABLE = "export its text as .csv or .jsonl first"
_PACKED = "unpack it first"
_NO_TEXT = "give a text instead"
_ZIP, _ODF = rb"PK\x03\x04.{26}", rb"PK\x03\x04.{26,60}mimetypeapplication/"
# Patterns of the first bytes, the format, and the way to text. The first match counts.
_FORMATS = (
    (rb"%PDF-\d", "a PDF document", "extract its text first: pdftotext FILE.pdf"),
    (rb"\{\\rtf\d", "an RTF document", _TEXT),
    (_ZIP + rb".{0,8000}?\bword/[a-z]", "a Word document", _TEXT),
    (_ZIP + rb".{0,8000}?\bxl/[a-z]", "an Excel sheet", "save it as a .csv file first"),
    (_ZIP + rb".{0,8000}?\bppt/[a-z]", "a PowerPoint presentation", _TEXT),
    (_ODF + rb"vnd\.oasis\.opendocument", "an OpenDocument file", _TEXT),
    (_ODF + rb"epub", "an EPUB book", "convert it first: pandoc FILE.epub -o FILE.txt"),
    (_ZIP + rb".{0,200}?data\.pkl", "a PyTorch file", _NO_TEXT),
    (rb"PK(?:\x03\x04|\x05\x06|\x07\x08)", "a zip archive", _PACKED),
    (rb"7z\xbc\xaf\x27\x1c", "a 7z archive", _PACKED),
    (rb"Rar!\x1a\x07", "a rar archive", _PACKED),
    (rb".{257}ustar", "a tar archive", _PACKED),
    (COMPRESSIONS[".gz"], "gzip-compressed data", "decompress it first: gunzip"),
    (COMPRESSIONS[".bz2"], "bzip2-compressed data", "decompress it first: bunzip2"),
    (COMPRESSIONS[".zst"] + rb"|[\x50-\x5f]\x2a\x4d\x18", "zstd-compressed data", "decompress it first: unzstd"),
    (rb"\xfd7zXZ\0", "xz-compressed data", "decompress it first: unxz"),
    (rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Word, Excel or PowerPoint file", _TEXT),
    (rb"\x89PNG\r|\xff\xd8\xff|GIF8[79]a|RIFF.{4}WEBP|II\*\0|MM\0\*|8BPS|BM.{4}\0{4}", "a picture", _NO_TEXT),
    (rb"\0\0\x01\0.\0|.{4}ftyp(?:hei|mif1|avif)", "a picture", _NO_TEXT),
    (rb"ID3[\x02-\x04]|\xff[\xf1-\xf3\xf9-\xfb]|fLaC|OggS|RIFF.{4}WAVE|MThd|.{4}ftypM4A", "audio", _NO_TEXT),
    (rb".{4}ftyp|\x1a\x45\xdf\xa3|RIFF.{4}AVI |FLV\x01|\0\0\x01[\xba\xb3]|\x47.{187}\x47", "a video", _NO_TEXT),
    (rb"\x7fELF|MZ.\0.\0|[\xce\xcf]\xfa\xed\xfe|\xca\xfe\xba\xbe|\0asm", "a program", _NO_TEXT),
    (rb"SQLite format 3\0", "an SQLite database", _TABLE),
    (rb"PAR1", "a Parquet file", "let its name end in .parquet"),
    (rb"ARROW1|Obj\x01|\x89HDF\r", "a table in a binary format (Arrow, Avro or HDF5)", _TABLE),
    (rb"\x80[\x04\x05]\x95|\x80[\x02\x03][\](}cX\x8a]", "a Python pickle", _TABLE),
    (rb".{5}\0{3}\{|GGUF|\x93NUMPY", "a file of weights or arrays", _NO_TEXT),
)
_PRINTABLE = 2  # of the formats, which may lack control characters; all others have some
_WIDE = ("utf-32-le", "utf-32-be", "utf-16-le", "utf-16-be")  # the mark of UTF-16-LE is the beginning of UTF-32-LE's
# Control characters that texts hardly have: not white space, overstrikes, and what switches colours and character sets.
_CONTROLS = bytes({*range(32), 127} - set(b"\b\t\n\v\f\r\x0e\x0f\x1a\x1b"))
_FEW_CONTROLS, _CONTROL_SHARE = 32, 0.05  # more than both are not text
_WIDE_SHARE = 0.15  # of the bytes of UTF-16, at least: half of them in Latin and Cyrillic, fewer in Hindi
# How HTML begins.
WEB_PAGE = re.compile(r"\s*(?:<\?xml[^>]{0,200}>\s*)?<(?:!doctype\s+html|html|head|body)\b", re.IGNORECASE)


def require_text(head: bytes, origin: str, encoding: str = "utf-8") -> None:
    """Raise `UserError` that names what a content is, if its first bytes (`HEAD_BYTES`) are not text in the encoding.

    UTF-16 and UTF-32 are recognised without a byte-order mark too. A few control characters, NUL included, are text.
    """
    controls = len(head) - len(head.translate(None, _CONTROLS))
    for pattern, name, advice in _FORMATS if controls else _FORMATS[:_PRINTABLE]:
        if re.match(pattern, head, re.DOTALL):
            raise UserError(f"{origin} is {name}, not text; {advice}")
    fitting = _wide_encodings(head, controls)
    if fitting and encoding not in fitting:
        advice = f"save it as UTF-8, or read it as data with --encoding {fitting[0]}"
        raise UserError(f"{origin} is text in {fitting[0]}, not {encoding}; {advice}")
    is_wide = bool(fitting) or encoding.startswith(("utf-16", "utf-32"))
    if not is_wide and controls > max(_FEW_CONTROLS, _CONTROL_SHARE * len(head)):
        share = f"{controls:,} of its first {len(head):,} bytes are control characters"
        raise UserError(f"{origin} is binary data, not text: {share}")


def _wide_encodings(head: bytes, controls: int) -> tuple[str, ...]:
    """The encodings of two or four bytes per unit that fit the content; none if it has another one."""
    for name in _WIDE:
        if head.startswith("\ufeff".encode(name)):
            return name[:6], name
    if b"\0" not in head:
        return ()
    texts = {name: text for name in _WIDE if "\0" not in (text := _decoded(head, name))}
    # Spaces and letters up to U+00FF. Control characters make a text unlikely.
    latin = {
        name: sum(1 if each >= " " or each.isspace() else -9 for each in text if each < "\u0100")
        for name, text in texts.items()
    }
    best = max(latin, key=lambda name: latin[name], default="")
    # Chinese, Japanese and Korean in UTF-16 are not valid UTF-8 by chance. Text in other scripts is full of controls.
    is_plausible = best.startswith("utf-32") or not _decoded(head, "utf-8") or controls > _WIDE_SHARE * len(head)
    return (best,) if is_plausible and latin.get(best, 0) >= 2 else ()


def _decoded(head: bytes, encoding: str) -> str:
    """The text of the bytes, whose last character may be incomplete; nothing if they are not valid."""
    try:
        return codecs.getincrementaldecoder(encoding)().decode(head)
    except UnicodeDecodeError:
        return ""
