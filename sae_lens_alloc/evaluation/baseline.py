"""The language model without an SAE: the reference for a reconstruction."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformer_lens.HookedTransformer import HookedRootModule

from sae_lens_alloc.evaluation.splicing import Replace, Site, spliced_loss


@dataclass(frozen=True)
class Baseline:
    """
    Losses of a model on some contexts, and the spread of its activations at a hook.

    Args:
        loss: Next-token loss of the untouched model, in nats.
        loss_zero_ablated: Loss with zero in place of every activation at the hook.
        loss_mean_ablated: Loss with the mean activation in place of every activation.
        total_variance: Sum over tokens and dimensions of (activation - mean)^2.
    """

    loss: float
    loss_zero_ablated: float
    loss_mean_ablated: float
    total_variance: float


class _Moments:
    """Sums over tokens, in float64 since the variance is a difference of two large sums."""

    def __init__(self) -> None:
        self.count = 0
        self.total = torch.zeros(())
        self.squares = 0.0

    def watch(self, _: torch.Tensor, activations: torch.Tensor) -> torch.Tensor:
        """Adds activations of shape (n, d) to the sums, and returns them unchanged."""
        exact = activations.double()
        self.count += len(exact)
        self.total = exact.sum(0) + self.total
        self.squares += exact.square().sum().item()
        return activations


def measure_baseline(
    model: HookedRootModule,
    tokens: torch.Tensor,
    hook_name: str,
    special_token_ids: Sequence[int],
    contexts_per_batch: int = 8,
    hook_name_out: str | None = None,
) -> Baseline:
    """
    Measures a model on contexts. The result serves all SAEs at one hook.

    Args:
        model: The language model.
        tokens: Token ids, shape (contexts, length).
        hook_name: Hook whose activations SAEs read.
        special_token_ids: Tokens such as BOS, which are neither measured nor ablated.
        contexts_per_batch: Contexts to run at once.
        hook_name_out: Hook whose activations are replaced, if transcoders are judged. None for
            `hook_name`.

    Raises:
        ValueError: if replacing the activations changes nothing.
    """
    site = Site(hook_name, hook_name_out or hook_name)

    def loss(replace: Replace) -> float:
        return spliced_loss(
            model, tokens, site, replace, special_token_ids, contexts_per_batch
        )

    moments = _Moments()
    untouched = loss(moments.watch)
    mean = moments.total / moments.count
    variance = moments.squares - moments.count * mean.square().sum().item()
    zero_ablated = loss(lambda _, activations: torch.zeros_like(activations))
    mean_ablated = loss(lambda _, activations: mean.expand_as(activations))
    if untouched in (zero_ablated, mean_ablated):
        raise ValueError(
            f"Replacing the activations at hook {site.replaced!r} leaves the model's loss as it "
            "is, so no reconstruction can be judged there: give another hook."
        )
    return Baseline(untouched, zero_ablated, mean_ablated, variance)
