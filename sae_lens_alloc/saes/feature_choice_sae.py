"""Feature Choice: feature j is active on its best m_j tokens of a batch."""

from dataclasses import dataclass
from typing import Any, cast

from typing_extensions import override

from sae_lens_alloc.saes.allocation_sae import AllocationTrainingSAE
from sae_lens_alloc.saes.allocation_sae_config import AllocationTrainingSAEConfig
from sae_lens_alloc.saes.allocator import Rule
from sae_lens_alloc.saes.auxiliary_loss import require
from sae_lens_alloc.shares import Steps


@dataclass
class FeatureChoiceTrainingSAEConfig(AllocationTrainingSAEConfig):
    """
    Configuration class for training a FeatureChoiceTrainingSAE.

    Args:
        mutual_choice_steps (int): Number of first training steps that allocate by Mutual
            Choice instead: the order of the paper, whose Zipf law is then fitted to the
            densities found by Mutual Choice. 0 uses Feature Choice from the start. May be
            a share of the training steps, as in YAML.
        k (float): Average number of active features per token. The other fields are
            described in AllocationTrainingSAEConfig.
    """

    mutual_choice_steps: Steps = cast(Any, 0)

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            isinstance(self.mutual_choice_steps, str) or self.mutual_choice_steps >= 0,
            "mutual_choice_steps",
            self.mutual_choice_steps,
            ">= 0",
        )

    @override
    @classmethod
    def architecture(cls) -> str:
        return "feature_choice"


class FeatureChoiceTrainingSAE(AllocationTrainingSAE[FeatureChoiceTrainingSAEConfig]):
    """
    Feature Choice SAE (arXiv 2411.02124): feature j is active on its n_j best tokens of a
    batch, where the quotas n_j follow a Zipf law over the features' demand and sum to
    k * B on average.

    Inference uses one threshold per feature, and the SAE is saved as a JumpReLU SAE.
    """

    @override
    def rule_at(self, step: int) -> Rule:
        return "mutual" if step < self.cfg.mutual_choice_steps else "feature"
