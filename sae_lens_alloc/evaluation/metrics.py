"""How good a saved SAE is on held-out text, by itself and in place of the model's activations."""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from sae_lens import SAE
from sae_lens.util import get_special_token_ids
from transformer_lens.HookedTransformer import HookedRootModule
from typing_extensions import override

from sae_lens_alloc.evaluation.baseline import Baseline, measure_baseline
from sae_lens_alloc.evaluation.splicing import Site, is_ordinary, loss_and_divergence
from sae_lens_alloc.evaluation.usage import Usage, UsageMeter, as_user


@dataclass(frozen=True, eq=False, kw_only=True)
class Evaluation(Usage):
    """
    Figures of one SAE on held-out contexts. Special tokens such as BOS are left out of all of them.

    Args:
        explained_variance: As in Usage.
        features_per_token: As in Usage, shape (contexts, length).
        densities: As in Usage.
        loss: Next-token loss of the untouched model, in nats.
        loss_with_sae: Loss with the SAE's reconstruction in place of the activations. A
            transcoder stands for what lies between its hooks.
        loss_zero_ablated: Loss with zero in place of the activations.
        loss_mean_ablated: Loss with the mean activation in place of the activations.
        kl_divergence: Mean KL divergence, in nats, of the next-token distribution with the
            SAE from that of the untouched model.
    """

    loss: float
    loss_with_sae: float
    loss_zero_ablated: float
    loss_mean_ablated: float
    kl_divergence: float

    @property
    def loss_recovered_zero(self) -> float:
        """Share of the loss added by zero ablation that the SAE recovers."""
        return self._recovered(self.loss_zero_ablated)

    @property
    def loss_recovered_mean(self) -> float:
        """Share of the loss added by mean ablation that the SAE recovers."""
        return self._recovered(self.loss_mean_ablated)

    def _recovered(self, ablated: float) -> float:
        return (ablated - self.loss_with_sae) / (ablated - self.loss)

    @override
    def to_dict(self) -> dict[str, Any]:
        return {
            **super().to_dict(),
            "ce_loss": self.loss,
            "ce_loss_with_sae": self.loss_with_sae,
            "ce_loss_zero_ablated": self.loss_zero_ablated,
            "ce_loss_mean_ablated": self.loss_mean_ablated,
            "ce_recovered_zero": self.loss_recovered_zero,
            "ce_recovered_mean": self.loss_recovered_mean,
            "kl_divergence": self.kl_divergence,
        }


def evaluate_sae(
    sae: SAE[Any],
    model: HookedRootModule,
    tokens: torch.Tensor,
    hook_name: str,
    baseline: Baseline | None = None,
    special_token_ids: Sequence[int] | None = None,
    contexts_per_batch: int = 8,
    hook_name_out: str | None = None,
) -> Evaluation:
    """
    Evaluates an SAE on contexts of tokens. Feature activations are in memory for one batch at a time.

    Args:
        sae: Any SAE, usually from SAE.load_from_disk.
        model: Model as `sae_lens.load_model.load_model` returns it.
        tokens: Token ids, shape (contexts, length), laid out as in training.
        hook_name: Hook whose activations the SAE encodes.
        baseline: Measurements of the model on the same tokens, to be shared by SAEs. None
            measures them here.
        special_token_ids: Tokens that are neither measured nor replaced, as in training
            with exclude_special_tokens. None means the special tokens of the model's
            tokenizer.
        contexts_per_batch: Contexts to run at once.
        hook_name_out: Hook whose activations are reconstructed and replaced, if the SAE is a
            transcoder. None for those at `hook_name`.

    Raises:
        ValueError: if no prediction can be judged, or replacing the activations changes
            nothing.
    """
    if special_token_ids is None:
        special_token_ids = get_special_token_ids(model.tokenizer)  # type: ignore[arg-type]
    if baseline is None:
        baseline = measure_baseline(
            model,
            tokens,
            hook_name,
            special_token_ids,
            contexts_per_batch,
            hook_name_out,
        )
    meter = UsageMeter(as_user(sae))
    with _on_flat_activations(sae):
        loss_with_sae, kl_divergence = loss_and_divergence(
            model,
            tokens,
            Site(hook_name, hook_name_out or hook_name),
            meter.reconstruct,
            special_token_ids,
            contexts_per_batch,
        )
    features_per_token = torch.full(tokens.shape, -1)
    features_per_token[is_ordinary(tokens, special_token_ids)] = meter.l0_counts
    return Evaluation(
        explained_variance=1 - meter.squared_error / baseline.total_variance,
        features_per_token=features_per_token,
        densities=meter.densities,
        loss=baseline.loss,
        loss_with_sae=loss_with_sae,
        loss_zero_ablated=baseline.loss_zero_ablated,
        loss_mean_ablated=baseline.loss_mean_ablated,
        kl_divergence=kl_divergence,
    )


@contextmanager
def _on_flat_activations(sae: SAE[Any]) -> Generator[None, None, None]:
    """Within it, an SAE of hook_z takes the heads of a token as one vector."""
    reshapes = sae.hook_z_reshaping_mode
    sae.turn_off_forward_pass_hook_z_reshaping()
    try:
        yield
    finally:
        if reshapes:
            sae.turn_on_forward_pass_hook_z_reshaping()
