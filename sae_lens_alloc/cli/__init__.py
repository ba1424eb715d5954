"""The console script `sae-lens-alloc`, one command in each file."""

import typer

from sae_lens_alloc.cli import calibrate, compare, demo, features, finetune, run, train

app = typer.Typer(
    name="sae-lens-alloc",
    help="Train SAELens SAEs that allocate one sparsity budget over a whole batch.",
    add_completion=False,
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


def main() -> None:
    """Runs the command line. It exits with 1 or 2 after an error."""
    app()
