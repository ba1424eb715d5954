"""
The console script `sae-lens-alloc`, one command in each file.

A package beside `sae_lens_alloc`, which imports SAELens and takes seconds. Here nothing heavy is
imported before a command runs, so that `--help` answers at once (`tests/cli/test_light.py`).
"""

import os
import sys
import threading
from importlib.metadata import version
from typing import Annotated

import typer

from sae_lens_alloc_cli import (
    architectures,
    calibrate,
    compare,
    demo,
    doctor,
    features,
    finetune,
    push,
    report,
    run,
    train,
)

# For imports, before a line says that they go on.
SECONDS_OF_SILENCE = 3.0

app = typer.Typer(
    name="sae-lens-alloc",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command()(train.train)
app.command()(finetune.finetune)
app.command(
    context_settings={"allow_interspersed_args": False, "ignore_unknown_options": True}
)(run.run)
app.command()(demo.demo)
app.command()(calibrate.calibrate)
app.command()(compare.compare)
app.command()(features.features)
app.command()(report.report)
app.command()(push.push)
app.command()(architectures.architectures)
app.command()(doctor.doctor)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"sae-lens-alloc {version('sae-lens-alloc')}")
        raise typer.Exit


@app.callback()
def sae_lens_alloc(
    _version: Annotated[
        bool,
        typer.Option(
            "--version",
            help="Print the version and exit.",
            callback=_print_version,
            is_eager=True,
        ),
    ] = False,
) -> None:
    """Train SAELens SAEs that allocate one sparsity budget over a whole batch."""


def main() -> None:
    """Runs the command line. It exits with 1 or 2 after an error."""
    say_that_imports_go_on()
    app(with_home(sys.argv[1:]))


def say_that_imports_go_on() -> None:
    """Says once what one waits for, if SAELens has not been imported after some seconds."""

    def say() -> None:
        # each command imports it last
        endings = sys.modules.get(f"{__name__}.endings")
        if not hasattr(endings, "ends_when_interrupted"):
            typer.echo("importing SAELens and torch ...", err=True)

    if os.environ.get("RANK", "0") == "0":  # of several processes, one says it
        timer = threading.Timer(SECONDS_OF_SILENCE, say)
        timer.daemon = True
        timer.start()


def with_home(arguments: list[str]) -> list[str]:
    """
    Arguments with the home folder for `~`, which shells leave in `output_path=~/sae` and in
    `--output=~/sae`. The arguments of another module, behind `run`, stay as they are.
    """
    if arguments[:1] == ["run"]:
        return arguments
    return [
        f"{name}{equals}{os.path.expanduser(value)}"
        if equals
        else os.path.expanduser(word)
        for word in arguments
        for name, equals, value in [word.partition("=")]
    ]
