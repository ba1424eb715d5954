"""Running densities of the features, and the flags of those that the auxiliary loss trains."""

from typing import ClassVar

import torch
from typing_extensions import override

from sae_lens_alloc.allocation.density import (
    fit_floor,
    underused_features,
    update_density,
)
from sae_lens_alloc.allocation.zipf import MIN_FEATURES, FittedLaw, ZipfLaw
from sae_lens_alloc.distributed.feature_shard import FeatureShard
from sae_lens_alloc.ops.topk_selection import FeatureSubset
from sae_lens_alloc.saes.running_statistics import RunningStatistics

# Densities move slowly, and ranking them takes time: once in so many steps.
STEPS_BETWEEN_FLAGS = 10


class DensityStatistics(RunningStatistics):
    """
    How often each feature fires, and which ones the auxiliary loss trains.

    Args:
        d_sae: Number of features F.
        density_window_tokens: Averaging window of the densities in tokens.
        device: Device of the buffers.

    Attributes:
        shard: The features that these statistics are of: all F, or those of this rank.
        by_feature: Names of the buffers of shape (F,).
    """

    tracked: ClassVar[tuple[str, ...]] = ("density", "density_tokens")
    by_feature: ClassVar[tuple[str, ...]] = ("density", "underused")

    density: torch.Tensor  # (F,) running rate per token at which each feature fires
    density_tokens: torch.Tensor  # () tokens in the running densities
    underused: torch.Tensor  # (F,) features that the auxiliary loss trains

    def __init__(
        self, d_sae: int, density_window_tokens: int, device: torch.device
    ) -> None:
        super().__init__(device)
        self.shard = FeatureShard(d_sae)
        self.density_window_tokens = density_window_tokens
        self._flagged: FeatureSubset | None = None
        self.register_buffer("density", torch.zeros(d_sae, device=device))
        self.register_buffer("density_tokens", torch.zeros((), device=device))
        self.register_buffer(
            "underused", torch.zeros(d_sae, dtype=torch.bool, device=device)
        )

    @override
    def forget_derived(self) -> None:
        super().forget_derived()
        self._flagged = None

    def update_density(self, counts: torch.Tensor, n_tokens: int) -> None:
        """
        Averages the tokens of a call into the running densities, together with those of the
        calls of the same step before it.

        Args:
            counts: Tokens of the call on which each feature fired, shape (F,).
            n_tokens: Tokens in the call.
        """
        for name in ("density", "density_tokens"):
            getattr(self, name).copy_(self.totals.start[name])
        update_density(
            self.density,
            self.density_tokens,
            self.totals.add("counts", counts),
            self.totals.add("n_tokens", n_tokens),
            self.density_window_tokens,
        )

    def fit_law(self, n_tokens: int) -> ZipfLaw | None:
        """
        Zipf law of the running densities, None where too few features have fired.

        Args:
            n_tokens: Tokens per batch, which sets the density below which a rate is noise.
        """
        floor, density = fit_floor(n_tokens), self.shard.gather(self.density)
        if int((density > floor).sum()) < MIN_FEATURES:
            return None
        return ZipfLaw.fit(density, floor)

    def renew_flags(
        self,
        step: int,
        dead: torch.Tensor | None,
        fraction: float | None,
        n_tokens: int,
    ) -> bool:
        """
        At every tenth step, flags the features that the auxiliary loss trains: those below
        `fraction` of the law and the dead ones, or the dead ones only where `fraction` is
        None. The host is told nothing of it.

        Args:
            step: Number of the training step.
            dead: Boolean mask of dead features, shape (F,), or None for none.
            fraction: Share of the predicted density below which a feature is underutilised.
            n_tokens: Tokens per batch.

        Returns:
            Whether the flags were renewed.
        """
        if step % STEPS_BETWEEN_FLAGS:
            return False
        if dead is None:
            dead = torch.zeros_like(self.underused)
        shard = self.shard
        if fraction is None:
            self.underused.copy_(dead)
        else:
            density = shard.gather(self.density)
            law = FittedLaw.fit(density, fit_floor(n_tokens))
            alive = torch.zeros_like(density, dtype=torch.bool)
            below = underused_features(density, alive, law, fraction)
            self.underused.copy_(shard.own(below) | dead)
        self._flagged = None
        return True

    @property
    def flagged(self) -> FeatureSubset:
        """The features that the auxiliary loss trains, until the flags are next renewed."""
        if self._flagged is None:
            self._flagged = FeatureSubset(self.underused, self.shard.ranks)
        return self._flagged
