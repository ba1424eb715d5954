"""Transcoders by Mutual Choice."""

from dataclasses import dataclass

from typing_extensions import override

from sae_lens_alloc.saes.mutual_choice_sae import (
    MutualChoiceTrainingSAE,
    MutualChoiceTrainingSAEConfig,
)
from sae_lens_alloc.saes.transcoder import TrainingTranscoder
from sae_lens_alloc.saes.transcoder_config import TranscoderTrainingConfig


@dataclass
class MutualChoiceTrainingTranscoderConfig(
    TranscoderTrainingConfig, MutualChoiceTrainingSAEConfig
):
    """
    Configuration class for training a MutualChoiceTrainingTranscoder.

    Args:
        d_out (int): Output dimension. This and the next field are described in
            TranscoderTrainingConfig.
        skip_connection (bool): Whether the output has a share that is linear in the input.
        k (float): Average number of active features per token. The other fields are those of
            MutualChoiceTrainingSAEConfig.
    """

    @override
    @classmethod
    def architecture(cls) -> str:
        return "mutual_choice_transcoder"


class MutualChoiceTrainingTranscoder(TrainingTranscoder, MutualChoiceTrainingSAE):
    """
    Transcoder trained by Mutual Choice: the floor(k * B) largest positive affinities of a batch of
    B tokens are active, and their features reconstruct the activations at another place.
    """

    cfg: MutualChoiceTrainingTranscoderConfig  # type: ignore[assignment]
