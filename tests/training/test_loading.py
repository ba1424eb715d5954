"""What of a run stock SAELens loads, as the page on inference says."""

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from sae_lens import SAE, TrainingSAE
from sae_lens.registry import get_sae_training_class
from sae_lens.training.upload_saes_to_huggingface import _build_sae_path
from transformer_lens.HookedTransformer import HookedRootModule

from sae_lens_alloc import AllocSAETrainingRunner
from tests.saes.conftest import changed, state_of
from tests.saes.test_aux_zipf import BASES, settings
from tests.training.conftest import D_MODEL, lm_config

ARCHITECTURES = ["mutual_choice", *(f"{base}_aux_zipf" for base in BASES)]


@pytest.mark.usefixtures("few_calibration_tokens", "restore_signals")
@pytest.mark.filterwarnings("ignore:The saved SAE, loaded with SAELens")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_output_folder_is_what_is_uploaded_and_a_checkpoint_is_a_training_sae(
    architecture: str,
    demo_model: HookedRootModule,
    demo_text: Dataset,
    tmp_path: Path,
):
    sizes: dict[str, Any] = settings(
        architecture.removesuffix("_aux_zipf"), d_in=D_MODEL
    )
    if architecture == "mutual_choice":
        sizes["k"] = 3
    sizes["dtype"] = "float32"
    sae_config = get_sae_training_class(architecture)[1](**sizes)
    cfg = lm_config(
        sae_config,
        training_tokens=2 * 256,
        output_path=str(tmp_path / "sae"),
        checkpoint_path=str(tmp_path / "checkpoints"),
        save_final_checkpoint=True,
    )
    AllocSAETrainingRunner(cfg, demo_text, demo_model).run()

    uploaded = _build_sae_path(tmp_path / "sae", str(tmp_path / "upload"))
    assert SAE.load_from_disk(uploaded).cfg.d_sae == 32
    (checkpoint,) = (tmp_path / "checkpoints").rglob("final_512")
    loaded = TrainingSAE.load_from_disk(checkpoint)
    assert loaded.cfg.architecture() == architecture
    assert changed(state_of(loaded), TrainingSAE.load_from_disk(checkpoint)) == set()
