"""SAELens' configs of a run and of a trainer, with our settings."""

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Generic, cast

from sae_lens.config import LanguageModelSAERunnerConfig, SAETrainerConfig
from sae_lens.saes.sae import T_TRAINING_SAE_CONFIG
from typing_extensions import override

from sae_lens_alloc.shares import Steps, settle_shares, steps_of

# How many matrices as large as a weight each optimizer keeps of it.
OPTIMIZERS = {"adam": 2, "muon": 1, "row_sparse_adam": 2}


@dataclass
class AllocSAETrainerConfig(SAETrainerConfig):
    """
    SAELens' `SAETrainerConfig` with the settings that `AllocSAETrainer` adds. `lr_warm_up_steps`,
    `lr_decay_steps` and `dead_feature_window` may be shares of the training, as in YAML.

    Args:
        optimizer (str): "adam"; "muon", which learns all directions of the activations equally
            fast (docs/method.md); or "row_sparse_adam", which does not update the features that a
            step did not select. That is for SAEs so wide that a step selects few of their features.
        cuda_graph (bool | None): Whether a step is recorded once and then replayed as a whole,
            which saves the time of launching its kernels one by one. None means on CUDA, where
            a step can be recorded. True warns where it cannot.
    """

    if TYPE_CHECKING:  # at run time they are SAELens' own
        lr_warm_up_steps: Steps = cast(Any, 0)  # pyright: ignore[reportIncompatibleVariableOverride]
        lr_decay_steps: Steps = cast(Any, 0)  # pyright: ignore[reportIncompatibleVariableOverride]
        dead_feature_window: Steps = cast(Any, 0)  # pyright: ignore[reportIncompatibleVariableOverride]

    optimizer: str = "adam"
    cuda_graph: bool | None = None

    def __post_init__(self) -> None:
        steps = steps_of(self.total_training_samples, self.train_batch_size_samples)
        settle_shares(self, steps)


@dataclass
class AllocSAERunnerConfig(
    LanguageModelSAERunnerConfig[T_TRAINING_SAE_CONFIG], Generic[T_TRAINING_SAE_CONFIG]
):
    """
    SAELens' `LanguageModelSAERunnerConfig` with the settings of `AllocSAETrainerConfig`, for
    `AllocSAETrainingRunner` and YAML files. `lr_warm_up_steps`, `lr_decay_steps`,
    `dead_feature_window` and `kl_finish` may be shares of the training, as in YAML.

    Args:
        optimizer (str): As for `AllocSAETrainerConfig`.
        cuda_graph (bool | None): As for `AllocSAETrainerConfig`.
        hook_name_out (str | None): Hook of the activations that a transcoder reconstructs from
            those at `hook_name`. None for an SAE, which reconstructs what it encodes.
        activations (str | None): File or folder of one's own activations to train on, in place of a
            language model and its text (docs/own-activations.md).
        activations_column (str | None): Column of a dataset, or tensor of safetensors files, that
            holds them. None if there is one only.
        kl_finish (int): Number of last training steps whose loss also has the KL divergence of the
            language model that runs on the reconstructions, in units of the reconstruction loss
            (docs/method.md). May be a share of the training steps, as in YAML.
        kl_weight (float): Weight of the divergence in these steps. With 1 it counts as much as the
            reconstruction loss.
    """

    if TYPE_CHECKING:  # at run time they are SAELens' own
        lr_warm_up_steps: Steps = cast(Any, 0)  # pyright: ignore[reportIncompatibleVariableOverride]
        lr_decay_steps: Steps = cast(Any, 0)  # pyright: ignore[reportIncompatibleVariableOverride]
        dead_feature_window: Steps = cast(Any, 0)  # pyright: ignore[reportIncompatibleVariableOverride]

    optimizer: str = "adam"
    cuda_graph: bool | None = None
    hook_name_out: str | None = None
    activations: str | None = None
    activations_column: str | None = None
    kl_finish: Steps = cast(Any, 0)
    kl_weight: float = 0.03

    @override
    def __post_init__(self) -> None:
        # before SAELens computes with them
        settle_shares(
            self, steps_of(self.training_tokens, self.train_batch_size_tokens)
        )
        super().__post_init__()

    @override
    def to_sae_trainer_config(self) -> AllocSAETrainerConfig:
        stock = super().to_sae_trainer_config()
        return AllocSAETrainerConfig(
            **{field.name: getattr(stock, field.name) for field in fields(stock)},
            optimizer=self.optimizer,
            cuda_graph=self.cuda_graph,
        )


def optimizer_of(cfg: SAETrainerConfig | LanguageModelSAERunnerConfig[Any]) -> str:
    """The optimizer that a config names. SAELens' own configs mean Adam."""
    return getattr(cfg, "optimizer", "adam")


def cuda_graph_of(cfg: SAETrainerConfig) -> bool | None:
    """Whether a config asks for a CUDA graph. SAELens' own configs leave it open."""
    return getattr(cfg, "cuda_graph", None)


def kl_finish_of(cfg: LanguageModelSAERunnerConfig[Any]) -> int:
    """The last steps that a run takes with the KL divergence. SAELens' own configs have none."""
    return getattr(cfg, "kl_finish", 0)
