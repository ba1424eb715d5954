"""SAELens is about to rename `n_batches_in_buffer`: both names work, in files and in Python."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sae_lens

from sae_lens_alloc import MutualChoiceTrainingSAEConfig
from sae_lens_alloc.activations.buffer_setting import (
    NAMES,
    buffer_setting,
    contexts_in_buffer,
    with_known_buffer_setting,
)
from tests.training.conftest import lm_config

OLD, NEW = NAMES

RUN = """
import sys
import sae_lens_alloc
from sae_lens_alloc.demo.methods import CORPUS, HERE

cfg = sae_lens_alloc.load_runner_config(HERE / "mutual_choice.yaml", [
    f"model_name={HERE / 'model'}", f"dataset_path={CORPUS}", "output_path=" + sys.argv[1],
    "training_tokens=4096", "n_batches_in_buffer=16", "sae.d_sae=256", "sae.k=4",
])
assert cfg.n_sequences_in_buffer == 16, cfg
assert not hasattr(cfg, "n_batches_in_buffer")
sae_lens_alloc.AllocSAETrainingRunner(cfg).run()
"""


def test_the_name_of_the_installed_sae_lens():
    cfg = lm_config(
        MutualChoiceTrainingSAEConfig(d_in=8, d_sae=16, k=2), n_batches_in_buffer=5
    )
    assert buffer_setting() == OLD
    assert contexts_in_buffer(cfg) == 5


def test_a_file_may_have_either_name():
    assert with_known_buffer_setting({NEW: 5, "lr": 1}) == {OLD: 5, "lr": 1}
    assert with_known_buffer_setting({OLD: 5}) == {OLD: 5}
    # an unknown key to whoever checks them
    assert with_known_buffer_setting({OLD: 5, NEW: 6}) == {OLD: 5, NEW: 6}


@pytest.mark.slow
def test_a_run_with_a_sae_lens_that_has_renamed_it(tmp_path: Path):
    """SAELens itself, with the other name wherever it has the old one."""
    installed = Path(sae_lens.__file__).parent
    renamed = tmp_path / "site" / "sae_lens"
    shutil.copytree(installed, renamed, ignore=shutil.ignore_patterns("__pycache__"))
    for file in renamed.rglob("*.py"):
        file.write_text(file.read_text().replace(OLD, NEW))
    python_path = [str(tmp_path / "site"), str(Path(__file__).parents[2])]
    result = subprocess.run(
        [sys.executable, "-c", RUN, str(tmp_path / "out")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(python_path)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "out" / "sae_weights.safetensors").exists()
