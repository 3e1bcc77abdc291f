"""Other projects' pickles, PyTorch's own files (`.pt`, `.bin`) among them: read as tensors and plain values, with nothing in them run."""

import pickle
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from glassgpt.utils.errors import UserError


def read_pickle(path: Path, stand_ins: Sequence[tuple[type, str]] = ()) -> Any:
    """What a file holds. `stand_ins` are classes without code, and the names for which each takes the place of a pickled one.

    Raises `UserError` for a file that asks for any other class or function, with its name, and for a damaged one.
    """
    import torch  # here, since whoever reads token files only has no use for it

    with path.open("rb") as file, warnings.catch_warnings(action="ignore"):
        try:
            with torch.serialization.safe_globals(list(stand_ins)):
                return torch.load(file, map_location="cpu", weights_only=True)
        except (
            Exception
        ) as error:  # each part of PyTorch's reader has its own for a damaged file, and its advice is to run it
            wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
            if wanted is not None:
                raise UserError(
                    f"{path} is not read: it needs {wanted[1]} to be run, and nothing in a file is run here"
                ) from None
            if path.stat().st_size == 0:
                raise UserError(f"{path} is empty") from None
            raise UserError(f"{path} is damaged, or no file of PyTorch with tensors and plain values only") from None


class _PlainUnpickler(pickle.Unpickler):
    """Numbers, text, lists and dictionaries. Without a way to name a class or function, nothing in a pickle can be run."""

    def find_class(self, module: str, name: str) -> NoReturn:
        """Refuse every name."""
        raise pickle.UnpicklingError(f"it needs {module}.{name} to be run, and nothing in a file is run here")


def read_plain_pickle(path: Path) -> Any:
    """What a pickle of plain values holds. Raises `UserError` for one that asks for any class or function, and for a damaged one."""
    with path.open("rb") as file:
        try:
            return _PlainUnpickler(file).load()
        except pickle.UnpicklingError as error:
            raise UserError(f"{path} is not read: {error}") from None
        except Exception as error:  # a damaged pickle can raise nearly anything
            raise UserError(f"{path} is damaged, or no pickle ({error or type(error).__name__})") from None
