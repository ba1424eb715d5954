"""`sae-lens-alloc demo`: two SAEs on the shipped language model, and a report."""

from pathlib import Path
from typing import Annotated

import typer

from sae_lens_alloc_cli.arguments import OverwriteOption


def demo(
    quick: Annotated[
        bool,
        typer.Option(
            "--quick", help="Train on less text: under 90 seconds on 2 cores."
        ),
    ] = False,
    output: Annotated[
        Path,
        typer.Option(
            help="Folder for the SAEs, the figures, report.html and features.html."
        ),
    ] = Path("demo-output"),
    overwrite: OverwriteOption = False,
) -> None:
    """
    Train a Mutual Choice SAE and a stock batchtopk SAE on the shipped language model, compare
    them on held-out text, and write a report and a page of features. Needs no network.

    \b
    Examples:
      sae-lens-alloc demo
      sae-lens-alloc demo --quick --output demo-quick
    """
    from sae_lens_alloc.demo.run import run_demo
    from sae_lens_alloc_cli.endings import by_one_process, ends_when_interrupted

    with by_one_process("demo"), ends_when_interrupted():
        run_demo(output, quick, overwrite)
