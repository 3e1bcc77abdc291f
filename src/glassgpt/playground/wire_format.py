"""Arrays for the page: a header in JSON and the numbers behind it as they lie in memory, so that nothing is spelled out and read again.

uint32 (little-endian) length of the header; the header; zero bytes up to a multiple of 8; then the arrays, each at a multiple of 8
from the first. All little-endian and in C order. The header has the plain values and, under `arrays`, each array's dtype, shape and
offset.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from glassgpt.utils.files import json_text

ALIGNMENT = 8
DTYPES = ("float32", "int32", "uint8", "uint16")


def pack(arrays: Mapping[str, Tensor | npt.NDArray[Any]], values: Mapping[str, Any]) -> bytes:
    """Arrays and plain values as one body. float64 and float16 become float32, int64 int32; other dtypes are as they are."""
    places: dict[str, dict[str, Any]] = {}
    parts: list[bytes] = []
    offset = 0
    for name, array in arrays.items():
        data = _as_sent(array)
        places[name] = {"dtype": data.dtype.name, "shape": list(data.shape), "offset": offset}
        part = _padded(data.tobytes())
        parts.append(part)
        offset += len(part)
    header = json_text({**values, "arrays": places}).encode()
    return b"".join([_padded(len(header).to_bytes(4, "little") + header), *parts])


def _as_sent(array: Tensor | npt.NDArray[Any]) -> npt.NDArray[Any]:
    data = array.detach().cpu().numpy() if isinstance(array, Tensor) else array
    shorter = {"float64": "float32", "float16": "float32", "int64": "int32"}
    name = shorter.get(data.dtype.name, data.dtype.name)
    assert name in DTYPES, name
    return np.asarray(data, dtype=np.dtype(name).newbyteorder("<"))


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % ALIGNMENT)
