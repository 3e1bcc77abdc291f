"""`environment.json`: the software, machine and data that a run began with, and the run's id.

Resuming relies on some of it, and the page and the report show it, so that the types of all known values are checked.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from glassgpt.config.validation import PositiveCount, StrictConfig, between, types_of
from glassgpt.utils.errors import UserError
from glassgpt.utils.files import own_file, read_object

ENVIRONMENT_FILE = "environment.json"


@dataclass(frozen=True, kw_only=True)
class _Known(StrictConfig):
    """The values that resuming uses or the page shows. Those with a default are missing in some runs."""

    threads: Annotated[int, between(1, 4096)]
    data_fingerprint: str
    processes: PositiveCount[int] = 1
    precision: Literal["float32", "tf32", "bfloat16", "float16"] = "float32"
    run_id: str | None = None
    device: str | None = None
    strategy: str | None = None
    torch: str | None = None
    cpu: str | None = None
    parameters: int | None = None


def read_environment(path: Path) -> dict[str, Any]:
    """The content of an `environment.json`. Raises `UserError` if it is missing or damaged."""
    values = read_object(own_file(path))
    try:
        _Known.from_dict({name: values[name] for name in types_of(_Known) if name in values})
    except UserError as error:
        raise UserError(f"{path} is damaged: {error}") from None
    return values
