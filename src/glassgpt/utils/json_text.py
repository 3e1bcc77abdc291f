"""JSON as the standard has it, which knows no number that is infinite or none."""

import json
import math
from collections.abc import Mapping
from typing import Any


def finite(value: Any) -> Any:
    """The value with None in the place of every number, however deep, that is not finite; tuples become lists."""
    if isinstance(value, Mapping):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def json_text(value: Any) -> str:
    """The value on one line of ASCII, in which a lone surrogate (of a file's name, say) is spelled out; `finite` numbers alone."""
    return json.dumps(finite(value), allow_nan=False, separators=(",", ":"))
