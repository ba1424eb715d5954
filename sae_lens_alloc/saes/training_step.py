"""A training step: select, reconstruct, losses, statistics, as docs/method.md has them."""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from sae_lens.saes.sae import TrainStepOutput

from sae_lens_alloc.allocation.sparse_activations import Pairs
from sae_lens_alloc.ops.block_encoder import Encoder, KnownAffinities
from sae_lens_alloc.ops.pair_autoencoder import GradientMemory
from sae_lens_alloc.saes.allocator import Allocator, Rule
from sae_lens_alloc.saes.auxiliary_loss import auxiliary_pairs
from sae_lens_alloc.saes.backend_record import BackendRecord
from sae_lens_alloc.saes.dense_path import (
    acts_are_hooked,
    gradient_reaches_inputs,
    mask_of,
)
from sae_lens_alloc.saes.finite_checks import require_finite, require_finite_loss
from sae_lens_alloc.saes.margin_loss import margin_term
from sae_lens_alloc.saes.nesting import level_loss_names
from sae_lens_alloc.saes.reconstruction import Weights
from sae_lens_alloc.saes.rows import encoded_and_target
from sae_lens_alloc.saes.settling_clock import SettlingClock
from sae_lens_alloc.saes.skip_connection import past_features
from sae_lens_alloc.saes.step_count import StepCount
from sae_lens_alloc.saes.step_metrics import allocation_metrics
from sae_lens_alloc.saes.step_outputs import outputs_of_step
from sae_lens_alloc.saes.step_plan import FirstPass, Outputs, Selection, StepPlan
from sae_lens_alloc.saes.threshold_sae import T_CONFIG, ThresholdTrainingSAE
from sae_lens_alloc.saes.weight_names import OF_NO_FEATURE


class SparseStepTrainingSAE(ThresholdTrainingSAE[T_CONFIG]):
    """
    Training SAE whose step works on the active pairs alone. This is what the device does in a
    step. What the host decides about it, the plan, is given.
    """

    def __init__(self, cfg: T_CONFIG, use_error_term: bool = False):
        super().__init__(cfg, use_error_term)
        self.allocator = Allocator(
            self.allocation, cfg.max_density, cfg.min_tokens_per_feature
        )
        self.step_count = StepCount(self.allocation)
        self.settling = SettlingClock(self.allocation)
        self.backend_record = BackendRecord(self.allocation)
        self.gradient_memory = GradientMemory()
        self.setup()

    @abstractmethod
    def rule_at(self, step: int) -> Rule:
        """The rule that allocates the batch of a training step."""

    def topk_share_at(self, step: int) -> float:  # noqa: ARG002
        """What is left of TopK at a training step (`allocation/token_share.py`)."""
        return 0.0

    @property
    def times_itself(self) -> bool:
        """Whether the end of Feature Choice is decided by the losses of the training."""
        return False

    def inner_widths(self) -> Sequence[int]:
        """
        Numbers of first features that must reconstruct the activations without the others,
        besides all of them.
        """
        return ()

    def first_inputs(self, sae_in: torch.Tensor) -> torch.Tensor:
        """Encoder inputs of shape (..., d_in), before any pass."""
        return self.process_sae_in(sae_in)

    def first_pass(
        self,
        encoder: Encoder,  # noqa: ARG002
        x: torch.Tensor,  # noqa: ARG002
        plan: StepPlan,  # noqa: ARG002
    ) -> FirstPass | None:
        """
        A pass before the one that allocates a batch of encoder inputs x, shape (B, d_in). It
        moves its statistics. None where there is one pass.
        """
        return None

    def second_inputs(
        self, encoder: Encoder, inputs: torch.Tensor, first: Pairs
    ) -> torch.Tensor:
        """The encoder inputs that a first pass makes of `first_inputs`, shape (..., d_in)."""
        raise NotImplementedError

    def take_step(
        self, sae_in: torch.Tensor, number: int, planned: Callable[[], StepPlan]
    ) -> TrainStepOutput:
        """
        What the device does in a training step.

        Args:
            sae_in: Activations of shape (..., d_in), or the rows of a transcoder.
            number: Number of the training step, for messages.
            planned: Gives the plan, once the activations are known to be finite.
        """
        encoded, target = encoded_and_target(self.cfg, sae_in)
        inputs, encoder = self.first_inputs(encoded), self.encoder()
        x = inputs.reshape(-1, self.cfg.d_in)
        others = [w for name, w in self.named_parameters() if name in OF_NO_FEATURE]
        normalized = self.cfg.normalize_activations == "layer_norm"
        require_finite(self.checks, encoder, others, sae_in, x, normalized, number)
        plan = planned()
        reaches_inputs = gradient_reaches_inputs(self, sae_in, self.shard)
        first = self.first_pass(encoder, x if reaches_inputs else x.detach(), plan)
        if first is not None:
            inputs = self.second_inputs(encoder, inputs, first.pairs)
            x = inputs.reshape(-1, self.cfg.d_in)
        if not reaches_inputs:
            x = x.detach()
        selection = replace(self._select(encoder, inputs, x, plan), first=first)
        shape = torch.Size([*inputs.shape[:-1], self.W_dec.shape[1]])
        by_b_dec = self.cfg.apply_b_dec_to_input and not x.requires_grad
        weights = Weights(
            self.W_enc,
            self.b_enc,
            self.W_dec,
            self.b_dec if by_b_dec else None,
            self.gradient_memory,
            self.shard.ranks,
        )
        outputs = outputs_of_step(
            self, weights, encoder, x, shape, selection, self.inner_widths()
        )
        past = past_features(self, encoded)
        # what is left for the features
        left = target if past is None else target - past
        losses, residuals = self._losses(left, outputs, selection, plan.step)
        loss = torch.stack(list(losses.values())).sum()
        if selection.margin is not None and outputs.unit is not None:
            loss = loss + margin_term(
                outputs.margin_pre_acts,
                selection.margin,
                encoder,
                self.W_dec,
                residuals,
                outputs.unit,
                self.shard,
            )
        sae_out, acts = outputs.levels[self.cfg.d_sae], selection.dense_acts
        if acts is None:
            acts = selection.pairs.to_coo(inputs.shape[:-1])
        return TrainStepOutput(
            sae_in=target,  # SAELens' metrics compare sae_out with it
            sae_out=sae_out if past is None else sae_out + past,
            feature_acts=acts,
            hidden_pre=acts,
            loss=loss,
            losses=losses,
            metrics=allocation_metrics(
                self.allocation,
                self.step_count,
                selection.pairs,
                self.encoder,
                x.detach(),
            ),
        )

    def _select(
        self, encoder: Encoder, inputs: torch.Tensor, x: torch.Tensor, plan: StepPlan
    ) -> Selection:
        """Selects who takes part, which moves the statistics."""
        aux = None
        if plan.aux_weight:
            aux = auxiliary_pairs(
                encoder,
                x,
                self.allocation.flagged,
                self.cfg.features_per_token_in_aux_loss(),
                plan.aux_weight,
                self.shard,
            )
        affinities, source = None, encoder
        if acts_are_hooked(self):
            affinities = self._dense_affinities(inputs)
            flat = affinities.detach().reshape(-1, self.cfg.d_sae)
            source = KnownAffinities(flat)
        pairs, margin = self.allocator.allocate(
            source,
            x,
            plan.budget,
            plan.rule,
            plan.previous_rule,
            plan.n_margin,
            plan.continues,
            plan.topk_share,
        )
        acts = None
        if affinities is not None:
            mask = mask_of(pairs).view(affinities.shape)
            acts = self.hook_sae_acts_post(affinities * mask)
        return Selection(pairs, margin, aux, acts)

    def _losses(
        self, target: torch.Tensor, outputs: Outputs, selection: Selection, step: int
    ) -> tuple[dict[str, torch.Tensor], Mapping[int, torch.Tensor]]:
        """Losses by name, and the error of each level."""
        levels, names = outputs.levels, level_loss_names(self.inner_widths())
        named = zip(names, levels.values(), strict=True)
        losses = {name: self._mse(out, target) for name, out in named}
        require_finite_loss(self.checks, losses["mse_loss"], step)
        if outputs.first is not None:
            losses["first_pass_loss"] = self._mse(outputs.first, target)
        if self.times_itself:
            self.settling.note_loss(losses["mse_loss"].detach())
        residuals = {width: (target - out).detach() for width, out in levels.items()}
        if selection.aux is not None and outputs.aux is not None:
            error = self._mse(outputs.aux, residuals[self.cfg.d_sae])
            losses["auxiliary_reconstruction_loss"] = selection.aux.coefficient * error
        return losses, residuals

    def _mse(self, out: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return self.mse_loss_fn(out, target).sum(dim=-1).mean()
