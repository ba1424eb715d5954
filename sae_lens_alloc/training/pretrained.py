"""Starting from the weights of a training SAE: `from_pretrained_path`."""

import json
from pathlib import Path
from typing import Any

from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME
from sae_lens.saes.sae import TrainingSAE, TrainingSAEConfig

from sae_lens_alloc.errors import in_one_sentence
from sae_lens_alloc.training.source_sae import TRAINING_ONLY_FIELD

# The weights mean nothing under another of these; all other settings may change.
SETTLED_KEYS = ("architecture", "d_in", "d_sae", "normalize_activations")


def check_pretrained(folder: str | Path, cfg: TrainingSAEConfig) -> None:
    """
    Refuses a folder whose weights are not those of a training SAE such as `cfg` describes.

    Raises:
        ValueError: in one sentence, if there is no such folder, it holds an SAE for inference,
            or architecture, sizes or normalization differ.
    """
    start = f"from_pretrained_path is {str(folder)!r}, but"
    for name in (SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME):
        if not (Path(folder) / name).is_file():
            what = (
                f"{name} is missing there"
                if Path(folder).is_dir()
                else "there is no such folder"
            )
            raise ValueError(f"{start} {what}.")
    try:
        saved = json.loads((Path(folder) / SAE_CFG_FILENAME).read_text())
    except ValueError as error:
        raise ValueError(
            f"{start} {SAE_CFG_FILENAME} there is damaged: {error}"
        ) from error
    if not isinstance(saved, dict):
        raise ValueError(f"{start} {SAE_CFG_FILENAME} there holds no settings.")
    if TRAINING_ONLY_FIELD not in saved:
        raise ValueError(
            f"{start} that is an SAE for inference, which has lost its training state: start "
            "from it with `sae-lens-alloc finetune --from`."
        )
    wanted = cfg.to_dict()
    for key in SETTLED_KEYS:
        if saved.get(key) != wanted[key]:
            raise ValueError(
                f"{start} its SAE has {key} {saved.get(key)!r}, and the one to be trained "
                f"{wanted[key]!r}."
            )


def load_pretrained(
    folder: str | Path, cfg: TrainingSAEConfig, device: str
) -> TrainingSAE[Any]:
    """
    The SAE that `cfg` describes with the weights, thresholds and statistics of another. All
    settings are those of `cfg`, and its schedule begins at step 0.

    Args:
        folder: A checkpoint.
        cfg: The SAE to be trained.
        device: Device to load it on.

    Raises:
        ValueError: as check_pretrained, and if the weights cannot be loaded.
    """
    check_pretrained(folder, cfg)
    sae = TrainingSAE.from_dict({**cfg.to_dict(), "device": device})
    try:
        sae.load_weights_from_checkpoint(folder)
    except Exception as error:  # safetensors and torch have many of their own
        raise ValueError(
            f"from_pretrained_path is {str(folder)!r}, but {SAE_WEIGHTS_FILENAME} there "
            f"cannot be loaded: {in_one_sentence(error)}"
        ) from error
    return sae
