"""Numbers for a web page, compressed, in text that HTML may hold."""

import base64
import gzip
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

# What JavaScript calls the arrays that it can read in place.
TYPED_ARRAYS = {
    "uint8": "Uint8Array",
    "uint16": "Uint16Array",
    "uint32": "Uint32Array",
    "int32": "Int32Array",
    "float32": "Float32Array",
}
ALIGNMENT = 8


def pack(facts: Mapping[str, Any], arrays: Mapping[str, "np.ndarray[Any, Any]"]) -> str:
    """
    Packs facts and arrays into base64 of gzip. Unpacked, it is the length of a JSON header as
    uint32, the header, and the arrays. The header holds `facts`, and under "arrays" the type,
    place and length of each. All numbers are little-endian.

    Args:
        facts: Anything that JSON can hold.
        arrays: By name, of a type in TYPED_ARRAYS, any shape.
    """
    places: dict[str, list[Any]] = {}
    parts: list[bytes] = []
    size = 0
    for name, array in arrays.items():
        raw = array.astype(array.dtype.newbyteorder("<")).tobytes()
        raw += bytes(-len(raw) % ALIGNMENT)
        places[name] = [TYPED_ARRAYS[array.dtype.name], size, array.size]
        parts.append(raw)
        size += len(raw)
    text = json.dumps({**facts, "arrays": places}, ensure_ascii=False).encode()
    text += b" " * (-(len(text) + 4) % ALIGNMENT)
    content = b"".join([len(text).to_bytes(4, "little"), text, *parts])
    # the same content gives the same page
    return base64.b64encode(gzip.compress(content, mtime=0)).decode()
