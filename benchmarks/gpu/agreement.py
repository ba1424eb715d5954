"""Whether what kernels give is what all affinities in float64 ask for, up to rounding."""

from typing import Literal

import torch

from sae_lens_alloc.allocation.sparse_activations import Pairs

Among = Literal["batch", "feature", "token"]


def disagreement(
    pairs: Pairs,
    affinities: torch.Tensor,
    numbers: torch.Tensor,
    among: Among,
    tolerance: float,
    only_positive: bool = True,
) -> str | None:
    """
    What is wrong with selected pairs, None if nothing is. The largest affinities must be
    selected, of equal ones those of the lowest token and then the lowest feature. Where
    affinities may be off by a tolerance, those as close as that to the smallest selected one
    may be in or out.

    Args:
        pairs: The selection.
        affinities: float64 of shape (B, F), -inf where none may be selected.
        numbers: How many to select, int64 of shape (1,), (F,) or (B,).
        among: Whether they are the largest of the batch, of each feature or of each token.
        tolerance: How far an affinity may be off, 0 for not at all.
        only_positive: Fewer are selected where fewer are positive.
    """
    found = pairs.without_padding()
    tokens, features = found.token_indices, found.feature_indices
    positions = tokens * affinities.shape[1] + features
    if (positions.diff() <= 0).any():
        return "pairs are not in row order, or there twice"
    off = (found.values.double() - affinities[tokens, features]).abs()
    if len(off) > 0 and not off.max() <= tolerance:
        return f"an affinity is off by {off.max().item():.1e}"
    selected = torch.zeros_like(affinities, dtype=torch.bool)
    selected[tokens, features] = True
    return _wrong_choice(
        _in_columns(selected, among),
        _in_columns(affinities, among),
        numbers,
        tolerance,
        only_positive,
    )


def wrong_counts(
    counts: torch.Tensor,
    affinities: torch.Tensor,
    bounds: torch.Tensor,
    tolerance: float,
) -> str | None:
    """
    What is wrong with the numbers of tokens on which features are positive and exceed a bound,
    None if nothing is.

    Args:
        counts: int64 of shape (F,).
        affinities: float64 of shape (B, F).
        bounds: Scalar or of shape (F,).
        tolerance: How far an affinity may be off.
    """
    bounds = bounds.double().clamp(min=0)
    fewest = (affinities > bounds + tolerance).sum(0)
    most = (affinities > bounds - tolerance).sum(0)
    n_wrong = int(((counts < fewest) | (counts > most)).sum())
    return f"{n_wrong} counts are wrong" if n_wrong else None


def distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over that of what is expected."""
    difference = (actual.double() - expected.double()).norm()
    return float(difference / expected.double().norm().clamp(min=1e-30))


def _in_columns(matrix: torch.Tensor, among: Among) -> torch.Tensor:
    """A matrix of shape (B, F) such that each column holds what competes."""
    if among == "batch":
        return matrix.reshape(-1, 1)
    return matrix if among == "feature" else matrix.T


def _wrong_choice(
    selected: torch.Tensor,
    affinities: torch.Tensor,
    numbers: torch.Tensor,
    tolerance: float,
    only_positive: bool,
) -> str | None:
    """What is wrong with a choice of the largest of each column."""
    fewest = most = numbers
    if only_positive:
        fewest = numbers.minimum((affinities > tolerance).sum(0))
        most = numbers.minimum((affinities > -tolerance).sum(0))
    if tolerance == 0:
        order = affinities.argsort(dim=0, descending=True, stable=True)
        ranks = torch.arange(len(affinities), device=affinities.device)[:, None]
        expected = torch.zeros_like(selected).scatter_(0, order, ranks < fewest)
        missing, extra = expected & ~selected, selected & ~expected
    else:
        counts = selected.sum(0)
        if ((counts < fewest) | (counts > most)).any():
            return f"{int(counts.sum())} pairs instead of {int(fewest.sum())}"
        ordered = affinities.sort(dim=0, descending=True).values
        limits = ordered.gather(0, (numbers - 1).clamp(0, len(ordered) - 1)[None])
        limits = limits.where(numbers > 0, torch.inf)
        if only_positive:
            limits = limits.clamp(min=0)
        missing = (affinities > limits + tolerance) & ~selected
        extra = selected & (affinities < limits - tolerance)
    if missing.any() or extra.any():
        return (
            f"{int(missing.sum())} pairs are missing, {int(extra.sum())} are too many"
        )
    return None
