"""`sae-lens-alloc compare`: many architectures at equal L0."""

from pathlib import Path
from typing import Annotated

import typer


def compare(
    config: Annotated[
        Path,
        typer.Argument(
            metavar="CONFIG.yaml",
            exists=True,
            dir_okay=False,
            help="SAELens' own keys for what all SAEs share, and the grid under `compare:`.",
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="Settings that replace the file's, such as `device=cuda`.",
        ),
    ] = None,
    output: Annotated[
        Path,
        typer.Option(help="Folder for the SAEs, results.json and report.html."),
    ] = Path("comparison-output"),
    jobs: Annotated[
        int | None,
        typer.Option(
            min=1, help="SAEs to train side by side. [default: 1, or one on each GPU]"
        ),
    ] = None,
    finished: Annotated[
        bool,
        typer.Option(
            "--finished", help="Train nothing, and compare the SAEs that have finished."
        ),
    ] = False,
) -> None:
    """
    Train SAEs of several architectures on the same activations and compare them at equal L0.

    Finished SAEs are kept, so the same command continues after an interruption. With --finished
    it compares the finished SAEs, also while another command trains.

    \b
    Examples:
      sae-lens-alloc compare configs/compare_demo.yaml
      sae-lens-alloc compare configs/compare_demo.yaml device=cuda --jobs 2 --output OUT
    """
    from rich.console import Console

    from sae_lens_alloc.comparison.run import run_comparison
    from sae_lens_alloc_cli.endings import by_one_process, ends_when_interrupted

    with by_one_process("compare"), ends_when_interrupted():
        run_comparison(config, overrides or [], output, jobs, finished, Console())
