"""`sae-lens-alloc features`: one page about what the features of an SAE do on text."""

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

TOKENS = 100_000


def features(
    sae: Annotated[
        str,
        typer.Argument(
            metavar="SAE",
            help="An SAE of SAELens: a folder, or RELEASE:ID of its directory of pretrained "
            "SAEs. It is not changed.",
        ),
    ],
    output: Annotated[Path, typer.Option(help="HTML file to write.")],
    tokens: Annotated[
        int, typer.Option(min=1, help="Tokens of text to look at.")
    ] = TOKENS,
    numbers: Annotated[
        str | None,
        typer.Option(
            "--features",
            metavar="0-99,512",
            help="Features to show.  [default: all]",
            show_default=False,
        ),
    ] = None,
    model: ModelOption = None,
    dataset: DatasetOption = None,
    config: TextConfigOption = None,
    device: DeviceOption = "cpu",
    overwrite: OverwriteFileOption = False,
) -> None:
    """
    Write one HTML page about the features of an SAE: text that each is most active on, logit
    lens, nearest features, and text with the features of each token.

    The text and the language model are those that SAELens recorded in the SAE, unless an
    option says otherwise.

    \b
    Examples:
      sae-lens-alloc features SAE --output features.html
      sae-lens-alloc features SAE --features 0-99 --output features.html
    """
    from sae_lens_alloc.config.run_checks import check_device
    from sae_lens_alloc.features.choice import chosen_features
    from sae_lens_alloc.features.loading import load_readable_sae
    from sae_lens_alloc.features.measure import measure_features
    from sae_lens_alloc.training.output_folder import new_files, require_new_file
    from sae_lens_alloc.training.preflight import check_activations, check_devices
    from sae_lens_alloc_cli.endings import by_one_process, ends_when_interrupted

    with by_one_process("features"), ends_when_interrupted():
        require_new_file(output, "--output", overwrite)
        check_device("--device", device)
        given = load_readable_sae(sae)
        chosen = chosen_features(numbers, given.cfg.d_sae)
        cfg = text_to_read(given, model, dataset, config, device, "the page")
        check_devices(cfg)
        check_activations(cfg)
        given.to(device)
        folder = Path(sae)
        title = folder.resolve().name if folder.is_dir() else sae
        page = measure_features(given, cfg, tokens, chosen, title)
        with new_files(output.parent, "the page") as new_folder:
            page.write(new_folder / output.name)
    found = page.activity.tokens.numel()
    if found < tokens:
        typer.echo(f"the text ended after {found:,} of {tokens:,} tokens")
    size = output.stat().st_size / 1e6
    typer.echo(f"saved in {output} ({size:.1f} MB); open it in a browser")
