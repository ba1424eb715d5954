"""`sae-lens-alloc compare`: many architectures at equal L0, or SAEs that one already has."""

from pathlib import Path
from typing import Annotated

import typer

from sae_lens_alloc_cli.arguments import OverwriteOption
from sae_lens_alloc_cli.text_to_read import (
    DatasetOption,
    ModelOption,
    TextConfigOption,
    text_to_read,
)

TOKENS = 50_000


def compare(
    given: Annotated[
        list[str],
        typer.Argument(
            metavar="CONFIG.yaml [KEY=VALUE]... | SAE...",
            help="A grid to train: SAELens' own keys for what all SAEs share, and the grid under "
            "`compare:`; settings such as `device=cuda` replace the file's. Or SAEs of SAELens to "
            "measure: folders, or RELEASE:ID of its directory of pretrained SAEs.",
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(help="Folder for the figures and report.html, and a grid's SAEs."),
    ] = Path("comparison-output"),
    jobs: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Grid: SAEs to train side by side. [default: 1, or one on each GPU]",
        ),
    ] = None,
    finished: Annotated[
        bool,
        typer.Option(
            "--finished",
            help="Grid: train nothing, and compare the SAEs that have finished.",
        ),
    ] = False,
    l0: Annotated[
        float | None,
        typer.Option(
            "--l0",
            help="SAEs: features per token at which they are compared.  [default: the smallest "
            "that one of them has]",
            show_default=False,
        ),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="SAEs: tokens of text to measure on; as many set the thresholds.  [default: "
            f"{TOKENS:,}]",
            show_default=False,
        ),
    ] = None,
    model: ModelOption = None,
    dataset: DatasetOption = None,
    config: TextConfigOption = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="SAEs: torch device for them and the language model.  [default: cpu]",
            show_default=False,
        ),
    ] = None,
    overwrite: OverwriteOption = False,
) -> None:
    """
    Train SAEs of several architectures on the same activations and compare them at equal L0. Or
    compare SAEs that you have, as they are saved and at equal L0.

    Of a grid, finished SAEs are kept, so the same command continues after an interruption. With
    --finished it compares the finished SAEs, also while another command trains.

    SAEs that you have may be of any architecture. They are measured on the same text, which is
    that of the first one's training unless an option says otherwise.

    \b
    Examples:
      sae-lens-alloc compare configs/compare_demo.yaml
      sae-lens-alloc compare configs/compare_demo.yaml device=cuda --jobs 2 --output OUT
      sae-lens-alloc compare SAE1 SAE2 RELEASE:ID --dataset org/text --output OUT
    """
    from rich.console import Console

    from sae_lens_alloc_cli.endings import by_one_process, ends_when_interrupted

    of_saes = {
        **{"--l0": l0, "--tokens": tokens, "--model": model, "--dataset": dataset},
        **{"--config": config, "--device": device, "--overwrite": overwrite or None},
    }
    of_grid = {"--jobs": jobs, "--finished": finished or None}
    is_grid = given[0].endswith((".yaml", ".yml"))
    with by_one_process("compare"), ends_when_interrupted():
        for option, value in (of_saes if is_grid else of_grid).items():
            if value is not None:
                raise ValueError(
                    f"{option} is for "
                    + (
                        "SAEs that you have, and not for a grid: put its settings into the file."
                        if is_grid
                        else "a grid, whose CONFIG.yaml comes first: leave it out."
                    )
                )
        if is_grid:
            from sae_lens_alloc.comparison.run import run_comparison

            path = Path(given[0])
            if not path.is_file():
                raise ValueError(f"there is no file {given[0]!r}.")
            run_comparison(path, given[1:], output, jobs, finished, Console())
            return
        _compare_saes(
            given,
            output,
            l0,
            tokens or TOKENS,
            model,
            dataset,
            config,
            device or "cpu",
            overwrite,
        )
    typer.echo(f"saved in {output}; open {output / 'report.html'} in a browser")


def _compare_saes(
    names: list[str],
    output: Path,
    l0: float | None,
    tokens: int,
    model: str | None,
    dataset: str | None,
    config: Path | None,
    device: str,
    overwrite: bool,
) -> None:
    from rich.console import Console

    from sae_lens_alloc.comparison.given_run import compare_given_saes
    from sae_lens_alloc.comparison.given_saes import SAME_METADATA, load_given_saes
    from sae_lens_alloc.config.run_checks import check_device
    from sae_lens_alloc.thresholds.requirements import require_target_l0
    from sae_lens_alloc.training.output_folder import (
        locked_folder,
        require_empty,
        require_other_folder,
    )
    from sae_lens_alloc.training.preflight import check_activations, check_devices

    check_device("--device", device)
    # an option says what the metadata of the SAEs say otherwise
    same = [] if config is not None else list(SAME_METADATA)
    if model is not None and same:
        same.remove("model_name")
    saes = load_given_saes(names, "cpu", same)
    for sae in saes.values():
        if l0 is not None:
            require_target_l0(sae, l0)
    first = next(iter(saes.values()))
    cfg = text_to_read(first, model, dataset, config, device, "the comparison")
    check_devices(cfg)
    check_activations(cfg)
    for name in names:
        require_other_folder(output, name, "one of the SAEs")
    with locked_folder(output, "--output"):
        require_empty(output, "--output", overwrite)
        for sae in saes.values():
            sae.to(device)
        compare_given_saes(saes, cfg, tokens, l0, output, Console())
