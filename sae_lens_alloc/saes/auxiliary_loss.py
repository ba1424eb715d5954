"""The loss by which underutilised features learn from the reconstruction error."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from sae_lens.saes.sae import SAEMetadata, TrainingSAEConfig
from typing_extensions import override

from sae_lens_alloc.allocation.schedule import aux_loss_fade
from sae_lens_alloc.allocation.sparse_activations import Pairs
from sae_lens_alloc.distributed.feature_shard import FeatureShard
from sae_lens_alloc.ops.block_encoder import Encoder
from sae_lens_alloc.ops.topk_over_ranks import topk_over_ranks
from sae_lens_alloc.ops.topk_selection import FeatureSubset, encode_topk
from sae_lens_alloc.shares import StepsOrNone, check_shares


@dataclass
class AuxiliaryLossTrainingSAEConfig(TrainingSAEConfig):
    """
    Configuration of the auxiliary loss, shared by all architectures that have ours.

    Args:
        aux_loss_coefficient (float): Coefficient of the auxiliary loss.
        aux_loss_decay_start (int | None): Training step at which the auxiliary loss starts to
            fade; it is gone a tenth of that many steps later. None keeps it to the end. May
            be a share of the training steps, as in YAML.
        k_aux (int | None): Features per token in the auxiliary loss. None means k, rounded
            up, or, where the architecture has no k, the features per token at the time.
        underuse_fraction (float): A feature is underutilised when its density is below this
            fraction of the Zipf curve at its rank.
        density_window_tokens (int): Tokens over which the running density of a feature is
            averaged.
    """

    aux_loss_coefficient: float = 1.0
    aux_loss_decay_start: StepsOrNone = cast(Any, None)
    k_aux: int | None = None
    underuse_fraction: float = 0.5
    density_window_tokens: int = 500_000

    @override
    def __post_init__(self) -> None:
        if isinstance(self.metadata, dict):  # as SAE.load_from_disk reads it
            self.metadata = SAEMetadata(**self.metadata)
        super().__post_init__()
        check_shares(self)
        require(
            self.aux_loss_coefficient >= 0,
            "aux_loss_coefficient",
            self.aux_loss_coefficient,
            ">= 0",
        )
        require(
            self.aux_loss_decay_start is None
            or isinstance(self.aux_loss_decay_start, str)
            or self.aux_loss_decay_start >= 0,
            "aux_loss_decay_start",
            self.aux_loss_decay_start,
            "a step count >= 0 or None",
        )
        require(
            self.k_aux is None or 0 < self.k_aux <= self.d_sae,
            "k_aux",
            self.k_aux,
            f"in [1, d_sae = {self.d_sae}] or None",
        )
        require(
            0 < self.underuse_fraction <= 1,
            "underuse_fraction",
            self.underuse_fraction,
            "in (0, 1]",
        )
        require(
            self.density_window_tokens > 0,
            "density_window_tokens",
            self.density_window_tokens,
            ">= 1",
        )


def require(condition: bool, name: str, value: object, allowed: str) -> None:
    if not condition:
        raise ValueError(f"{name} must be {allowed}, got {value!r}.")


@dataclass(frozen=True)
class AuxiliaryPairs:
    """
    What the auxiliary loss of one batch works on.

    Args:
        pairs: Pairs of tokens and flagged features, with their affinities.
        coefficient: Factor of the mean squared error of their reconstruction, a scalar tensor
            where the number of flagged features is known to the device alone.
    """

    pairs: Pairs
    coefficient: float | torch.Tensor


def auxiliary_weight(cfg: AuxiliaryLossTrainingSAEConfig, step: int) -> float:
    """Coefficient of the auxiliary loss at a training step, 0 once it has faded."""
    return cfg.aux_loss_coefficient * aux_loss_fade(step, cfg.aux_loss_decay_start)


def auxiliary_pairs(
    encoder: Encoder,
    x: torch.Tensor,
    flagged: FeatureSubset,
    k_aux: int,
    weight: float,
    shard: FeatureShard,
) -> AuxiliaryPairs | None:
    """
    The pairs by which flagged features reconstruct the error. None where none is flagged;
    the Triton backend, which does not ask how many are, has only padding then, and a
    coefficient of 0.

    Args:
        encoder: The encoder.
        x: Encoder inputs of shape (B, d_in).
        flagged: The flagged features, U of them.
        k_aux: Features per token.
        weight: Coefficient of the loss, which is scaled down where U is less than k_aux.
        shard: The features of this rank; U counts those of all ranks.
    """
    pairs = encode_topk(encoder, x.detach(), flagged, k_aux)
    if not shard.is_whole:
        if pairs.real is None and flagged.is_empty_in_all:
            return None
        pairs = topk_over_ranks(pairs, k_aux, shard)
        share = (flagged.n_in_all / k_aux).clamp(max=1.0)
        return AuxiliaryPairs(pairs, weight * share)
    if pairs.real is not None:
        share = (flagged.mask.sum() / k_aux).clamp(max=1.0)
        return AuxiliaryPairs(pairs, weight * share)
    if len(flagged.indices) == 0:
        return None
    return AuxiliaryPairs(pairs, weight * min(len(flagged.indices) / k_aux, 1.0))


def outputs_and_parts(
    norm_out: Callable[[torch.Tensor], torch.Tensor],
    recons: Sequence[torch.Tensor],
    parts: Sequence[torch.Tensor],
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """
    Reconstructions, and parts of one such as the auxiliary one, all of shape (..., d_in), in
    the space of the activations. The parts have no share in b_dec, nor in the mean that
    layer_norm adds back (SAELens #666).

    Args:
        norm_out: The output normalization of the SAE. It is affine, and works once per input.
        recons: Reconstructions with b_dec, as `norm_out` takes them; at least one.
        parts: Reconstructions without b_dec.
    """
    # Applied to all at once; a part is what it adds to the first of them.
    base = recons[0].detach()
    stacked = torch.stack([*recons, *(base + part for part in parts)])
    # slices would each have a gradient as large as all
    outputs = norm_out(stacked).unbind()
    outs, with_parts = outputs[: len(recons)], outputs[len(recons) :]
    return list(outs), [out - outs[0].detach() for out in with_parts]


def decoder_norms(W_dec: torch.Tensor) -> torch.Tensor:
    """
    Norms of the decoder rows in at least float32, shape (F,). No gradient: the norm cancels
    in the reconstruction.
    """
    weights = W_dec.detach()
    weights = weights.to(torch.promote_types(weights.dtype, torch.float32))
    return weights.norm(dim=-1).clamp(min=1e-8)
