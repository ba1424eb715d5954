"""How a command ends: with one sentence after an error, or with exit code 130 when interrupted."""

import os
import shlex
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import typer
from sae_lens.config import LanguageModelSAERunnerConfig

from sae_lens_alloc.compat import InterruptedException
from sae_lens_alloc.distributed.launch import is_launched
from sae_lens_alloc.distributed.speaking import is_first_to_end, is_lost_peer
from sae_lens_alloc.errors import in_one_sentence
from sae_lens_alloc.training.checkpoint import holds_checkpoints
from sae_lens_alloc.training.interruption import interruptible

# Set in the environment, it shows the traceback of an error.
TRACEBACK_VARIABLE = "SAE_LENS_ALLOC_TRACEBACK"
# What libraries warn of as they are used here, and nobody can change: text is tokenized as it is
# read (`is_dataset_tokenized: false`).
NOT_FOR_USERS = ("Dataset is not tokenized",)
LOST_PEER = (
    "another process of the training has ended unexpectedly, killed or out of memory, and the "
    "others end, too"
)


@contextmanager
def one_sentence_errors() -> Generator[None, None, None]:
    """Prints an error as one sentence and exits with 1. Of several processes, one prints it."""
    for said in NOT_FOR_USERS:
        warnings.filterwarnings("ignore", said)
    try:
        yield
    except (typer.Exit, click.ClickException):
        raise
    except Exception as error:
        if TRACEBACK_VARIABLE in os.environ:
            raise
        if is_first_to_end():
            typer.echo(f"error: {_sentence(error)}", err=True)
        raise typer.Exit(1) from None


def _sentence(error: Exception) -> str:
    if is_launched() and is_lost_peer(error):
        return LOST_PEER
    if isinstance(error, ValueError | OSError):
        return in_one_sentence(error)
    return f"{in_one_sentence(error)} (set {TRACEBACK_VARIABLE}=1 to see where)"


@contextmanager
def by_one_process(command: str) -> Generator[None, None, None]:
    """`one_sentence_errors` of a command that several processes cannot share."""
    with one_sentence_errors():
        if is_launched():
            raise ValueError(
                f"`sae-lens-alloc {command}` is for one process: start it without torchrun."
            )
        yield


@contextmanager
def ends_when_interrupted(
    cfg: LanguageModelSAERunnerConfig[Any] | None = None,
) -> Generator[None, None, None]:
    """
    Exits with 130 on SIGINT and SIGTERM. Prints where the SAE is saved or, if it is not, how to
    resume from the checkpoints.

    Args:
        cfg: The run, None if it has no checkpoints.
    """
    try:
        with interruptible():
            yield
    except (InterruptedException, KeyboardInterrupt) as interruption:
        how = str(interruption)
        if cfg is not None and not how:
            folder = cfg.checkpoint_path
            how = (
                f"to continue, start again with resume_from_checkpoint={shlex.quote(folder)}"
                if folder is not None and holds_checkpoints(Path(folder))
                else "no checkpoint was saved"
            )
        if is_first_to_end():
            typer.echo(f"interrupted; {how}" if how else "interrupted", err=True)
        raise typer.Exit(130) from None
