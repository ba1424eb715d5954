"""The source of the activations of a comparison, which also evaluates SAEs."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from sae_lens import SAE

from sae_lens_alloc.comparison.stream import Stream
from sae_lens_alloc.evaluation.usage import Usage


class Subject(ABC):
    """A source of activations that can evaluate an SAE of them."""

    @abstractmethod
    def write(self, folder: Path) -> Stream:
        """Writes the activations of all splits, or where they are, once for all cells."""

    @abstractmethod
    def evaluate(
        self, sae: SAE[Any], stream: Stream, split: str
    ) -> tuple[Usage, dict[str, Any]]:
        """Measures an SAE on a split. The dict has all figures, for JSON."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """A description, with the keys "kind" and "activations"."""
