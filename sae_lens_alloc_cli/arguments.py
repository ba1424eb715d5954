"""Arguments and options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

ConfigArgument = Annotated[
    Path,
    typer.Argument(
        metavar="CONFIG.yaml",
        exists=True,
        dir_okay=False,
        help="The run: SAELens' own keys, with the SAE under `sae:` and LoggingConfig under "
        "`logger:`.",
    ),
]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Settings that replace the file's, such as `lr=1e-3` or `sae.k=16`.",
    ),
]
OverwriteOption = Annotated[
    bool,
    typer.Option(
        "--overwrite",
        help="Write into the output folder even if it is not empty, and replace files of the "
        "same name.",
    ),
]
OverwriteFileOption = Annotated[
    bool, typer.Option("--overwrite", help="Replace the file if it exists.")
]
DryRunOption = Annotated[
    bool,
    typer.Option("--dry-run", help="Check the run, print what it would do, and stop."),
]
NoReportOption = Annotated[
    bool,
    typer.Option("--no-report", help="Write no report.html about the SAE at the end."),
]
