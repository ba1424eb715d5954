"""The margin of a budget: the last pairs that got in and the first that did not."""

from dataclasses import dataclass

import torch

from sae_lens_alloc.allocation.sparse_activations import SparseActivations


@dataclass(frozen=True)
class Margin:
    """
    Pairs whose affinities are next to the cut, on both sides.

    Args:
        pairs: The pairs, N of them, in row order.
        active: Which of them are active, bool of shape (N,).
        width: Largest minus smallest affinity, scalar tensor.
    """

    pairs: SparseActivations
    active: torch.Tensor
    width: torch.Tensor


def split_at_budget(
    pairs: SparseActivations, budget: int, n_margin: int
) -> tuple[SparseActivations, Margin]:
    """
    Splits the best pairs of a batch into those within the budget and the margin around it.

    Args:
        pairs: The `budget + n_margin` largest affinities of the batch or more, or as many as
            there are, in row order.
        budget: Number of pairs M.
        n_margin: Pairs of the margin on either side of the cut, at most M.

    Returns:
        The `budget` largest, of equal ones the first in row order, as Mutual Choice selects
        them; and the margin: the last `n_margin` of them, and as many that follow.
    """
    by_value = pairs.values.argsort(descending=True, stable=True)
    margin = by_value[budget - n_margin : budget + n_margin]
    # pairs come in row order, so ascending places are the row order
    places, order = margin.sort()
    around = pairs.at(places)
    width = around.values.new_zeros(())
    if len(places) > 0:
        width = around.values.max() - around.smallest_value()
    return pairs.at(by_value[:budget].sort().values), Margin(
        around, order < n_margin, width
    )


def gains(
    pre_acts: torch.Tensor,
    active: torch.Tensor,
    products: torch.Tensor,
    squared_norms: torch.Tensor,
) -> torch.Tensor:
    """
    How much smaller the squared error of its token is with each pair active than without,
    all else as it is, shape (N,): 2 z p + z^2 n where the pair is active, 2 z p - z^2 n where
    it is not.

    Args:
        pre_acts: Pre-activations z, shape (N,).
        active: Which of the pairs are active, bool of shape (N,).
        products: Product p of the pair's decoder row, as the SAE puts it out, with the error
            x - x_hat of its token, shape (N,).
        squared_norms: Squared norm n of that row, shape (N,).
    """
    sign = torch.where(active, 1.0, -1.0)
    return pre_acts * (2 * products + sign * pre_acts * squared_norms)


def selection_gradient(margin: Margin, gains: torch.Tensor) -> torch.Tensor:
    """
    The gradient of the squared error with respect to the affinities of the margin, by way of
    who is selected, shape (N,).

    Selection is a step, which has no gradient. Take instead a pair of the margin to be
    active with a probability that rises linearly from its lower end to its upper one: then
    the expected squared error falls by gain / width as the affinity rises. As the budget is
    fixed, what one pair wins others lose, which costs the mean gain: the price of a place.

    Args:
        margin: The margin.
        gains: See `gains`, shape (N,).
    """
    real = margin.pairs.real
    weights = torch.ones_like(gains) if real is None else real.to(gains)
    price = (weights * gains).sum() / weights.sum().clamp(min=1)
    # equal affinities throughout: nobody can be told to be ahead of anybody
    return (weights * (price - gains) / margin.width).where(margin.width > 0, 0.0)
