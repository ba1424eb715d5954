from pathlib import Path
from typing import Any

import pytest
import yaml


def small_settings() -> dict[str, Any]:
    """A synthetic comparison that trains in seconds: 40 steps of 64 samples."""
    return {
        "sae": {"d_in": 8, "d_sae": 16},
        "training_tokens": 2560,
        "train_batch_size_tokens": 64,
        "n_batches_in_buffer": 4,
        "compare": {
            "k": [2, 3],
            "lr": [1e-2],
            "seeds": [0, 1],
            "eval_samples": 500,
            "rows": {
                "ours": {"architecture": "mutual_choice"},
                "stock": {"architecture": "standard", "l1_coefficient": [0.01, 0.02]},
            },
            "synthetic": {
                "num_features": 20,
                "hidden_dim": 8,
                "firing_probability": {
                    "generator_name": "constant",
                    "probability": 0.1,
                },
                "seed": 1,
            },
        },
    }


@pytest.fixture
def settings() -> dict[str, Any]:
    return small_settings()


def write_config(settings: dict[str, Any], folder: Path) -> Path:
    path = folder / "compare.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return path
