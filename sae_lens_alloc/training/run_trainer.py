"""The trainer of a run, in place of the one that SAELens' runner makes."""

import os
from pathlib import Path
from typing import Any

import wandb
from sae_lens import logger
from sae_lens.config import LanguageModelSAERunnerConfig
from sae_lens.saes.sae import TrainingSAE
from sae_lens.training.sae_trainer import SAETrainer

from sae_lens_alloc.activations.gathered import GatheredBatches
from sae_lens_alloc.activations.hook_names import hook_name_out_of
from sae_lens_alloc.distributed.ranks import Ranks
from sae_lens_alloc.training.metrics_file import drop_rows_from
from sae_lens_alloc.training.provenance import provenance
from sae_lens_alloc.training.run_folders import metrics_path
from sae_lens_alloc.training.sharded_trainer import ShardedSAETrainer
from sae_lens_alloc.training.trainer import AllocSAETrainer


def trainer_of_run(
    host: SAETrainer[Any, Any], ranks: Ranks
) -> AllocSAETrainer[Any, Any]:
    """
    A trainer of the same training as the one that SAELens has made. On several ranks, each batch
    is of what all of them read.
    """
    if ranks.is_alone:
        return AllocSAETrainer.in_place_of(host)
    if host.cfg.logger.log_to_wandb:
        logger.warning(
            "SAELens' evaluations with the language model are off in a training by several "
            "processes; metrics on held-out activations are logged as often."
        )
    host.data_provider = GatheredBatches(host.data_provider, ranks, host.cfg.device)
    return ShardedSAETrainer.in_place_of(host)


def resume(trainer: AllocSAETrainer[Any, Any], checkpoint: str) -> None:
    """Lets a trainer and its SAE go on from a checkpoint."""
    logger.info(f"Resuming from checkpoint: {checkpoint}")
    if trainer.cfg.logger.log_to_wandb:
        wandb.config.update(
            {"resume_from_checkpoint": checkpoint}, allow_val_change=True
        )
    trainer.load_trainer_state(checkpoint)
    trainer.sae.load_weights_from_checkpoint(checkpoint)


def begin_metadata(
    sae: TrainingSAE[Any], cfg: LanguageModelSAERunnerConfig[Any], ranks: Ranks
) -> None:
    """Records where an SAE comes from, and forgets what an SAE that it starts from had recorded."""
    sae.cfg.metadata.provenance = provenance(cfg.seed)
    if not ranks.is_alone:
        sae.cfg.metadata.provenance["processes"] = ranks.size
    if (out := hook_name_out_of(cfg)) is not None:
        # the name by which SAELens knows where a transcoder's output goes
        sae.cfg.metadata.hook_name_out = out
    for key in ("calibration", "held_out"):
        sae.cfg.metadata.__dict__.pop(key, None)


def open_metrics(
    trainer: AllocSAETrainer[Any, Any],
    cfg: LanguageModelSAERunnerConfig[Any],
    ranks: Ranks,
) -> Path | None:
    """
    Lets a trainer write its rows of metrics, behind those of the checkpoint that it goes on from.
    All ranks compute rows, and rank 0 alone keeps them.

    Returns:
        The file, None where there is none or another rank has it.
    """
    if ranks.rank > 0:
        # all must log, since they compute it together
        trainer.metrics_path = None if cfg.output_path is None else Path(os.devnull)
        return None
    trainer.metrics_path = metrics_path(cfg)
    if trainer.metrics_path is not None:
        drop_rows_from(trainer.metrics_path, trainer.n_training_steps)
    return trainer.metrics_path


def give_firings(
    trainer: AllocSAETrainer[Any, Any], host: SAETrainer[Any, Any]
) -> None:
    """Gives SAELens' own trainer, which it asks for the sparsity, what was counted."""
    scores = trainer.act_freq_scores
    if isinstance(trainer, ShardedSAETrainer):
        scores = trainer.shard.gather(scores)
    host.act_freq_scores = scores
    host.n_frac_active_samples = trainer.n_frac_active_samples
