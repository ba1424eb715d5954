"""The scale of the activations of a transcoder: a factor of the input and one of the output."""

from typing import Any

import torch
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.types import DataProvider
from typing_extensions import override


class RowScaler(ActivationScaler):
    """
    SAELens' scaler for the rows [x, y] of a transcoder. Its factor is a pair, which SAELens saves,
    loads and folds into the transcoder at the end of training as if it was a number.
    """

    def __init__(self, d_in: int) -> None:
        """
        Args:
            d_in: Dimensions of the input, which come first in a row.
        """
        super().__init__()
        self.d_in = d_in

    @override
    def scale(self, acts: torch.Tensor) -> torch.Tensor:
        return acts if self.scaling_factor is None else acts * self._factors(acts)

    @override
    def unscale(self, acts: torch.Tensor) -> torch.Tensor:
        return acts if self.scaling_factor is None else acts / self._factors(acts)

    def _factors(self, rows: torch.Tensor) -> torch.Tensor:
        factors: Any = self.scaling_factor  # a list where it was loaded
        of_input, of_output = factors
        by_dimension = rows.new_full((rows.shape[-1],), of_output)
        by_dimension[: self.d_in] = of_input
        return by_dimension

    @override
    @torch.no_grad()
    def estimate_scaling_factor(
        self,
        d_in: int,
        data_provider: DataProvider,
        n_batches_for_norm_estimate: int = 1000,
    ) -> None:
        """The factors by which inputs and outputs get norms of sqrt(d) on average."""
        widths, norms, n_rows = [d_in], torch.zeros(2, dtype=torch.float64), 0
        for _ in range(n_batches_for_norm_estimate):
            rows = next(data_provider).float()
            widths = [d_in, rows.shape[-1] - d_in]
            parts = rows.split(widths, dim=-1)
            norms += torch.stack([part.norm(dim=-1).sum() for part in parts]).cpu()
            n_rows += len(rows)
        of_input, of_output = (
            width**0.5 / (norm / n_rows)
            for width, norm in zip(widths, norms.tolist(), strict=True)
        )
        self.scaling_factor = of_input, of_output  # pyright: ignore
