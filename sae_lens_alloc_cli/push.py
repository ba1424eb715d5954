"""`sae-lens-alloc push`: a saved SAE given to others."""

from pathlib import Path
from typing import Annotated

import typer


def push(
    sae: Annotated[
        Path,
        typer.Argument(
            metavar="SAE",
            exists=True,
            file_okay=False,
            help="Folder of a saved SAE of SAELens, or a folder with several in folders of their "
            "own. It is not changed.",
        ),
    ],
    to: Annotated[
        str | None,
        typer.Option(
            "--to",
            metavar="ORG/NAME",
            help="Repository of the Hugging Face hub. It is created if it is not there.",
        ),
    ] = None,
    to_sparsify: Annotated[
        Path | None,
        typer.Option(
            "--to-sparsify",
            metavar="FOLDER",
            help="Write it for EleutherAI's sparsify: a topk SAE.",
        ),
    ] = None,
    to_dictionary_learning: Annotated[
        Path | None,
        typer.Option(
            "--to-dictionary-learning",
            metavar="FOLDER",
            help="Write it for dictionary_learning: a jumprelu (ours, too), topk, standard or "
            "gated SAE.",
        ),
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="Let nobody else see the repository.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Write what would be uploaded to --output. Uses no network.",
        ),
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Folder of --dry-run.  [default: NAME of --to]", show_default=False
        ),
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            help="Add to a repository or folder that holds something, and replace files of the "
            "same name.",
        ),
    ] = False,
) -> None:
    """
    Upload a saved SAE with a model card, or write it in the form of another library.

    The card has config, figures, thresholds, a picture of the densities, and the commands that
    load the SAE. You log in with `hf auth login` or HF_TOKEN.

    \b
    Examples:
      sae-lens-alloc push SAE --to me/my-saes --dry-run
      sae-lens-alloc push SAE --to me/my-saes --private
      sae-lens-alloc push SAE --to-dictionary-learning FOLDER
    """
    from sae_lens_alloc.sharing.run import (
        push_to_hub,
        write_for_library,
        write_what_would_be_pushed,
    )
    from sae_lens_alloc_cli.endings import by_one_process, ends_when_interrupted

    libraries = {
        "sparsify": to_sparsify,
        "dictionary_learning": to_dictionary_learning,
    }
    wanted = {name: folder for name, folder in libraries.items() if folder is not None}
    with by_one_process("push"), ends_when_interrupted():
        if (to is not None) + len(wanted) != 1:
            raise ValueError(
                "give one of --to ORG/NAME, --to-sparsify FOLDER and --to-dictionary-learning "
                "FOLDER."
            )
        if to is None and (private or dry_run or output is not None):
            raise ValueError("--private, --dry-run and --output go with --to ORG/NAME.")
        if output is not None and not dry_run:
            raise ValueError("--output is the folder of --dry-run: give that, too.")
        for library, folder in wanted.items():
            for written in write_for_library(sae, library, folder, overwrite):
                typer.echo(f"saved in {written} for {library}")
        if to is not None and dry_run:
            folder = Path(to.rpartition("/")[2]) if output is None else output
            files = write_what_would_be_pushed(sae, to, folder, overwrite)
            for name in files:
                typer.echo(f"{(folder / name).stat().st_size:>15,}  {name}")
            typer.echo(f"saved in {folder}; without --dry-run, it is uploaded to {to}")
        elif to is not None:
            address = push_to_hub(sae, to, private, overwrite)
            typer.echo(f"uploaded to {address}")
