"""A training step: select, reconstruct, losses, statistics, as docs/method.md has them."""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence

import torch
from sae_lens.saes.sae import TrainStepOutput

from sae_lens_alloc.ops.block_encoder import Encoder, KnownAffinities
from sae_lens_alloc.ops.pair_autoencoder import GradientMemory
from sae_lens_alloc.saes.allocator import Allocator, Rule
from sae_lens_alloc.saes.auxiliary_loss import auxiliary_pairs, outputs_and_parts
from sae_lens_alloc.saes.backend_record import BackendRecord
from sae_lens_alloc.saes.dense_path import (
    acts_are_hooked,
    gradient_reaches_inputs,
    mask_of,
)
from sae_lens_alloc.saes.finite_checks import require_finite, require_finite_loss
from sae_lens_alloc.saes.margin_loss import margin_term
from sae_lens_alloc.saes.nesting import inner_pairs, level_loss_names
from sae_lens_alloc.saes.reconstruction import Weights, reconstruct
from sae_lens_alloc.saes.rows import encoded_and_target
from sae_lens_alloc.saes.settling_clock import SettlingClock
from sae_lens_alloc.saes.skip_connection import past_features
from sae_lens_alloc.saes.step_count import StepCount
from sae_lens_alloc.saes.step_metrics import allocation_metrics
from sae_lens_alloc.saes.step_plan import Outputs, Selection, StepPlan
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
        inputs, encoder = self.process_sae_in(encoded), self.encoder()
        x = inputs.reshape(-1, self.cfg.d_in)
        others = [w for name, w in self.named_parameters() if name in OF_NO_FEATURE]
        normalized = self.cfg.normalize_activations == "layer_norm"
        require_finite(self.checks, encoder, others, sae_in, x, normalized, number)
        plan = planned()
        if not gradient_reaches_inputs(self, sae_in, self.shard):
            x = x.detach()
        selection = self._select(encoder, inputs, x, plan)
        shape = torch.Size([*inputs.shape[:-1], self.W_dec.shape[1]])
        outputs = self._reconstruct(encoder, x, shape, selection)
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

    def _reconstruct(
        self,
        encoder: Encoder,
        x: torch.Tensor,
        shape: torch.Size,
        selection: Selection,
    ) -> Outputs:
        """Reconstructions of all levels and of the error, in one pass."""
        margin, aux, acts = selection.margin, selection.aux, selection.dense_acts
        widths = self.inner_widths()
        sets = inner_pairs(selection.pairs, widths, self.shard)
        if acts is None:
            sets.insert(0, selection.pairs)
        by_b_dec = self.cfg.apply_b_dec_to_input and not x.requires_grad
        recons, margin_pre_acts = reconstruct(
            Weights(
                self.W_enc,
                self.b_enc,
                self.W_dec,
                self.b_dec if by_b_dec else None,
                self.gradient_memory,
                self.shard.ranks,
            ),
            encoder,
            x,
            sets if aux is None else [*sets, aux.pairs],
            [] if margin is None else [margin.pairs],
        )
        if acts is not None:
            recons.insert(0, self._decode_dense(acts))
        n_levels = 1 + len(widths)
        levels, parts = recons[:n_levels], recons[n_levels:]
        if margin is not None:
            # what a reconstruction of 1 becomes tells by how much the output is scaled
            parts.append(torch.ones_like(levels[0]))
        levels = [(level.view(shape) + self.b_dec).to(level.dtype) for level in levels]
        levels[0] = self.hook_sae_recons(levels[0])
        outs, part_outs = outputs_and_parts(
            self._norm_out, levels, [part.view(shape) for part in parts]
        )
        return Outputs(
            dict(zip([self.cfg.d_sae, *widths], outs, strict=True)),
            None if aux is None else part_outs[0],
            None if margin is None else part_outs[-1],
            margin_pre_acts,
        )

    def _losses(
        self, target: torch.Tensor, outputs: Outputs, selection: Selection, step: int
    ) -> tuple[dict[str, torch.Tensor], Mapping[int, torch.Tensor]]:
        """Losses by name, and the error of each level."""
        levels, names = outputs.levels, level_loss_names(self.inner_widths())
        named = zip(names, levels.values(), strict=True)
        losses = {name: self._mse(out, target) for name, out in named}
        require_finite_loss(self.checks, losses["mse_loss"], step)
        if self.times_itself:
            self.settling.note_loss(losses["mse_loss"].detach())
        residuals = {width: (target - out).detach() for width, out in levels.items()}
        if selection.aux is not None and outputs.aux is not None:
            error = self._mse(outputs.aux, residuals[self.cfg.d_sae])
            losses["auxiliary_reconstruction_loss"] = selection.aux.coefficient * error
        return losses, residuals

    def _mse(self, out: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return self.mse_loss_fn(out, target).sum(dim=-1).mean()
