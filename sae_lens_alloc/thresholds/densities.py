"""
One factor for all densities of an SAE, which brings it to a wanted L0: each feature gets the
threshold that it exceeds on its share of the tokens, in proportion to how often it was active.
"""

import torch

from sae_lens_alloc.allocation.mutual_choice import budget_for
from sae_lens_alloc.allocation.quota_curve import QuotaCurve
from sae_lens_alloc.ops.block_encoder import Encoder
from sae_lens_alloc.ops.encode_select import encode_feature_choice
from sae_lens_alloc.thresholds.factor import Thresholded

# Relative distance of a threshold from the affinity that decides it.
MARGIN = 1e-6


def set_densities(
    sae: Thresholded, activations: torch.Tensor, counts: torch.Tensor, target_l0: float
) -> None:
    """
    Sets each threshold such that the feature is active on a number of tokens in proportion
    to `counts`, all together on `target_l0` features per token.

    Args:
        sae: The SAE; its thresholds, which are changed in place, make this fast if they are
            near.
        activations: Activations as the SAE takes them, shape (T, d_in).
        counts: Shape (F,).
        target_l0: Wanted features per token.

    Raises:
        ValueError: if the features cannot be active on so many tokens.
    """
    encoder, x = Encoder(sae.W_enc, sae.b_enc, None), sae.process_sae_in(activations)
    budget = budget_for(target_l0, len(x))
    guess = sae.threshold / 2
    never = guess.new_tensor(torch.inf)
    caps = torch.full_like(counts, len(x))
    while True:
        quotas = _quotas_in_proportion(counts, budget, caps)
        if budget == 0 or int(quotas.sum()) < budget:
            raise ValueError(
                f"no thresholds give an L0 of {target_l0} on these {len(x)} tokens: the "
                f"{int((counts > 0).sum())} features that are active on them reach "
                f"{int(quotas.sum()) / len(x):.3g}."
            )
        # a feature without quota is silenced, so its largest affinity has to be known, too
        wanted = quotas.clamp(min=1)
        best = encode_feature_choice(
            encoder, x, wanted, guess, never, guess, int(wanted.sum())
        ).pairs.without_padding()
        found = best.feature_counts()
        if not (found < quotas).any():
            break
        caps = torch.where(found < quotas, found, caps)  # all its positive affinities
    last = torch.full_like(guess, torch.inf).scatter_reduce(
        0, best.feature_indices, best.values.to(guess), "amin"
    )
    largest = last.where(found > 0, 0.0)
    silencing = torch.maximum(largest * (1 + MARGIN), sae.threshold)
    sae.threshold.copy_(torch.where(quotas > 0, last * (1 - MARGIN), silencing))


def _quotas_in_proportion(
    counts: torch.Tensor, budget: int, caps: torch.Tensor
) -> torch.Tensor:
    """Whole quotas in proportion to `counts` that sum to the budget; int64 of shape (F,)."""
    active = (counts > 0).nonzero().squeeze(1)
    quotas = torch.zeros_like(counts, dtype=torch.float64)
    if len(active) > 0:
        log_shares = counts[active].double().log()
        quotas[active] = QuotaCurve.of(log_shares, caps[active]).quotas(budget)
    # remainders are handed on from feature to feature, so that the sum is right
    return (quotas.cumsum(0) + 1e-6).floor().diff(prepend=quotas.new_zeros(1)).long()
