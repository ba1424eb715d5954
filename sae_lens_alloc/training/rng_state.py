"""The random generators of a run."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sae_lens_alloc.distributed.rank_files import file_of_rank, files_of_ranks
from sae_lens_alloc.distributed.ranks import ALONE, Ranks

RNG_STATE_FILENAME = "rng_state.pt"


def seed_all(seed: int) -> None:
    """Seeds Python's, NumPy's and torch's generators, on all devices."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def seed_of_rank(seed: int, ranks: Ranks) -> int:
    """The seed of what a rank does by itself, that of the run for one process alone."""
    if ranks.is_alone:
        return seed
    mixed = np.random.SeedSequence([seed % 2**64, ranks.rank])
    return int(mixed.generate_state(1, np.uint64)[0] >> 1)


def save_rng_state(checkpoint: Path, ranks: Ranks = ALONE) -> None:
    """Saves the state of all generators of this rank in a checkpoint."""
    torch.save(rng_state(), file_of_rank(checkpoint / RNG_STATE_FILENAME, ranks))


def restore_rng_state(checkpoint: Path, ranks: Ranks = ALONE) -> None:
    """
    Restores all generators from a checkpoint, if it has their state. SAELens' have not, nor have
    those of another number of ranks.
    """
    path = checkpoint / RNG_STATE_FILENAME
    own = file_of_rank(path, ranks)
    if own.exists() and len(files_of_ranks(path)) == ranks.size:
        set_rng_state(torch.load(own, map_location="cpu", weights_only=True))


def rng_state() -> dict[str, Any]:
    """State of all generators, in types that torch.load(weights_only=True) accepts."""
    name, keys, *position = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *position),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Restores all generators to a state that `rng_state` returned."""
    random.setstate(state["python"])
    name, keys, *position = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *position))
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
