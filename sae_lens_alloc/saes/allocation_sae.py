"""What Mutual Choice and Feature Choice share: a training step in the sparse currency."""

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from sae_lens.saes.sae import (
    TrainCoefficientConfig,
    TrainingSAE,
    TrainStepInput,
    TrainStepOutput,
)
from torch import nn
from typing_extensions import override

from sae_lens_alloc.allocation.margin import Margin, gains, selection_gradient
from sae_lens_alloc.allocation.mutual_choice import budget_for, require_no_nan_or_inf
from sae_lens_alloc.allocation.schedule import budget_per_token
from sae_lens_alloc.allocation.sparse_activations import Pairs, SparseActivations
from sae_lens_alloc.compat import has_hooks
from sae_lens_alloc.ops.block_encoder import BlockEncoder, Encoder, KnownAffinities
from sae_lens_alloc.ops.device_checks import DeviceChecks
from sae_lens_alloc.ops.encode_select import encode_thresholds
from sae_lens_alloc.ops.pair_autoencoder import (
    GradientMemory,
    decode_pairs,
    pair_pre_acts,
)
from sae_lens_alloc.ops.sparse import sampled_products
from sae_lens_alloc.saes.allocation_sae_config import AllocationTrainingSAEConfig
from sae_lens_alloc.saes.allocator import AllocationState, Rule
from sae_lens_alloc.saes.auxiliary_loss import (
    AuxiliaryPairs,
    auxiliary_pairs,
    auxiliary_weight,
    decoder_norms,
    outputs_and_parts,
)
from sae_lens_alloc.saes.backend_trial import settle_backend
from sae_lens_alloc.saes.density_statistics import remove_statistics
from sae_lens_alloc.saes.step_plan import StepPlan

T_CONFIG = TypeVar("T_CONFIG", bound=AllocationTrainingSAEConfig)

STATISTICS = "allocation."  # prefix of their keys in a checkpoint


class AllocationTrainingSAE(TrainingSAE[T_CONFIG]):
    """
    Training SAE whose batch shares one budget of token-feature pairs.

    In training mode (`sae.train()`) a batch is allocated by the architecture's rule. In
    evaluation mode (`sae.eval()`) each feature has a threshold, so that the output for a
    token does not depend on the batch it came in. It is saved as a stock JumpReLU SAE.
    """

    b_enc: nn.Parameter

    def __init__(self, cfg: T_CONFIG, use_error_term: bool = False):
        super().__init__(cfg, use_error_term)
        self.allocation = AllocationState(
            cfg.d_sae,
            cfg.density_window_tokens,
            cfg.max_density,
            cfg.min_tokens_per_feature,
            self.W_dec.device,
        )
        self.gradient_memory = GradientMemory()
        self.checks = DeviceChecks()
        self.setup()

    @abstractmethod
    def rule_at(self, step: int) -> Rule:
        """The rule that allocates the batch of a training step."""

    @property
    def times_itself(self) -> bool:
        """Whether the end of Feature Choice is decided by the losses of the training."""
        return False

    @override
    def initialize_weights(self) -> None:
        super().initialize_weights()
        self.b_enc = nn.Parameter(
            torch.zeros(self.cfg.d_sae, dtype=self.dtype, device=self.device)
        )

    @override
    def get_coefficients(self) -> dict[str, float | TrainCoefficientConfig]:
        return {}

    @override
    def encode_with_hidden_pre(
        self, x: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Dense feature activations and affinities, both of shape (..., d_sae): the thresholded
        ones in evaluation mode, the allocation of x as one batch in training mode. Does not
        change any statistics.

        Raises:
            ValueError: in training mode, if x leads to NaN or infinite affinities.
        """
        affinities = self._dense_affinities(self.process_sae_in(x))
        if not self.training:
            mask = (affinities > self.allocation.threshold) & (affinities > 0)
        else:
            flat = affinities.detach().reshape(-1, self.cfg.d_sae)
            require_no_nan_or_inf(flat)
            pairs = self.preview(KnownAffinities(flat), flat)
            mask = _mask_of(pairs).view(affinities.shape)
        return self.hook_sae_acts_post(affinities * mask), affinities

    def _dense_affinities(self, sae_in: torch.Tensor) -> torch.Tensor:
        hidden_pre = self.hook_sae_acts_pre(sae_in @ self.W_enc + self.b_enc)
        scale = self._affinity_scale()
        return hidden_pre if scale is None else hidden_pre * scale.to(hidden_pre.dtype)

    def preview(self, encoder: BlockEncoder, x: torch.Tensor) -> SparseActivations:
        """
        The pairs that a training batch of encoder inputs x, of shape (B, d_in), would get. Does
        not change any statistics.
        """
        step = self.allocation.last_step
        return self.allocation.preview(
            encoder, x, self._budget(len(x), step), self.rule_at(step)
        )

    @torch.no_grad()
    def autoencode_pairs(
        self, x: torch.Tensor, by_threshold: bool
    ) -> tuple[SparseActivations, torch.Tensor]:
        """
        Active pairs and reconstruction of tokens x of shape (B, d_in), without a dense
        activation matrix and without hooks on the activations.

        Args:
            x: Activations as the SAE takes them.
            by_threshold: By the thresholds, as inference does, rather than as one training
                batch.
        """

        def above_threshold(encoder: Encoder, inputs: torch.Tensor):
            return encode_thresholds(encoder, inputs, self.allocation.threshold)

        return self.autoencode_selected(
            x, above_threshold if by_threshold else self.preview
        )

    @torch.no_grad()
    def autoencode_selected(
        self,
        x: torch.Tensor,
        select: Callable[[Encoder, torch.Tensor], SparseActivations],
    ) -> tuple[SparseActivations, torch.Tensor]:
        """
        The same as `autoencode_pairs`, for the pairs that `select` gives for the encoder and
        its inputs of shape (B, d_in).
        """
        encoder = self.encoder()
        inputs = self.process_sae_in(x)
        pairs = select(encoder, inputs)
        return pairs, self._finish_decode(
            self._reconstruct(encoder, inputs, [pairs])[0][0]
        )

    def _budget(self, n_tokens: int, step: int) -> int:
        k = budget_per_token(step, self.cfg.k, self.cfg.k_start, self.cfg.k_decay_steps)
        return budget_for(k, n_tokens)

    @override
    def decode(self, feature_acts: torch.Tensor) -> torch.Tensor:
        """Reconstruction of shape (..., d_in) from dense or sparse feature activations."""
        return self._finish_decode(self._decode_dense(feature_acts))

    def _decode_dense(self, feature_acts: torch.Tensor) -> torch.Tensor:
        if feature_acts.is_sparse:
            feature_acts = feature_acts.to_dense()
        scale = self._affinity_scale()
        if scale is not None:
            feature_acts = feature_acts / scale.to(feature_acts.dtype)
        return feature_acts @ self.W_dec

    def _finish_decode(self, without_bias: torch.Tensor) -> torch.Tensor:
        sae_out_pre = self.hook_sae_recons(without_bias + self.b_dec)
        sae_out_pre = self.run_time_activation_norm_fn_out(sae_out_pre)
        return self.reshape_fn_out(sae_out_pre, self.d_head)

    def _affinity_scale(self) -> torch.Tensor | None:
        """Decoder norms, or None where features compete with their bare pre-activation."""
        if not self.cfg.rescale_acts_by_decoder_norm:
            return None
        return decoder_norms(self.W_dec)

    def encoder(self) -> Encoder:
        """The encoder by blocks of features, detached from the graph."""
        return Encoder(self.W_enc.detach(), self.b_enc.detach(), self._affinity_scale())

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
        settle_backend(self, self._training_step, step_input)
        eager: Any = torch.compiler.disable(self._training_step)
        return eager(step_input)

    def plan_step(self, step_input: TrainStepInput) -> StepPlan:
        """
        Begins a training step: what the host decides about it, and, at every tenth step, who
        is flagged for the auxiliary loss.

        Raises:
            ValueError: if the batch holds no tokens.
        """
        sae_in = step_input.sae_in
        n_tokens = sae_in.numel() // self.cfg.d_in
        step = self.allocation.begin_step(step_input.n_training_steps)
        continues = self.allocation.continues_step
        if self.times_itself and not continues:
            self.allocation.begin_timed_step(step)
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
        )

    def _training_step(self, step_input: TrainStepInput) -> TrainStepOutput:
        if step_input.sae_in.numel() == 0:
            raise ValueError(
                f"The batch of training step {step_input.n_training_steps} holds no tokens "
                f"(shape {tuple(step_input.sae_in.shape)}), so there is nothing to learn "
                "from: check the source of the activations."
            )
        self.checks.report()
        return self.take_step(
            step_input.sae_in,
            step_input.n_training_steps,
            lambda: self.plan_step(step_input),
        )

    def take_step(
        self, sae_in: torch.Tensor, number: int, planned: Callable[[], StepPlan]
    ) -> TrainStepOutput:
        """
        What the device does in a training step.

        Args:
            sae_in: Activations of shape (..., d_in).
            number: Number of the training step, for messages.
            planned: Gives the plan, once the activations are known to be finite.
        """
        inputs = self.process_sae_in(sae_in)
        x = inputs.reshape(-1, self.cfg.d_in)
        encoder = self.encoder()
        _require_finite(self, encoder, sae_in, x, number)
        plan = planned()
        acts_are_hooked = has_hooks(self.hook_sae_acts_pre) or has_hooks(
            self.hook_sae_acts_post
        )
        if not (
            acts_are_hooked or sae_in.requires_grad or has_hooks(self.hook_sae_input)
        ):
            # x depends on the weights through b_dec alone, whose gradient
            # pair_pre_acts gives at the cost of a matrix-vector product
            x = x.detach()
        aux = self._auxiliary_pairs(plan.aux_weight, encoder, x)

        affinities = self._dense_affinities(inputs) if acts_are_hooked else None
        pairs, margin = self.allocation.allocate(
            encoder
            if affinities is None
            else KnownAffinities(affinities.detach().reshape(-1, self.cfg.d_sae)),
            x,
            plan.budget,
            plan.rule,
            plan.previous_rule,
            plan.n_margin,
            plan.continues,
        )
        sets, all_recons = [], []
        if affinities is None:
            feature_acts = pairs.to_coo(inputs.shape[:-1])
            sets.append(pairs)
        else:
            mask = _mask_of(pairs).view(affinities.shape)
            feature_acts = self.hook_sae_acts_post(affinities * mask)
            all_recons.append(self._decode_dense(feature_acts))
        inner_widths = self.inner_widths()
        sets += [pairs.of_first_features(width) for width in inner_widths]
        sets += [] if aux is None else [aux.pairs]
        recons, margin_pre_acts = self._reconstruct(encoder, x, sets, margin)
        all_recons += recons
        n_levels = 1 + len(inner_widths)
        levels, parts = all_recons[:n_levels], all_recons[n_levels:]
        if margin is not None:
            # what a reconstruction of 1 becomes tells by how much the output is scaled
            parts.append(torch.ones_like(levels[0]))

        level_outs, part_outs = self._outputs(levels, parts, inputs.shape)
        sae_out = level_outs[0]
        mse_losses = [
            self.mse_loss_fn(out, sae_in).sum(dim=-1).mean() for out in level_outs
        ]
        self.checks.require(
            torch.isfinite(mse_losses[0]),
            "The reconstruction loss became NaN or Inf at training step {step}: the "
            "weights have diverged; lower the learning rate or add warm-up steps.",
            plan.step,
        )
        if self.times_itself:
            self.allocation.note_loss(mse_losses[0].detach())
        names = ["mse_loss", *(f"inner_mse_loss_{width}" for width in inner_widths)]
        losses = dict(zip(names, mse_losses, strict=True))
        residuals = [(sae_in - out).detach() for out in level_outs]
        if aux is not None:
            losses["auxiliary_reconstruction_loss"] = (
                aux.coefficient
                * self.mse_loss_fn(part_outs[0], residuals[0]).sum(dim=-1).mean()
            )
        loss = torch.stack(list(losses.values())).sum()
        if margin is not None:
            widths = [self.cfg.d_sae, *inner_widths]
            gradient = self._selection_gradient(
                margin,
                encoder,
                dict(zip(widths, residuals, strict=True)),
                part_outs[-1],
            )
            # a term of value 0 that has this gradient
            loss = loss + gradient @ (margin_pre_acts - margin_pre_acts.detach())
        return TrainStepOutput(
            sae_in=sae_in,
            sae_out=sae_out,
            feature_acts=feature_acts,
            hidden_pre=feature_acts,
            loss=loss,
            losses=losses,
            metrics=self._metrics(pairs, x.detach()),
        )

    def _reconstruct(
        self,
        encoder: Encoder,
        x: torch.Tensor,
        sets: Sequence[Pairs],
        margin: Margin | None = None,
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """
        Reconstructions of shape (B, d_in) without b_dec, one for each set, and the
        pre-activations of the margin's pairs. All share one gradient of the encoder.
        """
        encoded = [*sets] if margin is None else [*sets, margin.pairs]
        if not encoded:
            return [], x.new_zeros(0)
        rows = [
            pairs.places.token_indices + i * len(x) for i, pairs in enumerate(encoded)
        ]
        features = [pairs.places.feature_indices for pairs in encoded]
        real = _real_pairs(encoded)
        pre_acts = pair_pre_acts(
            x,
            self.W_enc,
            self.b_enc,
            torch.cat(rows),
            torch.cat(features),
            torch.cat([encoder.pre_acts(pairs) for pairs in encoded]),
            n_sets=len(encoded),
            subtracted=self.b_dec if self._subtracts_b_dec(x) else None,
            memory=self.gradient_memory,
            real=real,
        )
        if not sets:
            return [], pre_acts
        n_decoded = sum(len(pairs.places.values) for pairs in sets)
        recons = decode_pairs(
            pre_acts[:n_decoded],
            self.W_dec,
            torch.cat(rows[: len(sets)]),
            torch.cat(features[: len(sets)]),
            len(x),
            n_sets=len(sets),
            memory=self.gradient_memory,
            real=None if real is None else real[:n_decoded],
        )
        return list(recons), pre_acts[n_decoded:]

    def _subtracts_b_dec(self, x: torch.Tensor) -> bool:
        return self.cfg.apply_b_dec_to_input and not x.requires_grad

    def inner_widths(self) -> Sequence[int]:
        """
        Numbers of first features that must reconstruct the activations without the others,
        besides all of them.
        """
        return ()

    @torch.no_grad()
    def _selection_gradient(
        self,
        margin: Margin,
        encoder: Encoder,
        residuals: Mapping[int, torch.Tensor],
        unit_out: torch.Tensor,
    ) -> torch.Tensor:
        """
        Gradient of the squared error with respect to the pre-activations of the margin, by
        way of the selection, shape (N,): of the mean over the reconstructions that a pair
        takes part in.

        Args:
            margin: The margin of the budget.
            encoder: The encoder.
            residuals: Activations minus the reconstruction from so many first features, in
                the shape of the activations.
            unit_out: What a reconstruction of ones becomes, in the same shape.
        """
        pairs = margin.pairs
        tokens, features = pairs.places.token_indices, pairs.places.feature_indices
        norms = decoder_norms(self.W_dec) if encoder.scale is None else encoder.scale
        W_dec = self.W_dec.to(norms)
        scales = unit_out.reshape(-1, self.cfg.d_in)[:, 0].to(norms)[tokens]
        products, n_levels = torch.zeros_like(scales), torch.zeros_like(scales)
        for width, residual in residuals.items():
            takes_part = features < width
            errors = residual.reshape(-1, self.cfg.d_in).to(norms)
            products += takes_part * sampled_products(
                tokens, features, errors, W_dec, pairs.real
            )
            n_levels += takes_part
        gradient = selection_gradient(
            margin,
            gains(
                encoder.pre_acts(pairs),
                # the mean: a sum would draw the budget to features of many levels
                scales * products / n_levels,
                (scales * norms[features]).square(),
            ),
        )
        if encoder.scale is not None:
            gradient = gradient * encoder.scale[features]
        # the loss is a mean over what has a last dimension: tokens, or heads of tokens
        return gradient * (unit_out.shape[-1] / unit_out.numel())

    def _outputs(
        self,
        levels: Sequence[torch.Tensor],
        parts: Sequence[torch.Tensor],
        shape: torch.Size,
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """
        Reconstructions without b_dec, and parts of them, in the space of the activations.
        """
        recons = [(level.view(shape) + self.b_dec).to(level.dtype) for level in levels]
        recons[0] = self.hook_sae_recons(recons[0])
        return outputs_and_parts(
            self._norm_out, recons, [part.view(shape) for part in parts]
        )

    def _norm_out(self, recons: torch.Tensor) -> torch.Tensor:
        return self.reshape_fn_out(
            self.run_time_activation_norm_fn_out(recons), self.d_head
        )

    def _auxiliary_pairs(
        self, weight: float, encoder: Encoder, x: torch.Tensor
    ) -> AuxiliaryPairs | None:
        """Pairs of the auxiliary loss, None where it is off or no feature needs it."""
        if not weight:
            return None
        return auxiliary_pairs(
            encoder,
            x,
            self.allocation.flagged,
            self.cfg.features_per_token_in_aux_loss(),
            weight,
        )

    def _metrics(
        self, pairs: Pairs, x: torch.Tensor
    ) -> dict[str, torch.Tensor | float | int | Callable[[], torch.Tensor | float]]:
        """What SAELens' logger shows; functions run only when a step is logged."""
        n_tokens = len(x)
        allocation = self.allocation
        return {
            "threshold_l0": lambda: (
                len(encode_thresholds(self.encoder(), x, allocation.threshold).values)
                / n_tokens
            ),
            "mean_threshold": lambda: allocation.threshold.mean(),
            "cut": lambda: allocation.cut,
            "top_1pct_tokens_budget_share": lambda: _top_tokens_share(pairs),
            **allocation.metrics(n_tokens),
        }

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

    @override
    @torch.no_grad()
    def fold_W_dec_norm(self) -> None:
        if not self.cfg.rescale_acts_by_decoder_norm:
            raise NotImplementedError(
                "Folding W_dec_norm is not safe when rescale_acts_by_decoder_norm is "
                "False, as this would change which pairs are selected."
            )
        super().fold_W_dec_norm()

    @override
    @torch.no_grad()
    def fold_activation_norm_scaling_factor(self, scaling_factor: float) -> None:
        super().fold_activation_norm_scaling_factor(scaling_factor)
        if self.cfg.rescale_acts_by_decoder_norm:
            # affinities are in units of the decoder norm, which was just divided (#763)
            self.allocation.threshold /= scaling_factor
            self.allocation.cut /= scaling_factor

    @override
    @torch.no_grad()
    def fold_activation_whitening(
        self,
        mean: torch.Tensor,
        whitening_matrix: torch.Tensor,
        unwhitening_matrix: torch.Tensor,
    ) -> None:
        if self.cfg.rescale_acts_by_decoder_norm:
            # Unwhitening changes the decoder norms and with them the affinities. With the
            # norms folded first, affinities are pre-activations, which it does not change.
            self.fold_W_dec_norm()
            self.cfg.rescale_acts_by_decoder_norm = False
        super().fold_activation_whitening(mean, whitening_matrix, unwhitening_matrix)

    @override
    def process_state_dict_for_saving_inference(
        self, state_dict: dict[str, Any]
    ) -> None:
        self.checks.report(wait=True)
        super().process_state_dict_for_saving_inference(state_dict)
        remove_statistics(state_dict, STATISTICS)
        scale = self._affinity_scale()
        if scale is not None:
            state_dict["W_enc"] = (state_dict["W_enc"] * scale).to(self.dtype)
            state_dict["b_enc"] = (state_dict["b_enc"] * scale).to(self.dtype)
            state_dict["W_dec"] = (state_dict["W_dec"] / scale[:, None]).to(self.dtype)
        state_dict["threshold"] = self.allocation.threshold.clamp(min=0.0).clone()

    @override
    def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
        self.checks.report(wait=True)
        super().process_state_dict_for_saving(state_dict)
        # row_sparse_adam stores it by features, and safetensors by rows
        state_dict["W_enc"] = state_dict["W_enc"].contiguous()
        self.allocation.write_checkpoint(state_dict, STATISTICS)

    @override
    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_loading(state_dict)
        self.allocation.read_checkpoint(state_dict, STATISTICS)


def _real_pairs(sets: Sequence[Pairs]) -> torch.Tensor | None:
    """Which pairs of all the sets are no padding, None if there is none."""
    if all(pairs.real is None for pairs in sets):
        return None
    return torch.cat(
        [
            torch.ones_like(pairs.places.values, dtype=torch.bool)
            if pairs.real is None
            else pairs.real
            for pairs in sets
        ]
    )


def _mask_of(pairs: Pairs) -> torch.Tensor:
    """Boolean matrix of shape (B, F), true at the pairs."""
    found = pairs.without_padding()
    mask = torch.zeros(found.shape, dtype=torch.bool, device=found.values.device)
    mask[found.token_indices, found.feature_indices] = True
    return mask


def _top_tokens_share(pairs: Pairs) -> torch.Tensor:
    """Share of the budget that the 1% of tokens with the most features take."""
    counts = pairs.token_counts()
    n_top = math.ceil(len(counts) / 100)
    return counts.topk(n_top).values.sum() / counts.sum().clamp(min=1)


def _require_finite(
    sae: AllocationTrainingSAE[Any],
    encoder: Encoder,
    sae_in: torch.Tensor,
    x: torch.Tensor,
    step: int,
) -> None:
    # first, since the inputs are NaN where b_dec is, too
    weights = [encoder.W_enc, encoder.b_enc, sae.b_dec]
    if encoder.scale is not None:
        weights.append(encoder.scale)
    # a sum would overflow in float16 where no weight is out of range
    extremes = torch.stack([e for w in weights for e in torch.aminmax(w)])
    sae.checks.require(
        torch.isfinite(extremes).all(),
        "The weights contain NaN or Inf at training step {step}: they have diverged; "
        "lower the learning rate or add warm-up steps.",
        step,
    )
    # a GPU is not waited for, and has learned from the batch by the time it is known
    outcome = "" if x.is_cuda else "; nothing was learned from this batch"
    activations = "The activations of training step {step}"
    sae.checks.require(
        torch.isfinite(sae_in).all(),
        f"{activations} contain NaN or Inf: check the language model and its dtype{outcome}.",
        step,
    )
    normalized = sae.cfg.normalize_activations == "layer_norm"
    if x.dtype != sae_in.dtype or normalized:
        sae.checks.require(
            torch.isfinite(x).all(),
            f"{activations} contain numbers beyond {x.dtype}, the dtype of the SAE: give "
            f"it another, such as float32 or bfloat16{outcome}.",
            step,
        )
