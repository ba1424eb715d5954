"""The SAE at the end of a run: written whole, kept whatever fails after it."""

import json
import shlex
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
import wandb
from sae_lens.config import LanguageModelSAERunnerConfig
from sae_lens.constants import RUNNER_CFG_FILENAME, SPARSITY_FILENAME
from sae_lens.saes.sae import TrainingSAE
from safetensors.torch import save_file

from sae_lens_alloc.saes.allocation_sae import AllocationTrainingSAE
from sae_lens_alloc.training.output_folder import WriteError, new_files
from sae_lens_alloc.training.run_folders import METRICS_FILENAME, NEW_METRICS_FILENAME


def write_sae(
    sae: TrainingSAE[Any],
    cfg: LanguageModelSAERunnerConfig[Any],
    output: Path,
    log_feature_sparsity: torch.Tensor | None,
) -> None:
    """
    Writes the files that SAELens' runner writes, an SAE for inference among them, and moves
    the metrics of the run to their place.

    Args:
        sae: The SAE.
        cfg: Its run.
        output: Folder to write to, where files of the same name are replaced.
        log_feature_sparsity: As SAELens saves it, shape (d_sae,), or None.

    Raises:
        OSError: in one sentence, if it cannot be written; what was there is then as before.
    """
    new_metrics = output / NEW_METRICS_FILENAME
    with new_files(output, "the SAE") as folder:
        sae.save_inference_model(folder)
        if log_feature_sparsity is not None:
            save_file({"sparsity": log_feature_sparsity}, folder / SPARSITY_FILENAME)
        (folder / RUNNER_CFG_FILENAME).write_text(json.dumps(cfg.to_dict()))
        if new_metrics.exists():
            shutil.copyfile(new_metrics, folder / METRICS_FILENAME)
    new_metrics.unlink(missing_ok=True)


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
    try:
        write_sae(sae, cfg, output, log_feature_sparsity)
    except OSError as error:
        elsewhere = Path(tempfile.mkdtemp(prefix="sae-lens-alloc-"))
        try:
            write_sae(sae, cfg, elsewhere, log_feature_sparsity)
        except OSError:
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
