"""A whole fine-tuning: training, comparison with the source, report."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sae_lens import SAE, logger
from sae_lens.config import LanguageModelSAERunnerConfig

from sae_lens_alloc.activations.own_activations import activations_of
from sae_lens_alloc.compat import InterruptedException
from sae_lens_alloc.errors import as_reason
from sae_lens_alloc.evaluation.baseline import measure_baseline
from sae_lens_alloc.evaluation.figures import HELD_OUT_FILENAME, figures_of
from sae_lens_alloc.evaluation.metrics import evaluate_sae
from sae_lens_alloc.evaluation.report import SAVED_AND_LOADED, write_report
from sae_lens_alloc.evaluation.report_run import ReportRun, read_history
from sae_lens_alloc.evaluation.usage import Usage, as_user, measure_usage
from sae_lens_alloc.json_files import write_json
from sae_lens_alloc.saes.rows import encoded_and_target
from sae_lens_alloc.training.fine_tuning import FineTuningRunner
from sae_lens_alloc.training.output_folder import new_files
from sae_lens_alloc.training.runner import METRICS_FILENAME
from sae_lens_alloc.training.source_sae import SourceSAE, inference_sae
from sae_lens_alloc.training.warm_start import ConversionReport

EVALUATION_TOKENS = 65_536
RESULTS_FILENAME = "fine_tuning.json"
REPORT_FILENAME = "report.html"


@dataclass(frozen=True, eq=False)
class FineTuned:
    """
    An SAE before and after fine-tuning, on text or activations that fine-tuning did not use.

    Args:
        before: The source.
        after: The saved SAE.
        start: Figures of the converted SAE before training.
        report: The page that shows both, if it was written.
    """

    before: ReportRun
    after: ReportRun
    start: ConversionReport
    report: Path | None = None

    @property
    def revived_features(self) -> int:
        """Number of features that were active on no token before, and on some token after."""
        return _newly_dead(self.after.evaluation, self.before.evaluation)

    @property
    def died_features(self) -> int:
        """Number of features that were active on some token before, and on none after."""
        return _newly_dead(self.before.evaluation, self.after.evaluation)


def fine_tune(
    cfg: LanguageModelSAERunnerConfig[Any],
    source: SourceSAE,
    sae_overrides: dict[str, Any],
    overwrite: bool = False,
    with_report: bool = True,
) -> FineTuned | None:
    """
    Fine-tunes an SAE and compares it before and after. The SAE, the figures
    (`fine_tuning.json` and `held_out.json`) and `report.html` go to `cfg.output_path`. Of several processes, rank 0
    compares, and the others return None.

    Args:
        cfg: The run, with an output path.
        source: The SAE to start from.
        sae_overrides: See FineTuningRunner.
        overwrite: See FineTuningRunner.
        with_report: Whether to write `report.html`. If that fails, it is a warning.

    Raises:
        ValueError: as FineTuningRunner, and if the saved SAE cannot be compared.
        OSError: if something cannot be written.
    """
    assert cfg.output_path is not None
    output = Path(cfg.output_path)
    runner = FineTuningRunner(cfg, source, sae_overrides, overwrite, EVALUATION_TOKENS)
    if runner.ranks.rank > 0:
        runner.run()
        return None
    evaluate = _on_rows(runner) if activations_of(cfg) else _on_text(runner)
    before = ReportRun("before", evaluate(inference_sae(source)), 0.0)
    start = time.perf_counter()
    runner.run()
    seconds = time.perf_counter() - start
    saved = f"the SAE is saved in {str(output)!r}, but not compared with what it was"
    try:
        after = ReportRun(
            "after",
            evaluate(SAE.load_from_disk(output, cfg.device)),
            seconds,
            read_history(output / METRICS_FILENAME),
        )
        result = FineTuned(before, after, runner.start)
        with new_files(output, "the comparison") as folder:
            _write_results(folder, cfg, source, result)
    except (InterruptedException, KeyboardInterrupt):
        raise InterruptedException(saved) from None
    except (ValueError, RuntimeError, OSError) as error:
        raise ValueError(f"{saved}: {str(error).rstrip('.')}.") from error
    if with_report:
        return replace(result, report=_report_if_possible(cfg, source, result))
    return result


def _on_text(runner: FineTuningRunner) -> Callable[[SAE[Any]], Usage]:
    """Measures an SAE on the text that was set aside."""
    tokens, hook_name = runner.evaluation_contexts, runner.cfg.hook_name
    excluded = runner.activations_store.exclude_special_tokens
    special = [] if excluded is None else excluded.tolist()
    baseline = measure_baseline(runner.model, tokens, hook_name, special)
    return lambda sae: evaluate_sae(
        sae, runner.model, tokens, hook_name, baseline, special
    )


def _on_rows(runner: FineTuningRunner) -> Callable[[SAE[Any]], Usage]:
    """Measures an SAE on the rows of one's own activations that are held out."""

    def measure(sae: SAE[Any]) -> Usage:
        sae.turn_off_forward_pass_hook_z_reshaping()  # rows are flat
        encoded, target = encoded_and_target(sae.cfg, runner.held_out)
        return measure_usage(as_user(sae), encoded, target=target)

    return measure


def _newly_dead(first: Usage, second: Usage) -> int:
    return int(((first.densities > 0) & (second.densities == 0)).sum())


def _write_results(
    output: Path,
    cfg: LanguageModelSAERunnerConfig[Any],
    source: SourceSAE,
    result: FineTuned,
) -> None:
    runs: Sequence[ReportRun] = (result.after, result.before)
    figures = {
        "source": source.name,
        "source_architecture": source.sae.cfg.architecture(),
        "architecture": cfg.sae.architecture(),
        "training_tokens": cfg.training_tokens,
        "start": asdict(result.start),
        **{
            run.name: {
                **run.evaluation.to_dict(),
                "zipf": None
                if (law := run.evaluation.zipf_law()) is None
                else asdict(law),
            }
            for run in runs
        },
        "revived_features": result.revived_features,
        "died_features": result.died_features,
        "seconds": result.after.seconds,
    }
    (output / RESULTS_FILENAME).write_text(json.dumps(figures, indent=2) + "\n")
    held_out = figures_of(result.after.evaluation, result.after.evaluation.to_dict())
    write_json(output / HELD_OUT_FILENAME, held_out)


def _report_if_possible(
    cfg: LanguageModelSAERunnerConfig[Any], source: SourceSAE, result: FineTuned
) -> Path | None:
    output = Path(str(cfg.output_path))
    saved = f"the SAE is saved in {str(output)!r}, but not its report"
    facts = {
        "from": f"{source.sae.cfg.architecture()}, {source.name}",
        "to": cfg.sae.architecture(),
        "trained on": f"{cfg.training_tokens:,} tokens",
        "activations": f"{activations_of(cfg) or cfg.hook_name}, {cfg.sae.d_in} dimensions",
        "revived features": f"{result.revived_features:,}",
    }
    try:
        with new_files(output, "the report") as folder:
            write_report(
                folder / REPORT_FILENAME,
                "Before and after fine-tuning",
                "One sparse autoencoder before and after further training, in which another "
                "rule allocates the features.",
                (result.after, result.before),
                facts=facts,
                about_text=SAVED_AND_LOADED
                if activations_of(cfg) is None
                else SAVED_AND_LOADED.replace("text", "activations"),
            )
    except (InterruptedException, KeyboardInterrupt):
        raise InterruptedException(saved) from None
    except Exception as error:  # the SAE and its figures are there
        logger.warning(f"{saved}: {as_reason(error)}.")
        return None
    return output / REPORT_FILENAME
