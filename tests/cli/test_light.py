"""What answers at once imports nothing heavy, and the package imports what SAELens imports."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sae_lens_alloc.training.runner import CALIBRATION_TOKENS
from sae_lens_alloc_cli import app, calibrate

ROOT = Path(__file__).parents[2]
HEAVY = {
    *("sae_lens", "sae_lens_alloc", "torch", "transformer_lens", "transformers"),
    *("datasets", "numpy", "scipy", "pandas", "plotly", "wandb", "huggingface_hub"),
}
COMMANDS = sorted(
    info.name or str(getattr(info.callback, "__name__", ""))
    for info in app.registered_commands
)


def modules_after(code: str) -> set[str]:
    """Names of the modules that a process has once it has run some code, printed or not."""
    result = subprocess.run(
        [
            *(sys.executable, "-c"),
            f"import json, sys\ntry:\n    {code}\n"
            "except SystemExit as end:\n    assert not end.code\n"
            "print('\\n' + json.dumps(list(sys.modules)))",
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert result.returncode == 0, result.stderr
    return set(json.loads(result.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)]
)
def test_help_imports_nothing_heavy(arguments: list[str]):
    modules = modules_after(
        f"sys.argv[1:] = {arguments}; from sae_lens_alloc_cli import main; main()"
    )
    assert "sae_lens_alloc_cli.train" in modules
    assert {name.split(".")[0] for name in modules} & HEAVY == set()


@pytest.mark.slow
def test_importing_the_package_imports_what_sae_lens_imports():
    further = modules_after("import sae_lens, sae_lens_alloc") - modules_after(
        "import sae_lens"
    )
    assert {name.split(".")[0] for name in further} <= {"sae_lens_alloc", "datasets"}


def test_the_installed_script_and_the_wheel_are_of_the_light_package():
    text = (ROOT / "pyproject.toml").read_text()
    assert '\nsae-lens-alloc = "sae_lens_alloc_cli:main"\n' in text
    assert '\npackages = ["sae_lens_alloc", "sae_lens_alloc_cli"]\n' in text


def test_calibrate_reads_as_many_tokens_for_each_half_as_a_training():
    assert calibrate.TOKENS == 2 * CALIBRATION_TOKENS


def test_long_imports_are_announced():
    script = (
        "import sae_lens_alloc_cli as cli, sys; cli.SECONDS_OF_SILENCE = 0.05; "
        "sys.argv[1:] = ['features', '/no/such', '--output', 'x.html']; cli.main()"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT
    )
    first, *_, last = result.stderr.splitlines()
    assert first == "importing SAELens and torch ..."
    assert last.startswith("error: '/no/such' is neither a folder nor RELEASE:ID")
