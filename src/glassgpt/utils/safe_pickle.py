"""Other projects' pickles, PyTorch's own files (`.pt`, `.bin`) included: read without executing any code in them."""

import io
import pickle
import pickletools
import re
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from glassgpt.utils.errors import UserError
from glassgpt.utils.files import open_regular, read_file, readable


def read_pickle(path: Path, stand_ins: Sequence[tuple[type, str]] = ()) -> Any:
    """Read a PyTorch file. `stand_ins` are classes without code, and the names of the pickled classes they replace.

    Tensors are mapped into memory, except those of files older than PyTorch 1.6. Raises `UserError` for a file that
    needs any other class or function, and for a damaged one.
    """
    import torch  # imported here: reading token files does not need it

    is_zip = _is_stored_zip(path)
    with torch.serialization.safe_globals(list(stand_ins)):
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
        except pickle.UnpicklingError as error:
            name = re.search(r"GLOBAL ([\w.]+)", str(error))
            reason = f"refused: loading it would execute {name[1]}" if name else "damaged, or would execute code"
        except Exception:  # PyTorch's reader raises many types for a damaged file
            reason = "damaged, or not a PyTorch file of tensors and plain values" if path.stat().st_size else "empty"
    raise UserError(f"{path} is {reason}")


def _is_stored_zip(path: Path) -> bool:
    """Whether a file is a zip of uncompressed files, as `torch.save` writes. Raises `UserError` for another archive.

    A compressed file of a few MB could take any amount of memory.
    """
    with open_regular(path) as file:
        if file.read(4) != b"PK\x03\x04":  # as PyTorch decides
            file.seek(0)
            if tarfile.is_tarfile(file):
                raise UserError(f"{path} is refused: PyTorch's tar files, older than 2017, cannot be read safely")
            return False
        try:
            members = zipfile.ZipFile(file).infolist()
        except Exception:  # the library raises many types for a damaged file
            raise UserError(f"{path} is damaged, or not a PyTorch file of tensors and plain values") from None
        is_stored = all(member.compress_type == zipfile.ZIP_STORED for member in members)
        if not is_stored or sum(member.file_size for member in members) > file.seek(0, io.SEEK_END):
            raise UserError(f"{path} is refused: its content is compressed or overlaps; save it with torch.save")
    return True


class _PlainUnpickler(pickle.Unpickler):
    """Numbers, text, lists and dictionaries: no class or function can be named, so nothing can be executed."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"loading it would execute {module}.{name}")


def read_plain_pickle(path: Path) -> Any:
    """Read a pickle of plain values, without tuples. Raises `UserError` for one with a class or function, or damage."""
    with readable(path):
        content = read_file(path)
    try:
        for code, value, _ in pickletools.genops(content):
            if code.name in ("GLOBAL", "STACK_GLOBAL", "INST"):
                break  # refused below
            # Python takes memory for all numbers up to that of a stored value, and years to hash nested tuples.
            if "TUPLE" in code.name or ("PUT" in code.name and int(value or 0) > len(content)):
                raise ValueError("it has a tuple, or numbers values beyond its length")
        return _PlainUnpickler(io.BytesIO(content)).load()
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} is refused: {error}") from None
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise UserError(f"{path} is damaged, or not a pickle ({error or type(error).__name__})") from None
