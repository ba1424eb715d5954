"""
Checkpoints of a training by ranks: each rank writes what it has of the features, and the first
one what all have the same. Any number of ranks goes on from one, and so does one process.
"""

import json
from pathlib import Path
from typing import Any

import torch
from sae_lens.constants import (
    ACTIVATION_SCALER_CFG_FILENAME,
    SAE_CFG_FILENAME,
    SPARSITY_FILENAME,
    TRAINER_STATE_FILENAME,
)
from sae_lens.training.sae_trainer import SAETrainer
from safetensors.torch import save_file

from sae_lens_alloc.distributed.stored_tensors import (
    FeatureRows,
    Stored,
    holds_stored_tensors,
    read_stored_tensors,
    write_stored_tensors,
)
from sae_lens_alloc.distributed.together import together
from sae_lens_alloc.saes.checkpoint_weights import (
    as_stored,
    feature_rows,
    is_by_feature,
    stored_weights,
)

# What a trainer counts for each feature.
FEATURE_COUNTS = ("act_freq_scores", "n_forward_passes_since_fired")
# The rest of what SAELens saves of a trainer, apart from its optimizer and schedules.
COUNTS = (
    "n_training_samples",
    "n_training_steps",
    "n_frac_active_samples",
    "started_fine_tuning",
)

# Of an SAE that allocates.
ShardedTrainer = SAETrainer[Any, Any]


def write_sharded_checkpoint(trainer: ShardedTrainer, folder: Path) -> None:
    """
    Writes the files of a checkpoint. All ranks must call it.

    Args:
        trainer: The trainer of this rank.
        folder: A folder to be made, which all ranks see.

    Raises:
        ValueError: if weights are not finite.
        Exception: on all ranks, if one of them could not write.
    """
    sae = trainer.sae
    ranks = sae.shard.ranks
    sparsity = trainer.log_feature_sparsity
    together(ranks, lambda: sae.checks.report(wait=True))
    state = _trainer_state(trainer)
    tensors = {**stored_weights(sae), **_take_out_features(state, trainer)}

    def write_what_is_the_same() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / SAE_CFG_FILENAME).write_text(json.dumps(sae.cfg.to_dict()))
        save_file({"sparsity": sparsity}, folder / SPARSITY_FILENAME)
        torch.save(state, folder / TRAINER_STATE_FILENAME)
        trainer.activation_scaler.save(str(folder / ACTIVATION_SCALER_CFG_FILENAME))

    together(ranks, lambda: None if ranks.rank else write_what_is_the_same())
    together(ranks, lambda: _require_shared(folder))
    write_stored_tensors(folder, tensors, ranks)
    save_more = trainer.save_checkpoint_fn
    if save_more is not None:
        together(ranks, lambda: save_more(checkpoint_path=folder))


def read_trainer_state(trainer: ShardedTrainer, checkpoint: Path) -> None:
    """
    Puts a trainer where a checkpoint is: one of ranks, of whatever number, or one of one
    process. The SAE is loaded apart from it, as with SAELens.

    Args:
        trainer: The trainer of all features, or of those of this rank. Changed in place, apart
            from its schedule of the learning rate, which takes the checkpoint's state.
        checkpoint: The checkpoint.

    Raises:
        ValueError: if it is of an SAE of other sizes.
        OSError: if it cannot be read.
    """
    trainer.activation_scaler.load(checkpoint / ACTIVATION_SCALER_CFG_FILENAME)
    is_sharded = holds_stored_tensors(checkpoint)
    # the state of a whole SAE is mapped into memory, so that only what is taken is copied
    state: dict[str, Any] = torch.load(
        checkpoint / TRAINER_STATE_FILENAME,
        map_location="cpu",
        weights_only=True,
        mmap=not is_sharded,
    )
    if is_sharded:
        read_stored_tensors(checkpoint, _put_in_features(state, trainer))
    else:
        _keep_own_features(state, trainer)
    trainer.optimizer.load_state_dict(state["optimizer"])
    trainer.lr_scheduler.load_state_dict(state["lr_scheduler"])
    for name in FEATURE_COUNTS:
        setattr(trainer, name, state[name].to(trainer.cfg.device))
    for name in COUNTS:
        setattr(trainer, name, state[name])
    for name, schedule in state["coefficient_schedulers"].items():
        trainer.coefficient_schedulers[name].load_state_dict(schedule)


def _trainer_state(trainer: ShardedTrainer) -> dict[str, Any]:
    """What SAELens saves of a trainer."""
    schedules = trainer.coefficient_schedulers.items()
    return {
        "optimizer": trainer.optimizer.state_dict(),
        "lr_scheduler": trainer.lr_scheduler.state_dict(),
        "coefficient_schedulers": {name: s.state_dict() for name, s in schedules},
        **{name: getattr(trainer, name) for name in (*COUNTS, *FEATURE_COUNTS)},
    }


def _take_out_features(
    state: dict[str, Any], trainer: ShardedTrainer
) -> dict[str, Stored]:
    """
    The tensors of the own features, by name. In the state, which the first rank writes, each
    leaves an empty one of its dtype and number of dimensions.
    """
    shard = trainer.sae.shard
    taken: dict[str, Stored] = {}
    for name in FEATURE_COUNTS:
        taken[f"trainer.{name}"] = FeatureRows(state[name], shard)
        state[name] = _emptied(state[name])
    moments: dict[int, dict[str, Any]] = {}
    for i, weight, of_weight in _moments(state, trainer):
        moments[i] = dict(of_weight)
        for key, value in of_weight.items():
            if is_by_feature(weight) and value.ndim > 0:
                taken[_moment(weight, key)] = as_stored(weight, value, shard)
                moments[i][key] = _emptied(value)
    state["optimizer"] = {**state["optimizer"], "state": moments}
    return taken


def _put_in_features(
    state: dict[str, Any], trainer: ShardedTrainer
) -> dict[str, Stored]:
    """Puts new tensors to where some were taken out, to be filled by name."""
    shard = trainer.sae.shard
    wanted: dict[str, Stored] = {}
    for name in FEATURE_COUNTS:
        state[name] = state[name].new_empty(len(shard))
        wanted[f"trainer.{name}"] = FeatureRows(state[name], shard)
    for _, weight, of_weight in _moments(state, trainer):
        for key, value in of_weight.items():
            if is_by_feature(weight) and value.ndim > 0:
                of_weight[key] = _new_moment(value, weight, trainer)
                wanted[_moment(weight, key)] = as_stored(weight, of_weight[key], shard)
    return wanted


def _keep_own_features(state: dict[str, Any], trainer: ShardedTrainer) -> None:
    """Keeps in the state of a whole SAE what is of the own features."""
    shard = trainer.sae.shard
    for name in FEATURE_COUNTS:
        state[name] = shard.own(state[name])
    for _, weight, of_weight in _moments(state, trainer):
        for key, value in of_weight.items():
            if is_by_feature(weight) and value.ndim > 0:
                of_weight[key] = _new_moment(value, weight, trainer)
                feature_rows(weight, of_weight[key]).copy_(
                    shard.own(feature_rows(weight, value))
                )
            else:
                of_weight[key] = value.clone()


def _moments(
    state: dict[str, Any], trainer: ShardedTrainer
) -> list[tuple[int, str, dict[str, torch.Tensor]]]:
    """The optimizer's state of each weight, with its number there and the weight's name."""
    names = [name for name, _ in trainer.sae.named_parameters()]
    of_weights = state["optimizer"]["state"]
    return [(i, names[i], of_weights[i]) for i in sorted(of_weights)]


def _new_moment(
    value: torch.Tensor, weight: str, trainer: ShardedTrainer
) -> torch.Tensor:
    """A tensor in place of one in a file: of the weight's shape, in its order, or (F_r,)."""
    if value.ndim == 1:
        return value.new_empty(len(trainer.sae.shard))
    return torch.empty_like(
        trainer.sae.get_parameter(weight), dtype=value.dtype, device="cpu"
    ).detach()


def _moment(weight: str, key: str) -> str:
    return f"optimizer.{weight}.{key}"


def _emptied(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty((0,) * tensor.ndim, dtype=tensor.dtype)


def _require_shared(folder: Path) -> None:
    if not folder.is_dir():
        raise OSError(
            "one of the processes does not see the folder that another one has made there: "
            "give a checkpoint_path that all machines share"
        )
