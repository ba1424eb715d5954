"""How the weights of features start."""

import torch
from sae_lens.saes.sae import TrainingSAEConfig
from torch import nn


@torch.no_grad()
def initial_rows(rows: torch.Tensor, cfg: TrainingSAEConfig) -> torch.Tensor:
    """
    Draws the weights of features as SAELens draws those of a decoder.

    Args:
        rows: Tensor to fill, shape (n_features, width).
        cfg: Says which norm they get, if any.
    """
    nn.init.kaiming_uniform_(rows)
    if cfg.decoder_init_norm is not None:
        rows /= rows.norm(dim=-1, keepdim=True)
        rows *= cfg.decoder_init_norm
    return rows
