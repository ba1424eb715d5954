"""Running densities of the features, and which of them fire less than they should."""

import torch

from sae_lens_alloc.allocation.zipf import FittedLaw, ZipfLaw

# More flagged features than this share the auxiliary loss too thinly.
MAX_UNDERUSED_SHARE = 0.5


def update_density(
    density: torch.Tensor,
    tokens_seen: torch.Tensor,
    counts: torch.Tensor,
    n_tokens: int,
    window_tokens: int,
) -> None:
    """
    Averages the firing rates of one batch into the running densities, in place: an exact
    mean over the first `window_tokens` tokens, an exponential average after that.

    Args:
        density: Running firing rates per token, shape (F,).
        tokens_seen: Scalar tensor, tokens averaged so far.
        counts: Tokens of the batch on which each feature fired, shape (F,).
        n_tokens: Tokens in the batch.
        window_tokens: Length of the averaging window in tokens.
    """
    tokens_seen += n_tokens
    weight = n_tokens / tokens_seen.clamp(max=max(window_tokens, n_tokens))
    density.lerp_((counts / n_tokens).to(density.dtype), weight.to(density.dtype))


def density_ranks(density: torch.Tensor) -> torch.Tensor:
    """Rank of each feature from the densest (0) on, ties by feature index; int64 of shape (F,)."""
    order = density.argsort(descending=True, stable=True)
    ranks = torch.empty_like(order)
    ranks[order] = torch.arange(len(order), device=order.device)
    return ranks


def fit_floor(n_tokens: int) -> float:
    """Density below which a feature is left out of a fit (one event in 100 batches of B)."""
    return 1 / (100 * n_tokens)


def underused_features(
    density: torch.Tensor,
    dead: torch.Tensor,
    law: ZipfLaw | FittedLaw | None,
    fraction: float,
) -> torch.Tensor:
    """
    Flags the features that fire less than `fraction` of the law at their rank, and the dead
    ones; at most half of all features, the least dense first.

    Args:
        density: Running firing rates per token, shape (F,).
        dead: Boolean mask of dead features, shape (F,).
        law: The fitted law, or None to flag dead features only, as one that is not known does.
        fraction: Share of the predicted density below which a feature is underutilised.

    Returns:
        Boolean mask of shape (F,).
    """
    if law is None:
        return dead.clone()
    ranks = density_ranks(density)
    below = density < fraction * law.density(ranks + 1.0)
    n_features = len(density)
    first_flagged_rank = n_features - int(n_features * MAX_UNDERUSED_SHARE)
    return (below & (ranks >= first_flagged_rank)) | dead
