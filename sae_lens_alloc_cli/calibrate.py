"""`sae-lens-alloc calibrate`: the thresholds of a saved SAE set to a wanted L0."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sae_lens_alloc_cli.arguments import OverwriteOption
from sae_lens_alloc_cli.text_to_read import (
    DatasetOption,
    DeviceOption,
    ModelOption,
    TextConfigOption,
    activations_to_read,
)

if TYPE_CHECKING:
    from rich.table import Table
    from sae_lens.saes.topk_sae import TopKSAE

    from sae_lens_alloc.thresholds.factor import Thresholded
    from sae_lens_alloc.thresholds.recalibration import Recalibration

# the same as at the end of a training (tests/cli/test_light.py)
TOKENS = 2 * 65_536


def calibrate(
    sae: Annotated[
        Path,
        typer.Argument(
            metavar="SAE",
            exists=True,
            file_okay=False,
            help="Folder of a saved SAE: one of ours, or a stock jumprelu, batchtopk or topk SAE. "
            "It is not changed.",
        ),
    ],
    output: Annotated[
        Path, typer.Option(help="Folder for the SAE with its new thresholds.")
    ],
    l0: Annotated[
        float | None,
        typer.Option(
            "--l0",
            help="Wanted features per token. Default: the k that the SAE was trained with.",
            show_default=False,
        ),
    ] = None,
    per_feature: Annotated[
        bool,
        typer.Option(
            "--per-feature",
            help="Multiply all densities by one factor, instead of all thresholds.",
        ),
    ] = False,
    tokens: Annotated[
        int,
        typer.Option(help="Tokens of text: half set the thresholds, half check them."),
    ] = TOKENS,
    model: ModelOption = None,
    dataset: DatasetOption = None,
    config: TextConfigOption = None,
    device: DeviceOption = "cpu",
    overwrite: OverwriteOption = False,
) -> None:
    """
    Set the thresholds of a saved SAE to a wanted L0 on text of your choice.

    The text and the language model, or one's own activations, are those that were recorded in the
    SAE, unless an option says otherwise. A topk SAE becomes a jumprelu SAE.

    \b
    Examples:
      sae-lens-alloc calibrate SAE --l0 12 --output NEW
      sae-lens-alloc calibrate SAE --dataset org/text --per-feature --output NEW
    """
    from rich.console import Console

    from sae_lens_alloc.activations.on_text import gather_activations
    from sae_lens_alloc.activations.own_activations import activations_of
    from sae_lens_alloc.config.run_checks import check_device
    from sae_lens_alloc.thresholds.recalibration import (
        MIN_TOKENS,
        load_saved_sae,
        recalibrate,
    )
    from sae_lens_alloc.thresholds.requirements import require_target_l0
    from sae_lens_alloc.training.output_folder import (
        locked_folder,
        new_files,
        require_empty,
        require_other_folder,
    )
    from sae_lens_alloc.training.preflight import check_activations, check_devices
    from sae_lens_alloc_cli.endings import by_one_process, ends_when_interrupted

    with by_one_process("calibrate"), ends_when_interrupted():
        check_device("--device", device)
        given = load_saved_sae(sae)
        target_l0 = _trained_l0(given) if l0 is None else l0
        require_target_l0(given, target_l0)
        if tokens < MIN_TOKENS:
            raise ValueError(
                f"--tokens must be at least {MIN_TOKENS}, two for each half, got {tokens}."
            )
        cfg = activations_to_read(given, model, dataset, config, device)
        check_devices(cfg)
        if activations_of(cfg) is None:
            check_activations(cfg)
        require_other_folder(output, sae, "the SAE itself")
        with locked_folder(output, "--output"):
            require_empty(output, "--output", overwrite)
            given.to(device)
            report = recalibrate(
                given, gather_activations(cfg, tokens), target_l0, per_feature
            )
            with new_files(output, "the SAE") as folder:
                report.sae.save_model(folder)
    Console().print(_calibration_table(report))
    typer.echo(f"saved in {output}")


def _trained_l0(sae: "Thresholded | TopKSAE") -> float:
    from sae_lens_alloc.saes.saved_sae import trained_k

    k = trained_k(sae)
    if k is None:
        raise ValueError(
            "the SAE was not trained with a fixed number of features per token: give --l0."
        )
    return k


def _calibration_table(report: "Recalibration") -> "Table":
    from rich.table import Table

    how = "each feature's share kept" if report.per_feature else "one factor"
    table = Table(title=f"L0 {report.target_l0:g} wanted, {how}")
    table.add_column("on", style="bold")
    for column in ("thresholds", "L0", "explained\nvariance", "dead"):
        table.add_column(column, justify="right")
    half = f"half of {report.before.n_tokens:,} tokens"
    for text, pair in {
        f"calibration {half}": (report.before, report.after),
        f"held-out {half}": (report.held_out_before, report.held_out_after),
    }.items():
        for thresholds, usage in zip(("before", "after"), pair, strict=True):
            table.add_row(
                text,
                thresholds,
                f"{usage.l0:.2f}",
                f"{usage.explained_variance:.4f}",
                f"{usage.dead_features:,}",
            )
    return table
