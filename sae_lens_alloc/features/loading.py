"""The SAE of a feature page, by folder or release."""

from typing import Any

from sae_lens import SAE
from sae_lens.saes.temporal_sae import TemporalSAE
from sae_lens.saes.transcoder import Transcoder

from sae_lens_alloc.training.source_sae import inference_sae, load_source_sae


def load_readable_sae(name: str) -> SAE[Any]:
    """
    Loads an SAE whose features can be looked at one by one.

    Args:
        name: A folder with an SAE or a training checkpoint, or RELEASE:ID. A checkpoint is read
            as the SAE that it would be saved as.

    Returns:
        An inference SAE on the CPU that takes activations of shape (B, d_in).

    Raises:
        ValueError: if there is none, or it is a transcoder or a temporal SAE.
    """
    sae = inference_sae(load_source_sae(name, "cpu"))
    if isinstance(sae, Transcoder | TemporalSAE):
        why = (
            "reads one place of the model and writes to another"
            if isinstance(sae, Transcoder)
            else "encodes a whole context at a time"
        )
        raise ValueError(
            f"{name!r} is of the architecture {sae.cfg.architecture()!r}, which {why}: give an "
            "SAE."
        )
    # activations come flat, one vector a token
    sae.turn_off_forward_pass_hook_z_reshaping()
    return sae
