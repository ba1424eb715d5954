"""Paths of a run as they mean the same from every folder."""

import os
from pathlib import Path
from typing import Any

from sae_lens.config import LanguageModelSAERunnerConfig

PATH_KEYS = (
    *("model_name", "dataset_path", "cached_activations_path", "activations"),
    *("from_pretrained_path", "output_path", "checkpoint_path"),
    "resume_from_checkpoint",
)


def settle_paths(cfg: LanguageModelSAERunnerConfig[Any]) -> None:
    """
    Puts the home folder for `~`, and the absolute path for a model or a dataset on this machine:
    they are recorded in the SAE, which is used from other folders.

    Args:
        cfg: The run, changed in place.
    """
    for key in PATH_KEYS:
        value = getattr(cfg, key, None)
        if isinstance(value, str) and value.startswith("~"):
            setattr(cfg, key, os.path.expanduser(value))
    for key in ("dataset_path", "activations"):
        value = getattr(cfg, key, None)
        if value and os.path.exists(value):
            setattr(cfg, key, os.path.abspath(value))
    if _is_local_model(cfg):
        cfg.model_name = os.path.abspath(cfg.model_name)


def _is_local_model(cfg: LanguageModelSAERunnerConfig[Any]) -> bool:
    """TransformerLens takes the names of its list alone, and transformers a folder first."""
    return cfg.model_class_name == "AutoModelForCausalLM" and os.path.isfile(
        Path(cfg.model_name) / "config.json"
    )
