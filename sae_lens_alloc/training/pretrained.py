"""`from_pretrained_path`: training that starts from the weights of a checkpoint."""

from pathlib import Path
from typing import Any

from sae_lens.saes.sae import TrainingSAE, TrainingSAEConfig

from sae_lens_alloc.saes.saved_sae import load_sae

# The weights depend on these. All other settings may change.
SETTLED_KEYS = (
    *("architecture", "d_in", "d_sae", "normalize_activations"),
    *("d_out", "skip_connection"),  # of transcoders
)


def load_pretrained(
    folder: str | Path, cfg: TrainingSAEConfig, device: str
) -> TrainingSAE[Any]:
    """
    The SAE of `cfg`, with the weights, thresholds and statistics of a checkpoint. All settings
    are those of `cfg`, and its schedule begins at step 0.

    Args:
        folder: A checkpoint.
        cfg: The SAE to be trained.
        device: Device to load it on.

    Raises:
        ValueError: if there is no such folder, it is damaged or holds an SAE for inference, or
            architecture, sizes or normalization differ.
    """
    start = f"from_pretrained_path is {str(folder)!r}, but"
    if not Path(folder).is_dir():
        raise ValueError(f"{start} there is no such folder.")
    try:
        given = load_sae(folder, device)
    except ValueError as error:
        raise ValueError(f"{start} {error}") from error
    if not isinstance(given, TrainingSAE):
        raise ValueError(
            f"{start} that is an SAE for inference, which has no training state: start from it "
            "with `sae-lens-alloc finetune --from`."
        )
    saved, wanted = given.cfg.to_dict(), cfg.to_dict()
    for key in SETTLED_KEYS:
        if saved.get(key) != wanted.get(key):
            raise ValueError(
                f"{start} its SAE has {key} {saved.get(key)!r}, and the one to be trained "
                f"{wanted.get(key)!r}."
            )
    sae = TrainingSAE.from_dict({**wanted, "device": device})
    sae.load_state_dict(given.state_dict())
    return sae
