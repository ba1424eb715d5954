"""What an SAE does with its features on some activations."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sae_lens import SAE

from sae_lens_alloc.allocation.sparse_activations import SparseActivations
from sae_lens_alloc.allocation.zipf import ZipfLaw
from sae_lens_alloc.distributed.feature_shard import FeatureShard
from sae_lens_alloc.progress import shown
from sae_lens_alloc.saes.skip_connection import with_past

# Of activations (n, d_in): on how many tokens each feature is active (d_sae,), how many features
# each token has (n,), and the reconstruction.
Autoencode = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]

RARE_DENSITY = 1e-4
# A density measured from fewer firings is mostly noise.
MIN_FIRINGS = 10


N_CURVE_POINTS = 120


@dataclass(frozen=True)
class DensityCurve:
    """
    Densities over ranks, thinned out to points evenly spaced in the logarithm of the rank.

    Args:
        ranks: Ranks of the points, of features that fired; rank 1 is the most frequent.
        firings: On how many tokens the feature of each rank is active.
        n_tokens: Out of how many tokens.
        n_fitted: To how many of the first ranks the law was fitted.
        law: The fitted law; None if too few features fired.
    """

    ranks: list[int]
    firings: list[int]
    n_tokens: int
    n_fitted: int
    law: ZipfLaw | None


@dataclass(frozen=True, eq=False, kw_only=True)
class Usage:
    """
    How an SAE spends its features, and how well it reconstructs.

    Args:
        explained_variance: 1 - squared error / total variance about the mean, both summed
            over all tokens and dimensions.
        features_per_token: Number of active features of every token, of any shape; -1 at
            special tokens, which are not measured.
        densities: Share of the tokens on which each feature is active, float64 of shape
            (d_sae,).
    """

    explained_variance: float
    features_per_token: torch.Tensor
    densities: torch.Tensor

    @property
    def l0_counts(self) -> torch.Tensor:
        """Number of active features of every ordinary token, shape (n_tokens,)."""
        return self.features_per_token[self.features_per_token >= 0]

    @property
    def n_tokens(self) -> int:
        """Number of tokens measured."""
        return len(self.l0_counts)

    @property
    def l0(self) -> float:
        """Mean number of active features per token."""
        return self.l0_counts.double().mean().item()

    @property
    def top_1_percent_share(self) -> float:
        """Share of all active pairs held by the 1% of tokens with the most features."""
        counts = self.l0_counts.sort(descending=True).values
        held = counts[: math.ceil(len(counts) / 100)].sum().item()
        return held / max(counts.sum().item(), 1)

    @property
    def firings(self) -> torch.Tensor:
        """Number of tokens on which each feature is active, int64 of shape (d_sae,)."""
        return (self.densities * self.n_tokens).round().long()

    @property
    def dead_features(self) -> int:
        """Number of features active on no token."""
        return int((self.densities == 0).sum())

    @property
    def rare_features(self) -> int:
        """Number of features active on less than one token in 10,000, dead ones included."""
        return self.features_rarer_than(RARE_DENSITY)

    def features_rarer_than(self, density: float) -> int:
        """Number of features of less than this density, dead ones included."""
        return int((self.densities < density).sum())

    @property
    def l0_histogram(self) -> torch.Tensor:
        """Number of tokens with 0, 1, 2, ... active features, int64."""
        return self.l0_counts.bincount()

    @property
    def min_fitted_density(self) -> float:
        """Density above which features take part in the fit of the Zipf law."""
        return (MIN_FIRINGS - 0.5) / self.n_tokens

    @property
    def fitted_densities(self) -> torch.Tensor:
        """Densities that the Zipf law is fitted to, the largest first."""
        densities = self.densities.sort(descending=True).values
        return densities[densities > self.min_fitted_density]

    def zipf_law(self) -> ZipfLaw | None:
        """The law fitted to the densities; None if too few features fire."""
        if len(self.fitted_densities) < 3:
            return None
        return ZipfLaw.fit(self.densities, self.min_fitted_density)

    def density_curve(self) -> DensityCurve:
        """Its densities by rank, for a plot."""
        firings = self.firings.sort(descending=True).values
        ranks = log_spaced(int((firings > 0).sum()))
        return DensityCurve(
            ranks.tolist(),
            firings[ranks - 1].tolist(),
            self.n_tokens,
            len(self.fitted_densities),
            self.zipf_law(),
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything but the tensors per token and per feature, ready for JSON."""
        return {
            "n_tokens": self.n_tokens,
            "n_features": len(self.densities),
            "explained_variance": self.explained_variance,
            "l0": self.l0,
            "l0_histogram": self.l0_histogram.tolist(),
            "top_1_percent_share": self.top_1_percent_share,
            "dead_features": self.dead_features,
            "rare_features": self.rare_features,
        }


def log_spaced(n: int) -> torch.Tensor:
    """At most N_CURVE_POINTS ranks from 1 to n, evenly spaced in their logarithm."""
    if n == 0:
        return torch.zeros(0, dtype=torch.long)
    points = torch.logspace(0, math.log10(n), N_CURVE_POINTS, dtype=torch.float64)
    return points.round().long().clamp(1, n).unique()


class UsageMeter:
    """
    Watches what an SAE does while it reconstructs activations.

    Args:
        autoencode: How the SAE does that, see `as_user` and `by_pairs`.
    """

    def __init__(self, autoencode: Autoencode) -> None:
        self.autoencode = autoencode
        self.squared_error = 0.0
        self._firings = torch.zeros((), dtype=torch.long)
        self._l0: list[torch.Tensor] = []

    def reconstruct(
        self, activations: torch.Tensor, target: torch.Tensor
    ) -> torch.Tensor:
        """
        Reconstructs a target of shape (n, d_out) from activations of shape (n, d_in), for an SAE
        the same ones, and takes note of the features used.
        """
        by_feature, by_token, reconstruction = self.autoencode(activations)
        reconstruction = reconstruction.to(target.device)
        error = target.double() - reconstruction.double()
        self.squared_error += error.square().sum().item()
        self._firings = self._firings + by_feature.cpu()
        self._l0.append(by_token.cpu())
        return reconstruction

    @property
    def l0_counts(self) -> torch.Tensor:
        """Number of active features of every token seen, in order."""
        return torch.cat(self._l0)

    @property
    def densities(self) -> torch.Tensor:
        """Share of the tokens seen on which each feature was active, float64."""
        return self._firings.double() / len(self.l0_counts)


def as_user(sae: SAE[Any]) -> Autoencode:
    """As a user of the SAE does: `encode` and `decode`, and W_skip of transcoders."""

    def autoencode(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x = x.to(sae.device, sae.dtype)
        features = sae.encode(x)
        active = features.to_dense() != 0
        return active.sum(0), active.sum(-1), with_past(sae, sae.decode(features), x)

    return autoencode


def by_pairs(
    autoencode_pairs: Callable[[torch.Tensor], tuple[SparseActivations, torch.Tensor]],
    shard: FeatureShard | None = None,
) -> Autoencode:
    """
    By active pairs, where no dense matrix of activations is needed.

    Args:
        autoencode_pairs: Gives the active pairs and the reconstruction.
        shard: The features that the pairs are of, where other ranks have the others. All ranks
            measure all of them then. None for all features.
    """

    def autoencode(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        pairs, sae_out = autoencode_pairs(x)
        by_feature, by_token = pairs.feature_counts(), pairs.token_counts()
        if shard is not None:
            by_feature, by_token = shard.gather(by_feature), shard.ranks.sum(by_token)
        return by_feature, by_token, sae_out

    return autoencode


@torch.no_grad()
def measure_usage(
    autoencode: Autoencode,
    activations: torch.Tensor,
    batch_size: int = 2048,
    target: torch.Tensor | None = None,
) -> Usage:
    """
    Measures an SAE on activations, of which one batch is reconstructed at a time.

    Args:
        autoencode: See `as_user` and `by_pairs`.
        activations: Activations as the SAE takes them, shape (T, d_in), of any float type.
        batch_size: Tokens per batch.
        target: What is to be reconstructed, shape (T, d_out); None for the activations.

    Raises:
        ValueError: if the target does not vary, so that no variance can be explained.
    """
    return measure_usages([autoencode], activations, batch_size, target)[0]


@torch.no_grad()
def measure_usages(
    autoencoders: Sequence[Autoencode],
    activations: torch.Tensor,
    batch_size: int = 2048,
    target: torch.Tensor | None = None,
) -> list[Usage]:
    """
    `measure_usage` of each of several, which get a batch one after the other before the next
    one comes.
    """
    meters = [UsageMeter(autoencode) for autoencode in autoencoders]
    if target is None:
        target = activations
    batches = zip(
        shown(activations.split(batch_size), "measuring the SAE"),
        target.split(batch_size),
        strict=True,
    )
    for batch, target_batch in batches:
        for meter in meters:
            meter.reconstruct(batch, target_batch)
    centred = target.float() - target.float().mean(0)
    variance = float(centred.square().sum(dtype=torch.float64))
    if variance == 0:
        raise ValueError(
            f"the activations of these {len(activations):,} tokens are all the same, so there "
            "is no variance to explain: give other or more text."
        )
    return [
        Usage(
            explained_variance=1 - meter.squared_error / variance,
            features_per_token=meter.l0_counts,
            densities=meter.densities,
        )
        for meter in meters
    ]
