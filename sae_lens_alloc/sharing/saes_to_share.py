"""The SAEs of a folder, ready to be given to others."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import get_token
from sae_lens import SAE
from sae_lens.constants import (
    RUNNER_CFG_FILENAME,
    SAE_CFG_FILENAME,
    SAE_WEIGHTS_FILENAME,
    SPARSITY_FILENAME,
)

from sae_lens_alloc.saes.saved_sae import read_json_mapping
from sae_lens_alloc.training.source_sae import inference_sae, load_source_sae

# What SAELens uploads of an SAE.
SHARED_FILES = (
    SAE_CFG_FILENAME,
    SAE_WEIGHTS_FILENAME,
    SPARSITY_FILENAME,
    RUNNER_CFG_FILENAME,
)
# Under these names, configs hold what must not be given away.
SECRET_NAMES = ("token", "use_auth_token", "hf_token", "api_key")
HUB_TOKEN = re.compile(r"hf_\w{20,}")


@dataclass(frozen=True, eq=False)
class SharedSAE:
    """
    An SAE to be given to others.

    Args:
        sae_id: Its name among those that are shared with it, such as "mutual_choice".
        given: The folder that the user named, with its figures.
        folder: A folder with the SAE as anyone can load it, in one file of weights. The same, or
            one of our making.
        sae: The SAE for inference, on the CPU.
    """

    sae_id: str
    given: Path
    folder: Path
    sae: SAE[Any]


def saes_to_share(folder: Path, workplace: Path) -> list[SharedSAE]:
    """
    The SAE in a folder, or all those in the folders below it. Checkpoints and SAEs in several
    files are written anew, as the inference SAEs in one file that they mean.

    Args:
        folder: The folder. Not changed.
        workplace: An empty folder for what is written anew.

    Raises:
        ValueError: if there is no SAE, one of them is damaged, or a config holds a token.
    """
    folders = _folders_of_saes(folder)
    if not folders:
        raise ValueError(
            f"{str(folder)!r} holds no SAE of SAELens, nor does a folder below it: "
            f"{SAE_CFG_FILENAME} is missing."
        )
    shared: list[SharedSAE] = []
    for sae_id, given in folders.items():
        source, as_saved = load_source_sae(str(given), "cpu"), given
        sae = inference_sae(source)
        if sae is not source.sae or not (given / SAE_WEIGHTS_FILENAME).is_file():
            as_saved = workplace / sae_id
            sae.save_model(as_saved)
        require_no_secrets(as_saved)
        shared.append(SharedSAE(sae_id, given, as_saved, sae))
    return shared


def require_no_secrets(folder: Path) -> None:
    """Raises ValueError, without saying it, if a config to be shared holds a token, or is damaged."""
    own = get_token()
    for path in (folder / SAE_CFG_FILENAME, folder / RUNNER_CFG_FILENAME):
        if not path.is_file():
            continue
        for name, value in _strings(read_json_mapping(path)):
            is_token = HUB_TOKEN.search(value) or (own and own in value)
            if value and (name in SECRET_NAMES or is_token):
                raise ValueError(
                    f"{str(path)!r} holds a token or key under {name!r}, which others would "
                    "read: take it out of the file, and make the token invalid if it was "
                    "shared before."
                )


def _folders_of_saes(folder: Path) -> dict[str, Path]:
    """Folders of SAEs by their ids."""
    if (folder / SAE_CFG_FILENAME).is_file():
        return {folder.resolve().name: folder}
    found: dict[str, Path] = {}
    for place, inner, files in os.walk(folder):
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        if SAE_CFG_FILENAME in files:
            found[Path(place).relative_to(folder).as_posix()] = Path(place)
            inner.clear()
    return found


def _strings(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """All strings in a JSON value, each with the key that it stands under."""
    if isinstance(value, str):
        yield name, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _strings(item, str(key))
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item, name)
