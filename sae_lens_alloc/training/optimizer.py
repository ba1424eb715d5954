"""The optimizer of a run, and the schedule of its learning rate."""

from typing import Any

import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import TrainingSAE
from sae_lens.training.optim import get_lr_scheduler
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from sae_lens_alloc.config.run_checks import check_optimizer
from sae_lens_alloc.config.run_config import optimizer_of
from sae_lens_alloc.saes.allocation_sae import AllocationTrainingSAE
from sae_lens_alloc.training.muon import Muon
from sae_lens_alloc.training.row_sparse_adam import RowSparseAdam


def make_optimizer(cfg: SAETrainerConfig, sae: TrainingSAE[Any]) -> Optimizer:
    """
    The optimizer that a training names: SAELens' Adam, fused if the device can, Muon, or
    RowSparseAdam.

    Args:
        cfg: The training.
        sae: The SAE to train.

    Raises:
        ValueError: if there is no such optimizer, or it cannot train this SAE.
    """
    check_optimizer(cfg, sae.cfg)
    betas = (cfg.adam_beta1, cfg.adam_beta2)
    name = optimizer_of(cfg)
    if name == "row_sparse_adam":
        assert isinstance(sae, AllocationTrainingSAE)
        return RowSparseAdam(sae, cfg.lr, betas)
    if name == "muon":
        optimizer = Muon(sae, cfg.lr, betas)
    else:
        fused = torch.device(cfg.device).type in ("cpu", "cuda")
        optimizer = Adam(sae.parameters(), lr=cfg.lr, betas=betas, fused=fused)
        optimizer.register_load_state_dict_pre_hook(_stay_fused)
    if isinstance(sae, AllocationTrainingSAE):
        optimizer.register_step_post_hook(
            lambda *_: sae.gradient_memory.keep(sae.W_enc, sae.W_dec)
        )
    return optimizer


def make_schedule(cfg: SAETrainerConfig, optimizer: Optimizer) -> LRScheduler:
    """The schedule of the learning rate that SAELens makes for its own optimizer."""
    assert cfg.lr_end is not None
    return get_lr_scheduler(
        cfg.lr_scheduler_name,
        lr=cfg.lr,
        optimizer=optimizer,
        warm_up_steps=cfg.lr_warm_up_steps,
        decay_steps=cfg.lr_decay_steps,
        training_steps=cfg.total_training_steps,
        lr_end=cfg.lr_end,
        num_cycles=cfg.n_restart_cycles,
    )


def _stay_fused(adam: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """The state with `fused` as in this optimizer. Checkpoints of SAELens are of an unfused Adam."""
    if any("weight_decay" not in group for group in state_dict["param_groups"]):
        raise ValueError(
            "The checkpoint is of another optimizer than Adam: give the optimizer that the "
            "training began with."
        )
    fused = adam.defaults["fused"]
    groups = [{**group, "fused": fused} for group in state_dict["param_groups"]]
    return {**state_dict, "param_groups": groups}
