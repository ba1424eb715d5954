"""
SAEs on text that is unlike the text that they were trained and their thresholds were set on, with
the thresholds as saved. docs/results.md has the table.

    make demo    # trains the SAEs
    python -m benchmarks.shift docs/results/shift.json demo-output/mutual_choice demo-output/batchtopk
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.results import main_versions, write_results
from sae_lens_alloc.activations.on_text import text_of_sae
from sae_lens_alloc.comparison.given_figures import measure_given_saes
from sae_lens_alloc.comparison.given_saes import load_given_saes

ROOT = Path(__file__).parent.parent
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


def measure(names: list[str], files: str, n_tokens: int) -> dict[str, Any]:
    """Figures of each SAE on a text, by name."""
    saes = load_given_saes(names, "cpu")
    with TemporaryDirectory() as folder:
        text = as_parquet(files, Path(folder))
        cfg = text_of_sae(next(iter(saes.values())), None, str(text), "cpu")
        found = measure_given_saes(saes, cfg, n_tokens)
    of_saes = {run.name: run.evaluation.to_dict() for run in found.as_saved}
    return {
        name: {key: figures[key] for key in FIGURES}
        for name, figures in of_saes.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("saes", nargs="+")
    args = parser.parse_args()
    report: dict[str, Any] = {
        "versions": main_versions(),
        "command": f"python -m benchmarks.shift docs/results/shift.json {' '.join(args.saes)}",
        "texts": {
            name: measure(args.saes, files, n_tokens)
            for name, (files, n_tokens) in TEXTS.items()
        },
    }
    write_results(args.results, report)


if __name__ == "__main__":
    main()
