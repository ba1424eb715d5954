"""
Runs the scripts of this folder, writes how their cases ended, and prints a table.

    python -m scripts.faults docs/results/faults.json [--only configs outputs] [--every N]

Exits with 1 if a case ended as it should not.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.results import installed_versions, write_results
from scripts.faults.counting import OUTCOMES

SCRIPTS = tuple(
    name
    for name in ("configs", "sae_folders", "outputs", "data")
    if find_spec(f"scripts.faults.{name}") is not None
)
PACKAGES = ("torch", "sae-lens", "safetensors")


def run_script(name: str, every: int) -> dict[str, Any]:
    """What a script counts: `n_cases`, `counts` and `cases`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "counts.json"
        command = [sys.executable, "-m", f"scripts.faults.{name}", "--json", str(path)]
        subprocess.run([*command, "--every", str(every)], check=False)
        if not path.exists():
            sys.exit(f"{name} ended before it had counted anything.")
        return json.loads(path.read_text())


def table(scripts: dict[str, dict[str, Any]]) -> Table:
    result = Table("", *scripts)
    result.add_row("cases", *(str(counted["n_cases"]) for counted in scripts.values()))
    for outcome in OUTCOMES:
        counts = (counted["counts"][outcome] for counted in scripts.values())
        result.add_row(outcome, *map(str, counts))
    return result


def main() -> int:
    """Runs the scripts and returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path, help="JSON file for the counts")
    parser.add_argument("--only", nargs="+", choices=SCRIPTS, default=SCRIPTS)
    parser.add_argument("--every", type=int, default=1, help="one case of so many")
    options = parser.parse_args()
    scripts: dict[str, dict[str, Any]] = {}
    for name in options.only:
        counted = run_script(name, options.every)
        # of the rest, the counts are enough
        bad = [case for case in counted["cases"] if not OUTCOMES[case["outcome"]]]
        scripts[name] = {**counted, "cases": bad}
    content = {
        "command": " ".join(["python -m scripts.faults", *sys.argv[1:]]),
        "versions": installed_versions(PACKAGES),
        "every": options.every,
        "scripts": scripts,
    }
    write_results(options.output, content)
    Console().print(table(scripts))
    return int(any(script["cases"] for script in scripts.values()))


if __name__ == "__main__":
    sys.exit(main())
