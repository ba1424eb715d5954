"""How good a saved SAE is on held-out text, and what it costs the language model."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sae_lens import SAE
from sae_lens.util import get_special_token_ids
from transformer_lens.HookedTransformer import HookedRootModule

from sae_lens_alloc.evaluation.baseline import Baseline, measure_baseline
from sae_lens_alloc.evaluation.splicing import is_ordinary, spliced_loss

RARE_DENSITY = 1e-4


@dataclass(frozen=True, eq=False)
class Evaluation:
    """
    Figures of one SAE on held-out contexts. Special tokens such as BOS are in none of them.

    Args:
        explained_variance: 1 - squared error / total variance about the mean, both summed
            over all tokens and dimensions.
        loss: Next-token loss of the untouched model, in nats.
        loss_with_sae: Loss with the SAE's reconstruction in place of the activations.
        loss_zero_ablated: Loss with zero in place of the activations.
        loss_mean_ablated: Loss with the mean activation in place of the activations.
        features_per_token: Number of active features of every token, shape
            (contexts, length); -1 at special tokens.
        densities: Share of the tokens on which each feature is active, float64 of shape
            (d_sae,).
    """

    explained_variance: float
    loss: float
    loss_with_sae: float
    loss_zero_ablated: float
    loss_mean_ablated: float
    features_per_token: torch.Tensor
    densities: torch.Tensor

    @property
    def l0_counts(self) -> torch.Tensor:
        """Number of active features of every ordinary token, shape (n_tokens,)."""
        return self.features_per_token[self.features_per_token >= 0]

    @property
    def n_tokens(self) -> int:
        """Number of tokens measured."""
        return len(self.l0_counts)

    @property
    def l0(self) -> float:
        """Mean number of active features per token."""
        return self.l0_counts.double().mean().item()

    @property
    def top_1_percent_share(self) -> float:
        """Share of all active pairs held by the 1% of tokens with the most features."""
        counts = self.l0_counts.sort(descending=True).values
        held = counts[: math.ceil(len(counts) / 100)].sum().item()
        return held / max(counts.sum().item(), 1)

    @property
    def loss_recovered_zero(self) -> float:
        """Share of the loss added by zero ablation that the SAE wins back."""
        return self._recovered(self.loss_zero_ablated)

    @property
    def loss_recovered_mean(self) -> float:
        """Share of the loss added by mean ablation that the SAE wins back."""
        return self._recovered(self.loss_mean_ablated)

    def _recovered(self, ablated: float) -> float:
        return (ablated - self.loss_with_sae) / (ablated - self.loss)

    @property
    def dead_features(self) -> int:
        """Number of features active on no token."""
        return int((self.densities == 0).sum())

    @property
    def rare_features(self) -> int:
        """Number of features active on less than one token in 10,000, dead ones included."""
        return int((self.densities < RARE_DENSITY).sum())

    @property
    def l0_histogram(self) -> torch.Tensor:
        """Number of tokens with 0, 1, 2, ... active features, int64."""
        return self.l0_counts.bincount()

    def to_dict(self) -> dict[str, Any]:
        """Everything but the tensors per token and per feature, ready for JSON."""
        return {
            "n_tokens": self.n_tokens,
            "n_features": len(self.densities),
            "explained_variance": self.explained_variance,
            "ce_loss": self.loss,
            "ce_loss_with_sae": self.loss_with_sae,
            "ce_loss_zero_ablated": self.loss_zero_ablated,
            "ce_loss_mean_ablated": self.loss_mean_ablated,
            "ce_recovered_zero": self.loss_recovered_zero,
            "ce_recovered_mean": self.loss_recovered_mean,
            "l0": self.l0,
            "l0_histogram": self.l0_histogram.tolist(),
            "top_1_percent_share": self.top_1_percent_share,
            "dead_features": self.dead_features,
            "rare_features": self.rare_features,
        }


def evaluate_sae(
    sae: SAE[Any],
    model: HookedRootModule,
    tokens: torch.Tensor,
    hook_name: str,
    baseline: Baseline | None = None,
    special_token_ids: Sequence[int] | None = None,
    contexts_per_batch: int = 8,
) -> Evaluation:
    """
    Evaluates an SAE on contexts of tokens. One batch of features is held at a time.

    Args:
        sae: Any SAE, usually from SAE.load_from_disk.
        model: Model as `sae_lens.load_model.load_model` returns it.
        tokens: Token ids, shape (contexts, length), laid out as in training.
        hook_name: Where the SAE reads and writes.
        baseline: Measurements of the model on the same tokens, to share between SAEs.
        special_token_ids: Tokens that are neither measured nor replaced, as in training
            with exclude_special_tokens. None takes the special tokens of the model's
            tokenizer.
        contexts_per_batch: Contexts to run at once.
    """
    if special_token_ids is None:
        special_token_ids = get_special_token_ids(model.tokenizer)  # type: ignore[arg-type]
    if baseline is None:
        baseline = measure_baseline(
            model, tokens, hook_name, special_token_ids, contexts_per_batch
        )
    usage = _Usage(sae)
    loss_with_sae = spliced_loss(
        model,
        tokens,
        hook_name,
        usage.reconstruct,
        special_token_ids,
        contexts_per_batch,
    )
    features_per_token = torch.full(tokens.shape, -1)
    features_per_token[is_ordinary(tokens, special_token_ids)] = torch.cat(usage.l0)
    return Evaluation(
        explained_variance=1 - usage.squared_error / baseline.total_variance,
        loss=baseline.loss,
        loss_with_sae=loss_with_sae,
        loss_zero_ablated=baseline.loss_zero_ablated,
        loss_mean_ablated=baseline.loss_mean_ablated,
        features_per_token=features_per_token,
        densities=usage.firings.double() / sum(map(len, usage.l0)),
    )


class _Usage:
    """What an SAE does while it stands in for a model's activations."""

    def __init__(self, sae: SAE[Any]) -> None:
        self.sae = sae
        self.squared_error = 0.0
        self.firings = torch.zeros(sae.cfg.d_sae, dtype=torch.long)
        self.l0: list[torch.Tensor] = []

    def reconstruct(self, activations: torch.Tensor) -> torch.Tensor:
        """Reconstructs activations of shape (n, d) and takes note of the features used."""
        features = self.sae.encode(activations.to(self.sae.device, self.sae.dtype))
        reconstruction = self.sae.decode(features).to(activations.device)
        error = activations.double() - reconstruction.double()
        self.squared_error += error.square().sum().item()
        active = features.to_dense() != 0
        self.firings += active.sum(0).cpu()
        self.l0.append(active.sum(-1).cpu())
        return reconstruction
