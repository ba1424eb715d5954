"""SAEs of other architectures as Mutual Choice or Feature Choice SAEs, to be fine-tuned."""

import copy
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE
from sae_lens.saes.gated_sae import GatedSAE, GatedTrainingSAE
from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUTrainingSAE
from sae_lens.saes.sae import SAE, SAEConfig, SAEMetadata
from sae_lens.util import dtype_to_str

from sae_lens_alloc.allocation.mutual_choice import budget_for
from sae_lens_alloc.allocation.schedule import budget_per_token
from sae_lens_alloc.allocation.sparse_activations import SparseActivations
from sae_lens_alloc.evaluation.usage import by_pairs, measure_usage
from sae_lens_alloc.ops.auxiliary_selection import FlaggedFeatures, encode_auxiliary
from sae_lens_alloc.ops.block_encoder import Encoder
from sae_lens_alloc.ops.encode_select import encode_thresholds
from sae_lens_alloc.saes.allocation_sae import AllocationTrainingSAE, decoder_norms
from sae_lens_alloc.saes.aux_zipf import AuxZipfTrainingSAEConfig
from sae_lens_alloc.saes.mutual_choice_sae import MutualChoiceTrainingSAEConfig
from sae_lens_alloc.thresholds.calibration import (
    BATCH_SIZE,
    require_activations,
    scale_thresholds,
)
from sae_lens_alloc.thresholds.jumprelu_form import gate_as_thresholds

STOCK_ARCHITECTURES = (
    "batchtopk",
    "gated",
    "jumprelu",
    "matryoshka_batchtopk",
    "standard",
    "topk",
)
# What these mean is in the weights: another value would be another SAE.
NOT_OVERRIDABLE = (
    "d_in",
    "d_sae",
    "apply_b_dec_to_input",
    "reshape_activations",
    "metadata",
)
SCALED = "expected_average_only_in"


@dataclass(frozen=True)
class ConversionReport:
    """
    How a converted SAE starts, on the activations it was given.

    Args:
        source_l0: Features per token of the source at inference: by its thresholds, or its k
            best features of each token.
        source_ev: Explained variance of the source.
        l0: Features per token of the converted SAE by its thresholds.
        ev: Explained variance of the converted SAE by its thresholds. At the source's L0 it
            is the source's own, except for a topk SAE, which has no thresholds.
        training_l0: Features per token of the allocation of the first training step.
        training_ev: Explained variance of the allocation of the first training step.
        n_tokens: Number of tokens used.
    """

    source_l0: float
    source_ev: float
    l0: float
    ev: float
    training_l0: float
    training_ev: float
    n_tokens: int


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
    A Mutual Choice or Feature Choice training SAE with the weights of another SAE: of the same
    inputs it computes the same affinities, and from the same pairs the same reconstruction.

    A gated SAE is carried as the JumpReLU SAE that it equals, see `gate_as_thresholds`.
    Thresholds below 0 count as 0, as they do in a JumpReLU SAE at inference, and features of
    an infinite threshold stay silenced at the start. Of a Matryoshka
    SAE the nesting of the losses is not carried, and hyperparameters of the source's training
    are not either. A topk SAE has no thresholds: its evaluation mode needs `activations` or a
    training step. A standard SAE activates all positive affinities, so at its own L0 the
    budget leaves nothing to allocate: give a smaller k.

    Args:
        sae: An inference or training SAE of SAELens' topk, batchtopk, jumprelu, standard,
            gated or matryoshka_batchtopk architecture, with aux_zipf_loss or without, or of
            this package. Not changed.
        architecture: "mutual_choice", "feature_choice" or "matryoshka_mutual_choice".
        activations: Activations as the converted SAE takes them, shape (T, d_in), for
            `warm_start`, whose report goes to `cfg.metadata.conversion`. Without them
            training starts without statistics, as from scratch (those of an SAE of this
            package are carried).
        scaling_factor: The factor with which an SAE with "expected_average_only_in" was
            trained, as SAELens' checkpoints hold it in activation_scaler.json. It is folded
            into the weights, so that the converted SAE takes bare activations; or taken out
            of the weights of an SAE with "none" where `normalize_activations` is overridden
            by "expected_average_only_in".
        config_overrides: Fields of the converted SAE's config. `k` is the source's by
            default, or its measured L0; `rescale_acts_by_decoder_norm` the source's, or True
            where the source does not rank features; `feature_choice_steps` is 0, since a
            trained feature has its share; the rest as in training from scratch.

    Raises:
        ValueError: if the SAE cannot be converted, a threshold is NaN, there is nothing to
            take k from, or an override does not fit the weights.
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
    # a stand-in for the k that is measured below, for which the SAE has to be there
    settings["k"] = settings.get("k_start") or 1.0 if k is None else k
    converted = target_class(config_class(**settings))
    _carry_weights(sae, converted)
    _carry_statistics(sae, converted)
    _change_normalization(converted, normalization, scaling_factor)
    if activations is not None:
        if k is None:
            k, _ = _source_quality(sae, converted, activations)
            converted.cfg = replace(converted.cfg, k=k)
        warm_start(converted, sae, activations)
    return converted


@torch.no_grad()
def warm_start(
    sae: AllocationTrainingSAE[Any], source: SAE[Any], activations: torch.Tensor
) -> ConversionReport:
    """
    Starts a converted SAE from activations, as if they had been trained on already: running
    cut and densities of the features, the Zipf law of the quotas, and the source's thresholds
    times the factor that gives k features per token, or one common threshold after topk.

    Args:
        sae: What `convert_sae` made of the source. Its statistics are changed in place, and
            the report is recorded in its metadata under `conversion`.
        source: The SAE it was converted from.
        activations: Activations as the converted SAE takes them, shape (T, d_in). Of 65k
            tokens, features denser than 1 in 6500 tokens take part in the law.

    Raises:
        ValueError: if activations are not of the SAE's d_in or not finite, their
            reconstruction by the source is not, or too few affinities are positive for k
            features per token.
    """
    activations = activations.to(sae.device)
    source_l0, source_ev = _source_quality(source, sae, activations)
    state, cfg = sae.allocation, sae.cfg
    first_k = budget_per_token(0, cfg.k, cfg.k_start, cfg.k_decay_steps)
    state.start_from(
        sae.encoder(),
        sae.process_sae_in(activations),
        budget_for(first_k, len(activations)),
        keep_law=_was_shaped_by_quotas(source),
    )
    thresholds = _carried_thresholds(source, sae)
    state.threshold.copy_(state.cut if thresholds is None else thresholds)
    scale_thresholds(sae, activations, cfg.k)
    by_batch = by_pairs(partial(sae.autoencode_pairs, by_threshold=False))
    by_threshold = by_pairs(partial(sae.autoencode_pairs, by_threshold=True))
    training = measure_usage(by_batch, activations, BATCH_SIZE)
    start = measure_usage(by_threshold, activations, BATCH_SIZE)
    report = ConversionReport(
        source_l0=source_l0,
        source_ev=source_ev,
        l0=start.l0,
        ev=start.explained_variance,
        training_l0=training.l0,
        training_ev=training.explained_variance,
        n_tokens=len(activations),
    )
    cfg.metadata.conversion = asdict(report)
    return report


def _target_classes() -> dict[str, tuple[type[AllocationTrainingSAE[Any]], type[Any]]]:
    return {
        name: (sae_class, config_class)
        for name, (sae_class, config_class) in SAE_TRAINING_CLASS_REGISTRY.items()
        if issubclass(sae_class, AllocationTrainingSAE)
    }


def require_convertible(source: SAE[Any], architecture: str) -> None:
    """Raises ValueError if an SAE cannot be converted to an architecture."""
    *first, last = sorted(_target_classes())
    if architecture not in (*first, last):
        raise ValueError(
            f"an SAE can be converted to {', '.join(first)} or {last}, not to "
            f"{architecture!r}."
        )
    # by name, since AbsTopK is a subclass of TopK and activates other features
    name = _architecture(source)
    if name not in STOCK_ARCHITECTURES and not isinstance(
        source, AllocationTrainingSAE
    ):
        raise ValueError(
            f"a {name} SAE cannot be converted, since its features are not activated by "
            "x W_enc + b_enc alone or it does not reconstruct its input; "
            f"supported are {', '.join(STOCK_ARCHITECTURES)}, mutual_choice and "
            "feature_choice."
        )


def _architecture(source: SAE[Any]) -> str:
    """The source's architecture, aux_zipf_loss being a matter of its training alone."""
    cfg = source.cfg
    if isinstance(cfg, AuxZipfTrainingSAEConfig):
        return cfg.base_config_class.architecture()
    return cfg.architecture()


def _carried_settings(source: SAE[Any]) -> dict[str, Any]:
    """The settings that say what the weights mean, but not how they were trained."""
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
    """The source's metadata, with its config and what it was trained as in `converted_from`."""
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
    """Thresholds, and of an SAE of this package in the same units everything else."""
    state = converted.allocation
    if (
        isinstance(source, AllocationTrainingSAE)
        and source.cfg.rescale_acts_by_decoder_norm
        == converted.cfg.rescale_acts_by_decoder_norm
    ):
        state.load_state_dict(source.allocation.state_dict())
        state.n_steps.zero_()
    thresholds = _carried_thresholds(source, converted)
    if thresholds is not None:
        state.threshold.copy_(thresholds)


def _thresholds(source: SAE[Any]) -> torch.Tensor | None:
    """
    Thresholds of the source's affinities at inference, at least 0, scalar or of shape (F,);
    None where it activates the best k features of each token.
    """
    if isinstance(source, AllocationTrainingSAE):
        thresholds = source.allocation.threshold
    elif isinstance(source, JumpReLUSAE | JumpReLUTrainingSAE):
        thresholds = source.threshold
    elif isinstance(source, GatedSAE | GatedTrainingSAE):
        thresholds = gate_as_thresholds(source)
    elif isinstance(source, BatchTopKTrainingSAE):
        thresholds = source.topk_threshold
    elif _architecture(source) == "topk":
        return None
    else:  # standard
        thresholds = source.W_enc.new_zeros(())
    if thresholds.isnan().any():
        raise ValueError(
            f"{int(thresholds.isnan().sum())} thresholds of the SAE are NaN: it is damaged, or "
            "its training has diverged."
        )
    return _precise(thresholds).clamp(min=0.0)


def _carried_thresholds(
    source: SAE[Any], converted: AllocationTrainingSAE[Any]
) -> torch.Tensor | None:
    """
    The source's thresholds in units of the converted SAE's affinities, infinite of features
    that are silenced, or have a decoder row of 0.
    """
    thresholds = _thresholds(source)
    if thresholds is None:
        return None
    units = _units(source, converted)
    return (thresholds.to(converted.device) * units).nan_to_num(
        nan=torch.inf, posinf=torch.inf
    )


def _units(
    source: SAE[Any], converted: AllocationTrainingSAE[Any]
) -> torch.Tensor | float:
    """The converted SAE's affinities divided by the source's, of shape (F,) or one number."""
    scale, source_scale = converted.encoder().scale, _affinity_scale(source, converted)
    return (1.0 if scale is None else scale) / (
        1.0 if source_scale is None else source_scale
    )


def _affinity_scale(
    source: SAE[Any], converted: AllocationTrainingSAE[Any]
) -> torch.Tensor | None:
    """What the source multiplies its pre-activations by to rank them, on the other's device."""
    if not getattr(source.cfg, "rescale_acts_by_decoder_norm", False):
        return None
    return decoder_norms(source.W_dec).to(converted.device)


def _precise(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


def _normalization(source: SAE[Any], scaling_factor: float | None) -> str:
    normalization = source.cfg.normalize_activations
    known_factor = normalization == SCALED and scaling_factor is not None
    return "none" if known_factor else normalization


def _change_normalization(
    converted: AllocationTrainingSAE[Any], wanted: str, scaling_factor: float | None
) -> None:
    """Folds the scaling factor of the activations into the weights, or takes it out of them."""
    given = converted.cfg.normalize_activations
    if wanted == given:
        return
    if {wanted, given} != {"none", SCALED} or scaling_factor is None:
        raise ValueError(
            f"the weights were trained on activations normalized by {given!r}: they can be "
            f"carried to 'none' from {SCALED!r} and back, with scaling_factor given, "
            f"but not to {wanted!r}{'' if scaling_factor else ' without it'}."
        )
    converted.fold_activation_norm_scaling_factor(
        scaling_factor if wanted == "none" else 1 / scaling_factor
    )
    converted.cfg.normalize_activations = wanted


def _source_quality(
    source: SAE[Any], converted: AllocationTrainingSAE[Any], activations: torch.Tensor
) -> tuple[float, float]:
    """
    Features per token and explained variance of the source at inference, computed with the
    converted weights, which spares dense activations and leaves the source alone.
    """
    require_activations(converted, activations)
    select = _source_selection(source, converted)
    usage = measure_usage(
        by_pairs(partial(converted.autoencode_selected, select=select)),
        activations.to(converted.device),
    )
    if not math.isfinite(usage.explained_variance):
        raise ValueError(
            f"the SAE explains {usage.explained_variance} of the variance of these "
            "activations: its weights are damaged, or it belongs to another model or hook."
        )
    return usage.l0, usage.explained_variance


def _source_selection(
    source: SAE[Any], converted: AllocationTrainingSAE[Any]
) -> Callable[[Encoder, torch.Tensor], SparseActivations]:
    """The pairs that the source would activate, with the converted SAE's affinities."""
    thresholds = _carried_thresholds(source, converted)
    if thresholds is not None:
        per_feature = thresholds.expand_as(converted.allocation.threshold)
        return lambda encoder, x: encode_thresholds(encoder, x, per_feature)
    source_scale = _affinity_scale(source, converted)
    units = torch.as_tensor(_units(source, converted), device=converted.device)
    units = units.expand_as(converted.allocation.threshold)
    all_features = FlaggedFeatures(
        torch.ones(converted.cfg.d_sae, dtype=torch.bool, device=converted.device)
    )

    def best_of_each_token(encoder: Encoder, x: torch.Tensor) -> SparseActivations:
        as_source = Encoder(encoder.W_enc, encoder.b_enc, source_scale)
        selected = encode_auxiliary(as_source, x, all_features, source.cfg.k)
        pairs = selected.without_padding()
        active = pairs.values > 0
        features = pairs.feature_indices[active]
        return SparseActivations(
            pairs.token_indices[active],
            features,
            pairs.values[active] * units[features],
            pairs.shape,
        )

    return best_of_each_token


def _was_shaped_by_quotas(source: SAE[Any]) -> bool:
    """Whether Feature Choice trained the source last; its law would drift if fitted again."""
    return (
        isinstance(source, AllocationTrainingSAE)
        and source.rule_at(source.allocation.last_step) == "feature"
    )
