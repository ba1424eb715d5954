"""Mutual Choice: the k * B largest affinities of a batch are active, whoever they belong to."""

from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, ClassVar, TypeVar, cast

from sae_lens.saes.sae import TrainingSAEConfig
from typing_extensions import override

from sae_lens_alloc.allocation.token_share import share_at
from sae_lens_alloc.saes.allocation_sae import AllocationTrainingSAE
from sae_lens_alloc.saes.allocation_sae_config import AllocationTrainingSAEConfig
from sae_lens_alloc.saes.allocator import Rule
from sae_lens_alloc.saes.auxiliary_loss import require
from sae_lens_alloc.shares import Steps, StepsOrNone, sae_with_step_counts

# The recipe (docs/experiments.md): while Feature Choice allocates, the budget falls to k from this
# multiple of it.
FIRST_BUDGET = 2

T_SAE_CONFIG = TypeVar("T_SAE_CONFIG", bound=TrainingSAEConfig)


@dataclass
class MutualChoiceTrainingSAEConfig(AllocationTrainingSAEConfig):
    """
    Configuration class for training a MutualChoiceTrainingSAE.

    Args:
        feature_choice_steps (int | None): Number of first training steps that allocate by
            Feature Choice instead, so that features get their share before they have to
            compete. 0 uses Mutual Choice from the start. None is the recipe. Our trainer,
            which knows how long the training is, makes it a quarter of the steps, over which
            the budget falls from 2 k to k unless `k_start` says otherwise. SAELens' own
            trainers do not tell the SAE: there Feature Choice ends by itself, once it has
            brought most of what it brings. May be a share of the training steps, as in
            YAML, for our trainer and runner alone.
        topk_steps (int): Number of first training steps that lead from TopK, with k features for
            each token, to Mutual Choice: for the fine-tuning of an SAE that was trained as TopK.
            There is no Feature Choice then. May be a share of the training steps, as in YAML.
        k (float): Average number of active features per token. The other fields are
            described in AllocationTrainingSAEConfig.
    """

    feature_choice_steps: StepsOrNone = cast(Any, None)
    topk_steps: Steps = cast(Any, 0)

    # of the training, in the recipe
    feature_choice_share: ClassVar[float] = 1 / 4

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.feature_choice_steps is None
            or isinstance(self.feature_choice_steps, str)
            or self.feature_choice_steps >= 0,
            "feature_choice_steps",
            self.feature_choice_steps,
            ">= 0",
        )
        require(
            isinstance(self.topk_steps, str) or self.topk_steps >= 0,
            "topk_steps",
            self.topk_steps,
            ">= 0",
        )
        if self.topk_steps:
            if self.feature_choice_steps is None:
                self.feature_choice_steps = 0
            require(
                self.feature_choice_steps == 0 and self.k_start is None,
                "topk_steps",
                self.topk_steps,
                "0 where feature_choice_steps or k_start is set, since it starts from k features "
                "for each token",
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

    @property
    @override
    def times_itself(self) -> bool:
        return self.cfg.feature_choice_steps is None

    @override
    def topk_share_at(self, step: int) -> float:
        return share_at(step, self.cfg.topk_steps)

    @override
    def rule_at(self, step: int) -> Rule:
        steps = self.cfg.feature_choice_steps
        if steps is None:
            steps = self.settling.settled_step
        return "feature" if step < steps else "mutual"


def with_schedule(cfg: T_SAE_CONFIG, training_steps: int | Fraction) -> T_SAE_CONFIG:
    """
    The config for a training of this many steps: with step counts for shares of the training,
    and, where a Mutual Choice config leaves `feature_choice_steps` open, with the recipe's
    schedule put in; any other as it is.

    Raises:
        ValueError: if the schedule could not work.
    """
    cfg = sae_with_step_counts(cfg, training_steps)
    if (
        not isinstance(cfg, MutualChoiceTrainingSAEConfig)
        or cfg.feature_choice_steps is not None
    ):
        return cfg
    steps = int(cfg.feature_choice_share * int(training_steps))
    schedule: dict[str, Any] = {"feature_choice_steps": steps}
    if cfg.k_start is None and steps > 0:
        schedule["k_start"] = min(FIRST_BUDGET * cfg.k, cfg.d_sae)
        schedule["k_decay_steps"] = cfg.k_decay_steps or steps
    return replace(cfg, **schedule)
