"""What `train` says at its end, and what it does not say."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from sae_lens import SAE

from tests.cli.commands import CONFIG, TINY, train

pytestmark = pytest.mark.usefixtures("few_calibration_tokens")


def test_train_ends_with_its_figures(tmp_path: Path):
    output = tmp_path / "my sae"
    result = train(output)
    held_out = json.loads((output / "cfg.json").read_text())["metadata"]["held_out"]
    assert result.stdout.splitlines()[-10:] == [
        f"L0          {held_out['l0']:.2f} features per token, 4 wanted",
        f"explained   {held_out['explained_variance']:.4f} of the variance",
        f"dead        {held_out['dead_features']} of 64 features, active on none of "
        f"{held_out['n_tokens']:,} held-out tokens",
        f"report      {output / 'report.html'}",
        f"saved in {output}",
        "next:",
        f"  sae-lens-alloc features '{output}' --output features.html   # what each feature does",
        f"  sae-lens-alloc calibrate '{output}' --l0 L0 --output NEW   # another sparsity",
        f"  sae-lens-alloc push '{output}' --to ORG/NAME --dry-run   # give it to others",
        f"  sae_lens.SAE.load_from_disk('{output}')   # in Python",
    ]
    # measured again on the contexts that the training held out, as saved
    measured = json.loads((output / "held_out.json").read_text())
    for name, value in held_out.items():
        assert measured[name] == pytest.approx(value, rel=1e-6)
    assert measured["ce_recovered_mean"] < 1
    page = (output / "report.html").read_text()
    assert f"{measured['explained_variance']:.4f}" in page
    assert f"{measured['ce_recovered_mean']:.4f}" in page
    assert "<h2>Training</h2>" in page and "The same, in text" in page
    # another SAE in its place does not keep the figures of this one
    result = train(output, "--overwrite", "--no-report", "sae.k=5")
    assert result.exit_code == 0, result.stderr
    assert f"saved in {output}\nnext:" in result.stdout
    assert f"sae-lens-alloc report '{output}' --output report.html" in result.stdout
    assert not (output / "held_out.json").exists()


def test_a_refined_sae_is_told_with_its_stock_form(tmp_path: Path):
    output = tmp_path / "sae"
    settings = ("sae.architecture=refined_mutual_choice", "sae.feature_choice_steps=0")
    result = train(output, "--no-report", *settings)
    assert result.exit_code == 0, result.stderr
    metadata = json.loads((output / "cfg.json").read_text())["metadata"]
    stock = metadata["stock_form"]
    line = (
        f"stock form  in stock_jumprelu/ there: {stock['explained_variance']:.4f} of the "
        f"variance by {stock['l0']:.2f} features per token, loads without sae_lens_alloc"
    )
    assert line in result.stdout.splitlines()


def test_a_report_that_cannot_be_written_does_not_cost_the_sae(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    output = tmp_path / "sae"
    (output / "report.html").mkdir(parents=True)  # where a file is to be
    result = train(output, "--overwrite")
    assert result.exit_code == 0, result.stderr
    assert SAE.load_from_disk(output).cfg.d_sae == 64
    assert f"saved in {output}\nnext:" in result.stdout
    assert f"the SAE is saved in '{output}', but not its report: " in caplog.text


@pytest.mark.slow
def test_a_training_by_relative_paths_is_calibrated_elsewhere_and_nothing_is_noise(
    tmp_path: Path,
):
    demo, elsewhere = tmp_path / "demo", tmp_path / "elsewhere"
    elsewhere.mkdir()
    demo.symlink_to(Path(CONFIG).parent)
    settings = [s for s in TINY if not s.startswith(("model_name", "dataset_path"))]

    def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "sae_lens_alloc_cli", *arguments],
            cwd=folder,
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": os.getcwd(), "TQDM_DISABLE": "1"},
        )

    first = run(
        tmp_path,
        *("train", CONFIG, *settings, "output_path=sae"),
        *("model_name=demo/model", "dataset_path=demo/corpus"),
    )
    assert first.returncode == 0, first.stderr
    assert "Warning" not in first.stderr
    assert SAE.load_from_disk(tmp_path / "sae").cfg.metadata.model_name == str(
        demo / "model"
    )
    again = run(
        elsewhere,
        *("calibrate", "../sae", "--output", "new"),
        *("--l0", "3", "--tokens", "2000"),
    )
    assert again.returncode == 0, again.stderr
    assert "Warning" not in again.stderr
