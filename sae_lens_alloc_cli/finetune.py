"""`sae-lens-alloc finetune`: trains an SAE further."""

from typing import Annotated

import typer

from sae_lens_alloc_cli.arguments import (
    ConfigArgument,
    DryRunOption,
    NoReportOption,
    OverridesArgument,
    OverwriteOption,
)


def finetune(
    config: ConfigArgument,
    source: Annotated[
        str,
        typer.Option(
            "--from",
            metavar="PATH|RELEASE:ID",
            help="The SAE to start from: a folder with an SAE or a checkpoint, or an SAE of "
            "SAELens' directory of pretrained SAEs.",
        ),
    ],
    overrides: OverridesArgument = None,
    overwrite: OverwriteOption = False,
    dry_run: DryRunOption = False,
    no_report: NoReportOption = False,
) -> None:
    """
    Train an SAE that you have further, as Mutual Choice or Feature Choice, and compare it
    before and after.

    The SAE may be of SAELens' topk, batchtopk, matryoshka_batchtopk, jumprelu, gated or
    standard architecture, or one of ours. It is not changed.

    \b
    Examples:
      sae-lens-alloc finetune configs/finetune_demo.yaml --from SAE
      sae-lens-alloc finetune configs/finetune_gpt2_openai.yaml --from RELEASE:ID
    """
    from rich.console import Console

    from sae_lens_alloc.config.run_file import load_fine_tuning_config
    from sae_lens_alloc.distributed.agreement import failing_together
    from sae_lens_alloc.distributed.launch import leave
    from sae_lens_alloc.evaluation.results_table import results_table
    from sae_lens_alloc.training.conversion import require_convertible
    from sae_lens_alloc.training.fine_tuning_run import fine_tune
    from sae_lens_alloc.training.outcome import next_steps
    from sae_lens_alloc.training.output_folder import require_other_folder
    from sae_lens_alloc.training.preflight import check_output, check_training
    from sae_lens_alloc.training.resuming import settle_resumed_run
    from sae_lens_alloc.training.run_folders import claimed_folders
    from sae_lens_alloc.training.run_on_ranks import ranks_of_run, settle_on_ranks
    from sae_lens_alloc.training.source_sae import load_source_sae
    from sae_lens_alloc.training.summary import describe_run
    from sae_lens_alloc_cli.endings import ends_when_interrupted, one_sentence_errors

    with one_sentence_errors(), ends_when_interrupted():
        ranks = ranks_of_run()
        with failing_together(ranks):
            loaded = load_source_sae(source, "cpu")
            cfg, sae_overrides = load_fine_tuning_config(
                config, overrides or [], loaded.sae.cfg
            )
        settle_on_ranks(cfg, ranks)
        settle_resumed_run(cfg, sae_is_known=False, ranks=ranks)
        with failing_together(ranks):
            if ranks.rank == 0:
                typer.echo(describe_run(cfg, ranks.size))
                typer.echo(f"{'from':<12}{loaded.sae.cfg.architecture()}, {source}")
            require_convertible(loaded.sae, cfg.sae.architecture())
            if cfg.from_pretrained_path is not None:
                raise ValueError(
                    "from_pretrained_path has no effect in a fine-tuning, which starts from "
                    "the SAE of --from: leave it out."
                )
            require_other_folder(cfg.output_path, source, "the SAE to start from")
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
            result = fine_tune(
                cfg, loaded, sae_overrides, overwrite, with_report=not no_report
            )
        leave()
    if result is None:  # rank 0 has it
        return
    report = None if result.report is None else result.report.name
    Console().print(results_table([result.before, result.after]))
    typer.echo(
        f"{result.revived_features:,} features revived, {result.died_features:,} died; "
        f"saved in {cfg.output_path}{f', with {report}' if report else ''}"
    )
    typer.echo(next_steps(cfg.sae, str(cfg.output_path), report))
