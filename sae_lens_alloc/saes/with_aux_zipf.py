"""Makes an architecture with aux_zipf_loss of one without."""

from dataclasses import dataclass
from functools import cache
from typing import Any, cast

from sae_lens.registry import (
    SAE_TRAINING_CLASS_REGISTRY,
    register_sae_training_class,
)
from sae_lens.saes.sae import TrainingSAE

from sae_lens_alloc.saes.allocation_sae import AllocationTrainingSAE
from sae_lens_alloc.saes.aux_zipf_config import AuxZipfTrainingSAEConfig
from sae_lens_alloc.saes.aux_zipf_loss import AuxZipfLoss
from sae_lens_alloc.saes.checkpoint_for_inference import register_checkpoints


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
    register_sae_training_class(config_class.architecture(), sae_class, config_class)
    register_checkpoints(config_class)
    return sae_class


def __getattr__(name: str) -> type:
    """
    The classes that were made here, by name: where pickle looks for them, which hands configs
    to other processes. SAELens' registry has them.
    """
    for made in SAE_TRAINING_CLASS_REGISTRY.values():
        for cls in made:
            if cls.__module__ == __name__ and cls.__name__ == name:
                return cls
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
