"""The demo corpus: the source text of Python's standard library, split by file."""

import hashlib
import platform
import random
import shutil
import sys
import tokenize
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

Row = tuple[str, str]  # (path, text)

CHUNK_CHARS = 8000
HELD_OUT_ONE_IN = 18
EXCLUDED_FOLDERS = {
    "tests",
    "test",
    "idle_test",
    "encodings",
    "site-packages",
    "__pycache__",
}
# Tables and build records rather than prose or code; the latter name the machine that built Python.
EXCLUDED_PREFIXES = ("config-", "_sysconfigdata")


def source_paths(stdlib: Path) -> list[Path]:
    """The library's Python files, relative and sorted, without tests and tables."""

    def wanted(path: Path) -> bool:
        return not any(
            part in EXCLUDED_FOLDERS or part.startswith(EXCLUDED_PREFIXES)
            for part in path.parts
        )

    paths = (path.relative_to(stdlib) for path in stdlib.rglob("*.py"))
    return sorted(path for path in paths if wanted(path))


def is_held_out(path: str) -> bool:
    """Whether a file is held out: decided by its name alone, so that a file never moves."""
    digest = hashlib.sha256(path.encode()).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT_ONE_IN == 0


def chunks(text: str, limit: int = CHUNK_CHARS) -> list[str]:
    """Cut a text at line ends into pieces of at most `limit` characters; a longer line stays."""
    pieces, piece = [], ""
    for line in text.splitlines(keepends=True):
        if piece and len(piece) + len(line) > limit:
            pieces.append(piece)
            piece = ""
        piece += line
    return [*pieces, piece] if piece else pieces


def read_rows(stdlib: Path) -> tuple[list[Row], list[Row]]:
    """Training and held-out rows, each in one fixed shuffled order."""
    splits: tuple[list[Row], list[Row]] = ([], [])
    for path in source_paths(stdlib):
        with tokenize.open(stdlib / path) as file:  # honours a file's declared encoding
            text = file.read()
        name = path.as_posix()
        splits[is_held_out(name)].extend((name, chunk) for chunk in chunks(text))
    for rows in splits:
        # Neighbours in the stream should be unrelated, as the separator between them says.
        random.Random(0).shuffle(rows)
    return splits


def write_rows(rows: list[Row], path: Path) -> None:
    """Write rows as one parquet file with the columns `text` and `path`."""
    table = pa.table(
        {"text": [text for _, text in rows], "path": [name for name, _ in rows]}
    )
    # One page a column: zstd then sees repeats across the whole corpus.
    pq.write_table(
        table,
        path,
        compression="zstd",
        compression_level=22,
        use_dictionary=False,
        row_group_size=len(rows),
        data_page_size=2**28,
        write_batch_size=len(rows),
    )


def write_licence(stdlib: Path, path: Path) -> None:
    """Copy Python's licence, or state it where the installation has no copy."""
    source = stdlib / "LICENSE.txt"
    if source.exists():
        shutil.copyfile(source, path)
    else:
        path.write_text(
            f"Source text of the standard library of Python {platform.python_version()}.\n"
            f"Licence: PSF-2.0, https://docs.python.org/3/license.html\n\n{sys.copyright}\n"
        )
