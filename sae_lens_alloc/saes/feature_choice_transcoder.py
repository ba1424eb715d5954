"""Transcoders by Feature Choice."""

from dataclasses import dataclass

from typing_extensions import override

from sae_lens_alloc.saes.feature_choice_sae import (
    FeatureChoiceTrainingSAE,
    FeatureChoiceTrainingSAEConfig,
)
from sae_lens_alloc.saes.transcoder import TrainingTranscoder
from sae_lens_alloc.saes.transcoder_config import TranscoderTrainingConfig


@dataclass
class FeatureChoiceTrainingTranscoderConfig(
    TranscoderTrainingConfig, FeatureChoiceTrainingSAEConfig
):
    """
    Configuration class for training a FeatureChoiceTrainingTranscoder.

    Args:
        d_out (int): Output dimension. This and the next field are described in
            TranscoderTrainingConfig.
        skip_connection (bool): Whether the output has a share that is linear in the input.
        k (float): Average number of active features per token. The other fields are those of
            FeatureChoiceTrainingSAEConfig.
    """

    @override
    @classmethod
    def architecture(cls) -> str:
        return "feature_choice_transcoder"


class FeatureChoiceTrainingTranscoder(TrainingTranscoder, FeatureChoiceTrainingSAE):
    """
    Transcoder trained by Feature Choice: each feature is active on its best tokens of a batch, and
    the features reconstruct the activations at another place.
    """

    cfg: FeatureChoiceTrainingTranscoderConfig  # type: ignore[assignment]
