"""The house of CONTRIBUTING.md: which package may import which, and how large a room may be."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import sae_lens_alloc

PACKAGE = Path(sae_lens_alloc.__file__).parent
ROOT = PACKAGE.parent
# Files and packages by layers: each may import those of the layers above it.
LAYERS = (
    ("checksums", "errors", "host_release", "typed_values", "version"),
    ("compat", "json_files", "progress", "shares"),
    ("distributed",),
    ("allocation",),
    ("ops",),
    ("saes",),
    ("activations",),
    ("evaluation",),
    ("thresholds",),
    ("config",),
    ("training",),
    ("features",),
    ("comparison", "demo"),
    ("sharing",),
)
# Only these import every layer: the public names, and `python -m sae_lens_alloc`.
ENTRANCES = ("__init__", "__main__")
LAYER_OF = {name: i for i, names in enumerate(LAYERS) for name in names}

LONGEST_FILE, LONGEST_TEST_FILE, LONGEST_CLASS = 350, 450, 200


def module_of(path: Path) -> str:
    """The name of a file below the package: "ops.sparse" of ops/sparse.py, "ops" of its __init__."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imported(path: Path) -> set[str]:
    """Names that a file imports, also within its functions, with their module in front."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def own_modules(path: Path) -> set[str]:
    """Modules of this package that a file imports, as in MODULES; "__init__" for the package."""
    found: set[str] = set()
    for name in imported(path):
        if name == PACKAGE.name or name.startswith(f"{PACKAGE.name}."):
            inner = name.removeprefix(PACKAGE.name).removeprefix(".")
            while inner and inner not in MODULES:
                inner = inner.rpartition(".")[0]
            found.add(inner or "__init__")
    return found


GRAPH = {module: own_modules(path) for module, path in MODULES.items()}


def test_every_module_has_a_layer():
    first = {module.split(".")[0] for module in MODULES} - set(ENTRANCES)
    assert first <= set(LAYER_OF), "say in CONTRIBUTING.md and here what it may import"


@pytest.mark.parametrize("module", sorted(set(GRAPH) - set(ENTRANCES)))
def test_imports_run_downwards(module: str):
    own = module.split(".")[0]
    for name in GRAPH[module]:
        first = name.split(".")[0]
        assert first == own or (
            first not in ENTRANCES and LAYER_OF[first] < LAYER_OF[own]
        ), f"{module} imports {name}"


def test_no_file_imports_itself_by_way_of_others():
    order = list(TopologicalSorter(GRAPH).static_order())  # CycleError otherwise
    assert order.index("errors") < order.index("training") < order.index("__init__")


def test_nothing_imports_the_command_line_but_what_starts_it():
    importing = [
        module
        for module, path in MODULES.items()
        if any(name.startswith("sae_lens_alloc_cli") for name in imported(path))
    ]
    assert importing == ["__main__"]


def test_the_mathematics_knows_no_sae_lens():
    for module, path in MODULES.items():
        if LAYER_OF.get(module.split(".")[0], 99) <= LAYER_OF["ops"]:
            roots = {name.split(".")[0] for name in imported(path)}
            assert "sae_lens" not in roots or module == "compat", module


def source_files() -> list[Path]:
    folders = (
        "sae_lens_alloc",
        "sae_lens_alloc_cli",
        "benchmarks",
        "docs",
        "scripts",
        "tests",
    )
    return [path for name in folders for path in sorted((ROOT / name).rglob("*.py"))]


def test_no_file_is_too_long():
    lengths = {
        path.relative_to(ROOT).as_posix(): len(path.read_text().splitlines())
        for path in source_files()
    }
    too_long = {
        name: n
        for name, n in lengths.items()
        if n > (LONGEST_TEST_FILE if name.startswith("tests/") else LONGEST_FILE)
    }
    assert too_long == {}


def test_no_class_is_too_long():
    too_long = {
        f"{module}:{node.name}": n
        for module, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
        for n in [(node.end_lineno or 0) - node.lineno + 1]
        if n > LONGEST_CLASS
    }
    assert too_long == {}
