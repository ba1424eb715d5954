"""`sae-lens-alloc run` is `python -m` with our architectures."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.commands import invoke


@pytest.mark.slow
def test_run_lets_saelens_own_command_line_train_our_architectures():
    result = subprocess.run(
        [
            *(sys.executable, "-m", "sae_lens_alloc", "run", "--"),
            *("sae_lens.llm_sae_training_runner", "--architecture", "mutual_choice"),
            "--help",
        ],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "mutual_choice,feature_choice," in result.stdout
    assert "MutualChoiceTrainingSAEConfig" in result.stdout
    assert "--feature_choice_steps [int]" in result.stdout
    assert "--k_start [float]" in result.stdout
    assert "found in sys.modules" not in result.stderr


@pytest.fixture
def _restore_process(monkeypatch: pytest.MonkeyPatch):
    """`run` takes over the process: give it its arguments and search path back."""
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.mark.usefixtures("_restore_process")
def test_run_is_python_dash_m(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a_script.py").write_text(
        "import sys\nprint(__name__, sys.argv)\nsys.exit(3)\n"
    )
    monkeypatch.chdir(tmp_path)
    for separator in (["--"], []):
        result = invoke("run", *separator, "a_script", "--quick", "x=1", "--", "-h")
        assert result.exit_code == 3
        script = str(tmp_path / "a_script.py")
        assert result.stdout == f"__main__ {[script, '--quick', 'x=1', '--', '-h']}\n"


@pytest.mark.parametrize("module", ["nowhere", "nowhere.at.all", "sae_lens"])
@pytest.mark.usefixtures("_restore_process")
def test_run_of_what_cannot_be_run_is_one_sentence(module: str):
    result = invoke("run", module)
    assert result.exit_code == 1
    assert result.stderr == f"error: there is no module {module!r} that can be run.\n"
