"""What a page finds in its data, read in Python."""

import base64
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np

DTYPES = {"Uint8Array": "<u1", "Uint16Array": "<u2", "Uint32Array": "<u4"}
DTYPES |= {"Int32Array": "<i4", "Float32Array": "<f4"}


def unpacked(text: str) -> dict[str, Any]:
    """What a page finds in its data."""
    content = gzip.decompress(base64.b64decode(text))
    size = int.from_bytes(content[:4], "little")
    data = json.loads(content[4 : 4 + size])
    for name, (kind, start, length) in data.pop("arrays").items():
        place = 4 + size + start
        assert place % 4 == 0
        data[name] = np.frombuffer(content, DTYPES[kind], length, place)
    return data


def data_of(path: Path) -> dict[str, Any]:
    """What the page in a file finds in its data."""
    text = path.read_text(encoding="utf-8")
    start = text.index('<script id="data" type="application/octet-stream">')
    return unpacked(text[start:].split(">", 1)[1].split("<")[0])
