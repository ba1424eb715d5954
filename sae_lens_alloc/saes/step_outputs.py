"""Reconstructions of a training step: of all levels, of both passes and of the error, in one pass."""

from collections.abc import Sequence
from typing import Any

import torch

from sae_lens_alloc.ops.block_encoder import Encoder
from sae_lens_alloc.saes.auxiliary_loss import outputs_and_parts
from sae_lens_alloc.saes.nesting import inner_pairs
from sae_lens_alloc.saes.reconstruction import Weights, reconstruct
from sae_lens_alloc.saes.step_plan import Outputs, Selection
from sae_lens_alloc.saes.threshold_sae import ThresholdTrainingSAE


def outputs_of_step(
    sae: ThresholdTrainingSAE[Any],
    weights: Weights,
    encoder: Encoder,
    x: torch.Tensor,
    shape: torch.Size,
    selection: Selection,
    inner_widths: Sequence[int],
) -> Outputs:
    """
    What a step puts out. All sets of pairs share one gradient of each weight.

    Args:
        sae: The SAE.
        weights: The weights that learn.
        encoder: The encoder that found the pairs.
        x: Encoder inputs by which the batch was allocated, shape (B, d_in).
        shape: Shape of a reconstruction.
        selection: Who takes part.
        inner_widths: Numbers of first features that reconstruct without the others.
    """
    margin, aux, acts = selection.margin, selection.aux, selection.dense_acts
    first, n_tokens = selection.first, len(x)
    sets = inner_pairs(selection.pairs, inner_widths, sae.shard)
    if first is not None:
        # as if its tokens followed those of the other pass
        sets.insert(0, selection.pairs.followed_by(first.pairs))
        x = torch.cat([x, first.x])
    elif acts is None:
        sets.insert(0, selection.pairs)
    recons, margin_pre_acts = reconstruct(
        weights,
        encoder,
        x,
        sets if aux is None else [*sets, aux.pairs],
        [] if margin is None else [margin.pairs],
    )
    of_first = []
    if first is not None:
        of_first = [recons[0][n_tokens:]]
        recons = [recon[:n_tokens] for recon in recons]
        if acts is not None:
            del recons[0]
    if acts is not None:
        recons.insert(0, sae._decode_dense(acts))
    n_levels = 1 + len(inner_widths)
    levels, parts = [*recons[:n_levels], *of_first], recons[n_levels:]
    if margin is not None:
        # what a reconstruction of 1 becomes tells by how much the output is scaled
        parts.append(torch.ones_like(levels[0]))
    levels = [(level.view(shape) + sae.b_dec).to(level.dtype) for level in levels]
    levels[0] = sae.hook_sae_recons(levels[0])
    outs, part_outs = outputs_and_parts(
        sae._norm_out, levels, [part.view(shape) for part in parts]
    )
    return Outputs(
        dict(zip([sae.cfg.d_sae, *inner_widths], outs, strict=False)),
        None if aux is None else part_outs[0],
        None if margin is None else part_outs[-1],
        margin_pre_acts,
        outs[-1] if of_first else None,
    )
