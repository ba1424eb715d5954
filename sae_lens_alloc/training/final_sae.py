"""The SAE at the end of a run: written whole, kept whatever fails after it."""

import json
import shlex
import shutil
import tempfile
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import wandb
from sae_lens.config import LanguageModelSAERunnerConfig
from sae_lens.constants import (
    RUNNER_CFG_FILENAME,
    SAE_CFG_FILENAME,
    SAE_WEIGHTS_FILENAME,
    SPARSITY_FILENAME,
)
from sae_lens.saes.sae import TrainingSAE
from safetensors.torch import save_file

from sae_lens_alloc.distributed.ranks import ALONE, Ranks
from sae_lens_alloc.distributed.together import together
from sae_lens_alloc.evaluation.figures import HELD_OUT_FILENAME
from sae_lens_alloc.progress import announced
from sae_lens_alloc.saes.allocation_sae import AllocationTrainingSAE
from sae_lens_alloc.saes.refined_jumprelu_sae import STOCK_FOLDER
from sae_lens_alloc.saes.refined_mutual_choice_sae import (
    RefinedMutualChoiceTrainingSAE,
)
from sae_lens_alloc.saes.split_weights import split_weight_files
from sae_lens_alloc.training.gathered_weights import write_gathered_weights
from sae_lens_alloc.training.output_folder import (
    WriteError,
    named_write_errors,
    new_files,
)
from sae_lens_alloc.training.run_folders import METRICS_FILENAME, NEW_METRICS_FILENAME


def write_sae(
    sae: TrainingSAE[Any],
    cfg: LanguageModelSAERunnerConfig[Any],
    output: Path,
    log_feature_sparsity: torch.Tensor | None,
) -> None:
    """
    Writes the files that SAELens' runner writes, an SAE for inference among them, and moves
    the metrics of the run to their place. Of ranks that share an SAE all must call it: the
    first one writes what one process would write, and only there are files touched.

    Args:
        sae: The SAE, of the features of this rank if ranks share it.
        cfg: Its run.
        output: Folder to write to, where files of the same name are replaced.
        log_feature_sparsity: As SAELens saves it, shape (d_sae,), or None.

    Raises:
        OSError: in one sentence and on all ranks, if it cannot be written; what was there is
            then as before.
    """
    ranks = _ranks_of(sae)
    new_metrics = output / NEW_METRICS_FILENAME

    def write_rest(folder: Path) -> None:
        if not ranks.is_alone:
            settings = sae.cfg.get_inference_sae_cfg_dict()
            (folder / SAE_CFG_FILENAME).write_text(json.dumps(settings))
        if log_feature_sparsity is not None:
            save_file({"sparsity": log_feature_sparsity}, folder / SPARSITY_FILENAME)
        if isinstance(sae, RefinedMutualChoiceTrainingSAE):
            sae.stock_form().save_model(folder / STOCK_FOLDER)
        (folder / RUNNER_CFG_FILENAME).write_text(json.dumps(cfg.to_dict()))
        if new_metrics.exists():
            shutil.copyfile(new_metrics, folder / METRICS_FILENAME)
        _remove_other_weights(output, folder)
        (output / HELD_OUT_FILENAME).unlink(missing_ok=True)  # of another SAE

    with announced("saving the SAE"), _new_files_of_first(output, ranks) as folder:
        if isinstance(sae, AllocationTrainingSAE) and not ranks.is_alone:
            write_gathered_weights(sae, folder)
        elif folder is not None:
            sae.save_inference_model(folder)
        together(ranks, lambda: None if folder is None else write_rest(folder))
    together(ranks, lambda: None if ranks.rank else new_metrics.unlink(missing_ok=True))


def write_sae_somewhere(
    sae: TrainingSAE[Any],
    cfg: LanguageModelSAERunnerConfig[Any],
    output: Path,
    log_feature_sparsity: torch.Tensor | None,
) -> None:
    """
    As `write_sae`, but if the SAE cannot be written there, writes it to a new temporary folder
    of the system, which the OSError names.
    """
    ranks = _ranks_of(sae)
    try:
        write_sae(sae, cfg, output, log_feature_sparsity)
    except OSError as error:
        is_first = ranks.rank == 0
        (made, *_) = together(
            ranks,
            lambda: tempfile.mkdtemp(prefix="sae-lens-alloc-") if is_first else "",
        )
        elsewhere = Path(made)
        try:
            write_sae(sae, cfg, elsewhere, log_feature_sparsity)
        except OSError:
            if is_first:
                shutil.rmtree(elsewhere, ignore_errors=True)
            raise error from None
        raise WriteError(
            error.errno,
            f"{str(error).rstrip('.')}; it is saved in {str(elsewhere)!r} instead, with the "
            "thresholds of training.",
        ) from error


def how_to_calibrate(sae: TrainingSAE[Any], output: Path) -> str:
    """The command that calibrates a saved SAE."""
    assert isinstance(sae, AllocationTrainingSAE)
    return (
        f"sae-lens-alloc calibrate {shlex.quote(str(output))} --l0 {sae.cfg.k:g} "
        "--output NEW"
    )


def require_artifact_names(sae: TrainingSAE[Any]) -> None:
    """Raises ValueError if W&B would refuse the names under which SAELens uploads an SAE."""
    name = sae.get_name().replace("/", "__")  # as LoggingConfig.log names them
    for artifact in (name, f"{name}_log_feature_sparsity"):
        try:
            wandb.Artifact(artifact, type="model")
        except ValueError as error:
            raise ValueError(
                f"SAELens will upload the SAE as {artifact!r}, but W&B refuses that name "
                f"({str(error).rstrip('.')}): give model_name as a path with other "
                "characters, or logger.log_to_wandb=false."
            ) from error


def _ranks_of(sae: TrainingSAE[Any]) -> Ranks:
    return sae.shard.ranks if isinstance(sae, AllocationTrainingSAE) else ALONE


def _remove_other_weights(output: Path, folder: Path) -> None:
    """Removes the weights that would be left beside new ones in another number of files."""
    for old in (output / SAE_WEIGHTS_FILENAME, *split_weight_files(output)):
        if not (folder / old.name).exists():
            old.unlink(missing_ok=True)
    if not (folder / STOCK_FOLDER).exists():
        shutil.rmtree(output / STOCK_FOLDER, ignore_errors=True)


@contextmanager
def _new_files_of_first(
    output: Path, ranks: Ranks
) -> Generator[Path | None, None, None]:
    """
    `new_files` of the first rank, None on the others. If it fails there, it fails on all ranks.
    """
    stack = ExitStack()

    def begin() -> Path | None:
        if ranks.rank > 0:
            return None
        return stack.enter_context(new_files(output, "the SAE"))

    folder = together(ranks, begin)[ranks.rank]
    with named_write_errors("the SAE", output):
        with stack:
            yield folder
            closing = stack.pop_all()
        together(ranks, closing.close)
