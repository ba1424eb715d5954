"""Mutual Choice (arXiv 2411.02124, section 3): the largest affinities of the batch are active."""

import math

import torch

from sae_lens_alloc.allocation.candidates import candidate_positions
from sae_lens_alloc.allocation.sparse_activations import SparseActivations


def budget_for(k: float, n_tokens: int) -> int:
    """Number of pairs floor(k * n_tokens). It is 0 if the batch is too small for one pair."""
    # 0.29 * 100 is 28.999999999999996 in floating point, and means 29 pairs
    return math.floor(k * n_tokens * (1 + 1e-12))


def require_no_nan_or_inf(affinities: torch.Tensor) -> None:
    """Raises ValueError if a NaN or an infinity could take part in a selection."""
    if not torch.isfinite(affinities).all():
        raise ValueError(
            "affinities contain NaN or Inf, and no allocation of them is meaningful: "
            "check the activations and the learning rate."
        )


def select_mutual_choice(affinities: torch.Tensor, budget: int) -> SparseActivations:
    """
    Selects the `budget` largest positive affinities of a batch.

    Exactly min(budget, number of positive affinities) pairs are selected. Among equal
    affinities, the lower token index goes first, then the lower feature index.

    Args:
        affinities: Token-feature affinities of shape (B, F).
        budget: Number of pairs M to select, see `budget_for`.

    Returns:
        The selected pairs with their affinities as values.

    Raises:
        ValueError: if an affinity is NaN or infinite, or the budget is negative.
    """
    if budget < 0:
        raise ValueError(f"budget must be >= 0, got {budget}.")
    require_no_nan_or_inf(affinities)
    n_tokens, n_features = affinities.shape
    tokens, features = candidate_positions(affinities, 0.0)
    collector = MutualChoiceCollector((n_tokens, n_features), budget, None)
    collector.add(tokens, features, affinities[tokens, features])
    return collector.finish()


class MutualChoiceCollector:
    """
    Keeps the M largest of the positive affinities that come in, block by block.

    At most 2 M candidates and those of one block are held. If there are more, they are pruned
    to the best M, which raises `bound`. The result does not depend on the blocks.

    Args:
        shape: (number of tokens B, number of features F).
        budget: Number of pairs M to select.
        bound: Affinities below it need not be added. Scalar tensor, or None.
    """

    def __init__(
        self, shape: tuple[int, int], budget: int, bound: torch.Tensor | None
    ) -> None:
        self.shape = shape
        self.budget = budget
        self.bound = bound
        self.n_candidates = 0
        self._keys: list[torch.Tensor] = []
        self._values: list[torch.Tensor] = []

    def add(
        self, tokens: torch.Tensor, features: torch.Tensor, values: torch.Tensor
    ) -> None:
        """Adds candidate pairs with their affinities, all of shape (n,)."""
        self._keys.append(tokens * self.shape[1] + features)
        self._values.append(values)
        self.n_candidates += len(values)
        if self.n_candidates > 2 * self.budget:
            self._prune()

    def finish(self) -> SparseActivations:
        """The best M candidates, in row order."""
        self._prune()
        keys, order = self._keys[0].sort()
        tokens = keys // self.shape[1]
        return SparseActivations(
            tokens, keys - tokens * self.shape[1], self._values[0][order], self.shape
        )

    def _prune(self) -> None:
        keys, values = torch.cat(self._keys), torch.cat(self._values)
        if self.budget == 0:
            keys, values = keys[:0], values[:0]
        elif len(values) > self.budget:
            cut = values.kthvalue(len(values) - self.budget + 1).values
            above = (values > cut).nonzero().squeeze(1)
            ties = (values == cut).nonzero().squeeze(1)
            # the key orders by token, then by feature
            first_ties = ties[keys[ties].argsort()[: self.budget - len(above)]]
            kept = torch.cat([above, first_ties])
            keys, values = keys[kept], values[kept]
            self.bound = cut
        self._keys, self._values = [keys], [values]
        self.n_candidates = len(values)
