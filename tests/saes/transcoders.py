"""Tiny transcoders, and the dense formulas that they must equal."""

from typing import Any

import torch
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY

from sae_lens_alloc.saes.transcoder import TrainingTranscoder
from tests.saes.conftest import set_weights, tokens, training_step

D_IN, D_OUT, D_SAE = 8, 5, 32
ARCHITECTURES = ("mutual_choice_transcoder", "feature_choice_transcoder")


def make_transcoder(
    architecture: str = "mutual_choice_transcoder", **overrides: Any
) -> TrainingTranscoder:
    """
    A transcoder with random weights and decoder norms between 0.3 and 3; 8 inputs, 5 outputs, 32
    features, k 3, no auxiliary loss, no margin and one rule otherwise.
    """
    settings: dict[str, Any] = {
        "d_in": D_IN,
        "d_out": D_OUT,
        "d_sae": D_SAE,
        "k": 3,
        "aux_loss": "none",
        "selection_margin": 0.0,
        **({"feature_choice_steps": 0} if "mutual_choice" in architecture else {}),
        **overrides,
    }
    torch.manual_seed(0)
    sae_class, config_class = SAE_TRAINING_CLASS_REGISTRY[architecture]
    sae = sae_class(config_class(**settings))
    assert isinstance(sae, TrainingTranscoder)
    cfg = sae.cfg
    directions = tokens(cfg.d_sae, cfg.d_out, seed=2, dtype=torch.float64)
    directions /= directions.norm(dim=1, keepdim=True)
    norms = torch.logspace(-0.5, 0.5, cfg.d_sae, dtype=torch.float64)
    set_weights(
        sae,
        W_dec=directions * norms[:, None],
        W_enc=tokens(cfg.d_in, cfg.d_sae, seed=3, dtype=torch.float64) / cfg.d_in**0.5,
        b_enc=0.1 * tokens(cfg.d_sae, seed=4, dtype=torch.float64),
        b_dec=0.1 * tokens(cfg.d_out, seed=5, dtype=torch.float64),
    )
    if cfg.skip_connection:
        set_weights(sae, W_skip=0.3 * tokens(cfg.d_out, cfg.d_in, seed=6))
    return sae


def make_rows(
    n: int, seed: int = 1, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Rows [x, y] of which y depends on x."""
    x = tokens(n, D_IN, seed=seed, dtype=dtype)
    mixing = tokens(D_IN, D_OUT, seed=7, dtype=dtype)
    return torch.cat([x, (x @ mixing).relu() + 1], dim=1)


def stepped_transcoder(architecture: str, **overrides: Any) -> TrainingTranscoder:
    """A transcoder whose statistics have seen a few batches; its weights stay as they are."""
    sae = make_transcoder(architecture, **overrides)
    for step in range(30):
        training_step(sae, make_rows(64, seed=step), step)
    return sae
