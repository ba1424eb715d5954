"""`sae-lens-alloc train`: trains one SAE from a YAML file."""

import typer

from sae_lens_alloc.cli.arguments import (
    ConfigArgument,
    DryRunOption,
    OverridesArgument,
    OverwriteOption,
)
from sae_lens_alloc.cli.endings import ends_when_interrupted, one_sentence_errors
from sae_lens_alloc.config.run_file import load_runner_config
from sae_lens_alloc.training.preflight import check_output, check_training
from sae_lens_alloc.training.resuming import settle_resumed_run
from sae_lens_alloc.training.run_folders import claimed_folders
from sae_lens_alloc.training.runner import AllocSAETrainingRunner
from sae_lens_alloc.training.summary import describe_run


def train(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    overwrite: OverwriteOption = False,
    dry_run: DryRunOption = False,
) -> None:
    """
    Train one SAE from a YAML file.

    The run is checked and described before any model is loaded. An output folder that is not
    empty is refused unless --overwrite is given.
    """
    with one_sentence_errors(), ends_when_interrupted():
        cfg = load_runner_config(config, overrides or [])
        settle_resumed_run(cfg)
        typer.echo(describe_run(cfg))
        check_training(cfg)
        if dry_run:
            check_output(cfg.output_path, overwrite, bool(cfg.resume_from_checkpoint))
            return
        # locked and checked now, so that saving does not fail after a long training
        claimed = claimed_folders(cfg, overwrite, only_if_empty=True)
        with claimed, ends_when_interrupted(cfg):
            AllocSAETrainingRunner(cfg, overwrite=overwrite).run()
    typer.echo(f"saved in {cfg.output_path}")
