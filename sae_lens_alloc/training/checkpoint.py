"""Checkpoints that are whole or recognised as not."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

from sae_lens import logger
from sae_lens.constants import (
    RUNNER_CFG_FILENAME,
    TRAINER_STATE_FILENAME,
)

from sae_lens_alloc.checksums import sha256_of
from sae_lens_alloc.distributed.ranks import ALONE, Ranks
from sae_lens_alloc.distributed.together import together
from sae_lens_alloc.training.output_folder import flush

# Written last: a checkpoint is whole if it is there and agrees with the other files.
MANIFEST_FILENAME = "checkpoint.json"
PARTIAL_PREFIX = ".partial-"


def partial_path(checkpoint: Path) -> Path:
    """The temporary folder, beside it, that a checkpoint is written to first."""
    return checkpoint.with_name(f"{PARTIAL_PREFIX}{checkpoint.name}")


def publish_checkpoint(
    checkpoint: Path, n_training_samples: int, ranks: Ranks = ALONE
) -> None:
    """
    Completes the checkpoint in `partial_path(checkpoint)` with the checksums of its files,
    forces it to the disk, renames it, and removes what killed runs left half-written. The
    last whole checkpoint is found at any moment, even while one of the same name is
    replaced, since what is whole is found by whatever name.

    Args:
        checkpoint: The checkpoint's folder.
        n_training_samples: Tokens learned from so far.
        ranks: Those that wrote its files and share the work. All of them must call it.
    """
    partial = partial_path(checkpoint)
    # each is sure to see what it wrote itself
    listed = together(ranks, lambda: {file.name for file in partial.iterdir()})
    names = sorted(set().union(*listed))
    own = names[ranks.rank :: ranks.size]
    parts = together(ranks, lambda: {name: _flushed(partial / name) for name in own})
    checksums = {name: part[name] for part in parts for name in part}
    manifest = {"n_training_samples": n_training_samples, "sha256": checksums}
    together(ranks, lambda: None if ranks.rank else _publish(checkpoint, manifest))


def _flushed(file: Path) -> str:
    """The checksum of a file that is forced to the disk."""
    flush(file)
    return sha256_of(file)


def _publish(checkpoint: Path, manifest: dict[str, Any]) -> None:
    partial = partial_path(checkpoint)
    (partial / MANIFEST_FILENAME).write_text(json.dumps(manifest))
    flush(partial / MANIFEST_FILENAME)
    flush(partial)
    if checkpoint.exists():
        shutil.rmtree(checkpoint)
    partial.rename(checkpoint)
    flush(checkpoint.parent)
    for leftover in checkpoint.parent.glob(f"{PARTIAL_PREFIX}*"):
        if leftover.is_dir():
            shutil.rmtree(leftover)


def find_checkpoint(path: str | Path, ranks: Ranks = ALONE) -> Path:
    """
    The checkpoint to resume from: `path` itself if it is one, or the last whole one in it.
    Damaged and half-written ones on the way are reported and skipped. So are those that
    SAELens calls `final_...`: the normalization is folded into their weights.

    Args:
        path: A folder.
        ranks: Those that look for it and share the work. All of them must call it.

    Raises:
        ValueError: if `path` is a damaged checkpoint, or there is no whole one in it.
    """
    path = Path(path)
    is_one, *_ = together(ranks, lambda: _is_existing_checkpoint(path))
    if is_one:
        reason = _damage(path, ranks)
        if reason is not None:
            raise ValueError(
                f"The checkpoint {path} cannot be resumed from: {reason}. Give its parent "
                "folder to resume from the last whole one."
            )
        return path
    # which a shared folder may show to each rank in another order
    folders, *_ = together(ranks, lambda: _last_first(path))
    for folder in folders:
        reason = _damage(folder, ranks)
        if reason is None:
            return folder
        logger.warning(f"Skipping the checkpoint {folder}: {reason}.")
    raise ValueError(
        f"There is no whole checkpoint in {path}, so there is nothing to resume from; "
        "leave resume_from_checkpoint out to start anew."
    )


def _last_first(path: Path) -> list[Path]:
    """The folders in a folder that may be checkpoints to resume from."""
    folders = [folder for folder in path.iterdir() if folder.is_dir()]
    folders = [folder for folder in folders if not _is_final(folder)]
    return sorted(folders, key=_progress, reverse=True)


def holds_checkpoints(folder: Path) -> bool:
    """Whether a folder holds checkpoints, apart from half-written ones."""
    return folder.is_dir() and any(
        _is_checkpoint(path)
        for path in folder.iterdir()
        if not path.name.startswith(PARTIAL_PREFIX)
    )


def folder_of_checkpoints(path: str | Path) -> Path:
    """The folder, with all links resolved, that holds a checkpoint, if it is not `path` itself."""
    path = Path(path).resolve()
    return path.parent if _is_checkpoint(path) else path


def _is_existing_checkpoint(path: Path) -> bool:
    """Whether a folder is a checkpoint. Raises ValueError if there is no such folder."""
    if not path.is_dir():
        raise ValueError(f"There is no folder {path} to resume from.")
    return _is_checkpoint(path)


def _is_checkpoint(path: Path) -> bool:
    return (path / MANIFEST_FILENAME).exists() or (
        path / TRAINER_STATE_FILENAME
    ).exists()


def _is_final(checkpoint: Path) -> bool:
    return checkpoint.name.removeprefix(PARTIAL_PREFIX).startswith("final_")


def _damage(checkpoint: Path, ranks: Ranks) -> str | None:
    """What is wrong with a checkpoint, or None if it is whole: the same on all ranks."""
    reasons = together(ranks, lambda: _own_damage(checkpoint, ranks))
    return next((reason for reason in reasons if reason is not None), None)


def _own_damage(checkpoint: Path, ranks: Ranks) -> str | None:
    """What is wrong with a checkpoint as far as this rank looks at its files."""
    manifest = _read_manifest(checkpoint)
    if manifest is None:
        if (checkpoint / MANIFEST_FILENAME).exists():
            return f"{MANIFEST_FILENAME} is damaged"
        # SAELens writes no checksums; the runner's config comes last
        by_sae_lens = (
            not checkpoint.name.startswith(PARTIAL_PREFIX)
            and (checkpoint / TRAINER_STATE_FILENAME).is_file()
            and _read_json(checkpoint / RUNNER_CFG_FILENAME) is not None
        )
        return None if by_sae_lens else "it was not written to the end"
    for name, checksum in list(manifest["sha256"].items())[ranks.rank :: ranks.size]:
        file = checkpoint / name
        if not file.exists():
            return f"{name} is missing"
        if not file.is_file():
            return f"{name} is no file"
        try:
            found = sha256_of(file)
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        if found != checksum:
            return f"{name} is damaged"
    return None


def _progress(checkpoint: Path) -> float:
    """Tokens learned from, infinite where that is not known."""
    manifest = _read_manifest(checkpoint)
    if manifest is not None:
        return manifest["n_training_samples"]
    return int(checkpoint.name) if checkpoint.name.isdecimal() else math.inf


def _read_manifest(checkpoint: Path) -> dict[str, Any] | None:
    """Tokens learned from, and checksums by the names of files; None if there is none of that."""
    manifest = _read_json(checkpoint / MANIFEST_FILENAME)
    if (
        isinstance(manifest, dict)
        and isinstance(manifest.get("n_training_samples"), int)
        and isinstance(manifest.get("sha256"), dict)
    ):
        return manifest
    return None


def _read_json(path: Path) -> Any:
    """What is in a JSON file, None if it is none."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return None
