"""
The SAEs of a comparison on text that is unlike the text that they were trained and their
thresholds were set on, with the thresholds as saved. docs/results.md has the table.

    sae-lens-alloc compare configs/compare_demo.yaml --output output/compare_demo
    python -m benchmarks.shift docs/results/shift.json output/compare_demo
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from sae_lens import SAE

from benchmarks.probes import find_saes
from benchmarks.results import main_versions, write_results
from sae_lens_alloc.activations.on_text import text_of_sae
from sae_lens_alloc.comparison.given_figures import measure_given_saes
from sae_lens_alloc.saes.saved_sae import load_sae

ROOT = Path(__file__).parent.parent
D_IN = 192  # of the demo's model
# The demo's model and its text are Python. Each with the tokens that are measured.
TEXTS = {
    "Python, other files": ("sae_lens_alloc/demo/corpus/heldout.parquet", 60_000),
    "English prose: the documents": ("docs/*.md", 30_000),
    "JavaScript: the feature page": ("sae_lens_alloc/features/*.js", 8_000),
}
FIGURES = (
    *("n_tokens", "l0", "explained_variance", "ce_recovered_mean"),
    *("kl_divergence", "dead_features"),
)


def as_parquet(files: str, folder: Path) -> Path:
    """A parquet file with a column `text` of what the files hold."""
    paths = sorted(ROOT.glob(files))
    if [path.suffix for path in paths] == [".parquet"]:
        return paths[0]
    written = folder / "text.parquet"
    texts = [path.read_text(encoding="utf-8") for path in paths]
    pq.write_table(pa.table({"text": texts}), written)
    return written


def load_saes(comparison: Path, l0: int) -> dict[tuple[str, int], SAE[Any]]:
    """The SAEs of a comparison at an L0, by row and seed. Their metadata names the language model."""
    found = find_saes(comparison, l0, D_IN)
    return {key: load_sae(path, "cpu").eval() for key, path in found.items()}


def measure(
    saes: dict[tuple[str, int], SAE[Any]], files: str, n_tokens: int
) -> dict[str, list[dict[str, Any]]]:
    """Figures on a text: of each row, those of its seeds."""
    named = {f"{row}, {seed}": sae for (row, seed), sae in saes.items()}
    with TemporaryDirectory() as folder:
        text = as_parquet(files, Path(folder))
        cfg = text_of_sae(next(iter(named.values())), None, str(text), "cpu")
        runs = measure_given_saes(named, cfg, n_tokens).as_saved
    figures: dict[str, list[dict[str, Any]]] = {}
    for (row, _), run in zip(saes, runs, strict=True):
        found = run.evaluation.to_dict()
        figures.setdefault(row, []).append({key: found[key] for key in FIGURES})
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("comparison", type=Path)
    parser.add_argument("--l0", type=int, default=16)
    args = parser.parse_args()
    saes = load_saes(args.comparison, args.l0)
    report: dict[str, Any] = {
        "versions": main_versions(),
        "command": f"python -m benchmarks.shift docs/results/shift.json {args.comparison}",
        "l0": args.l0,
        "texts": {
            name: measure(saes, files, n_tokens)
            for name, (files, n_tokens) in TEXTS.items()
        },
    }
    write_results(args.results, report)


if __name__ == "__main__":
    main()
