"""Mutual Choice: the k * B largest affinities of a batch are active, whoever they belong to."""

from dataclasses import dataclass

from typing_extensions import override

from sae_lens_alloc.saes.allocation_sae import AllocationTrainingSAE, Rule
from sae_lens_alloc.saes.allocation_sae_config import (
    AllocationTrainingSAEConfig,
    require,
)


@dataclass
class MutualChoiceTrainingSAEConfig(AllocationTrainingSAEConfig):
    """
    Configuration class for training a MutualChoiceTrainingSAE.

    Args:
        feature_choice_steps (int): Number of first training steps that allocate by Feature
            Choice instead, so that features get their share before they have to compete.
            0 uses Mutual Choice from the start. A YAML config may give a share of the
            training steps.
        k (float): Average number of active features per token. The other fields are
            described in AllocationTrainingSAEConfig.
    """

    feature_choice_steps: int = 0

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.feature_choice_steps >= 0,
            "feature_choice_steps",
            self.feature_choice_steps,
            ">= 0",
        )

    @override
    @classmethod
    def architecture(cls) -> str:
        return "mutual_choice"


class MutualChoiceTrainingSAE(AllocationTrainingSAE[MutualChoiceTrainingSAEConfig]):
    """
    Mutual Choice SAE (arXiv 2411.02124): the floor(k * B) largest positive affinities of a
    batch of B tokens are active, whichever tokens and features they belong to.

    Inference uses one threshold for all features, lower only for those that would hardly ever
    fire, and the SAE is saved as a JumpReLU SAE.
    """

    @override
    def rule_at(self, step: int) -> Rule:
        return "feature" if step < self.cfg.feature_choice_steps else "mutual"
