"""Which releases of SAELens we import, and what the import says of another or of none."""

import subprocess
import sys
from pathlib import Path

from sae_lens_alloc.host_release import SUPPORTED, explained

ROOT = Path(__file__).parents[1]


def test_the_supported_release_is_that_of_pyproject():
    assert f'    "{SUPPORTED}",' in (ROOT / "pyproject.toml").read_text()


def test_only_errors_of_importing_sae_lens_are_explained():
    other = ImportError("No module named 'typer'", name="typer")
    assert explained(other) is other
    ours = ImportError("cannot import name 'x'", name="sae_lens_alloc.compat")
    assert explained(ours) is ours


def test_another_sae_lens_is_one_sentence(tmp_path: Path):
    """With a SAELens in front that has nothing of what we import."""
    (tmp_path / "sae_lens").mkdir()
    (tmp_path / "sae_lens" / "__init__.py").write_text("")
    found = subprocess.run(
        [sys.executable, "-c", "import sae_lens_alloc"],
        env={"PYTHONPATH": f"{tmp_path}:{ROOT}"},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 1
    last = found.stderr.strip().splitlines()[-1]
    assert last.startswith(f"ImportError: sae-lens-alloc works with {SUPPORTED}, not")
    assert "cannot import name" in last
    assert last.endswith(f"run `pip install '{SUPPORTED}'`.")


def test_no_sae_lens_is_one_sentence():
    """Without site-packages, as in an environment that has nothing installed."""
    found = subprocess.run(
        [sys.executable, "-S", "-c", "import sae_lens_alloc"],
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 1
    assert found.stderr.strip().splitlines()[-1] == (
        f"ImportError: sae-lens-alloc works with {SUPPORTED}, which is not installed: run "
        f"`pip install '{SUPPORTED}'`."
    )
