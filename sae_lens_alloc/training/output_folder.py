"""Output folders: one run at a time writes to them, and only whole files appear in them."""

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

# Names that begin like this in an output folder are ours.
OWN_PREFIX = ".sae-lens-alloc-"
LOCK_FILENAME = f"{OWN_PREFIX}lock"
# Which launch of several processes writes to a folder: torchrun may start them again.
LAUNCH_FILENAME = f"{OWN_PREFIX}launch"
# Folders of half-written files, and of whole files that have yet to be moved to their place.
PARTIAL_PREFIX = f"{OWN_PREFIX}partial-"
READY_PREFIX = f"{OWN_PREFIX}ready-"


@contextmanager
def locked_folder(folder: Path, setting: str) -> Generator[None, None, None]:
    """
    Creates a folder and locks it against other processes. If a killed process left whole files
    to be moved to their place, they are moved. At the end, created folders that are still empty
    are removed. The same thread may lock a folder several times. The lock of a process that has
    died does not count.

    Args:
        folder: The folder.
        setting: Name of the setting that names the folder, for messages.

    Raises:
        ValueError: if another process has locked it.
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
    Gives a new folder inside of `folder` to write files into. At the end they replace the files
    of the same name in `folder`. After an error they are removed. If the process is killed,
    either the old files or the new ones remain, once `locked_folder` has completed the exchange.

    Args:
        folder: Folder of the files.
        what: What the files are, for messages.

    Raises:
        OSError: if there is no room or they cannot be written.
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
    Turns the errors of torch, safetensors and Python for a file that cannot be written into an
    OSError in one sentence.
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
    """Something cannot be written. The message is one sentence."""

    def __str__(self) -> str:
        return self.strerror or ""


def require_empty(
    folder: Path, setting: str, overwrite: bool, expected: frozenset[str] = frozenset()
) -> None:
    """
    Raises ValueError if a folder holds other files than `expected` ones and our own, unless
    `overwrite` is given.
    """
    if overwrite or not folder.exists():
        return
    names = {path.name for path in folder.iterdir()}
    if any(not name.startswith(OWN_PREFIX) for name in names - expected):
        raise ValueError(
            f"{setting} {str(folder)!r} is not empty: give --overwrite to write into it, "
            f"or another {setting}."
        )


def is_of_launch(folder: Path, launch: str | None) -> bool:
    """Whether an earlier process of a launch has held a folder, by `mark_launch`."""
    mark = folder / LAUNCH_FILENAME
    if launch is None or not mark.exists():
        return False
    marked, _, pid = mark.read_text().rpartition(" ")
    return marked == launch and pid != str(os.getpid())


@contextmanager
def mark_launch(folder: Path, launch: str) -> Generator[None, None, None]:
    """Within it, and afterwards unless the folder has stayed empty, a folder is of a launch."""
    mark = folder / LAUNCH_FILENAME
    if not is_of_launch(folder, launch):
        mark.write_text(f"{launch} {os.getpid()}")
    try:
        yield
    finally:
        if {path.name for path in folder.iterdir()} <= {LOCK_FILENAME, LAUNCH_FILENAME}:
            mark.unlink(missing_ok=True)


def require_new_file(path: Path, setting: str, overwrite: bool) -> None:
    """
    Raises ValueError if a file cannot be written at a path: it is there already and `overwrite`
    is not given, or it is a folder, or the folder that it would be in is none or cannot be
    written to. Nothing is created.
    """
    if path.is_dir():
        raise ValueError(
            f"{setting} {str(path)!r} is a folder: give the name of a file."
        )
    if path.exists() and not overwrite:
        raise ValueError(
            f"{setting} {str(path)!r} exists: give --overwrite to replace it, or another "
            f"{setting}."
        )
    there = next(folder for folder in path.absolute().parents if folder.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise ValueError(
            f"{setting} is {str(path)!r}, but {str(there)!r} is not a folder that can be "
            "written to."
        )


def require_other_folder(
    output: str | Path | None, source: str | Path, what: str
) -> None:
    """
    Raises ValueError if an output folder is the folder `source`, under whatever name, and would
    overwrite it.

    Args:
        output: The output folder.
        source: The folder that the run starts from.
        what: What that folder holds, for the message.
    """
    if output is None or not Path(output).exists() or not Path(source).exists():
        return
    if os.path.samefile(output, source):
        raise ValueError(
            f"the output {str(output)!r} is the folder of {what}, which must not change: "
            "give another folder."
        )


def flush(path: Path) -> None:
    """Forces a file, or the names in a folder, to the disk."""
    if os.name == "nt":  # Windows cannot open folders
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
            f"{folder} cannot be locked: make sure that no other run uses it"
        )


def _complete_what_was_killed(folder: Path) -> None:
    for ready in folder.glob(f"{READY_PREFIX}*"):
        _move_to_their_place(ready)
    for partial in folder.glob(f"{PARTIAL_PREFIX}*"):
        shutil.rmtree(partial, ignore_errors=True)


def _move_to_their_place(ready: Path) -> None:
    folder = ready.parent
    # the config is removed first and written last, so that no mixture of old and new can be loaded
    files = sorted(ready.iterdir(), key=lambda file: file.name == SAE_CFG_FILENAME)
    if files and files[-1].name == SAE_CFG_FILENAME:
        (folder / SAE_CFG_FILENAME).unlink(missing_ok=True)
    for file in files:
        if file.is_dir() and not file.is_symlink():
            shutil.rmtree(folder / file.name, ignore_errors=True)
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
    # torch.save does not pass on the message of the system
    if "PytorchStreamWriter" in str(error) or "inline_container" in str(error):
        return "the disk is full, or there is a limit on the size of files"
    return None
