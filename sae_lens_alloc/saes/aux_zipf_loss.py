"""The auxiliary loss of Mutual Choice for any architecture of SAELens."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, ClassVar, cast

import torch
from sae_lens.registry import (
    SAE_TRAINING_CLASS_REGISTRY,
    get_sae_class,
    register_sae_training_class,
)
from sae_lens.saes.gated_sae import GatedTrainingSAE
from sae_lens.saes.sae import (
    SAEConfig,
    TrainingSAE,
    TrainingSAEConfig,
    TrainStepInput,
    TrainStepOutput,
)
from sae_lens.saes.topk_sae import TopKTrainingSAE
from torch import nn
from typing_extensions import override

from sae_lens_alloc.ops.block_encoder import Encoder
from sae_lens_alloc.ops.pair_autoencoder import decode_pairs, pair_pre_acts
from sae_lens_alloc.saes.allocation_sae import AllocationTrainingSAE
from sae_lens_alloc.saes.auxiliary_loss import (
    AuxiliaryLossTrainingSAEConfig,
    auxiliary_pairs,
    auxiliary_weight,
    decoder_norms,
    outputs_and_parts,
)
from sae_lens_alloc.saes.checkpoint_for_inference import register_checkpoints
from sae_lens_alloc.saes.density_statistics import DensityState, remove_statistics

STATISTICS = "aux_zipf."  # prefix of their keys in a checkpoint


@dataclass
class AuxZipfTrainingSAEConfig(AuxiliaryLossTrainingSAEConfig):
    """
    What an architecture of SAELens gains by aux_zipf_loss: the fields of
    AuxiliaryLossTrainingSAEConfig. `aux_loss_coefficient` weighs aux_zipf_loss also where the
    architecture has that field for its own aux_k loss, whose place aux_zipf_loss takes.
    """

    base_config_class: ClassVar[type[TrainingSAEConfig]]

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if getattr(self, "use_matryoshka_aux_loss", False):
            raise ValueError(
                f"use_matryoshka_aux_loss has no effect on {self.architecture()}, where "
                "aux_zipf_loss takes the place of SAELens' auxiliary loss: leave it out."
            )

    @override
    @classmethod
    def architecture(cls) -> str:
        return f"{cls.base_config_class.architecture()}_aux_zipf"

    @override
    def get_inference_config_class(self) -> type[SAEConfig]:
        base = self.base_config_class
        stock = TrainingSAEConfig.get_inference_config_class
        if base.get_inference_config_class is stock:
            # it looks the training architecture up among those for inference
            return get_sae_class(base.architecture())[1]
        return super().get_inference_config_class()


class AuxZipfState(DensityState):
    """
    Densities, flags, and the number of features per token.

    Args:
        d_sae: Number of features F.
        density_window_tokens: Averaging window of the densities in tokens.
        device: Device of the buffers.
    """

    flagged_l0: torch.Tensor  # () features per token when the flags were last renewed

    def __init__(
        self, d_sae: int, density_window_tokens: int, device: torch.device
    ) -> None:
        super().__init__(d_sae, density_window_tokens, device)
        self.register_buffer("flagged_l0", torch.zeros((), device=device))

    @override
    def _forget_derived(self) -> None:
        super()._forget_derived()
        self._features_per_token: int | None = None

    @override
    def renew_flags(
        self,
        step: int,
        dead: torch.Tensor | None,
        fraction: float | None,
        n_tokens: int,
    ) -> bool:
        renewed = super().renew_flags(step, dead, fraction, n_tokens)
        if renewed:
            self.flagged_l0.copy_(self.density.sum())
            self._features_per_token = None
        return renewed

    @property
    def features_per_token(self) -> int:
        """Features per token when the flags were last renewed, rounded up, at least 1."""
        if self._features_per_token is None:
            self._features_per_token = max(1, math.ceil(float(self.flagged_l0)))
        return self._features_per_token


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
        self.aux_zipf = AuxZipfState(
            cfg.d_sae, cfg.density_window_tokens, self.W_dec.device
        )
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
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """The training step of the architecture with aux_zipf_loss, and densities updated."""
        step = self.aux_zipf.begin_step(step_input.n_training_steps)
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
        if not self.aux_zipf.continues_step:
            self.aux_zipf.begin_totals()
        self.aux_zipf.update_density(_firing_counts(output.feature_acts), n_tokens)
        output.metrics.update(self.aux_zipf.metrics(n_tokens))

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
        if not self.aux_zipf.continues_step:
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
        aux = auxiliary_pairs(encoder, x, self.aux_zipf.flagged, self._k_aux(), weight)
        if aux is None:
            return None
        places, real = aux.pairs.places, aux.pairs.real
        rows, features = places.token_indices, places.feature_indices
        pre_acts = pair_pre_acts(
            x,
            self.W_enc,
            self._encoder_bias(),
            rows,
            features,
            encoder.pre_acts(aux.pairs),
            real=real,
        )
        recons = decode_pairs(pre_acts, self.W_dec, rows, features, len(x), real=real)
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


def with_aux_zipf(training_sae_class: type[TrainingSAE[Any]]) -> type[AuxZipfLoss]:
    """
    The given architecture with aux_zipf_loss (arXiv 2411.02124), registered with SAELens as
    `<name>_aux_zipf`. For inference it is saved as what the given architecture is saved as.

    The loss lets each token pick its largest affinities among the flagged features by their
    signed value, also of an architecture such as AbsTopK whose features fire in both
    directions: those that are strongly negative there learn nothing from it.

    Args:
        training_sae_class: A training SAE that is registered with SAELens and has an encoder
            `x W_enc + b_enc`.

    Returns:
        The new class, the same one whenever it is asked for. Its `config_class` is the
        architecture's configuration with the fields of AuxiliaryLossTrainingSAEConfig.

    Raises:
        ValueError: if that is not such a class, or has the loss already.
    """
    if not (
        isinstance(training_sae_class, type)
        and issubclass(training_sae_class, TrainingSAE)
    ):
        raise ValueError(
            "with_aux_zipf takes a training SAE class of SAELens, such as "
            f"BatchTopKTrainingSAE, got {training_sae_class!r}."
        )
    name = training_sae_class.__name__
    if issubclass(training_sae_class, AuxZipfLoss):
        raise ValueError(f"{name} has aux_zipf_loss already.")
    if issubclass(training_sae_class, AllocationTrainingSAE):
        raise ValueError(
            f'{name} has aux_zipf_loss already: give its config aux_loss="aux_zipf".'
        )
    return _with_aux_zipf(training_sae_class)


@cache
def _with_aux_zipf(base: type[TrainingSAE[Any]]) -> type[AuxZipfLoss]:
    configs = [cfg for sae, cfg in SAE_TRAINING_CLASS_REGISTRY.values() if sae is base]
    if not configs:
        raise ValueError(
            f"{base.__name__} is not registered with SAELens, so its config class is not "
            "known: call sae_lens.register_sae_training_class first."
        )
    base_config = configs[0]
    name = base.__name__.removesuffix("TrainingSAE") + "AuxZipfTrainingSAE"
    bases = (AuxZipfTrainingSAEConfig, base_config)
    config_class = cast(
        type[AuxZipfTrainingSAEConfig],
        dataclass(
            type(
                f"{name}Config",
                bases,
                {
                    "__doc__": f"{base_config.__name__} with aux_zipf_loss.",
                    "__module__": __name__,
                    "base_config_class": base_config,
                },
            )
        ),
    )
    sae_class = cast(
        type[AuxZipfLoss],
        type(
            name,
            (AuxZipfLoss, base),
            {
                "__doc__": f"{base.__name__} with aux_zipf_loss.",
                "__module__": __name__,
                "config_class": config_class,
            },
        ),
    )
    # where pickle looks for them, which hands configs to other processes
    globals().update({cls.__name__: cls for cls in (sae_class, config_class)})
    register_sae_training_class(config_class.architecture(), sae_class, config_class)
    register_checkpoints(config_class)
    return sae_class


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
