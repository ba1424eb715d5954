"""Upload to the Hugging Face hub, by SAELens' own function, with errors in one sentence."""

import re
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from sae_lens import upload_saes_to_huggingface

from sae_lens_alloc.errors import as_reason

REPO_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
# The hub makes it itself.
EXPECTED_FILES = {".gitattributes"}
# Libraries whose errors are those of the network, whichever of them huggingface_hub uses.
NETWORK_LIBRARIES = {"httpx", "httpx2", "httpcore", "requests", "urllib3"}


def require_repo_id(repo_id: str) -> None:
    """Raises ValueError if a text is no ORG/NAME."""
    if REPO_ID.fullmatch(repo_id) is None:
        raise ValueError(
            f"--to must be ORG/NAME or USER/NAME of the Hugging Face hub, got {repo_id!r}."
        )


def upload(
    saes: Mapping[str, Path],
    card: Path,
    repo_id: str,
    private: bool,
    overwrite: bool,
) -> str:
    """
    Uploads SAEs and then their model card. The repository is created if it is not there.

    Args:
        saes: Folders of SAEs, by their names in the repository.
        card: Folder with the card and its picture alone.
        repo_id: ORG/NAME.
        private: Whether nobody else may see the repository.
        overwrite: Whether files may be added to a repository that holds some, and replaced there.

    Returns:
        The address of the repository.

    Raises:
        ValueError: in one sentence that holds no token, if that fails.
    """
    with _hub_errors_in_one_sentence(repo_id):
        api = HfApi()
        api.whoami()
        if not _is_there(api, repo_id, private, overwrite):
            # None: as the organization has it
            api.create_repo(repo_id, private=private or None)
        upload_saes_to_huggingface(
            dict(saes.items()), repo_id, add_default_readme=False
        )
        api.upload_folder(
            repo_id=repo_id, folder_path=card, commit_message="Add the model card"
        )
        return f"{api.endpoint}/{repo_id}"


def _is_there(api: HfApi, repo_id: str, private: bool, overwrite: bool) -> bool:
    """
    Whether a repository is there.

    Raises:
        ValueError: if something in it would be lost, or seen by others.
    """
    try:
        info: Any = api.repo_info(repo_id)
    except RepositoryNotFoundError:
        return False
    n_files = len({file.rfilename for file in info.siblings} - EXPECTED_FILES)
    if n_files and not overwrite:
        raise ValueError(
            f"{repo_id} is there already and holds {n_files} files: give --overwrite to add to "
            "it and replace files of the same name, or another name."
        )
    if private and not info.private:
        raise ValueError(
            f"{repo_id} is there already and public: make it private on the hub, or give "
            "another name."
        )
    return True


@contextmanager
def _hub_errors_in_one_sentence(repo_id: str) -> Generator[None, None, None]:
    try:
        yield
    except Exception as error:
        sentence = _sentence(error, repo_id)
        if sentence is None:
            raise
        raise ValueError(sentence) from None


def _sentence(error: Exception, repo_id: str) -> str | None:
    """What an error of the hub means for the one who uploads; None for other errors."""
    log_in = "run `hf auth login` with a token that may write, or set HF_TOKEN"
    if isinstance(error, LocalTokenNotFoundError):
        return f"you are not logged in to the Hugging Face hub: {log_in}."
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so nothing can be uploaded: unset it, or give --dry-run."
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        if status == 401:
            return f"the Hugging Face hub does not accept your token: {log_in}."
        if status == 403:
            return f"your token may not write to {repo_id}: {log_in}."
        said = error.server_message or error.response.reason_phrase
        return _without_token(
            f"the Hugging Face hub has refused to take {repo_id} ({status}, {said}): try again, "
            "with --overwrite if a part of it is there already."
        )
    libraries = {base.__module__.partition(".")[0] for base in type(error).__mro__}
    if libraries & NETWORK_LIBRARIES:
        return _without_token(
            f"the Hugging Face hub cannot be reached ({as_reason(error)}): try again where "
            "there is a network, or give --dry-run."
        )
    return None


def _without_token(text: str) -> str:
    token = get_token()
    return text.replace(token, "…") if token else text
