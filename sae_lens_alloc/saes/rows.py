"""What a row of activations holds: the vector of a token, or, for a transcoder, two of them."""

import torch
from sae_lens.saes.sae import SAEConfig


def output_width(cfg: SAEConfig) -> int | None:
    """d_out of a transcoder, SAELens' or ours, and None of an SAE."""
    return getattr(cfg, "d_out", None)


def row_width(cfg: SAEConfig) -> int:
    """Numbers in a row: d_in, and those of the output if the SAE is a transcoder."""
    return cfg.d_in + (output_width(cfg) or 0)


def encoded_and_target(
    cfg: SAEConfig, rows: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    What is encoded of some activations and what is to be reconstructed. For an SAE both are the
    activations. The rows of a transcoder are [x, y]: its input, shape (..., d_in), and its output
    for the same token, shape (..., d_out).

    Args:
        cfg: The SAE or transcoder.
        rows: Activations as `row_width` has them, shape (..., width).

    Raises:
        ValueError: if the rows of a transcoder have another width.
    """
    if output_width(cfg) is None:
        return rows, rows
    if rows.shape[-1] != row_width(cfg):
        raise ValueError(
            f"a transcoder is trained on rows of its input and its output, d_in + d_out = "
            f"{row_width(cfg)} numbers, but got {rows.shape[-1]}: train it with "
            "AllocSAETrainingRunner and hook_name_out, or give AllocSAETrainer such rows."
        )
    # contiguous, since kernels read them row after row
    return rows[..., : cfg.d_in].contiguous(), rows[..., cfg.d_in :].contiguous()
