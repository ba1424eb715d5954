"""Feature Choice (arXiv 2411.02124, section 3): every feature takes its best tokens."""

from dataclasses import dataclass

import torch

from sae_lens_alloc.allocation.candidates import candidate_positions
from sae_lens_alloc.allocation.mutual_choice import require_no_nan_or_inf
from sae_lens_alloc.allocation.sparse_activations import SparseActivations


def select_feature_choice(
    affinities: torch.Tensor, quotas: torch.Tensor
) -> SparseActivations:
    """
    Selects for each feature its largest positive affinities, up to its quota.

    Feature j gets exactly min(quotas[j], number of its positive affinities) tokens. Among
    equal affinities, the lower token index goes first.

    Args:
        affinities: Token-feature affinities of shape (B, F).
        quotas: Integer number of tokens for each feature, shape (F,).

    Returns:
        The selected pairs with their affinities as values.

    Raises:
        ValueError: if an affinity is NaN or infinite, or the quotas are not F integers >= 0.
    """
    n_tokens, n_features = affinities.shape
    if quotas.shape != (n_features,) or quotas.is_floating_point():
        raise ValueError(
            f"quotas must be {n_features} integers, one a feature, got "
            f"{quotas.dtype} of shape {tuple(quotas.shape)}."
        )
    if (quotas < 0).any():
        raise ValueError("quotas must be >= 0.")
    require_no_nan_or_inf(affinities)
    tokens, features = candidate_positions(affinities, 0.0)
    ranked = rank_candidates(tokens, features, affinities[tokens, features], n_features)
    return ranked.best(quotas).in_row_order((n_tokens, n_features))


@dataclass(frozen=True)
class RankedCandidates:
    """
    Candidate pairs ordered by feature, and for each feature from its best token to its worst.

    Args:
        tokens: int64 of shape (n,).
        features: int64 of shape (n,).
        values: Affinities, shape (n,).
        ranks: Rank of each pair among its feature's tokens, from 0, shape (n,).
    """

    tokens: torch.Tensor
    features: torch.Tensor
    values: torch.Tensor
    ranks: torch.Tensor

    def best(
        self, quotas: torch.Tensor, n_best: int | None = None
    ) -> "RankedCandidates":
        """
        The first `quotas[j]` candidates of each feature j.

        Args:
            quotas: Shape (F,).
            n_best: How many candidates these are. If it is given, the host need not wait for
                a GPU to count them.
        """
        is_best = self.ranks < quotas[self.features]
        kept = (
            is_best.nonzero()
            if n_best is None
            else torch.nonzero_static(is_best, size=n_best)
        ).squeeze(1)
        return RankedCandidates(
            self.tokens[kept], self.features[kept], self.values[kept], self.ranks[kept]
        )

    def in_row_order(self, shape: tuple[int, int]) -> SparseActivations:
        """The candidates as the active pairs of a batch of shape (B, F)."""
        return SparseActivations.from_unordered(
            self.tokens, self.features, self.values, shape
        )


def rank_candidates(
    tokens: torch.Tensor,
    features: torch.Tensor,
    values: torch.Tensor,
    n_features: int,
) -> RankedCandidates:
    """
    Ranks the candidate tokens of each feature, the largest affinity first.

    Args:
        tokens: int64 of shape (n,), ascending for each feature, which settles ties.
        features: int64 of shape (n,), below `n_features`.
        values: Positive affinities, shape (n,).
        n_features: Number of features.
    """
    order = _order(features, values)
    features = features[order]
    # bincount would wait for a GPU to find the largest feature
    counts = features.new_zeros(n_features)
    counts.scatter_add_(0, features, torch.ones_like(features))
    starts = counts.cumsum(0) - counts
    ranks = torch.arange(len(order), device=order.device) - starts[features]
    return RankedCandidates(tokens[order], features, values[order], ranks)


def _order(features: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Order by feature, then from the largest value to the smallest, then as given."""
    if values.dtype == torch.float64:
        by_value = values.argsort(descending=True, stable=True)
        return by_value[features[by_value].argsort(stable=True)]
    # The bits of positive floats have the order of the floats. Torch sorts integers by radix, and
    # one such sort is ten times faster than two sorts.
    smallest_first = 0x7FFFFFFF - values.float().view(torch.int32).long()
    return ((features << 32) | smallest_first).argsort(stable=True)
