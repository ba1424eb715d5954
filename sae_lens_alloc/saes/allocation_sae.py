"""What Mutual Choice and Feature Choice share: what the host decides about a training step."""

from typing import Any

import torch
from numpy.typing import NDArray
from sae_lens.saes.sae import TrainCoefficientConfig, TrainStepInput, TrainStepOutput
from typing_extensions import override

from sae_lens_alloc.allocation.mutual_choice import budget_for
from sae_lens_alloc.allocation.schedule import budget_per_token
from sae_lens_alloc.allocation.sparse_activations import SparseActivations
from sae_lens_alloc.ops.block_encoder import BlockEncoder
from sae_lens_alloc.saes.auxiliary_loss import auxiliary_weight
from sae_lens_alloc.saes.backend_trial import settle_backend
from sae_lens_alloc.saes.rows import row_width
from sae_lens_alloc.saes.step_plan import StepPlan
from sae_lens_alloc.saes.threshold_sae import T_CONFIG
from sae_lens_alloc.saes.training_step import SparseStepTrainingSAE
from sae_lens_alloc.shares import require_step_counts


class AllocationTrainingSAE(SparseStepTrainingSAE[T_CONFIG]):
    """
    Training SAE whose batch shares one budget of token-feature pairs.

    In training mode (`sae.train()`) a batch is allocated by the architecture's rule. In
    evaluation mode (`sae.eval()`) each feature has a threshold, so that the output for a
    token does not depend on the batch it came in. It is saved as a stock JumpReLU SAE.
    """

    @override
    @torch.no_grad()
    def log_histograms(self) -> dict[str, NDArray[Any]]:
        """As SAELens', of all features. Of ranks that share them, all must call it."""
        norms = self.shard.gather(self.W_dec.float().norm(dim=1))
        return {**super().log_histograms(), "weights/W_dec_norms": norms.cpu().numpy()}

    @override
    def preview(self, encoder: BlockEncoder, x: torch.Tensor) -> SparseActivations:
        step = self.step_count.last
        return self.allocator.preview(
            encoder,
            x,
            self._budget(len(x), step),
            self.rule_at(step),
            self.topk_share_at(step),
        )

    def _budget(self, n_tokens: int, step: int) -> int:
        k = budget_per_token(step, self.cfg.k, self.cfg.k_start, self.cfg.k_decay_steps)
        return budget_for(k, n_tokens)

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """
        One training step: allocate the batch, reconstruct from the selected pairs, and
        update densities and thresholds.

        Returns:
            SAELens' output, with feature_acts and hidden_pre (the selected affinities) as
            sparse COO tensors of shape (..., d_sae), without the dimension of the heads where
            hook_z is reshaped.

        Raises:
            ValueError: if activations or weights are not finite, naming the step; nothing
                has been changed then. On a GPU, which is not waited for, the report comes
                in one of the next steps or before anything is saved.
        """
        # The number of pairs differs from batch to batch, which torch.compile would answer
        # with a recompilation per step; `compile_sae` therefore leaves the step as it is.
        self.before_step(step_input)
        eager: Any = torch.compiler.disable(self._training_step)
        return eager(step_input)

    def before_step(self, step_input: TrainStepInput) -> None:
        """
        What must be known before a step, and is asked once in a training: that its settings are
        settled and that it has tokens, and the backend that takes it.

        Raises:
            ValueError: in one sentence, if the schedule is not settled or there are no tokens.
        """
        require_step_counts(self.cfg)
        if step_input.sae_in.numel() == 0:
            raise ValueError(
                f"The batch of training step {step_input.n_training_steps} holds no tokens "
                f"(shape {tuple(step_input.sae_in.shape)}), so there is nothing to learn "
                "from: check the source of the activations."
            )
        settle_backend(self, self._training_step, step_input)

    def _training_step(self, step_input: TrainStepInput) -> TrainStepOutput:
        self.checks.report()
        return self.take_step(
            step_input.sae_in,
            step_input.n_training_steps,
            lambda: self.plan_step(step_input),
        )

    def plan_step(self, step_input: TrainStepInput) -> StepPlan:
        """
        Begins a training step: what the host decides about it, and, at every tenth step, who
        is flagged for the auxiliary loss.
        """
        n_tokens = step_input.sae_in.numel() // row_width(self.cfg)
        step = self.step_count.begin(step_input.n_training_steps)
        continues = self.step_count.continues
        if self.times_itself and not continues:
            self.settling.begin_step(step)
        aux_weight = auxiliary_weight(self.cfg, step)
        if self.cfg.aux_loss == "none":
            aux_weight = 0.0
        if aux_weight and not continues:
            self.allocation.renew_flags(
                step,
                step_input.dead_neuron_mask,
                self.cfg.underuse_fraction if self.cfg.aux_loss == "aux_zipf" else None,
                n_tokens,
            )
        budget = self._budget(n_tokens, step)
        return StepPlan(
            step=step,
            continues=continues,
            rule=self.rule_at(step),
            previous_rule=self.rule_at(step - 1) if step else None,
            budget=budget,
            n_margin=int(self.cfg.selection_margin * budget),
            aux_weight=aux_weight,
            topk_share=self.topk_share_at(step),
        )

    @override
    def get_coefficients(self) -> dict[str, float | TrainCoefficientConfig]:
        # asked by a trainer when it is made, before the first step
        require_step_counts(self.cfg)
        return {}

    @override
    def calculate_aux_loss(
        self,
        step_input: TrainStepInput,
        feature_acts: torch.Tensor,
        hidden_pre: torch.Tensor,
        sae_out: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        raise NotImplementedError(
            "The auxiliary loss shares its backward with the reconstruction: call "
            "training_forward_pass, which returns it in `losses`."
        )
