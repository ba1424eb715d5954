"""The activations that all SAEs of a comparison train on, written when they are first needed."""

from pathlib import Path

from rich.console import Console

from sae_lens_alloc.comparison.config import ComparisonConfig, digest
from sae_lens_alloc.comparison.language_model import LanguageModelSubject
from sae_lens_alloc.comparison.own_activations import OwnActivationsSubject
from sae_lens_alloc.comparison.own_stream import open_stream
from sae_lens_alloc.comparison.stream import Stream
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

    def stored(self) -> Stream | None:
        """The activations, if they have been written."""
        return open_stream(self.folder)

    def needed(self) -> Stream:
        """The activations. They are written now if they have not been."""
        stored = self.stored()
        if stored is None:
            self._console.print("Preparing the activations that all SAEs train on")
            stored = self.subject.write(self.folder)
        return stored


def make_subject(config: ComparisonConfig) -> Subject:
    """The source of the activations of a comparison."""
    if config.synthetic is not None:
        return SyntheticSubject(config)
    if config.activations is not None:
        return OwnActivationsSubject(config)
    return LanguageModelSubject(config)
