"""The margin: the first pairs below the cut."""

from dataclasses import dataclass

import torch

from sae_lens_alloc.allocation.sparse_activations import Pairs


@dataclass(frozen=True)
class Margin:
    """
    Pairs whose affinities are next below the cut.

    Args:
        pairs: The pairs, N of them, in row order.
        width: Largest minus smallest affinity, scalar tensor, or of shape (N,) where it differs
            from token to token (`token_share.py`).
    """

    pairs: Pairs
    width: torch.Tensor


def split_at_budget(pairs: Pairs, budget: int, n_margin: int) -> tuple[Pairs, Margin]:
    """
    Splits the best pairs of a batch into those within the budget and the margin below it.

    Args:
        pairs: The `budget + n_margin` largest affinities of the batch, or all of them if there
            are fewer, in row order. Smaller affinities may be among them.
        budget: Number of pairs M.
        n_margin: Pairs of the margin.

    Returns:
        The pairs that Mutual Choice selects: the `budget` largest, and among equal ones the
        first in row order. Then the margin: the `n_margin` pairs that follow.
    """
    # padding, whose value is 0, comes last
    by_value = pairs.places.values.argsort(descending=True, stable=True)
    ends = (budget, budget + n_margin)
    groups = torch.full_like(by_value, len(ends), dtype=torch.uint8)
    for group, places in enumerate(by_value.tensor_split(ends)[: len(ends)]):
        groups.scatter_(0, places, group)
    # pairs come in row order, which a stable sort keeps within a group
    in_groups = groups.argsort(stable=True).tensor_split(ends)
    selected, below = pairs.at(in_groups[0]), pairs.at(in_groups[1])
    values = below.places.values
    width = values.new_zeros(())
    if len(values) > 0:
        # negative if the margin is all padding, which has no affinity
        width = (values.max() - below.smallest_value()).clamp(min=0)
    return selected, Margin(below, width)


def gains(
    pre_acts: torch.Tensor, products: torch.Tensor, squared_norms: torch.Tensor
) -> torch.Tensor:
    """
    How much smaller the squared error of its token would be if a pair were active and all
    others stayed as they are: 2 z p - z^2 n.

    Args:
        pre_acts: Pre-activations z of pairs that are not active, shape (N,).
        products: Product p of the pair's decoder row, on the scale of the SAE's output, with
            the error x - x_hat of its token, shape (N,).
        squared_norms: Squared norm n of that row, on the same scale, shape (N,).

    Returns:
        The gain of each pair, shape (N,).
    """
    return pre_acts * (2 * products - pre_acts * squared_norms)


def total_gain(margin: Margin, gains: torch.Tensor) -> torch.Tensor:
    """Sum of the gains of the margin's pairs and their number, shape (2,)."""
    weights = _weights(margin, gains)
    return torch.stack([(weights * gains).sum(), weights.sum()])


def selection_gradient(
    margin: Margin, gains: torch.Tensor, total: torch.Tensor | None = None
) -> torch.Tensor:
    """
    The gradient of the squared error with respect to the affinities of the margin, through
    the choice of the active pairs.

    The choice itself has no gradient. So let a pair of the margin be active with a
    probability that rises linearly from the lower end of the margin to its upper end. Then
    the expected squared error falls by gain / width for each unit of affinity. The budget is
    fixed, so a pair that gets a place takes it from another. The price of a place is
    therefore the mean gain of the margin.

    Args:
        margin: The margin.
        gains: The gain of each pair, shape (N,).
        total: Sum and number of the gains of the whole margin, shape (2,), if `margin` is only a
            part of it. None means those of `margin`.

    Returns:
        The gradient, shape (N,). It is 0 for padding.
    """
    if total is None:
        total = total_gain(margin, gains)
    price = total[0] / total[1].clamp(min=1)
    weights = _weights(margin, gains)
    # all affinities are equal: no pair is ahead of another
    return (weights * (price - gains) / margin.width).where(margin.width > 0, 0.0)


def _weights(margin: Margin, gains: torch.Tensor) -> torch.Tensor:
    """1 for each pair and 0 for padding, shape (N,)."""
    real = margin.pairs.real
    return torch.ones_like(gains) if real is None else real.to(gains)
