"""An SAE written whole or not at all."""

import os
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sae_lens.saes.sae import SAE
from safetensors import SafetensorError


@contextmanager
def made_if_used(folder: Path) -> Generator[None, None, None]:
    """Makes a folder to write to, so that it is known to be possible, and leaves none if it fails."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for path in made:  # the deepest first
            with suppress(OSError):  # somebody else uses it by now
                path.rmdir()
        raise


def save_sae(sae: SAE[Any], folder: Path) -> None:
    """
    Saves an SAE into a folder that exists, whose other files stay.

    It is written to a temporary folder within, on the same file system, and then moved.

    Raises:
        ValueError: if it cannot be written. The folder is then as it was.
    """
    try:
        with TemporaryDirectory(prefix=".partial-", dir=folder) as partial:
            sae.save_model(partial)
            for file in Path(partial).iterdir():
                os.replace(file, folder / file.name)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"the SAE could not be written to {str(folder)!r}: {error}."
        ) from error
