"""`sae-lens-alloc report`: one page with the figures of an SAE."""

from pathlib import Path
from typing import Annotated

import typer

from sae_lens_alloc_cli.arguments import OverwriteFileOption
from sae_lens_alloc_cli.text_to_read import (
    DatasetOption,
    DeviceOption,
    ModelOption,
    TextConfigOption,
    text_to_read,
)

TOKENS = 50_000


def report(
    sae: Annotated[
        str,
        typer.Argument(
            metavar="SAE",
            help="An SAE or transcoder of SAELens: a folder, or RELEASE:ID of its directory of "
            "pretrained SAEs. It is not changed.",
        ),
    ],
    output: Annotated[Path, typer.Option(help="HTML file to write.")],
    tokens: Annotated[
        int, typer.Option(min=1, help="Tokens of text to measure on.")
    ] = TOKENS,
    model: ModelOption = None,
    dataset: DatasetOption = None,
    config: TextConfigOption = None,
    device: DeviceOption = "cpu",
    overwrite: OverwriteFileOption = False,
) -> None:
    """
    Write one HTML page about an SAE: variance explained, cross-entropy recovered, features per
    token, dead features, densities, and its training where the folder has metrics.jsonl.

    The text and the language model are those that SAELens recorded in the SAE, unless an
    option says otherwise.

    \b
    Examples:
      sae-lens-alloc report SAE --output report.html
      sae-lens-alloc report RELEASE:ID --output report.html --dataset org/text --device cuda
    """
    from rich.console import Console

    from sae_lens_alloc.comparison.given_run import report_given_sae
    from sae_lens_alloc.comparison.given_saes import load_given_saes
    from sae_lens_alloc.config.run_checks import check_device
    from sae_lens_alloc.evaluation.results_table import results_table
    from sae_lens_alloc.training.output_folder import require_new_file
    from sae_lens_alloc.training.preflight import check_activations, check_devices
    from sae_lens_alloc_cli.endings import by_one_process, ends_when_interrupted

    with by_one_process("report"), ends_when_interrupted():
        require_new_file(output, "--output", overwrite)
        check_device("--device", device)
        saes = load_given_saes([sae], "cpu")
        (given,) = saes.values()
        cfg = text_to_read(given, model, dataset, config, device, "the report")
        check_devices(cfg)
        check_activations(cfg)
        given.to(device)
        run = report_given_sae(sae, saes, cfg, tokens, output)
    Console().print(results_table([run], "The SAE on {n_tokens:,} tokens"))
    typer.echo(f"saved in {output}; open it in a browser")
