"""The console script `sae-lens-alloc`."""

import importlib.util
import os
import runpy
import shlex
import sys
import warnings
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Annotated, Any

import click
import typer
from rich.console import Console
from rich.table import Table
from sae_lens.config import LanguageModelSAERunnerConfig
from sae_lens.saes.jumprelu_sae import JumpReLUSAE
from sae_lens.saes.topk_sae import TopKSAE

from sae_lens_alloc.activations.on_text import gather_activations, text_of_sae
from sae_lens_alloc.compat import InterruptedException
from sae_lens_alloc.config.run_checks import check_device
from sae_lens_alloc.config.run_file import load_fine_tuning_config, load_runner_config
from sae_lens_alloc.errors import in_one_sentence
from sae_lens_alloc.evaluation.results_table import results_table
from sae_lens_alloc.saes.saved_sae import trained_k
from sae_lens_alloc.thresholds.recalibration import (
    MIN_TOKENS,
    Recalibration,
    load_saved_sae,
    recalibrate,
    require_target_l0,
)
from sae_lens_alloc.training.checkpoint import holds_checkpoints
from sae_lens_alloc.training.conversion import require_convertible
from sae_lens_alloc.training.fine_tuning_run import fine_tune
from sae_lens_alloc.training.interruption import interruptible
from sae_lens_alloc.training.output_folder import (
    locked_folder,
    new_files,
    require_empty,
    require_other_folder,
)
from sae_lens_alloc.training.preflight import (
    check_activations,
    check_devices,
    check_output,
    check_training,
)
from sae_lens_alloc.training.resuming import settle_resumed_run
from sae_lens_alloc.training.run_folders import claimed_folders
from sae_lens_alloc.training.runner import (
    CALIBRATION_TOKENS,
    AllocSAETrainingRunner,
)
from sae_lens_alloc.training.source_sae import load_source_sae
from sae_lens_alloc.training.summary import describe_run

# For whoever has to mend an error that is not theirs.
TRACEBACK_VARIABLE = "SAE_LENS_ALLOC_TRACEBACK"

app = typer.Typer(
    name="sae-lens-alloc",
    help="Train SAELens SAEs that allocate one sparsity budget over a whole batch.",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Runs the command line, and exits with 1 or 2 after a user's error."""
    app()


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
        help="Write into the output folder even if it holds something, replacing files of "
        "the same name.",
    ),
]
DryRunOption = Annotated[
    bool,
    typer.Option("--dry-run", help="Check the run, say what it would do, and stop."),
]


@app.command()
def train(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    overwrite: OverwriteOption = False,
    dry_run: DryRunOption = False,
) -> None:
    """
    Train one SAE as a YAML file says.

    The run is checked and described before any model is loaded. An output folder that holds
    something is left alone unless --overwrite is given.
    """
    with _one_sentence_errors(), _interruptible():
        cfg = load_runner_config(config, overrides or [])
        settle_resumed_run(cfg)
        typer.echo(describe_run(cfg))
        check_training(cfg)
        if dry_run:
            check_output(cfg.output_path, overwrite, bool(cfg.resume_from_checkpoint))
            return
        with _claim_output(cfg, overwrite), _interruptible(cfg):
            AllocSAETrainingRunner(cfg, overwrite=overwrite).run()
    typer.echo(f"saved in {cfg.output_path}")


@app.command()
def finetune(
    config: ConfigArgument,
    source: Annotated[
        str,
        typer.Option(
            "--from",
            metavar="PATH|RELEASE:ID",
            help="The SAE to start from: a folder with an SAE or a checkpoint, or an SAE of "
            "SAELens' directory of pretrained ones.",
        ),
    ],
    overrides: OverridesArgument = None,
    overwrite: OverwriteOption = False,
    dry_run: DryRunOption = False,
) -> None:
    """
    Train an SAE that you have further, as Mutual Choice or Feature Choice, and compare it with
    what it was.

    The SAE may be of SAELens' topk, batchtopk, matryoshka_batchtopk, jumprelu, gated or
    standard architecture, or one of ours. It is not changed.
    """
    with _one_sentence_errors(), _interruptible():
        loaded = load_source_sae(source, "cpu")
        cfg, sae_overrides = load_fine_tuning_config(
            config, overrides or [], loaded.sae.cfg
        )
        settle_resumed_run(cfg, sae_is_known=False)
        typer.echo(describe_run(cfg))
        typer.echo(f"{'from':<12}{loaded.sae.cfg.architecture()}, {source}")
        require_convertible(loaded.sae, cfg.sae.architecture())
        if cfg.from_pretrained_path is not None:
            raise ValueError(
                "from_pretrained_path has no effect here, where --from says which SAE to "
                "start from: leave it out."
            )
        require_other_folder(cfg.output_path, source, "the SAE to start from")
        check_training(cfg)
        if dry_run:
            check_output(cfg.output_path, overwrite, bool(cfg.resume_from_checkpoint))
            return
        with _claim_output(cfg, overwrite), _interruptible(cfg):
            result = fine_tune(cfg, loaded, sae_overrides, overwrite)
    Console().print(results_table([result.before, result.after]))
    typer.echo(
        f"{result.revived_features:,} features revived, {result.died_features:,} died; "
        f"saved in {cfg.output_path}, with report.html"
    )


@app.command(
    context_settings={"allow_interspersed_args": False, "ignore_unknown_options": True}
)
def run(
    module: Annotated[
        str, typer.Argument(metavar="MODULE", help="For example sae_lens.evals.")
    ],
    args: Annotated[
        list[str] | None, typer.Argument(metavar="ARG", help="Its arguments.")
    ] = None,
) -> None:
    """
    Run a Python module, as `python -m` does, with our architectures known to SAELens.

    For example: sae-lens-alloc run -- sae_lens.llm_sae_training_runner --architecture
    mutual_choice --k 32 ...
    """
    sys.path.insert(0, os.getcwd())
    with _one_sentence_errors():
        _require_runnable(module)
    sys.argv = [module, *(args or [])]
    # runpy warns that sae_lens imported the module already; `python -m` would, too
    warnings.filterwarnings("ignore", ".*found in sys.modules", RuntimeWarning)
    runpy.run_module(module, run_name="__main__", alter_sys=True)


@app.command()
def demo(
    quick: Annotated[
        bool,
        typer.Option(
            "--quick", help="Train on less text: under 90 seconds on 2 cores."
        ),
    ] = False,
    output: Annotated[
        Path, typer.Option(help="Folder for the SAEs, the figures and report.html.")
    ] = Path("demo-output"),
    overwrite: OverwriteOption = False,
) -> None:
    """
    Train a Mutual Choice SAE and a stock batchtopk SAE on the shipped language model,
    compare them on held-out text, and write a report. Needs no network.
    """
    from sae_lens_alloc.demo.run import run_demo

    with _one_sentence_errors(), _interruptible():
        run_demo(output, quick, overwrite)


@app.command()
def calibrate(
    sae: Annotated[
        Path,
        typer.Argument(
            metavar="SAE",
            exists=True,
            file_okay=False,
            help="Folder of a saved SAE: one of ours, or a stock jumprelu, batchtopk or "
            "topk one. It is left as it is.",
        ),
    ],
    output: Annotated[
        Path, typer.Option(help="Folder for the SAE with its new thresholds.")
    ],
    l0: Annotated[
        float | None,
        typer.Option(
            "--l0",
            help="Wanted features per token; by default the k that the SAE was trained with.",
            show_default=False,
        ),
    ] = None,
    per_feature: Annotated[
        bool,
        typer.Option(
            "--per-feature",
            help="Move all densities by one factor, rather than all thresholds.",
        ),
    ] = False,
    tokens: Annotated[
        int,
        typer.Option(help="Tokens of text: half set the thresholds, half check them."),
    ] = 2 * CALIBRATION_TOKENS,
    model: Annotated[
        str | None,
        typer.Option(help="Language model, if not the one the SAE was trained on."),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(help="Text, if not that which the SAE was trained on."),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="YAML file of a run, as `train` takes, whose model and text to use.",
        ),
    ] = None,
    device: Annotated[
        str, typer.Option(help="Torch device for the SAE and the language model.")
    ] = "cpu",
    overwrite: OverwriteOption = False,
) -> None:
    """
    Set the thresholds of a saved SAE to a wanted L0 on text of your choice.

    The text and the language model are those that SAELens recorded in the SAE, unless told
    otherwise. A topk SAE becomes a jumprelu one, which needs no sorting.
    """
    with _one_sentence_errors(), _interruptible():
        check_device("--device", device)
        given = load_saved_sae(sae)
        target_l0 = _trained_l0(given) if l0 is None else l0
        require_target_l0(given, target_l0)
        if tokens < MIN_TOKENS:
            raise ValueError(
                f"--tokens must be at least {MIN_TOKENS}, two for each half, got {tokens}."
            )
        if config is None:
            cfg = text_of_sae(given, model, dataset, device)
        else:
            cfg = load_runner_config(config, [f"device={device}"])
            cfg.model_name = model or cfg.model_name
            cfg.dataset_path = dataset or cfg.dataset_path
        _require_machine(cfg)
        require_other_folder(output, sae, "the SAE itself")
        with _claim_folder(output, "--output", overwrite):
            given.to(device)
            report = recalibrate(
                given, gather_activations(cfg, tokens), target_l0, per_feature
            )
            with new_files(output, "the SAE") as folder:
                report.sae.save_model(folder)
    Console().print(_calibration_table(report))
    typer.echo(f"saved in {output}")


def _trained_l0(sae: JumpReLUSAE | TopKSAE) -> float:
    k = trained_k(sae)
    if k is None:
        raise ValueError(
            "the SAE was not trained with a fixed number of features per token: give --l0."
        )
    return k


def _calibration_table(report: Recalibration) -> Table:
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


@contextmanager
def _interruptible(
    cfg: LanguageModelSAERunnerConfig[Any] | None = None,
) -> Generator[None, None, None]:
    """
    Ends on SIGINT and SIGTERM with exit code 130, says where the SAE is if it is saved, and
    otherwise the checkpoints, if there are any.
    """
    try:
        with interruptible():
            yield
    except (InterruptedException, KeyboardInterrupt) as interruption:
        how = str(interruption)
        if cfg is not None and not how:
            folder = cfg.checkpoint_path
            how = (
                f"to go on, start again with resume_from_checkpoint={shlex.quote(folder)}"
                if folder is not None and holds_checkpoints(Path(folder))
                else "no checkpoint was saved"
            )
        typer.echo(f"interrupted; {how}" if how else "interrupted", err=True)
        raise typer.Exit(130) from None


@app.command()
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
            "--finished", help="Compare what has finished so far, and train nothing."
        ),
    ] = False,
) -> None:
    """
    Train SAEs of several architectures on the same activations and compare them at equal L0.

    What has finished is kept: the same command goes on where it was interrupted, and with
    --finished, also beside it, compares what there is.
    """
    from sae_lens_alloc.comparison.run import run_comparison

    with _one_sentence_errors(), _interruptible():
        run_comparison(config, overrides or [], output, jobs, finished, Console())


@contextmanager
def _one_sentence_errors() -> Generator[None, None, None]:
    """Turns an error into one sentence and exit code 1."""
    try:
        yield
    except (typer.Exit, click.ClickException):
        raise
    except Exception as error:
        if TRACEBACK_VARIABLE in os.environ:
            raise
        hint = ""
        if not isinstance(error, ValueError | OSError):
            hint = f" (set {TRACEBACK_VARIABLE}=1 to see where)"
        typer.echo(f"error: {in_one_sentence(error)}{hint}", err=True)
        raise typer.Exit(1) from None


def _require_machine(cfg: LanguageModelSAERunnerConfig[Any]) -> None:
    """What running the language model needs, checked before it is loaded."""
    check_devices(cfg)
    check_activations(cfg)


def _claim_output(
    cfg: LanguageModelSAERunnerConfig[Any], overwrite: bool
) -> AbstractContextManager[None]:
    """Holds the folders of a run, rather than fail to write there after a long training."""
    return claimed_folders(cfg, overwrite, only_if_empty=True)


@contextmanager
def _claim_folder(
    folder: Path, setting: str, overwrite: bool
) -> Generator[None, None, None]:
    """Holds a folder to write to, which must be empty unless it may be overwritten."""
    with locked_folder(folder, setting):
        require_empty(folder, setting, overwrite)
        yield


def _require_runnable(module: str) -> None:
    try:
        spec = importlib.util.find_spec(module)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = importlib.util.find_spec(f"{module}.__main__")
    except ModuleNotFoundError:
        spec = None
    if spec is None:
        raise ValueError(f"there is no module {module!r} that can be run.")
