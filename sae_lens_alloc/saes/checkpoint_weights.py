"""What a rank, or one process, reads of the SAE in a checkpoint that other ranks wrote."""

from pathlib import Path
from typing import Any

import torch
from sae_lens.constants import SAE_WEIGHTS_FILENAME
from sae_lens.saes.sae import TrainingSAE
from safetensors import safe_open

from sae_lens_alloc.distributed.feature_shard import FeatureShard
from sae_lens_alloc.distributed.stored_tensors import (
    FeatureRows,
    Stored,
    holds_stored_tensors,
    read_stored_tensors,
)
from sae_lens_alloc.saes.allocation_statistics import AllocationStatistics
from sae_lens_alloc.saes.weight_names import INPUT_MEAN, OF_NO_FEATURE

STATISTICS = "allocation."  # prefix of their keys in a state dict


def stored_weights(sae: TrainingSAE[Any]) -> dict[str, Stored]:
    """
    Weights and statistics of an SAE that allocates, by their names in a checkpoint of ranks. They
    are those of the SAE itself, no copies.
    """
    shard = _statistics(sae).shard
    return {
        f"sae.{name}": as_stored(name, tensor, shard)
        for name, tensor in sae.state_dict().items()
    }


def as_stored(name: str, tensor: torch.Tensor, shard: FeatureShard) -> Stored:
    """A weight, or what belongs to it in the same shape, as a checkpoint of ranks keeps it."""
    if not is_by_feature(name):
        return tensor
    return FeatureRows(feature_rows(name, tensor), shard)


def is_by_feature(name: str) -> bool:
    """Whether what an SAE has by this name is a part for each feature."""
    if name.startswith(STATISTICS):
        return name.removeprefix(STATISTICS) in AllocationStatistics.by_feature
    return name not in (*OF_NO_FEATURE, INPUT_MEAN)


def feature_rows(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A view of a weight, or of what is of its shape, whose rows are features."""
    return tensor.T if name == "W_enc" and tensor.ndim == 2 else tensor


@torch.no_grad()
def load_own_weights(sae: TrainingSAE[Any], checkpoint: Path) -> None:
    """
    Puts into an SAE that allocates what a checkpoint of one process, or of any number of ranks,
    has of its features.

    Args:
        sae: The SAE, of all features or those of this rank. Changed in place.
        checkpoint: The checkpoint.

    Raises:
        ValueError: if it is of an SAE of other sizes.
        OSError: if it cannot be read.
    """
    statistics = _statistics(sae)
    if holds_stored_tensors(checkpoint):
        read_stored_tensors(checkpoint, stored_weights(sae))
        statistics.forget_derived()
        return
    with safe_open(checkpoint / SAE_WEIGHTS_FILENAME, framework="pt") as file:
        # the file is mapped into memory, so that only what is taken is copied
        state = {
            name: _own(name, file.get_tensor(name), statistics.shard)
            for name in file.keys()  # noqa: SIM118
        }
    sae.process_state_dict_for_loading(state)
    sae.load_state_dict(state)


def weights_as_saved(
    sae: TrainingSAE[Any], checkpoint: Path
) -> dict[str, torch.Tensor]:
    """
    What a checkpoint of ranks would hold if one process had written it.

    Args:
        sae: An SAE of its config without memory. It is given that of the tensors.
        checkpoint: The checkpoint.

    Raises:
        ValueError: if it is of an SAE of other sizes.
        OSError: if it cannot be read.
    """
    sae.to_empty(device="cpu")
    load_own_weights(sae, checkpoint)
    state = sae.state_dict()
    sae.process_state_dict_for_saving(state)
    return state


def _own(name: str, tensor: torch.Tensor, shard: FeatureShard) -> torch.Tensor:
    if not is_by_feature(name):
        return tensor
    if name == "W_dec":
        return shard.own(tensor)
    # features come last, also in the bytes of statistics
    return shard.own(tensor.movedim(-1, 0)).movedim(0, -1)


def _statistics(sae: TrainingSAE[Any]) -> AllocationStatistics:
    statistics = sae.get_submodule(STATISTICS.removesuffix("."))
    assert isinstance(statistics, AllocationStatistics)
    return statistics
