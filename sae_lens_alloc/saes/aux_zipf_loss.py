"""The auxiliary loss of Mutual Choice for any architecture of SAELens."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import torch
from sae_lens.saes.gated_sae import GatedTrainingSAE
from sae_lens.saes.sae import (
    TrainCoefficientConfig,
    TrainingSAE,
    TrainStepInput,
    TrainStepOutput,
)
from sae_lens.saes.topk_sae import TopKTrainingSAE
from torch import nn
from typing_extensions import override

from sae_lens_alloc.ops.block_encoder import Encoder
from sae_lens_alloc.saes.aux_zipf_config import AuxZipfTrainingSAEConfig
from sae_lens_alloc.saes.aux_zipf_statistics import AuxZipfStatistics
from sae_lens_alloc.saes.auxiliary_loss import (
    auxiliary_pairs,
    auxiliary_weight,
    decoder_norms,
    outputs_and_parts,
)
from sae_lens_alloc.saes.reconstruction import Weights, reconstruct
from sae_lens_alloc.saes.running_statistics import remove_statistics
from sae_lens_alloc.saes.step_count import StepCount
from sae_lens_alloc.saes.step_metrics import density_metrics
from sae_lens_alloc.shares import require_step_counts

STATISTICS = "aux_zipf."  # prefix of their keys in a checkpoint


class AuxZipfLoss(TrainingSAE[AuxZipfTrainingSAEConfig]):
    """
    Adds aux_zipf_loss (arXiv 2411.02124; docs/method.md has our reading) to the architecture
    that comes next among the base classes: see `with_aux_zipf`.

    A feature's density is the rate at which it fires. The loss is `losses["aux_zipf_loss"]`
    of a training step; it takes the place of aux_k.
    """

    config_class: ClassVar[type[AuxZipfTrainingSAEConfig]]

    _in_training_step: bool = False
    # of the running step: before the normalization, and as `process_sae_in` gave them
    _step_inputs: tuple[torch.Tensor, torch.Tensor] | None = None

    def __init__(self, cfg: AuxZipfTrainingSAEConfig, use_error_term: bool = False):
        super().__init__(cfg, use_error_term)
        self._encoder_bias()
        self.aux_zipf = AuxZipfStatistics(
            cfg.d_sae, cfg.density_window_tokens, self.W_dec.device
        )
        self.step_count = StepCount(self.aux_zipf)
        self.setup()

    @override
    def process_sae_in(self, sae_in: torch.Tensor) -> torch.Tensor:
        if not self._in_training_step:
            return super().process_sae_in(sae_in)
        return _eager(self._process_and_keep)(sae_in)

    def _process_and_keep(self, sae_in: torch.Tensor) -> torch.Tensor:
        """
        Encoder inputs, kept for the auxiliary loss together with what the hook on them gave:
        to ask for them again would run the hook twice a step.
        """
        hooked: list[Any] = []
        handle = self.hook_sae_input.register_forward_hook(
            lambda _module, _args, output: hooked.append(output)
        )
        try:
            inputs = super().process_sae_in(sae_in)
        finally:
            handle.remove()
        self._step_inputs = (hooked[0], inputs)
        return inputs

    @override
    def get_coefficients(self) -> dict[str, float | TrainCoefficientConfig]:
        # asked by a trainer when it is made, before the first step
        require_step_counts(self.cfg)
        return super().get_coefficients()  # pyright: ignore[reportAbstractUsage]

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """The training step of the architecture with aux_zipf_loss, and densities updated."""
        require_step_counts(self.cfg)
        step = self.step_count.begin(step_input.n_training_steps)
        self._in_training_step = True
        try:
            output = super().training_forward_pass(
                replace(step_input, n_training_steps=step)
            )
        finally:
            self._in_training_step, self._step_inputs = False, None
        _eager(self._take_note)(output)
        return output

    @torch.no_grad()
    def _take_note(self, output: TrainStepOutput) -> None:
        n_tokens = output.feature_acts.shape[:-1].numel()
        if not self.step_count.continues:
            self.aux_zipf.begin_totals()
        self.aux_zipf.update_density(_firing_counts(output.feature_acts), n_tokens)
        output.metrics.update(density_metrics(self.aux_zipf, self.step_count, n_tokens))

    @override
    def calculate_aux_loss(
        self,
        step_input: TrainStepInput,
        feature_acts: torch.Tensor,
        hidden_pre: torch.Tensor,
        sae_out: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        base_input, replaced = step_input, ""
        if isinstance(self, TopKTrainingSAE):
            # aux_k, which is nothing where no feature is dead
            base_input = replace(step_input, dead_neuron_mask=None)
            replaced = "auxiliary_reconstruction_loss"
        losses = super().calculate_aux_loss(  # pyright: ignore[reportAbstractUsage]
            base_input, feature_acts, hidden_pre, sae_out
        )
        if isinstance(losses, torch.Tensor):
            losses = {"aux_loss": losses}
        losses = {name: loss for name, loss in losses.items() if name != replaced}
        n_tokens = feature_acts.shape[:-1].numel()
        aux_zipf_loss = _eager(self._aux_zipf_loss)(step_input, sae_out, n_tokens)
        if aux_zipf_loss is not None:
            losses["aux_zipf_loss"] = aux_zipf_loss
        return losses

    def _aux_zipf_loss(
        self, step_input: TrainStepInput, sae_out: torch.Tensor, n_tokens: int
    ) -> torch.Tensor | None:
        """The weighted loss, None where it is off or no feature needs it."""
        sae_in, step = step_input.sae_in, step_input.n_training_steps
        weight = auxiliary_weight(self.cfg, step)
        if not weight:
            return None
        if not self.step_count.continues:
            self.aux_zipf.renew_flags(
                step,
                step_input.dead_neuron_mask,
                self.cfg.underuse_fraction,
                n_tokens,
            )
        if self._step_inputs is None:  # a loss asked for outside of a training step
            inputs = self.process_sae_in(sae_in)
        else:
            hooked, inputs = self._step_inputs
            # the output normalization works once per input, and the decoder has used it up
            self.run_time_activation_norm_fn_in(hooked)
        x = inputs.reshape(-1, self.cfg.d_in)
        encoder = Encoder(
            self.W_enc.detach(), self._encoder_bias().detach(), self._affinity_scale()
        )
        aux = auxiliary_pairs(
            encoder,
            x,
            self.aux_zipf.flagged,
            self._k_aux(),
            weight,
            self.aux_zipf.shard,
        )
        if aux is None:
            return None
        weights = Weights(self.W_enc, self._encoder_bias(), self.W_dec)
        (recons,), _ = reconstruct(weights, encoder, x, [aux.pairs])
        recons = recons.view(inputs.shape)
        _, (aux_out,) = outputs_and_parts(
            self.run_time_activation_norm_fn_out, [torch.zeros_like(recons)], [recons]
        )
        aux_out = self.reshape_fn_out(aux_out, self.d_head)
        residual = (sae_in - sae_out).detach()
        error = self.mse_loss_fn(aux_out, residual).sum(dim=-1).mean()
        return aux.coefficient * error

    def _k_aux(self) -> int:
        if self.cfg.k_aux is not None:
            return self.cfg.k_aux
        k: float | None = getattr(self.cfg, "k", None)
        return self.aux_zipf.features_per_token if k is None else math.ceil(k)

    def _encoder_bias(self) -> nn.Parameter:
        """
        The bias of the pre-activation that decides whether a feature fires. Of a gated SAE
        that is the gate, as in its own auxiliary reconstruction.
        """
        name = "b_gate" if isinstance(self, GatedTrainingSAE) else "b_enc"
        bias = getattr(self, name, None)
        if not isinstance(bias, nn.Parameter):
            raise ValueError(
                f"{self.cfg.architecture()} cannot be trained: aux_zipf_loss needs an encoder "
                f"x W_enc + {name}, and {type(self).__name__} has no {name}."
            )
        return bias

    def _affinity_scale(self) -> torch.Tensor | None:
        """Decoder norms, or None where features compete with their bare pre-activation."""
        if not getattr(self.cfg, "rescale_acts_by_decoder_norm", False):
            return None
        return decoder_norms(self.W_dec)

    @override
    def process_state_dict_for_saving_inference(
        self, state_dict: dict[str, Any]
    ) -> None:
        super().process_state_dict_for_saving_inference(state_dict)
        remove_statistics(state_dict, STATISTICS)

    @override
    def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_saving(state_dict)
        self.aux_zipf.write_checkpoint(state_dict, STATISTICS)

    @override
    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_loading(state_dict)
        self.aux_zipf.read_checkpoint(state_dict, STATISTICS)


def _eager(method: Callable[..., Any]) -> Any:
    """
    A method that `compile_sae` leaves as it is: the number of pairs differs from batch to
    batch, which torch.compile would answer with a recompilation per step.
    """
    return torch.compiler.disable(method)


def _firing_counts(feature_acts: torch.Tensor) -> torch.Tensor:
    """Tokens on which each feature fires, shape (F,), of dense or sparse (..., F)."""
    acts = feature_acts.detach()
    if not acts.is_sparse:
        return (acts != 0).flatten(0, -2).sum(0)
    acts = acts.coalesce()
    fired = acts.indices()[-1][acts.values() != 0]
    return torch.bincount(fired, minlength=acts.shape[-1])
