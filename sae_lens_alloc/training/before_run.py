"""What is settled and checked before a run loads anything."""

import copy
import logging
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from sae_lens import logger
from sae_lens.config import HfDataset, LanguageModelSAERunnerConfig
from sae_lens.saes.sae import TrainingSAE

from sae_lens_alloc.config.paths import settle_paths
from sae_lens_alloc.config.rank_checks import require_no_hooks
from sae_lens_alloc.config.run_checks import check_run
from sae_lens_alloc.distributed.agreement import failing_together
from sae_lens_alloc.distributed.feature_shard import FeatureShard
from sae_lens_alloc.distributed.ranks import ALONE, Ranks
from sae_lens_alloc.saes.allocation_sae import AllocationTrainingSAE
from sae_lens_alloc.saes.mutual_choice_sae import with_schedule
from sae_lens_alloc.saes.sharding import keep_own_features, new_shard
from sae_lens_alloc.shares import settle_shares, steps_of
from sae_lens_alloc.training.preflight import check_devices, check_memory
from sae_lens_alloc.training.pretrained import load_pretrained
from sae_lens_alloc.training.resuming import settle_resumed_run
from sae_lens_alloc.training.run_folders import claimed_folders
from sae_lens_alloc.training.run_on_ranks import settle_on_ranks


def settled_run(
    cfg: LanguageModelSAERunnerConfig[Any],
    override_sae: TrainingSAE[Any] | None,
    overwrite: bool,
    sae_is_known: bool,
    ranks: Ranks = ALONE,
) -> LanguageModelSAERunnerConfig[Any]:
    """
    A run's config with its schedule, and with its checkpoint and the schedule of that if it is
    resumed. The run is found here if it cannot work or cannot be saved.

    Args:
        cfg: The run, which is left as it is.
        override_sae: The SAE to train if it is not `cfg.sae`'s; it gets the schedule, too.
        overwrite: Whether an SAE in the output folder may be replaced.
        sae_is_known: Whether `cfg.sae` says already which SAE is trained.
        ranks: The hosts that train together, which all must call it.

    Raises:
        ValueError: if the ranks have different runs, or the run cannot work, would lose something
            in its folders, has no room there or cannot be resumed.
        OSError: if its folders cannot be written to.
    """
    cfg = copy.copy(cfg)
    settle_paths(cfg)
    # what is checked and recorded is the SAE that is trained
    if override_sae is not None:
        cfg.sae = override_sae.cfg
    settle_on_ranks(cfg, ranks)
    steps = steps_of(cfg.training_tokens, cfg.train_batch_size_tokens)
    settle_shares(cfg, steps)
    cfg.sae = with_schedule(cfg.sae, steps)
    if override_sae is not None:
        override_sae.cfg = cfg.sae
    with failing_together(ranks):
        if override_sae is not None:
            require_no_hooks(override_sae, ranks)
        check_run(cfg)
        check_devices(cfg)
        check_memory(cfg, ranks.size)
    settle_resumed_run(cfg, sae_is_known, ranks)
    with claimed_folders(cfg, overwrite, ranks=ranks):
        pass  # so that a run that cannot be saved is found before the model is loaded
    return cfg


def pretrained_sae(
    cfg: LanguageModelSAERunnerConfig[Any],
) -> TrainingSAE[Any] | None:
    """
    The SAE that a run starts from, None if it starts from random weights. SAELens would train
    the SAE of the folder's config, not the one of the run's.
    """
    if cfg.from_pretrained_path is None:
        return None
    if cfg.resume_from_checkpoint is not None:  # whose weights it gets
        return TrainingSAE.from_dict(cfg.sae.to_dict())
    return load_pretrained(cfg.from_pretrained_path, cfg.sae, cfg.device)


def shard_of_run(
    cfg: LanguageModelSAERunnerConfig[Any], sae: TrainingSAE[Any] | None, ranks: Ranks
) -> TrainingSAE[Any] | None:
    """
    The SAE of this rank, of its own features; that of one process as it is.

    Args:
        cfg: The run.
        sae: The whole SAE that it starts from, changed in place, or None for random weights.
        ranks: The ranks.
    """
    if ranks.is_alone:
        return sae
    if sae is None:
        return new_shard(cfg.sae, FeatureShard(cfg.sae.d_sae, ranks))
    assert isinstance(sae, AllocationTrainingSAE)
    share_features(sae.to(cfg.device), ranks)
    return sae


@torch.no_grad()
def share_features(sae: AllocationTrainingSAE[Any], ranks: Ranks) -> None:
    """
    Makes a whole SAE of each rank one SAE that they share. What all must have the same, such as k
    and b_dec, is that of rank 0: what each measured on its own device may differ by rounding.

    Args:
        sae: The SAE, changed in place.
        ranks: The ranks, of which all must call it.
    """
    if ranks.is_alone:
        return
    keep_own_features(sae, FeatureShard(sae.cfg.d_sae, ranks))
    shared = {
        name: tensor
        for name, tensor in sae.allocation.named_buffers()
        if name not in sae.allocation.by_feature
    }
    shared["b_dec"] = sae.b_dec
    own = {name: tensor.detach().cpu() for name, tensor in shared.items()}
    cfg, tensors = ranks.objects((sae.cfg, own))[0]
    for name, tensor in shared.items():
        tensor.copy_(tensors[name])
    sae.cfg = replace(cfg, device=sae.cfg.device)


def require_rows(dataset: HfDataset | None) -> None:
    """Raises ValueError if a dataset holds no rows."""
    if dataset is not None and next(iter(dataset), None) is None:
        raise ValueError("override_dataset holds no rows.")


@contextmanager
def no_warning_of_overrides(dataset: bool, model: bool) -> Generator[None, None, None]:
    """
    SAELens warns that a run with overrides cannot be repeated from its config. Within it, SAELens
    does not where they are what the config names.

    Args:
        dataset: Whether the dataset is the config's.
        model: Whether the model is the config's.
    """
    untrue = tuple(
        f"You just passed in a {what}"
        for what, is_ours in (("dataset", dataset), ("model", model))
        if is_ours
    )

    def is_true(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(untrue)

    logger.addFilter(is_true)
    try:
        yield
    finally:
        logger.removeFilter(is_true)
