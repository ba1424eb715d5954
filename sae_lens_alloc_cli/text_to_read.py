"""The language model and the text that a command reads for a saved SAE, and its options for them."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from sae_lens import SAE
    from sae_lens.config import LanguageModelSAERunnerConfig

ModelOption = Annotated[
    str | None,
    typer.Option(help="Language model, if not that of the SAE's training."),
]
DatasetOption = Annotated[
    str | None,
    typer.Option(help="Text, if not that of the SAE's training."),
]
TextConfigOption = Annotated[
    Path | None,
    typer.Option(
        exists=True,
        dir_okay=False,
        help="YAML file of a run, as for `train`. Its model and text are used.",
    ),
]
DeviceOption = Annotated[
    str, typer.Option(help="Torch device for the SAE and the language model.")
]


def text_to_read(
    sae: "SAE[Any]",
    model: str | None,
    dataset: str | None,
    config: Path | None,
    device: str,
    what: str,
) -> "LanguageModelSAERunnerConfig[Any]":
    """
    A run with the language model and the text to read. `what` is read for it, as messages say.

    Raises:
        ValueError: as `text_of_sae`, or if the run is one of another width than the SAE's or on
            one's own activations.
    """
    from sae_lens_alloc.activations.on_text import text_of_sae
    from sae_lens_alloc.activations.own_activations import require_text

    if config is None:
        return text_of_sae(sae, model, dataset, device)
    cfg = _run(sae, model, dataset, config, device)
    require_text(cfg, what)
    return cfg


def activations_to_read(
    sae: "SAE[Any]",
    model: str | None,
    dataset: str | None,
    config: Path | None,
    device: str,
) -> "LanguageModelSAERunnerConfig[Any]":
    """
    A run with the activations to read: those of the SAE's training, of a language model or one's
    own, unless an option says otherwise.

    Raises:
        ValueError: as `text_of_sae`, or if the run is one of another width than the SAE's.
    """
    from sae_lens_alloc.activations.on_text import own_run_of_sae, text_of_sae

    if config is not None:
        return _run(sae, model, dataset, config, device)
    if sae.cfg.metadata.activations and model is None and dataset is None:
        return own_run_of_sae(sae, device)
    return text_of_sae(sae, model, dataset, device)


def _run(
    sae: "SAE[Any]",
    model: str | None,
    dataset: str | None,
    config: Path,
    device: str,
) -> "LanguageModelSAERunnerConfig[Any]":
    from sae_lens_alloc.config.run_file import load_runner_config

    cfg = load_runner_config(config, [f"device={device}"])
    if cfg.sae.d_in != sae.cfg.d_in:
        raise ValueError(
            f"the SAE takes activations of {sae.cfg.d_in} dimensions, but sae.d_in of "
            f"{str(config)!r} is {cfg.sae.d_in}: give the config of a run on its activations."
        )
    cfg.model_name = model or cfg.model_name
    cfg.dataset_path = dataset or cfg.dataset_path
    return cfg
