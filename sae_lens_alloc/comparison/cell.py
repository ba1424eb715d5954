"""One cell of a comparison: one SAE to train."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sae_lens.config import LanguageModelSAERunnerConfig

from sae_lens_alloc.config.run_file import build_training_config

RESULT_FILENAME = "cell.json"
FAILURE_FILENAME = "failed.json"


@dataclass(frozen=True)
class Cell:
    """
    One SAE to train.

    Args:
        row: Name of its row.
        sparsity_key: Its SAE setting of sparsity: "k", or the name of a coefficient.
        sparsity: Value of that setting.
        lr: Learning rate.
        seed: Seed of the SAE's weights.
        target_l0s: Features per token that its thresholds are set for after training. This is
            its k or, without a k, every k of the comparison.
        settings: Its run, laid out as in the file that `load_runner_config` reads.
        stream: Digest of the activations' settings.
        stock_form_of: Name of the row of refined SAEs whose stock form this one has.
    """

    row: str
    sparsity_key: str
    sparsity: float
    lr: float
    seed: int
    target_l0s: tuple[float, ...]
    settings: Mapping[str, Any]
    stream: str
    stock_form_of: str | None = None

    @property
    def key(self) -> str:
        """Name of its folder. It depends on all settings, so no other cell is overwritten."""
        settings = asdict(self)
        if self.stock_form_of is None:  # as it was before there was the choice
            del settings["stock_form_of"]
        text = json.dumps(settings, sort_keys=True, default=str)
        row = re.sub(r"[^A-Za-z0-9_.-]+", "-", self.row)
        return (
            f"{row}-{self.sparsity_key}{self.sparsity:g}-lr{self.lr:g}-seed{self.seed}-"
            f"{hashlib.sha256(text.encode()).hexdigest()[:8]}"
        )

    @property
    def trained(self) -> "Cell":
        """The cell whose SAE this one measures: itself, or that of refined SAEs."""
        if self.stock_form_of is None:
            return self
        return replace(self, row=self.stock_form_of, stock_form_of=None)

    def runner_config(self) -> LanguageModelSAERunnerConfig[Any]:
        """Its run. Raises ValueError if the run could not work."""
        return build_training_config(
            {
                **self.settings,
                "logger": {"log_to_wandb": False},
                "checkpoint_path": None,
                "verbose": False,
            }
        )


def cell_folder(output: Path, key: str) -> Path:
    """Folder of the cell with this key."""
    return output / "cells" / key


def sae_folder(folder: Path, target_l0: float) -> Path:
    """Folder of a cell's SAE with thresholds for this many features per token."""
    return folder / f"l0-{target_l0:g}"
