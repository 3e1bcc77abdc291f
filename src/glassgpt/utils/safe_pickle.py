"""Other projects' pickles, PyTorch's own files (`.pt`, `.bin`) included: read without executing any code in them."""

import pickle
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from glassgpt.utils.errors import UserError
from glassgpt.utils.files import open_regular, readable


def read_pickle(path: Path, stand_ins: Sequence[tuple[type, str]] = ()) -> Any:
    """Read a PyTorch file. `stand_ins` are classes without code, and the names of the pickled classes they replace.

    Raises `UserError` for a file that needs any other class or function, and for a damaged one.
    """
    import torch  # imported here: reading token files does not need it

    with path.open("rb") as file, torch.serialization.safe_globals(list(stand_ins)):
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            name = re.search(r"GLOBAL ([\w.]+)", str(error))
            reason = f"refused: loading it would execute {name[1]}" if name else "damaged, or would execute code"
        except Exception:  # PyTorch's reader raises many types for a damaged file
            reason = "damaged, or not a PyTorch file of tensors and plain values" if path.stat().st_size else "empty"
    raise UserError(f"{path} is {reason}")


class _PlainUnpickler(pickle.Unpickler):
    """Numbers, text, lists and dictionaries: no class or function can be named, so nothing can be executed."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"loading it would execute {module}.{name}")


def read_plain_pickle(path: Path) -> Any:
    """Read a pickle of plain values. Raises `UserError` for one that needs a class or function, or is damaged."""
    with readable(path), open_regular(path) as file:
        try:
            return _PlainUnpickler(file).load()
        except pickle.UnpicklingError as error:
            raise UserError(f"{path} is refused: {error}") from None
        except Exception as error:  # a damaged pickle can raise nearly anything
            raise UserError(f"{path} is damaged, or not a pickle ({error or type(error).__name__})") from None
