"""The files of ops/ import each other in one direction: kernels know no selection."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

from sae_lens_alloc import ops

FOLDER = Path(ops.__file__).parent
PACKAGE = ops.__name__


def imports_of(path: Path) -> set[str]:
    """Files of ops/ that a file imports, also within its functions."""
    found = set[str]()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            if node.module == PACKAGE:
                found |= {alias.name for alias in node.names}
            elif node.module.startswith(PACKAGE + "."):
                found.add(node.module.removeprefix(PACKAGE + "."))
    return found


def test_no_file_imports_itself_by_way_of_others():
    graph = {path.stem: imports_of(path) for path in FOLDER.glob("*.py")}
    order = list(TopologicalSorter(graph).static_order())  # CycleError otherwise
    assert {"triton_mutual_choice", "encode_select", "encoder_tensors"} <= set(order)
    for name, imported in graph.items():
        if name.startswith("triton_"):
            facades = {file for file in imported if "select" in file}
            assert facades == set(), name
