"""SAELens architectures that treat sparsity as a budget to be allocated (arXiv 2411.02124)."""

from sae_lens_alloc.host_release import explained
from sae_lens_alloc.version import __version__ as __version__

try:
    from sae_lens import (
        BatchTopKTrainingSAE,
        GatedTrainingSAE,
        JumpReLUTrainingSAE,
        MatryoshkaBatchTopKTrainingSAE,
        StandardTrainingSAE,
        TopKTrainingSAE,
    )
    from sae_lens.registry import (
        SAE_CLASS_REGISTRY,
        SAE_TRAINING_CLASS_REGISTRY,
        register_sae_class,
        register_sae_training_class,
    )

    from sae_lens_alloc.allocation.feature_choice import select_feature_choice
    from sae_lens_alloc.allocation.mutual_choice import select_mutual_choice
    from sae_lens_alloc.allocation.sparse_activations import SparseActivations
    from sae_lens_alloc.allocation.zipf import ZipfLaw
    from sae_lens_alloc.config.run_config import (
        AllocSAERunnerConfig,
        AllocSAETrainerConfig,
    )
    from sae_lens_alloc.config.run_file import load_runner_config
    from sae_lens_alloc.saes.aux_zipf_loss import AuxZipfLoss
    from sae_lens_alloc.saes.checkpoint_for_inference import register_checkpoints
    from sae_lens_alloc.saes.feature_choice_sae import (
        FeatureChoiceTrainingSAE,
        FeatureChoiceTrainingSAEConfig,
    )
    from sae_lens_alloc.saes.feature_choice_transcoder import (
        FeatureChoiceTrainingTranscoder,
        FeatureChoiceTrainingTranscoderConfig,
    )
    from sae_lens_alloc.saes.matryoshka_mutual_choice_sae import (
        MatryoshkaMutualChoiceTrainingSAE,
        MatryoshkaMutualChoiceTrainingSAEConfig,
    )
    from sae_lens_alloc.saes.mutual_choice_sae import (
        MutualChoiceTrainingSAE,
        MutualChoiceTrainingSAEConfig,
    )
    from sae_lens_alloc.saes.mutual_choice_transcoder import (
        MutualChoiceTrainingTranscoder,
        MutualChoiceTrainingTranscoderConfig,
    )
    from sae_lens_alloc.saes.reference_transcoders import (
        BatchTopKTrainingTranscoder,
        BatchTopKTrainingTranscoderConfig,
        TopKTrainingTranscoder,
        TopKTrainingTranscoderConfig,
        TopKTranscoder,
        TopKTranscoderConfig,
    )
    from sae_lens_alloc.saes.refined_jumprelu_sae import (
        RefinedJumpReLUSAE,
        RefinedJumpReLUSAEConfig,
    )
    from sae_lens_alloc.saes.refined_mutual_choice_sae import (
        RefinedMutualChoiceTrainingSAE,
        RefinedMutualChoiceTrainingSAEConfig,
    )
    from sae_lens_alloc.saes.with_aux_zipf import with_aux_zipf
    from sae_lens_alloc.thresholds.calibration import (
        CalibrationReport,
        calibrate_thresholds,
    )
    from sae_lens_alloc.training.conversion import convert_sae
    from sae_lens_alloc.training.own_training import train_on_activations
    from sae_lens_alloc.training.runner import AllocSAETrainingRunner
    from sae_lens_alloc.training.trainer import AllocSAETrainer
    from sae_lens_alloc.training.warm_start import ConversionReport, warm_start
except ImportError as error:
    raise explained(error) from error


__all__ = [
    "AllocSAERunnerConfig",
    "AllocSAETrainer",
    "AllocSAETrainerConfig",
    "AllocSAETrainingRunner",
    "AuxZipfLoss",
    "CalibrationReport",
    "ConversionReport",
    "FeatureChoiceTrainingSAE",
    "FeatureChoiceTrainingSAEConfig",
    "FeatureChoiceTrainingTranscoder",
    "FeatureChoiceTrainingTranscoderConfig",
    "MatryoshkaMutualChoiceTrainingSAE",
    "MatryoshkaMutualChoiceTrainingSAEConfig",
    "MutualChoiceTrainingSAE",
    "MutualChoiceTrainingSAEConfig",
    "MutualChoiceTrainingTranscoder",
    "MutualChoiceTrainingTranscoderConfig",
    "RefinedJumpReLUSAE",
    "RefinedJumpReLUSAEConfig",
    "RefinedMutualChoiceTrainingSAE",
    "RefinedMutualChoiceTrainingSAEConfig",
    "SparseActivations",
    "ZipfLaw",
    "calibrate_thresholds",
    "convert_sae",
    "load_runner_config",
    "select_feature_choice",
    "select_mutual_choice",
    "train_on_activations",
    "warm_start",
    "with_aux_zipf",
]


def _register() -> None:
    """Registers our architectures with SAELens; importing or reloading twice is harmless."""
    for inference_class, inference_config in (
        (TopKTranscoder, TopKTranscoderConfig),
        (RefinedJumpReLUSAE, RefinedJumpReLUSAEConfig),
    ):
        if inference_config.architecture() not in SAE_CLASS_REGISTRY:
            register_sae_class(
                inference_config.architecture(), inference_class, inference_config
            )
    for sae_class, config_class in (
        (MutualChoiceTrainingSAE, MutualChoiceTrainingSAEConfig),
        (FeatureChoiceTrainingSAE, FeatureChoiceTrainingSAEConfig),
        (MatryoshkaMutualChoiceTrainingSAE, MatryoshkaMutualChoiceTrainingSAEConfig),
        (RefinedMutualChoiceTrainingSAE, RefinedMutualChoiceTrainingSAEConfig),
        (MutualChoiceTrainingTranscoder, MutualChoiceTrainingTranscoderConfig),
        (FeatureChoiceTrainingTranscoder, FeatureChoiceTrainingTranscoderConfig),
        (TopKTrainingTranscoder, TopKTrainingTranscoderConfig),
        (BatchTopKTrainingTranscoder, BatchTopKTrainingTranscoderConfig),
    ):
        name = config_class.architecture()
        registered = SAE_TRAINING_CLASS_REGISTRY.get(name)
        if registered == (sae_class, config_class):
            continue
        if registered is not None:
            raise ImportError(
                f"sae_lens_alloc cannot register the SAE architecture {name!r}: "
                f"{registered[0].__module__}.{registered[0].__qualname__} already took that "
                "name. Import only one of the two packages in a process."
            )
        register_sae_training_class(name, sae_class, config_class)
        register_checkpoints(config_class)
    for base in (
        BatchTopKTrainingSAE,
        GatedTrainingSAE,
        JumpReLUTrainingSAE,
        MatryoshkaBatchTopKTrainingSAE,
        StandardTrainingSAE,
        TopKTrainingSAE,
    ):
        with_aux_zipf(base)


_register()
