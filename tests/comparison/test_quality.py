"""
Quality does not move: each architecture on a small synthetic subject, trained as
configs/compare_synthetic_small.yaml says, does about as well as when docs/results was written.
The bounds are wide, since one seed on another processor rounds differently.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from sae_lens import SAE

from sae_lens_alloc.comparison.cell import sae_folder
from sae_lens_alloc.comparison.config import load_comparison
from sae_lens_alloc.comparison.synthetic import SyntheticSubject
from sae_lens_alloc.comparison.worker import train_cell

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "compare_synthetic_small.yaml"
# what `sae-lens-alloc compare` wrote for the config
RECORDED: dict[str, dict[str, Any]] = {
    cell["row"]: cell["measured"]["test"]["4"]
    for cell in json.loads(
        (ROOT / "docs" / "results" / "compare_synthetic_small.json").read_text()
    )["cells"].values()
}


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Figures on the test split by row."""
    config = load_comparison(CONFIG)[0]
    subject = SyntheticSubject(config)
    stream = subject.write(tmp_path_factory.mktemp("activations"))
    figures: dict[str, dict[str, Any]] = {}
    for cell in config.cells():
        folder = tmp_path_factory.mktemp("cell")
        train_cell(cell, stream, folder)
        sae = SAE.load_from_disk(sae_folder(folder, 4))
        figures[cell.row] = subject.evaluate(sae, stream, "test")[1]
    return figures


def test_every_row_was_recorded(figures: dict[str, dict[str, Any]]):
    assert figures.keys() == RECORDED.keys()


@pytest.mark.parametrize("row", RECORDED)
def test_figures_are_about_those_recorded(figures: dict[str, dict[str, Any]], row: str):
    found, recorded = figures[row], RECORDED[row]
    assert found["l0"] == pytest.approx(4.0, rel=0.02)
    assert found["explained_variance"] == pytest.approx(
        recorded["explained_variance"], abs=0.04
    )
    for name in ("f1", "mcc"):
        assert found[name] == pytest.approx(recorded[name], abs=0.15), name
