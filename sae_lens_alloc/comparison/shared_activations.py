"""The activations that all SAEs of a comparison train on, written when they are first needed."""

from pathlib import Path

from rich.console import Console

from sae_lens_alloc.comparison.config import ComparisonConfig, digest
from sae_lens_alloc.comparison.language_model import LanguageModelSubject
from sae_lens_alloc.comparison.stream import StoredStream, stored_stream
from sae_lens_alloc.comparison.subject import Subject
from sae_lens_alloc.comparison.synthetic import SyntheticSubject


class SharedActivations:
    """
    The activations of a comparison, in its output folder.

    Args:
        config: The comparison.
        output: Its folder.
        console: Where a line says that they are being written.

    Attributes:
        subject: The source of the activations.
        folder: Where they are, or will be.
    """

    def __init__(
        self, config: ComparisonConfig, output: Path, console: Console
    ) -> None:
        self.subject = make_subject(config)
        self.folder = output / f"activations-{digest(config.stream_settings())}"
        self._console = console

    def stored(self) -> StoredStream | None:
        """The activations, if they have been written."""
        return stored_stream(self.folder)

    def needed(self) -> StoredStream:
        """The activations. They are written now if they have not been."""
        stored = self.stored()
        if stored is None:
            self._console.print("Storing the activations that all SAEs train on")
            stored = self.subject.write(self.folder)
        return stored


def make_subject(config: ComparisonConfig) -> Subject:
    """The source of the activations of a comparison."""
    if config.synthetic is not None:
        return SyntheticSubject(config)
    return LanguageModelSubject(config)
