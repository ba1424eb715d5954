"""The notebooks of docs/tutorials run, and what they show is fit to be read."""

import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "docs" / "tutorials").glob("*.ipynb"))
MISSING = [
    name for name in ("ipykernel", "matplotlib", "nbclient") if find_spec(name) is None
]


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def path(request: pytest.FixtureRequest) -> Path:
    return request.param


def cells(path: Path, kind: str) -> list[Any]:
    notebook = json.loads(path.read_text())
    return [cell for cell in notebook["cells"] if cell["cell_type"] == kind]


def printed(cell: Any) -> str:
    return "".join(
        "".join(output["text"])
        for output in cell["outputs"]
        if output["output_type"] == "stream"
    )


def test_there_are_three():
    assert [path.stem for path in NOTEBOOKS] == [
        "1-train-and-read",
        "2-fine-tune-and-compare",
        "3-look-and-steer",
    ]


def test_outputs_are_those_of_one_run_from_top_to_bottom(path: Path):
    counts = [cell["execution_count"] for cell in cells(path, "code")]
    assert counts == list(range(1, len(counts) + 1))
    pictures = [
        output
        for cell in cells(path, "code")
        for output in cell["outputs"]
        if "image/png" in output.get("data", {})
    ]
    assert pictures != []


def test_outputs_hold_no_noise_and_no_paths_of_a_machine(path: Path):
    for cell in cells(path, "code"):
        for output in cell["outputs"]:
            assert output["output_type"] in ("stream", "display_data")
            assert output.get("name") != "stderr"
        assert not re.search(
            r"[Ww]arn|/home/|/tmp/|/root/|site-packages", printed(cell)
        )


def test_links_lead_somewhere(path: Path):
    text = "".join("".join(cell["source"]) for cell in cells(path, "markdown"))
    links = re.findall(r"\]\(([^)#]+)\)", text)
    assert links != []
    assert [link for link in links if not (path.parent / link).exists()] == []


@pytest.mark.slow
@pytest.mark.skipif(
    MISSING != [],
    reason=f"not installed: {', '.join(MISSING)} (pip install -e '.[tutorials]')",
)
def test_it_runs(path: Path, tmp_path: Path):
    from scripts.run_tutorials import executed

    found = executed(path, tmp_path)  # raises if a cell fails
    assert [cell.source for cell in found.cells if cell.cell_type == "code"] == [
        "".join(cell["source"]) for cell in cells(path, "code")
    ]
    if path.stem == "3-look-and-steer":
        # steering by what a feature writes works, and random directions do not
        table = "".join(map(printed, (c for c in found.cells if c.cell_type == "code")))
        for word in ("self", "None"):
            feature, random = (
                [float(mean) for mean in re.findall(r"\d+\.\d\d", line)]
                for line in re.findall(rf"^{word}, (?:feature|random) .*", table, re.M)
                if "active" not in line and "strength" not in line
            )
            assert max(feature) > 3 * feature[0]
            assert max(feature) > 1.5 * max(random)
