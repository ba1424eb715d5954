"""
From k features for each token to one budget of the batch, without a jump.

A TopK SAE gives each token its k largest affinities. Mutual Choice gives the batch its k * B
largest. In between, the affinities of a token are measured relative to its own k-th largest tau_i:

    a_ij * (tau / tau_i)^share,    tau the mean of all tau_i

With a share of 1 those of the k largest of a token are at least tau, and the others below: the
largest k * B of the batch are the k largest of each token. With a share of 0 they are the
affinities themselves. The share falls from 1 to 0, so that a fine-tuning starts as the SAE that it
was given, and ends as Mutual Choice.
"""

from dataclasses import replace

import torch

from sae_lens_alloc.allocation.margin import Margin
from sae_lens_alloc.allocation.sparse_activations import Pairs


def share_at(step: int, topk_steps: int) -> float:
    """What is left of TopK at a training step: 1 at the first, 0 from `topk_steps` on."""
    return max(0.0, 1 - step / topk_steps) if topk_steps else 0.0


def token_factors(kth_largest: torch.Tensor, share: float) -> torch.Tensor:
    """
    What the affinities of each token are multiplied by, shape (B,).

    Args:
        kth_largest: The k-th largest affinity of each token, shape (B,). A token where it is not
            positive has fewer than k features to give, all of which come first.
        share: What is left of TopK.
    """
    smallest = torch.finfo(kth_largest.dtype).tiny ** 0.5
    floor = kth_largest.clamp(min=smallest)
    return (floor.mean() / floor) ** share


def unscaled(pairs: Pairs, factors: torch.Tensor | None) -> Pairs:
    """
    Pairs of affinities that were multiplied by the factors of their tokens, without these. As they
    are if there are no factors.
    """
    if factors is None:
        return pairs
    places = pairs.places
    return pairs.with_values(places.values / factors[places.token_indices])


def unscaled_margin(
    margin: Margin | None, factors: torch.Tensor | None
) -> Margin | None:
    """The same of a margin, whose width then differs from token to token: shape (N,)."""
    if margin is None or factors is None:
        return margin
    tokens = margin.pairs.places.token_indices
    return replace(
        margin,
        pairs=unscaled(margin.pairs, factors),
        width=margin.width / factors[tokens],
    )
