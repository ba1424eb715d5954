"""The nearest features of a feature: by the direction of its decoder, and by where it is active."""

from dataclasses import dataclass

import torch

from sae_lens_alloc.allocation.sparse_activations import SparseActivations
from sae_lens_alloc.features.ragged import offsets_of, places_of_runs
from sae_lens_alloc.progress import shown

N_NEIGHBOURS = 8
# Elements of a matrix of some features by all, and pairs of pairs counted at once.
LARGEST_BLOCK = 2**24
# Pairs of features that are active together, over all tokens, beyond which some tokens must do.
LARGEST_N_TOGETHER = 2**30


@dataclass(frozen=True, eq=False)
class Neighbours:
    """
    The nearest features of n features, the nearest first.

    Args:
        features: Numbers of features, int64 of shape (n, k); -1 where there are fewer.
        nearness: How near each is, from 0 or -1 to 1, shape (n, k).
    """

    features: torch.Tensor
    nearness: torch.Tensor


@torch.no_grad()
def nearest_by_decoder(
    directions: torch.Tensor, features: torch.Tensor, k: int = N_NEIGHBOURS
) -> Neighbours:
    """
    The features with the largest cosine to the decoder of each of some features.

    Args:
        directions: Decoder rows of all features, shape (F, d_in).
        features: Features to find neighbours of, int64 of shape (n,).
        k: Neighbours of each, if there are so many.
    """
    norms = directions.norm(dim=1, keepdim=True)
    units = directions / norms.clamp(min=torch.finfo(directions.dtype).tiny)
    found: list[Neighbours] = []
    for block in features.split(max(1, LARGEST_BLOCK // len(directions))):
        cosines = units[block.to(units.device)] @ units.T
        found.append(_nearest(cosines, block, k, -torch.inf))
    return _joined(found)


@torch.no_grad()
def nearest_by_activity(
    pairs: SparseActivations, features: torch.Tensor, k: int = N_NEIGHBOURS
) -> Neighbours:
    """
    The features that are active on the same tokens as each of some features. Nearness is the
    tokens on which both are active, over those on which at least one is (Jaccard).

    Args:
        pairs: Active pairs of all features, in row order.
        features: Features to find neighbours of, int64 of shape (n,).
        k: Neighbours of each, if there are so many. Features that share no token are none.

    An SAE of many features per token is measured on some of the tokens, evenly spread.
    """
    pairs = _on_some_tokens(pairs)
    n_features = pairs.shape[1]
    firings = pairs.feature_counts()
    first_of_token = offsets_of(pairs.token_counts())
    tokens = pairs.token_indices[pairs.feature_indices.argsort(stable=True)]
    first_of_feature = offsets_of(firings)
    found: list[Neighbours] = []
    for block in shown(
        features.split(max(1, LARGEST_BLOCK // n_features)),
        "finding features that are active together",
    ):
        counts = torch.zeros(len(block) * n_features, dtype=torch.long)
        runs = firings[block]
        rows = torch.arange(len(block)).repeat_interleave(runs)
        its_tokens = tokens[places_of_runs(first_of_feature[block], runs)]
        active = first_of_token[its_tokens + 1] - first_of_token[its_tokens]
        for some in _pieces(active):
            others = pairs.feature_indices[
                places_of_runs(first_of_token[its_tokens[some]], active[some])
            ]
            keys = rows[some].repeat_interleave(active[some]) * n_features + others
            counts += keys.bincount(minlength=len(counts))
        both = counts.view(len(block), n_features)
        either = firings[block, None] + firings - both
        found.append(_nearest(both / either.clamp(min=1), block, k, 0.0))
    return _joined(found)


def _on_some_tokens(pairs: SparseActivations) -> SparseActivations:
    """The pairs of as many tokens, evenly spread, as LARGEST_N_TOGETHER allows."""
    together = pairs.token_counts().double().square().sum().item()
    if together <= LARGEST_N_TOGETHER:
        return pairs
    share = LARGEST_N_TOGETHER / together
    steps = (torch.arange(pairs.shape[0] + 1, dtype=torch.float64) * share).floor()
    kept = steps.diff() > 0
    return pairs.at(kept[pairs.token_indices].nonzero().squeeze(1)).without_padding()


def _pieces(sizes: torch.Tensor) -> list[slice]:
    """Slices of consecutive sizes that sum to about LARGEST_BLOCK at most."""
    if len(sizes) == 0:
        return []
    piece = sizes.cumsum(0) // LARGEST_BLOCK
    ends = [*(piece.diff().nonzero().squeeze(1) + 1).tolist(), len(sizes)]
    return [slice(*pair) for pair in zip([0, *ends[:-1]], ends, strict=True)]


def _nearest(
    nearness: torch.Tensor, features: torch.Tensor, k: int, bound: float
) -> Neighbours:
    """The k largest above a bound in each row of (n, F), without the feature itself."""
    rows = torch.arange(len(features), device=nearness.device)
    nearness[rows, features.to(nearness.device)] = -torch.inf
    best = nearness.topk(min(k, nearness.shape[1] - 1))
    none = best.values <= bound
    return Neighbours(
        best.indices.masked_fill(none, -1).cpu(),
        best.values.masked_fill(none, 0.0).float().cpu(),
    )


def _joined(parts: list[Neighbours]) -> Neighbours:
    return Neighbours(
        torch.cat([part.features for part in parts]),
        torch.cat([part.nearness for part in parts]),
    )
