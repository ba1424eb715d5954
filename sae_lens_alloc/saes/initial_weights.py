"""How the weights of features start."""

import torch
from sae_lens.saes.sae import TrainingSAEConfig
from torch import nn


@torch.no_grad()
def initial_decoder(rows: torch.Tensor, cfg: TrainingSAEConfig) -> torch.Tensor:
    """
    Draws decoder rows as SAELens does.

    Args:
        rows: Tensor to fill, shape (n_features, width).
        cfg: Says which norm they get, if any.
    """
    nn.init.kaiming_uniform_(rows)
    if cfg.decoder_init_norm is not None:
        rows /= rows.norm(dim=-1, keepdim=True)
        rows *= cfg.decoder_init_norm
    return rows


@torch.no_grad()
def initial_encoder(rows: torch.Tensor, cfg: TrainingSAEConfig) -> torch.Tensor:
    """
    Draws the encoder of features from the distribution that SAELens' transcoders have,
    kaiming_uniform of a matrix of shape (d_in, d_sae), but feature by feature, so that ranks can
    draw a part at a time.

    Args:
        rows: Tensor to fill, shape (n_features, d_in).
        cfg: The transcoder.
    """
    bound = (6 / cfg.d_sae) ** 0.5
    return rows.uniform_(-bound, bound)
