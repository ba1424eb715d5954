"""What the training of an SAE with aux_zipf_loss keeps beside the weights."""

import math

import torch
from typing_extensions import override

from sae_lens_alloc.saes.density_statistics import DensityStatistics


class AuxZipfStatistics(DensityStatistics):
    """
    Densities, flags, and the number of features per token.

    Args:
        d_sae: Number of features F.
        density_window_tokens: Averaging window of the densities in tokens.
        device: Device of the buffers.
    """

    flagged_l0: torch.Tensor  # () features per token when the flags were last renewed

    def __init__(
        self, d_sae: int, density_window_tokens: int, device: torch.device
    ) -> None:
        super().__init__(d_sae, density_window_tokens, device)
        self._features_per_token: int | None = None
        self.register_buffer("flagged_l0", torch.zeros((), device=device))

    @override
    def forget_derived(self) -> None:
        super().forget_derived()
        self._features_per_token = None

    @override
    def renew_flags(
        self,
        step: int,
        dead: torch.Tensor | None,
        fraction: float | None,
        n_tokens: int,
    ) -> bool:
        renewed = super().renew_flags(step, dead, fraction, n_tokens)
        if renewed:
            self.flagged_l0.copy_(self.density.sum())
            self._features_per_token = None
        return renewed

    @property
    def features_per_token(self) -> int:
        """Features per token when the flags were last renewed, rounded up, at least 1."""
        if self._features_per_token is None:
            self._features_per_token = max(1, math.ceil(float(self.flagged_l0)))
        return self._features_per_token
