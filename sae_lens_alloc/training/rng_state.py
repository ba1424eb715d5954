"""The random generators of a run."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

RNG_STATE_FILENAME = "rng_state.pt"


def seed_all(seed: int) -> None:
    """Seeds Python's, NumPy's and torch's generators, on all devices."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def save_rng_state(checkpoint: Path) -> None:
    """Saves the state of all generators in a checkpoint."""
    torch.save(rng_state(), checkpoint / RNG_STATE_FILENAME)


def restore_rng_state(checkpoint: Path) -> None:
    """Restores all generators from a checkpoint, if it has their state. SAELens' have not."""
    path = checkpoint / RNG_STATE_FILENAME
    if path.exists():
        set_rng_state(torch.load(path, map_location="cpu", weights_only=True))


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
