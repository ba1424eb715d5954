"""The margin of a budget: the first pairs that did not get in."""

from dataclasses import dataclass

import torch

from sae_lens_alloc.allocation.sparse_activations import Pairs


@dataclass(frozen=True)
class Margin:
    """
    Pairs whose affinities are next below the cut.

    Args:
        pairs: The pairs, N of them, in row order.
        width: Largest minus smallest affinity, scalar tensor.
    """

    pairs: Pairs
    width: torch.Tensor


def split_at_budget(pairs: Pairs, budget: int, n_margin: int) -> tuple[Pairs, Margin]:
    """
    Splits the best pairs of a batch into those within the budget and the margin below it.

    Args:
        pairs: The `budget + n_margin` largest affinities of the batch or more, or as many as
            there are, in row order.
        budget: Number of pairs M.
        n_margin: Pairs of the margin.

    Returns:
        The `budget` largest, of equal ones the first in row order, as Mutual Choice selects
        them; and the margin, the `n_margin` that follow.
    """
    # padding, whose value is 0, comes last
    by_value = pairs.places.values.argsort(descending=True, stable=True)
    # pairs come in row order, so ascending places are the row order
    selected, below = (
        pairs.at(places.sort().values)
        for places in (by_value[:budget], by_value[budget : budget + n_margin])
    )
    values = below.places.values
    width = values.new_zeros(())
    if len(values) > 0:
        # negative where all of it is padding, which has no affinity
        width = (values.max() - below.smallest_value()).clamp(min=0)
    return selected, Margin(below, width)


def gains(
    pre_acts: torch.Tensor, products: torch.Tensor, squared_norms: torch.Tensor
) -> torch.Tensor:
    """
    How much smaller the squared error of its token would be with each pair active, all else
    as it is, shape (N,): 2 z p - z^2 n.

    Args:
        pre_acts: Pre-activations z of pairs that are not active, shape (N,).
        products: Product p of the pair's decoder row, as the SAE puts it out, with the error
            x - x_hat of its token, shape (N,).
        squared_norms: Squared norm n of that row, shape (N,).
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
    The gradient of the squared error with respect to the affinities of the margin, by way of
    who is selected, shape (N,).

    Selection is a step, which has no gradient. Take instead a pair of the margin to be
    active with a probability that rises linearly from its lower end to its upper one: then
    the expected squared error falls by gain / width as the affinity rises. As the budget is
    fixed, what one pair wins others lose, which costs the mean gain: the price of a place.

    Args:
        margin: The margin.
        gains: See `gains`, shape (N,).
        total: See `total_gain`, shape (2,): of the whole margin where `margin` is a part of it.
            None for that of `margin`.
    """
    if total is None:
        total = total_gain(margin, gains)
    price = total[0] / total[1].clamp(min=1)
    weights = _weights(margin, gains)
    # equal affinities throughout: nobody can be told to be ahead of anybody
    return (weights * (price - gains) / margin.width).where(margin.width > 0, 0.0)


def _weights(margin: Margin, gains: torch.Tensor) -> torch.Tensor:
    """1 for each pair and 0 for padding, shape (N,)."""
    real = margin.pairs.real
    return torch.ones_like(gains) if real is None else real.to(gains)
