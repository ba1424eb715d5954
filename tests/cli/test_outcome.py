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
    assert result.stdout.splitlines()[-7:] == [
        f"L0          {held_out['l0']:.2f} features per token, 4 wanted",
        f"explained   {held_out['explained_variance']:.4f} of the variance",
        f"dead        {held_out['dead_features']} of 64 features, active on none of "
        f"{held_out['n_tokens']:,} held-out tokens",
        f"saved in {output}",
        "next:",
        f"  sae-lens-alloc calibrate '{output}' --l0 L0 --output NEW   # another sparsity",
        f"  sae_lens.SAE.load_from_disk('{output}')   # in Python",
    ]


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
