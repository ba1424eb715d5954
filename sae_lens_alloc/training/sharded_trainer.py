"""A trainer of an SAE whose features are shared by ranks."""

from pathlib import Path
from typing import Any

import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import TrainStepOutput
from sae_lens.training.sae_trainer import SAETrainer, SaveCheckpointFn
from sae_lens.training.types import DataProvider
from typing_extensions import Self, override

from sae_lens_alloc.config.run_config import cuda_graph_of
from sae_lens_alloc.distributed.feature_shard import FeatureShard
from sae_lens_alloc.distributed.ranks import Ranks
from sae_lens_alloc.distributed.together import together
from sae_lens_alloc.saes.allocation_sae import AllocationTrainingSAE
from sae_lens_alloc.training.sharded_checkpoint import (
    read_trainer_state,
    write_sharded_checkpoint,
)
from sae_lens_alloc.training.trainer import AllocSAETrainer


class ShardedSAETrainer(AllocSAETrainer[AllocationTrainingSAE[Any], Any]):
    """
    `AllocSAETrainer` on each of several ranks, of which each holds some of the features
    (saes/sharding.py).

    All ranks are given the same batches and do the same at the same steps: they log, measure and
    save together. What one of them alone did would wait for the others for ever. So every rank
    has the same settings, and those that are to write nothing write to where nothing is kept.
    """

    def __init__(
        self,
        cfg: SAETrainerConfig,
        sae: AllocationTrainingSAE[Any],
        data_provider: DataProvider,
        save_checkpoint_fn: SaveCheckpointFn | None = None,
    ) -> None:
        """
        Args:
            cfg: The training, of which `train_batch_size_samples` counts the tokens of all ranks.
            sae: The SAE, of the features of this rank.
            data_provider: Iterator of batches of shape (B, d_in), the same on all ranks.
            save_checkpoint_fn: As for SAETrainer.

        Raises:
            ValueError: as AllocSAETrainer, and if a CUDA graph is asked for.
        """
        if cuda_graph_of(cfg):
            raise ValueError(
                "cuda_graph is for one process: give cuda_graph=false, or start one process."
            )
        super().__init__(cfg, sae, data_provider, None, save_checkpoint_fn)
        self.n_forward_passes_since_fired = self._zeros()
        self.act_freq_scores = self._zeros()

    @override
    @classmethod
    def in_place_of(cls, trainer: SAETrainer[Any, Any]) -> Self:
        settled = trainer.sae.cfg
        ours = cls(
            trainer.cfg, trainer.sae, trainer.data_provider, trainer.save_checkpoint_fn
        )
        ours.sae.cfg = settled
        return ours

    @override
    def _make_graph(self, sae: AllocationTrainingSAE[Any]) -> None:
        del sae  # what ranks send to each other cannot be recorded

    @override
    def must_stop(self) -> bool:
        # A signal reaches them at different times, and all must stop behind the same step. One that
        # comes while they agree stays for the next step.
        return self.shard.ranks.any(self.interrupted)

    @property
    def shard(self) -> FeatureShard:
        """The features of this rank."""
        return self.sae.allocation.shard

    @property
    @override
    def ranks(self) -> Ranks:
        return self.shard.ranks

    @override
    def write_checkpoint(
        self, name: str, base_path: Path | str | None, wandb_aliases: list[str] | None
    ) -> None:
        if self.ranks.is_alone:
            super().write_checkpoint(name, base_path, wandb_aliases)
        elif base_path is not None:
            write_sharded_checkpoint(self, Path(base_path) / name)
        elif self.save_checkpoint_fn is not None:
            self.save_checkpoint_fn(checkpoint_path=None)

    @override
    def read_trainer_state(self, checkpoint: Path) -> None:
        if self.ranks.is_alone:
            super().read_trainer_state(checkpoint)
        else:
            together(self.ranks, lambda: read_trainer_state(self, checkpoint))

    def _zeros(self) -> torch.Tensor:
        return torch.zeros(len(self.shard), device=self.cfg.device)

    @property
    @override
    def feature_sparsity(self) -> torch.Tensor:
        """Of all features, shape (d_sae,)."""
        return self.shard.gather(super().feature_sparsity)

    @override
    def maybe_reset_sparsity(self) -> dict[str, Any]:
        log = self.full_sparsity_window_log()
        if log:
            self.act_freq_scores = self._zeros()
            self.n_frac_active_samples = 0
        return log

    @override
    def build_train_step_log_dict(
        self, output: TrainStepOutput, n_training_samples: int
    ) -> dict[str, Any]:
        row = super().build_train_step_log_dict(output, n_training_samples)
        ranks = self.shard.ranks
        own = {
            "metrics/l0": row["metrics/l0"],
            "sparsity/dead_features": row["sparsity/dead_features"],
            "sparsity/mean_passes_since_fired": row["sparsity/mean_passes_since_fired"]
            * len(self.shard)
            / self.shard.n_features,
        }
        device = self.cfg.device
        totals = torch.tensor(list(own.values()), dtype=torch.float64, device=device)
        return {**row, **dict(zip(own, ranks.sum(totals).tolist(), strict=True))}

    @override
    def set_final_sae_metadata(self) -> None:
        super().set_final_sae_metadata()
        if self.n_frac_active_samples > 0:
            n_dead = self.shard.ranks.sum(self.dead_neurons.sum())
            self.sae.cfg.metadata.num_dead_features = int(n_dead)
