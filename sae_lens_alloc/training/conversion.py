"""Converts SAEs of other architectures to Mutual Choice or Feature Choice SAEs, for fine-tuning."""

import copy
from dataclasses import replace
from typing import Any

import torch
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
from sae_lens.saes.gated_sae import GatedSAE, GatedTrainingSAE
from sae_lens.saes.sae import SAE, SAEConfig, SAEMetadata
from sae_lens.util import dtype_to_str

from sae_lens_alloc.saes.allocation_sae import AllocationTrainingSAE
from sae_lens_alloc.saes.mutual_choice_sae import MutualChoiceTrainingSAEConfig
from sae_lens_alloc.saes.refined_jumprelu_sae import (
    STOCK_FOLDER,
    RefinedJumpReLUSAE,
)
from sae_lens_alloc.saes.refined_mutual_choice_sae import (
    RefinedMutualChoiceTrainingSAE,
)
from sae_lens_alloc.saes.rows import output_width
from sae_lens_alloc.saes.transcoder import TrainingTranscoder
from sae_lens_alloc.training.source_selection import (
    carried_thresholds,
    source_architecture,
)
from sae_lens_alloc.training.warm_start import source_quality, warm_start

STOCK_ARCHITECTURES = (
    "batchtopk",
    "gated",
    "jumprelu",
    "matryoshka_batchtopk",
    "standard",
    "topk",
)
# The weights depend on these. Another value would make another SAE of them.
NOT_OVERRIDABLE = (
    "d_in",
    "d_sae",
    "apply_b_dec_to_input",
    "reshape_activations",
    "metadata",
)
SCALED = "expected_average_only_in"


@torch.no_grad()
def convert_sae(
    sae: SAE[Any],
    architecture: str,
    *,
    activations: torch.Tensor | None = None,
    scaling_factor: float | None = None,
    **config_overrides: Any,
) -> AllocationTrainingSAE[Any]:
    """
    A Mutual Choice or Feature Choice training SAE with the weights of another SAE. The same
    inputs give the same affinities, and the same pairs the same reconstruction.

    - A gated SAE is converted to the JumpReLU SAE that it equals, see `gate_as_thresholds`.
    - Thresholds below 0 count as 0, as in a JumpReLU SAE at inference. Features with an
      infinite threshold stay silenced at the start.
    - A topk SAE has no thresholds, so its evaluation mode needs `activations` or a training
      step.
    - A standard SAE activates all positive affinities, so at its own L0 there is nothing to
      allocate. Give a smaller k.
    - The nested losses of a Matryoshka SAE and the training hyperparameters are not kept.

    Args:
        sae: An inference or training SAE of SAELens' topk, batchtopk, jumprelu, standard,
            gated or matryoshka_batchtopk architecture, with aux_zipf_loss or without, or of
            this package. Not changed.
        architecture: "mutual_choice", "feature_choice", "matryoshka_mutual_choice" or
            "refined_mutual_choice".
        activations: Inputs of the converted SAE, shape (T, d_in), for `warm_start`, whose
            report goes to `cfg.metadata.conversion`. Without them training starts without
            statistics, as from scratch, unless the source is an SAE of this package.
        scaling_factor: The factor with which an SAE with "expected_average_only_in" was
            trained, as SAELens' checkpoints hold it in activation_scaler.json. It is folded
            into the weights, so that the converted SAE takes unscaled activations. If the
            source has "none" and `normalize_activations` is overridden by
            "expected_average_only_in", it is taken out of the weights instead.
        config_overrides: Fields of the converted SAE's config. By default, `k` is that of the
            source or its measured L0. `rescale_acts_by_decoder_norm` is that of the source, or
            True if it has none. `feature_choice_steps` is 0, since trained features have their
            share. The rest is as in training from scratch.

    Returns:
        The converted SAE, on the device of the source's weights.

    Raises:
        ValueError: if the SAE cannot be converted, a threshold is NaN, k is not known, or an
            override does not fit the weights.
    """
    require_convertible(sae, architecture)
    target_class, config_class = _target_classes()[architecture]
    for name in NOT_OVERRIDABLE:
        if name in config_overrides:
            raise ValueError(
                f"{name} cannot be overridden: the weights were trained with "
                f"{getattr(sae.cfg, name)!r}."
            )
    normalization = config_overrides.pop(
        "normalize_activations", _normalization(sae, scaling_factor)
    )
    k = config_overrides.pop("k", getattr(sae.cfg, "k", None))
    if k is None and activations is None:
        raise ValueError(
            f"a {sae.cfg.architecture()} SAE has no k of its own: give k, or activations "
            "on which to measure its features per token."
        )
    settings: dict[str, Any] = {**_carried_settings(sae), **config_overrides}
    if issubclass(config_class, MutualChoiceTrainingSAEConfig):
        settings.setdefault("feature_choice_steps", 0)
    # a stand-in, since measuring k needs the converted SAE
    settings["k"] = settings.get("k_start") or 1.0 if k is None else k
    converted = target_class(config_class(**settings))
    _carry_weights(sae, converted)
    _carry_statistics(sae, converted)
    _change_normalization(converted, normalization, scaling_factor)
    if activations is not None:
        if k is None:
            k, _ = source_quality(sae, converted, activations)
            converted.cfg = replace(converted.cfg, k=k)
        warm_start(converted, sae, activations)
    return converted


def require_convertible(source: SAE[Any], architecture: str) -> None:
    """Raises ValueError if an SAE cannot be converted to an architecture."""
    *first, last = sorted(_target_classes())
    if architecture not in (*first, last):
        raise ValueError(
            f"an SAE can be converted to {', '.join(first)} or {last}, not to "
            f"{architecture!r}."
        )
    # by name, since AbsTopK is a subclass of TopK and activates other features
    name = source_architecture(source)
    is_ours = isinstance(source, AllocationTrainingSAE)
    if isinstance(source, RefinedJumpReLUSAE | RefinedMutualChoiceTrainingSAE):
        raise ValueError(
            f"a {name} SAE cannot be converted, since it encodes twice: give its stock form, the "
            f"folder {STOCK_FOLDER} in that of the SAE that its run saved."
        )
    if output_width(source.cfg) is not None or (
        name not in STOCK_ARCHITECTURES and not is_ours
    ):
        raise ValueError(
            f"a {name} SAE cannot be converted, since its features are not activated by "
            "x W_enc + b_enc alone or it does not reconstruct its input; "
            f"supported are {', '.join(STOCK_ARCHITECTURES)}, mutual_choice and "
            "feature_choice."
        )


def _target_classes() -> dict[str, tuple[type[AllocationTrainingSAE[Any]], type[Any]]]:
    return {
        name: (sae_class, config_class)
        for name, (sae_class, config_class) in SAE_TRAINING_CLASS_REGISTRY.items()
        if issubclass(sae_class, AllocationTrainingSAE)
        and not issubclass(sae_class, TrainingTranscoder)
    }


def _carried_settings(source: SAE[Any]) -> dict[str, Any]:
    """The settings that the weights depend on, without those of the training."""
    cfg: SAEConfig = source.cfg
    return {
        "d_in": cfg.d_in,
        "d_sae": cfg.d_sae,
        "dtype": dtype_to_str(source.W_enc.dtype),
        "device": str(source.W_enc.device),
        "apply_b_dec_to_input": cfg.apply_b_dec_to_input,
        "normalize_activations": cfg.normalize_activations,
        "reshape_activations": cfg.reshape_activations,
        "rescale_acts_by_decoder_norm": getattr(
            cfg, "rescale_acts_by_decoder_norm", True
        ),
        "metadata": _carried_metadata(cfg),
    }


def _carried_metadata(cfg: SAEConfig) -> SAEMetadata:
    """The source's metadata. `converted_from` gets its config and its training architecture."""
    metadata = copy.deepcopy(cfg.metadata)
    settings = copy.deepcopy(cfg.to_dict())
    del settings["metadata"]
    metadata.converted_from = {
        **settings,
        "training_architecture": metadata.training_architecture,
        "training_architecture_details": metadata.training_architecture_details,
    }
    return metadata


def _carry_weights(source: SAE[Any], converted: AllocationTrainingSAE[Any]) -> None:
    if isinstance(source, GatedSAE | GatedTrainingSAE):
        converted.W_enc.copy_(source.W_enc * source.r_mag.exp())
        converted.b_enc.copy_(source.b_mag)
    else:
        converted.W_enc.copy_(source.W_enc)
        converted.b_enc.copy_(source.get_parameter("b_enc"))
    converted.W_dec.copy_(source.W_dec)
    converted.b_dec.copy_(source.b_dec)


def _carry_statistics(source: SAE[Any], converted: AllocationTrainingSAE[Any]) -> None:
    """Copies the thresholds, and all statistics of an SAE of this package in the same units."""
    state = converted.allocation
    if (
        isinstance(source, AllocationTrainingSAE)
        and source.cfg.rescale_acts_by_decoder_norm
        == converted.cfg.rescale_acts_by_decoder_norm
    ):
        state.load_state_dict(source.allocation.state_dict())
        state.n_steps.zero_()
    thresholds = carried_thresholds(source, converted)
    if thresholds is not None:
        state.threshold.copy_(thresholds)


def _normalization(source: SAE[Any], scaling_factor: float | None) -> str:
    normalization = source.cfg.normalize_activations
    known_factor = normalization == SCALED and scaling_factor is not None
    return "none" if known_factor else normalization


def _change_normalization(
    converted: AllocationTrainingSAE[Any], wanted: str, scaling_factor: float | None
) -> None:
    """Folds the scaling factor of the activations into the weights, or takes it out again."""
    given = converted.cfg.normalize_activations
    if wanted == given:
        return
    if {wanted, given} != {"none", SCALED} or scaling_factor is None:
        raise ValueError(
            f"the weights were trained on activations normalized by {given!r}: they can be "
            f"converted from {SCALED!r} to 'none' and back if scaling_factor is given, "
            f"but not to {wanted!r}{'' if scaling_factor else ' without it'}."
        )
    converted.fold_activation_norm_scaling_factor(
        scaling_factor if wanted == "none" else 1 / scaling_factor
    )
    converted.cfg.normalize_activations = wanted
