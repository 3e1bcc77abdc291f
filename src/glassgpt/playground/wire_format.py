"""Arrays for the page: a JSON header and the raw numbers, which the browser reads without parsing.

uint32 length of the header; the header; zero bytes up to a multiple of 8; the arrays, each at a multiple of 8 from the
first. All little-endian, in C order. The header has the plain values and, under `arrays`, each array's dtype, shape and
offset.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from glassgpt.utils.files import json_text

ALIGNMENT = 8
SENT_AS = {"float64": "float32", "float16": "float32", "int64": "int32"}
"""Dtypes that are converted. float32, int32, uint16 and uint8 are sent as they are."""


def pack(arrays: Mapping[str, Tensor | npt.NDArray[Any]], values: Mapping[str, Any]) -> bytes:
    """Arrays and plain values as one body."""
    descriptions: dict[str, dict[str, Any]] = {}
    parts: list[bytes] = []
    offset = 0
    for name, array in arrays.items():
        numbers = array.detach().cpu().numpy() if isinstance(array, Tensor) else array
        dtype = np.dtype(SENT_AS.get(numbers.dtype.name, numbers.dtype.name))
        assert dtype.name in ("float32", "int32", "uint16", "uint8"), dtype
        descriptions[name] = {"dtype": dtype.name, "shape": list(numbers.shape), "offset": offset}
        parts.append(_pad(np.asarray(numbers, dtype.newbyteorder("<")).tobytes()))
        offset += len(parts[-1])
    header = json_text({**values, "arrays": descriptions}).encode()
    return b"".join([_pad(len(header).to_bytes(4, "little") + header), *parts])


def _pad(data: bytes) -> bytes:
    return data + bytes(-len(data) % ALIGNMENT)
