"""Trains one cell, in a process of its own so that its memory can be measured."""

import argparse
import math
import resource
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE
from sae_lens.config import LanguageModelSAERunnerConfig
from sae_lens.saes.sae import TrainingSAE

from sae_lens_alloc.activations.own_activations import activations_of
from sae_lens_alloc.activations.recorded_source import (
    record_language_model,
    record_own_activations,
)
from sae_lens_alloc.comparison.cell import (
    FAILURE_FILENAME,
    RESULT_FILENAME,
    Cell,
    sae_folder,
)
from sae_lens_alloc.comparison.config import load_comparison
from sae_lens_alloc.comparison.own_stream import open_stream
from sae_lens_alloc.comparison.stream import Stream
from sae_lens_alloc.distributed.ranks import ALONE
from sae_lens_alloc.errors import as_reason
from sae_lens_alloc.evaluation.usage import as_user, measure_usage
from sae_lens_alloc.json_files import write_json
from sae_lens_alloc.saes.refined_jumprelu_sae import RefinedJumpReLUSAE
from sae_lens_alloc.saes.rows import encoded_and_target
from sae_lens_alloc.saes.saved_sae import load_sae, read_json_mapping
from sae_lens_alloc.thresholds.operating_point import at_l0
from sae_lens_alloc.training.run_trainer import begin_metadata
from sae_lens_alloc.training.trainer import AllocSAETrainer


def train_cell(cell: Cell, stream: Stream, folder: Path) -> dict[str, Any]:
    """
    Trains a cell, and saves its SAE for inference at each wanted L0. The test split is not used.

    Args:
        cell: The cell.
        stream: The activations.
        folder: Folder for the SAEs and for `cell.json`, which is written last.

    Returns:
        The content of `cell.json`.

    Raises:
        ValueError: if the training diverges.
    """
    cfg = cell.runner_config()
    torch.manual_seed(cell.seed)
    before = _peak_memory(cfg.device)
    sae = TrainingSAE.from_dict(cfg.get_training_sae_cfg_dict()).to(cfg.device)
    _record_run(sae, cell, cfg)
    trainer = AllocSAETrainer(
        cfg.to_sae_trainer_config(),
        sae,
        stream.training_batches(cfg.train_batch_size_tokens),
    )
    start = time.perf_counter()
    trainer.fit()
    seconds = time.perf_counter() - start
    memory = _peak_memory(cfg.device) - before
    for name, parameter in sae.named_parameters():
        if not parameter.isfinite().all():
            raise ValueError(
                f"the training has diverged, {name} is not finite: give compare.lr a smaller "
                "learning rate."
            )

    natural_l0, points = _save_at_each_l0(
        sae,
        cell.target_l0s,
        stream.split("validation").to(cfg.device),
        folder,
        cfg.device,
    )
    result = {
        "row": cell.row,
        "sparsity": {cell.sparsity_key: cell.sparsity},
        "lr": cell.lr,
        "seed": cell.seed,
        "seconds": seconds,
        "peak_memory_bytes": memory,
        "threads": torch.get_num_threads(),
        "l0_before_calibration": natural_l0,
        "validation": points,
        "settings": dict(cell.settings),
    }
    write_json(folder / RESULT_FILENAME, result)
    return result


def _record_run(
    sae: TrainingSAE[Any], cell: Cell, cfg: LanguageModelSAERunnerConfig[Any]
) -> None:
    """Records, as a runner does, what an SAE was trained on, so that it can be used by itself."""
    if activations_of(cfg) is not None:
        record_own_activations(sae.cfg.metadata, cfg)
    elif "dataset_path" in cell.settings:  # synthetic activations have none
        record_language_model(sae.cfg.metadata, cfg)
    begin_metadata(sae, cfg, ALONE)


def _save_at_each_l0(
    sae: TrainingSAE[Any],
    target_l0s: Sequence[float],
    validation: torch.Tensor,
    folder: Path,
    device: str,
) -> tuple[float, dict[str, Any]]:
    """L0 as training left it, and figures on the validation split at each wanted L0."""
    points: dict[str, Any] = {}
    encoded, reconstructed = encoded_and_target(sae.cfg, validation)
    with tempfile.TemporaryDirectory() as trained:
        sae.save_inference_model(trained)
        natural = measure_usage(
            as_user(_load(trained, device)), encoded, target=reconstructed
        )
        for target in target_l0s:
            points[f"{target:g}"] = _save_at_l0(
                _load(trained, device), target, encoded, reconstructed, folder
            )
    return natural.l0, points


def _save_at_l0(
    sae: SAE[Any],
    target: float,
    encoded: torch.Tensor,
    reconstructed: torch.Tensor,
    folder: Path,
) -> dict[str, Any]:
    """Saves an SAE at a wanted L0: its figures on the validation split, or why it cannot be there."""
    try:
        calibrated = at_l0(sae, encoded, target)
    except ValueError as error:
        return {"unreachable": str(error)}
    usage = measure_usage(as_user(calibrated), encoded, target=reconstructed)
    if not math.isfinite(usage.explained_variance):
        raise ValueError(
            f"at {target:g} features per token, the explained variance on the "
            f"validation split is {usage.explained_variance}."
        )
    calibrated.cfg.metadata.l0 = usage.l0
    calibrated.save_model(sae_folder(folder, target))
    return {"l0": usage.l0, "explained_variance": usage.explained_variance}


def _load(folder: str | Path, device: str) -> SAE[Any]:
    return load_sae(folder, device).eval()


def measure_stock_form(cell: Cell, stream: Stream, folder: Path) -> dict[str, Any]:
    """
    The same as `train_cell` for a cell in the stock form of refined SAEs. These are trained only if they
    have not been.
    """
    cfg, trained = cell.runner_config(), folder.parent / cell.trained.key
    path = trained / RESULT_FILENAME
    if path.exists():
        result = read_json_mapping(path)
    else:
        trained = folder / "trained"
        result = train_cell(cell.trained, stream, trained)
    validation = stream.split("validation").to(cfg.device)
    points: dict[str, Any] = {}
    for target in cell.target_l0s:
        sae = _load(sae_folder(trained, target), cfg.device)
        assert isinstance(sae, RefinedJumpReLUSAE)
        stock = sae.stock_form().eval()
        before = measure_usage(as_user(stock), validation)
        result["l0_before_calibration"] = before.l0
        points[f"{target:g}"] = _save_at_l0(
            stock, target, validation, validation, folder
        )
    result = {**result, "row": cell.row, "validation": points}
    write_json(folder / RESULT_FILENAME, result)
    return result


def _peak_memory(device: str) -> int:
    """Largest memory of this process so far, in bytes: that of the GPU, or else the resident memory."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():
        # getrusage would start from the peak of the process that started this one
        (line,) = (x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def main() -> None:
    """Trains the cell that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("stream", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    (cell,) = (
        cell
        for cell in load_comparison(args.config)[0].cells()
        if cell.key == args.folder.name
    )
    # remove what an interrupted or failed training left
    for path in args.folder.glob("l0-*"):
        shutil.rmtree(path)
    for filename in (RESULT_FILENAME, FAILURE_FILENAME):
        (args.folder / filename).unlink(missing_ok=True)
    try:
        stream = open_stream(args.stream)
        assert stream is not None  # written before the first cell
        run = train_cell if cell.stock_form_of is None else measure_stock_form
        run(cell, stream, args.folder)
    except Exception as error:
        traceback.print_exc()
        sys.exit(as_reason(error))  # the last line of the log, which the results show


if __name__ == "__main__":
    main()
