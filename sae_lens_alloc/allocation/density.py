"""Running densities of the features, and which of them fire less than they should."""

import torch

from sae_lens_alloc.allocation.zipf import FittedLaw, ZipfLaw

# If more features were flagged, each would learn too little from the auxiliary loss.
MAX_UNDERUSED_SHARE = 0.5


def update_density(
    density: torch.Tensor,
    tokens_seen: torch.Tensor,
    counts: torch.Tensor,
    n_tokens: int,
    window_tokens: int,
) -> None:
    """
    Averages the firing rates of one batch into the running densities, in place. The average
    is an exact mean over the first `window_tokens` tokens, and exponential after that.

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
    Flags the dead features, and the features that fire less than `fraction` of the law at
    their rank. At most half of all features are flagged for the second reason, the least
    dense ones first.

    Args:
        density: Running firing rates per token, shape (F,).
        dead: Boolean mask of dead features, shape (F,).
        law: The fitted law. None, or a law that is not known, flags dead features only.
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
