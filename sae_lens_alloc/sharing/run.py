"""What `sae-lens-alloc push` does."""

import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from sae_lens_alloc.sharing.card import write_card
from sae_lens_alloc.sharing.hub import require_repo_id, upload
from sae_lens_alloc.sharing.other_forms import SAVE_FOR
from sae_lens_alloc.sharing.saes_to_share import (
    SHARED_FILES,
    SharedSAE,
    saes_to_share,
)
from sae_lens_alloc.training.output_folder import (
    locked_folder,
    new_files,
    require_empty,
    require_other_folder,
)


def push_to_hub(source: Path, repo_id: str, private: bool, overwrite: bool) -> str:
    """
    Uploads the SAEs of a folder with a model card.

    Args:
        source: A folder with an SAE, or with folders of SAEs.
        repo_id: ORG/NAME on the hub.
        private: See `upload`.
        overwrite: See `upload`.

    Returns:
        The address of the repository.

    Raises:
        ValueError: as `saes_to_share` and `upload`.
    """
    require_repo_id(repo_id)
    with TemporaryDirectory() as made, TemporaryDirectory() as card:
        shared = saes_to_share(source, Path(made))
        write_card(Path(card), shared, repo_id)
        folders = {one.sae_id: one.folder for one in shared}
        return upload(folders, Path(card), repo_id, private, overwrite)


def write_what_would_be_pushed(
    source: Path, repo_id: str, output: Path, overwrite: bool
) -> list[Path]:
    """
    Writes to a folder what `push_to_hub` would upload. Needs no network.

    Args:
        source: As for `push_to_hub`.
        repo_id: As for `push_to_hub`.
        output: Folder to write to.
        overwrite: Whether to write into the folder even if it holds something.

    Returns:
        The files, relative to the folder.

    Raises:
        ValueError: as `saes_to_share`, or if the folder is the source or not empty.
        OSError: if it cannot be written to.
    """
    require_repo_id(repo_id)
    with TemporaryDirectory() as made:
        shared = saes_to_share(source, Path(made))
        written: list[Path] = []
        with _output(output, source, overwrite):
            for one in shared:
                with new_files(output / one.sae_id, "the SAE") as folder:
                    for name in SHARED_FILES:
                        if (one.folder / name).is_file():
                            shutil.copyfile(one.folder / name, folder / name)
                            written.append(Path(one.sae_id, name))
            with new_files(output, "the model card") as folder:
                written += map(Path, write_card(folder, shared, repo_id))
        return written


def write_for_library(
    source: Path, library: str, output: Path, overwrite: bool
) -> list[Path]:
    """
    Writes the SAEs of a folder in the form of another library: one SAE to the output folder
    itself, several to folders in it.

    Args:
        source: As for `push_to_hub`.
        library: Its name in SAVE_FOR.
        output: Folder to write to.
        overwrite: Whether to write into the folder even if it holds something.

    Returns:
        The folders of the SAEs.

    Raises:
        ValueError: as `saes_to_share`, or if the library has no form for one of the SAEs, or the
            folder is the source or not empty.
        OSError: if it cannot be written to.
    """
    with TemporaryDirectory() as made:
        shared = saes_to_share(source, Path(made))
        with _output(output, source, overwrite):
            folders = [_folder_of(one, shared, output) for one in shared]
            for one, folder in zip(shared, folders, strict=True):
                with new_files(folder, "the SAE") as new_folder:
                    SAVE_FOR[library](one.sae, new_folder)
        return folders


def _folder_of(one: SharedSAE, shared: list[SharedSAE], output: Path) -> Path:
    return output if len(shared) == 1 else output / one.sae_id


@contextmanager
def _output(output: Path, source: Path, overwrite: bool) -> Generator[None, None, None]:
    """The output folder, claimed, another one than the source and empty."""
    require_other_folder(output, source, "the SAE")
    with locked_folder(output, "--output"):
        require_empty(output, "--output", overwrite)
        yield
