"""
Runs the notebooks of docs/tutorials and writes what they show into them.

    python -m scripts.run_tutorials                    all of them
    python -m scripts.run_tutorials docs/tutorials/1-train-and-read.ipynb

Progress bars and warnings go to stderr, and are not kept.
"""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import nbformat
from nbclient import NotebookClient

TUTORIALS = Path(__file__).parent.parent / "docs" / "tutorials"


def executed(path: Path, folder: Path) -> Any:
    """
    A notebook with the outputs of a new run, without what went to stderr.

    Args:
        path: The notebook. It is not changed.
        folder: Where it runs, and leaves its files.

    Raises:
        CellExecutionError: if a cell fails.
    """
    notebook: Any = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook,
        timeout=900,
        kernel_name="python3",
        coalesce_streams=True,
        resources={"metadata": {"path": str(folder)}},
        record_timing=False,
    ).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [
                output for output in cell.outputs if output.get("name") != "stderr"
            ]
    # the interpreter that ran it is nobody's concern
    notebook.metadata.language_info = {"name": "python"}
    return notebook


def main() -> None:
    chosen = [Path(name) for name in sys.argv[1:]]
    for path in chosen or sorted(TUTORIALS.glob("*.ipynb")):
        with TemporaryDirectory() as folder:
            notebook = executed(path, Path(folder))
        nbformat.write(notebook, path)


if __name__ == "__main__":
    main()
