"""`sae-lens-alloc train`: trains one SAE from a YAML file."""

import time

import typer

from sae_lens_alloc_cli.arguments import (
    ConfigArgument,
    DryRunOption,
    NoReportOption,
    OverridesArgument,
    OverwriteOption,
)


def train(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    overwrite: OverwriteOption = False,
    dry_run: DryRunOption = False,
    no_report: NoReportOption = False,
) -> None:
    """
    Train one SAE from a YAML file.

    The run is checked and described before any model is loaded. An output folder that is not
    empty is refused unless --overwrite is given. Where torchrun starts several processes, they
    train the SAE together. At the end, report.html in the output folder shows how the SAE does.

    \b
    Examples:
      sae-lens-alloc train configs/demo_mutual_choice.yaml --dry-run
      sae-lens-alloc train configs/gpt2_mutual_choice.yaml sae.k=16 lr=3e-4
      torchrun --standalone --nproc-per-node 8 -m sae_lens_alloc train CONFIG.yaml
    """
    from sae_lens_alloc.config.run_file import load_runner_config
    from sae_lens_alloc.distributed.agreement import failing_together
    from sae_lens_alloc.distributed.launch import leave
    from sae_lens_alloc.training.outcome import describe_outcome
    from sae_lens_alloc.training.preflight import check_output, check_training
    from sae_lens_alloc.training.resuming import settle_resumed_run
    from sae_lens_alloc.training.run_folders import claimed_folders
    from sae_lens_alloc.training.run_on_ranks import ranks_of_run, settle_on_ranks
    from sae_lens_alloc.training.run_report import report_if_possible
    from sae_lens_alloc.training.runner import AllocSAETrainingRunner
    from sae_lens_alloc.training.summary import describe_run
    from sae_lens_alloc_cli.endings import ends_when_interrupted, one_sentence_errors

    with one_sentence_errors(), ends_when_interrupted():
        ranks = ranks_of_run()
        with failing_together(ranks):
            cfg = load_runner_config(config, overrides or [])
        settle_on_ranks(cfg, ranks)
        settle_resumed_run(cfg, ranks=ranks)
        with failing_together(ranks):
            if ranks.rank == 0:
                typer.echo(describe_run(cfg, ranks.size))
            check_training(cfg, ranks.size)
            if dry_run:
                resumed = cfg.resume_from_checkpoint is not None
                check_output(cfg.output_path, overwrite, resumed)
        if dry_run:
            leave()
            return
        # locked and checked now, so that saving does not fail after a long training
        claimed = claimed_folders(cfg, overwrite, only_if_empty=True, ranks=ranks)
        with claimed, ends_when_interrupted(cfg):
            runner = AllocSAETrainingRunner(cfg, overwrite=overwrite)
            started = time.perf_counter()
            sae = runner.run()
            seconds = time.perf_counter() - started
            page = None
            if ranks.rank == 0 and not no_report:
                page = report_if_possible(runner, seconds)
        leave()
    if ranks.rank == 0:
        report = None if page is None else str(page)
        typer.echo(describe_outcome(sae.cfg, str(cfg.output_path), report))
