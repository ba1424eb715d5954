"""The page at the end of a training: the saved SAE on the contexts that were held out."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sae_lens import SAE, logger
from sae_lens.config import LanguageModelSAERunnerConfig

from sae_lens_alloc.activations.names import name_for_others
from sae_lens_alloc.activations.store import ResumableActivationsStore
from sae_lens_alloc.compat import InterruptedException
from sae_lens_alloc.errors import as_reason
from sae_lens_alloc.evaluation.figures import HELD_OUT_FILENAME, figures_of
from sae_lens_alloc.evaluation.on_contexts import OnContexts
from sae_lens_alloc.evaluation.report import write_report
from sae_lens_alloc.evaluation.report_run import ReportRun, read_history
from sae_lens_alloc.evaluation.snippets import Snippet
from sae_lens_alloc.evaluation.usage import Usage, as_user, measure_usage
from sae_lens_alloc.json_files import write_json
from sae_lens_alloc.saes.rows import encoded_and_target
from sae_lens_alloc.saes.saved_sae import load_sae
from sae_lens_alloc.training.output_folder import new_files
from sae_lens_alloc.training.run_folders import METRICS_FILENAME
from sae_lens_alloc.training.runner import AllocSAETrainingRunner

REPORT_FILENAME = "report.html"


def write_run_report(runner: AllocSAETrainingRunner, seconds: float) -> Path:
    """
    Measures the saved SAE of a run that has ended and writes `report.html` and the figures,
    `held_out.json`, beside it.

    Where no language model can judge the reconstructions, the page is without what needs one.

    Args:
        runner: The runner, after `run()`, with an output path.
        seconds: How long that took.

    Returns:
        The page.

    Raises:
        ValueError: if the SAE cannot be loaded or measured.
        OSError: if something cannot be written.
    """
    cfg = runner.cfg
    assert cfg.output_path is not None
    output = Path(cfg.output_path)
    sae = load_sae(output, cfg.device).eval()
    # activations come flat, one vector a token
    sae.turn_off_forward_pass_hook_z_reshaping()
    usage, snippets = _measure(runner, sae)
    run = ReportRun(
        name=output.resolve().name,
        evaluation=usage,
        seconds=seconds,
        history=read_history(output / METRICS_FILENAME),
        settings=_settings(cfg),
    )
    with new_files(output, "the report") as folder:
        figures = figures_of(usage, usage.to_dict())
        write_json(folder / HELD_OUT_FILENAME, figures)
        write_report(
            folder / REPORT_FILENAME,
            f"The SAE {run.name}",
            "One sparse autoencoder, as it was trained and saved.",
            [run],
            snippets,
            _facts(cfg),
        )
    return output / REPORT_FILENAME


def report_if_possible(runner: AllocSAETrainingRunner, seconds: float) -> Path | None:
    """
    `write_run_report`, where an error is a warning, since the SAE is saved. None without a page.

    Raises:
        InterruptedException: where the SAE is, if this is interrupted.
    """
    if runner.cfg.output_path is None:
        return None
    saved = f"the SAE is saved in {runner.cfg.output_path!r}, but not its report"
    try:
        return write_run_report(runner, seconds)
    except (InterruptedException, KeyboardInterrupt):
        raise InterruptedException(saved) from None
    except Exception as error:  # whatever a language model may do
        logger.warning(f"{saved}: {as_reason(error)}.")
        return None


def _measure(
    runner: AllocSAETrainingRunner, sae: SAE[Any]
) -> tuple[Usage, Sequence[Snippet]]:
    on_contexts = _held_out_contexts(runner)
    if on_contexts is not None:
        return on_contexts.measure(sae), on_contexts.snippets()
    encoded, target = encoded_and_target(sae.cfg, runner.held_out)
    batch_size = runner.cfg.train_batch_size_tokens
    return measure_usage(as_user(sae), encoded, batch_size, target), ()


def _held_out_contexts(runner: AllocSAETrainingRunner) -> OnContexts | None:
    """
    The contexts whose activations the run held out, read again; None where there is no text or
    the language model cannot judge it.
    """
    store = runner.activations_store
    if (
        not isinstance(store, ResumableActivationsStore)
        or store.dataset is None
        or runner.cfg.use_cached_activations
    ):
        return None
    # of the same part of the text, of which this is a second reading
    again = ResumableActivationsStore.in_place_of(store, runner.cfg)
    excluded = store.exclude_special_tokens
    contexts = again.hold_out_contexts(store.n_metrics_contexts)
    found = OnContexts(
        again, runner.cfg, contexts, [] if excluded is None else excluded.tolist()
    )
    return found if found.runs_the_model else None


def _facts(cfg: LanguageModelSAERunnerConfig[Any]) -> Mapping[str, str]:
    facts = {
        "dimensions": f"{cfg.sae.d_in:,}",
        "features": f"{cfg.sae.d_sae:,}",
        "trained on": f"{cfg.training_tokens:,} tokens",
    }
    if cfg.model_name:
        model = name_for_others(cfg.model_name)
        facts = {"activations": f"{model} at {cfg.hook_name}", **facts}
    if cfg.dataset_path:
        facts["text"] = name_for_others(cfg.dataset_path)
    return facts


def _settings(cfg: LanguageModelSAERunnerConfig[Any]) -> Mapping[str, str]:
    settings = {
        "architecture": cfg.sae.architecture(),
        "learning rate": f"{cfg.lr:g}, {cfg.lr_warm_up_steps} steps of warm-up, "
        f"{cfg.lr_decay_steps} of decay, of {cfg.total_training_steps}",
        "batch": f"{cfg.train_batch_size_tokens:,} tokens",
        "seed": str(cfg.seed),
    }
    k = getattr(cfg.sae, "k", None)
    return settings if k is None else {**settings, "features per token": f"{k:g}"}
