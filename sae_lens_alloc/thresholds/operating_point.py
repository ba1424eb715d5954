"""A trained SAE brought to a wanted number of features per token by its thresholds."""

from typing import Any

import torch
from sae_lens import SAE
from sae_lens.saes.gated_sae import GatedSAE
from sae_lens.saes.standard_sae import StandardSAE
from sae_lens.saes.topk_sae import TopKSAE

from sae_lens_alloc.ops.block_encoder import Encoder
from sae_lens_alloc.saes.reference_transcoders import TopKTranscoder
from sae_lens_alloc.thresholds.factor import Thresholded, set_l0, threshold_factor
from sae_lens_alloc.thresholds.jumprelu_form import jumprelu_form


@torch.no_grad()
def at_l0(sae: SAE[Any], activations: torch.Tensor, target_l0: float) -> SAE[Any]:
    """
    The SAE with `target_l0` features per token on the given activations.

    - topk (and topk_transcoder) keeps its own rule, which gives every token its k.
    - jumprelu (as batchtopk, matryoshka and our own are saved) and jumprelu_transcoder: all
      thresholds are multiplied by one factor.
    - standard becomes a jumprelu with one threshold on activation * decoder norm.
    - gated becomes a jumprelu that is open where gate pre-activation * decoder norm exceeds
      one threshold in place of 0.

    Args:
        sae: An inference SAE; it may be changed in place.
        activations: Activations that it encodes, shape (T, d_in).

    Raises:
        ValueError: if the architecture is none of these, or no thresholds give the wanted L0:
            raising them takes features away from a token, lowering them to 0 gives a standard
            or gated SAE no more than its own.
    """
    if isinstance(sae, TopKSAE | TopKTranscoder):
        return sae
    if isinstance(sae, Thresholded):
        set_l0(sae, activations, target_l0)
        return sae
    if not isinstance(sae, StandardSAE | GatedSAE):
        raise ValueError(
            f"{sae.cfg.architecture()!r} SAEs have no thresholds to bring them to an L0 of "
            f"{target_l0:g}."
        )
    sae.fold_W_dec_norm()
    gate_bias, gain = (
        (sae.b_gate, sae.r_mag.exp())
        if isinstance(sae, GatedSAE)
        else (sae.b_enc, torch.ones_like(sae.b_enc))
    )
    gate = Encoder(sae.W_enc, gate_bias, None)
    x = sae.process_sae_in(activations)
    cut = threshold_factor(gate, x, torch.ones_like(gate_bias), target_l0)
    jumprelu = jumprelu_form(sae)
    jumprelu.threshold.add_(gain * cut)
    return jumprelu
