"""What the SAEs of a comparison are trained on and judged by."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from sae_lens import SAE

from sae_lens_alloc.comparison.stream import StoredStream
from sae_lens_alloc.evaluation.usage import Usage


class Subject(ABC):
    """A source of activations that can judge an SAE of them."""

    @abstractmethod
    def write(self, folder: Path) -> StoredStream:
        """Writes the activations of all splits, once for all cells."""

    @abstractmethod
    def evaluate(
        self, sae: SAE[Any], stream: StoredStream, split: str
    ) -> tuple[Usage, dict[str, Any]]:
        """Measures an SAE on a split; all figures are also in the dict, for JSON."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """What this is: "kind", "activations"."""
