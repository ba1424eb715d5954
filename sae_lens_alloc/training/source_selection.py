"""The pairs that the source of a conversion activates, in the units of the converted SAE."""

from collections.abc import Callable
from typing import Any

import torch
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE
from sae_lens.saes.gated_sae import GatedSAE, GatedTrainingSAE
from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUTrainingSAE
from sae_lens.saes.sae import SAE

from sae_lens_alloc.allocation.sparse_activations import SparseActivations
from sae_lens_alloc.ops.block_encoder import Encoder
from sae_lens_alloc.ops.encode_thresholds import encode_thresholds
from sae_lens_alloc.ops.topk_selection import FeatureSubset, encode_topk
from sae_lens_alloc.saes.allocation_sae import AllocationTrainingSAE
from sae_lens_alloc.saes.aux_zipf_config import AuxZipfTrainingSAEConfig
from sae_lens_alloc.saes.auxiliary_loss import decoder_norms
from sae_lens_alloc.thresholds.jumprelu_form import gate_as_thresholds


def source_selection(
    source: SAE[Any], converted: AllocationTrainingSAE[Any]
) -> Callable[[Encoder, torch.Tensor], SparseActivations]:
    """
    A function that gives the pairs that the source would activate, with the converted SAE's
    affinities as values. It takes the converted SAE's encoder and activations of shape
    (B, d_in).
    """
    thresholds = carried_thresholds(source, converted)
    if thresholds is not None:
        per_feature = thresholds.expand_as(converted.allocation.threshold)
        return lambda encoder, x: encode_thresholds(encoder, x, per_feature)
    source_scale = _affinity_scale(source, converted)
    units = torch.as_tensor(_units(source, converted), device=converted.device)
    units = units.expand_as(converted.allocation.threshold)
    all_features = FeatureSubset(
        torch.ones(converted.cfg.d_sae, dtype=torch.bool, device=converted.device)
    )

    def best_of_each_token(encoder: Encoder, x: torch.Tensor) -> SparseActivations:
        as_source = Encoder(encoder.W_enc, encoder.b_enc, source_scale)
        selected = encode_topk(as_source, x, all_features, source.cfg.k)
        pairs = selected.without_padding()
        active = pairs.values > 0
        features = pairs.feature_indices[active]
        return SparseActivations(
            pairs.token_indices[active],
            features,
            pairs.values[active] * units[features],
            pairs.shape,
        )

    return best_of_each_token


def carried_thresholds(
    source: SAE[Any], converted: AllocationTrainingSAE[Any]
) -> torch.Tensor | None:
    """
    The source's thresholds in units of the converted SAE's affinities, of shape (F,) or (). They
    are infinite for features that are silenced or have a decoder row of 0. None if the source
    has no thresholds.
    """
    thresholds = _thresholds(source)
    if thresholds is None:
        return None
    units = _units(source, converted)
    return (thresholds.to(converted.device) * units).nan_to_num(
        nan=torch.inf, posinf=torch.inf
    )


def _thresholds(source: SAE[Any]) -> torch.Tensor | None:
    """
    Thresholds of the source's affinities at inference, at least 0, of shape () or (F,). None if
    it activates the best k features of each token.
    """
    if isinstance(source, AllocationTrainingSAE):
        thresholds = source.allocation.threshold
    elif isinstance(source, JumpReLUSAE | JumpReLUTrainingSAE):
        thresholds = source.threshold
    elif isinstance(source, GatedSAE | GatedTrainingSAE):
        thresholds = gate_as_thresholds(source)
    elif isinstance(source, BatchTopKTrainingSAE):
        thresholds = source.topk_threshold
    elif source_architecture(source) == "topk":
        return None
    elif source_architecture(source) == "standard":
        thresholds = source.W_enc.new_zeros(())
    else:
        raise NotImplementedError(
            f"Which pairs an SAE of {source_architecture(source)!r} activates is not known here."
        )
    if thresholds.isnan().any():
        raise ValueError(
            f"{int(thresholds.isnan().sum())} thresholds of the SAE are NaN: it is damaged, or "
            "its training has diverged."
        )
    return _precise(thresholds).clamp(min=0.0)


def _units(
    source: SAE[Any], converted: AllocationTrainingSAE[Any]
) -> torch.Tensor | float:
    """Ratio of the converted SAE's affinities to the source's, of shape (F,) or one number."""
    scale, source_scale = converted.encoder().scale, _affinity_scale(source, converted)
    return (1.0 if scale is None else scale) / (
        1.0 if source_scale is None else source_scale
    )


def _affinity_scale(
    source: SAE[Any], converted: AllocationTrainingSAE[Any]
) -> torch.Tensor | None:
    """The factors from the source's pre-activations to its affinities, None if they are equal."""
    if not getattr(source.cfg, "rescale_acts_by_decoder_norm", False):
        return None
    return decoder_norms(source.W_dec).to(converted.device)


def _precise(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


def source_architecture(source: SAE[Any]) -> str:
    """The source's architecture, without aux_zipf_loss, which concerns its training alone."""
    cfg = source.cfg
    if isinstance(cfg, AuxZipfTrainingSAEConfig):
        return cfg.base_config_class.architecture()
    return cfg.architecture()
