"""Folders that results are written to: by one run at a time, and whole files only."""

import errno
import os
import shutil
import uuid
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout
from sae_lens import logger
from sae_lens.constants import SAE_CFG_FILENAME
from safetensors import SafetensorError

from sae_lens_alloc.training.interruption import postponing_signals

# What begins like this in a folder of results is ours, and nobody else's.
OWN_PREFIX = ".sae-lens-alloc-"
LOCK_FILENAME = f"{OWN_PREFIX}lock"
# Half-written files, and files that only have to be moved to their place.
PARTIAL_PREFIX = f"{OWN_PREFIX}partial-"
READY_PREFIX = f"{OWN_PREFIX}ready-"


@contextmanager
def locked_folder(folder: Path, setting: str) -> Generator[None, None, None]:
    """
    Creates a folder, holds it against other processes, and completes what a process that was
    killed there had almost written. At the end, folders that were created and have stayed
    empty are removed. The same thread may hold a folder several times. The lock of a process
    that has died counts no more.

    Args:
        folder: The folder.
        setting: What its user calls it.

    Raises:
        ValueError: if another process holds it.
        OSError: if it cannot be created or written to.
    """
    folder = folder.absolute()
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.resolve() / LOCK_FILENAME, is_singleton=True)
        _acquire(lock, folder)
    except Timeout:
        raise ValueError(
            f"{setting} {str(folder)!r} is in use by another run: wait until that has ended, "
            f"or give another {setting}."
        ) from None
    except OSError as error:
        _remove_empty(missing)
        where = f" at {error.filename!r}" if error.filename else ""
        raise OSError(
            f"{setting} {str(folder)!r} cannot be written to{where} ({error.strerror}): give "
            f"another {setting}."
        ) from error
    try:
        if lock.lock_counter <= 1:
            _complete_what_was_killed(folder)
        yield
    finally:
        if lock.lock_counter <= 1:
            with suppress(OSError):
                (folder / LOCK_FILENAME).unlink()
            _remove_empty(missing)
        lock.release()


@contextmanager
def new_files(folder: Path, what: str) -> Generator[Path, None, None]:
    """
    A new folder inside of `folder` to write files into, which at the end replace those of
    the same name in `folder`, or, where something goes wrong, are removed. A process that is
    killed leaves the old files or the new ones: `locked_folder` sees to the rest.

    Args:
        folder: Where the files are to be.
        what: What they are, for the message.

    Raises:
        OSError: in one sentence, if there is no room or they cannot be written.
    """
    name = uuid.uuid4().hex
    partial, ready = (
        folder / f"{PARTIAL_PREFIX}{name}",
        folder / f"{READY_PREFIX}{name}",
    )
    try:
        with named_write_errors(what, folder):
            partial.mkdir(parents=True)
            yield partial
            for file in partial.iterdir():
                flush(file)
            flush(partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    with named_write_errors(what, folder), postponing_signals():
        partial.rename(ready)
        _move_to_their_place(ready)


@contextmanager
def named_write_errors(what: str, folder: Path) -> Generator[None, None, None]:
    """
    Makes an OSError of one sentence of whatever torch, safetensors and Python raise where a
    file cannot be written.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = _reason(error)
        if reason is None:
            raise
        number = error.errno if isinstance(error, OSError) else None
        message = f"{what} cannot be written to {str(folder)!r}: {reason}."
        raise WriteError(number or errno.EIO, message) from error


class WriteError(OSError):
    """That something cannot be written, in one sentence."""

    def __str__(self) -> str:
        return self.strerror or ""


def require_empty(
    folder: Path, setting: str, overwrite: bool, expected: frozenset[str] = frozenset()
) -> None:
    """
    Raises ValueError if a folder holds anything but `expected` files and what is ours, unless
    it may be overwritten.
    """
    if overwrite or not folder.exists():
        return
    names = {path.name for path in folder.iterdir()}
    if any(not name.startswith(OWN_PREFIX) for name in names - expected):
        raise ValueError(
            f"{setting} {str(folder)!r} is not empty: give --overwrite to write into it, "
            f"or another {setting}."
        )


def require_other_folder(
    output: str | Path | None, source: str | Path, what: str
) -> None:
    """
    Raises ValueError if an output folder is, by whatever name, the folder of `what` it is
    made from, which it would overwrite.
    """
    if output is None or not Path(output).exists() or not Path(source).exists():
        return
    if os.path.samefile(output, source):
        raise ValueError(
            f"the output {str(output)!r} is the folder of {what}, which is left as it is: "
            "give another folder."
        )


def flush(path: Path) -> None:
    """Forces a file, or the names in a folder, to the disk."""
    if os.name == "nt":  # which opens no folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _acquire(lock: BaseFileLock, folder: Path) -> None:
    try:
        lock.acquire(timeout=0)
    except OSError as error:
        # some network file systems have no locks, but can be written to
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        logger.warning(
            f"{folder} cannot be locked: see to it that no other run uses it"
        )


def _complete_what_was_killed(folder: Path) -> None:
    for ready in folder.glob(f"{READY_PREFIX}*"):
        _move_to_their_place(ready)
    for partial in folder.glob(f"{PARTIAL_PREFIX}*"):
        shutil.rmtree(partial, ignore_errors=True)


def _move_to_their_place(ready: Path) -> None:
    folder = ready.parent
    # the config goes first and comes last, so that no mixture of old and new can be loaded
    files = sorted(ready.iterdir(), key=lambda file: file.name == SAE_CFG_FILENAME)
    if files and files[-1].name == SAE_CFG_FILENAME:
        (folder / SAE_CFG_FILENAME).unlink(missing_ok=True)
    for file in files:
        os.replace(file, folder / file.name)
    ready.rmdir()
    flush(folder)


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def _reason(error: Exception) -> str | None:
    """Why a file could not be written, or None if the error is about something else."""
    if isinstance(error, WriteError):
        return None
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if isinstance(error, SafetensorError):
        return str(error)
    # torch.save keeps what the system said to itself
    if "PytorchStreamWriter" in str(error) or "inline_container" in str(error):
        return "the disk is full, or files may not become as large"
    return None
