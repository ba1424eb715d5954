"""The folders of a training run: checked before it starts, and locked while it runs."""

import json
import os
import shutil
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from sae_lens import logger
from sae_lens.config import LanguageModelSAERunnerConfig
from sae_lens.constants import (
    RUNNER_CFG_FILENAME,
    SAE_CFG_FILENAME,
    SAE_WEIGHTS_FILENAME,
    SPARSITY_FILENAME,
)

from sae_lens_alloc.distributed.agreement import failing_together
from sae_lens_alloc.distributed.launch import launch_id
from sae_lens_alloc.distributed.ranks import ALONE, Ranks
from sae_lens_alloc.saes.split_weights import split_weight_files
from sae_lens_alloc.training.checkpoint import folder_of_checkpoints, holds_checkpoints
from sae_lens_alloc.training.metrics_file import is_of_checkpoint, require_rows
from sae_lens_alloc.training.output_folder import (
    is_of_launch,
    locked_folder,
    mark_launch,
    require_empty,
    require_other_folder,
)
from sae_lens_alloc.training.summary import estimate_memory, in_bytes

METRICS_FILENAME = "metrics.jsonl"
# Metrics of a run whose SAE has yet to replace that of another run in its output folder.
NEW_METRICS_FILENAME = "metrics.new.jsonl"
SAE_FILENAMES = (
    SAE_CFG_FILENAME,
    SAE_WEIGHTS_FILENAME,
    SPARSITY_FILENAME,
    RUNNER_CFG_FILENAME,
)
METRICS_FILENAMES = (METRICS_FILENAME, NEW_METRICS_FILENAME)
# A row has about 30 names with figures of 20 digits.
BYTES_PER_ROW = 2000


@contextmanager
def claimed_folders(
    cfg: LanguageModelSAERunnerConfig[Any],
    overwrite: bool = False,
    only_if_empty: bool = False,
    ranks: Ranks = ALONE,
) -> Generator[None, None, None]:
    """
    Locks the output folder and the checkpoint folder of a run against other runs. Checks that
    they can be written to, have enough room, and hold nothing that the run would overwrite.
    Nothing in them is changed.

    Args:
        cfg: The run.
        overwrite: Whether an SAE in the output folder may be replaced.
        only_if_empty: Whether the output folder must be empty, unless `overwrite` is given.
        ranks: The ranks, of which rank 0 holds the folders for all. What these processes wrote
            before torchrun started them again may be replaced.

    Raises:
        ValueError: if a folder is in use, has too little room, or holds something that the run
            would overwrite.
        OSError: if a folder cannot be written to.
    """
    with ExitStack() as stack:
        with failing_together(ranks):
            if ranks.rank == 0:
                launch = None if ranks.is_alone else launch_id()
                claimed = _claimed(cfg, overwrite, only_if_empty, launch, ranks.size)
                stack.enter_context(claimed)
        yield


@contextmanager
def _claimed(
    cfg: LanguageModelSAERunnerConfig[Any],
    overwrite: bool,
    only_if_empty: bool,
    launch: str | None,
    n_ranks: int,
) -> Generator[None, None, None]:
    for key in ("from_pretrained_path", "resume_from_checkpoint"):
        source = getattr(cfg, key)
        if source is not None:
            require_other_folder(cfg.output_path, source, key)
    with ExitStack() as stack:
        if cfg.output_path is not None:
            output = Path(cfg.output_path)
            stack.enter_context(locked_folder(output, "output_path"))
            overwrite = overwrite or is_of_launch(output, launch)
            # before the checkpoint folder is created, which may be inside
            _require_free_output(cfg, output, overwrite, only_if_empty)
        if cfg.checkpoint_path is not None:
            checkpoints = Path(cfg.checkpoint_path)
            stack.enter_context(locked_folder(checkpoints, "checkpoint_path"))
            _require_own_checkpoints(cfg, checkpoints)
        _require_room(cfg, n_ranks)
        for folder in (cfg.output_path, cfg.checkpoint_path):
            if launch is not None and folder is not None:
                stack.enter_context(mark_launch(Path(folder), launch))
        yield


def require_free_output(
    cfg: LanguageModelSAERunnerConfig[Any], overwrite: bool
) -> None:
    """
    Raises ValueError if the output folder of a run on the command line holds files that are not
    of the run. Creates nothing.
    """
    if cfg.output_path is None:
        return
    output = Path(cfg.output_path)
    expected: set[str] = set()
    if cfg.resume_from_checkpoint is not None:
        # what the resumed run left, perhaps with the SAE that it saved after its last step
        expected.update(METRICS_FILENAMES)
        if _is_same_run(output, cfg) and not _is_finished(output):
            expected.update(SAE_FILENAMES)
            expected.update(path.name for path in split_weight_files(output))
    require_empty(output, "output_path", overwrite, frozenset(expected))


def metrics_path(cfg: LanguageModelSAERunnerConfig[Any]) -> Path | None:
    """
    Where a run writes its metrics until its SAE is saved. The metrics of another run are not
    replaced before that. None if the run has no output folder.
    """
    if cfg.output_path is None:
        return None
    output = Path(cfg.output_path)
    path, new = output / METRICS_FILENAME, output / NEW_METRICS_FILENAME
    if cfg.resume_from_checkpoint is None:
        new.unlink(missing_ok=True)  # left by a run that saved no SAE
        return new if path.exists() else path
    own = _own_metrics(cfg, output)
    if own is None:
        new.unlink(missing_ok=True)
        return new if path.exists() else path
    if own == path and holds_sae(output):
        logger.warning(f"the SAE in {output} will be replaced when this run saves one")
        shutil.copyfile(path, new)
        return new
    return own


def _own_metrics(cfg: LanguageModelSAERunnerConfig[Any], output: Path) -> Path | None:
    """The metrics of the run that is resumed, None if there are none or those of another run."""
    assert cfg.resume_from_checkpoint is not None
    for name in (NEW_METRICS_FILENAME, METRICS_FILENAME):
        path, checkpoint = output / name, Path(cfg.resume_from_checkpoint)
        if path.exists() and is_of_checkpoint(path, checkpoint):
            return path
    return None


def holds_sae(folder: Path) -> bool:
    """Whether there is an SAE in a folder, or a part of one."""
    return any(
        (folder / name).exists() for name in (SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME)
    )


def _require_free_output(
    cfg: LanguageModelSAERunnerConfig[Any],
    output: Path,
    overwrite: bool,
    only_if_empty: bool,
) -> None:
    if only_if_empty:
        require_free_output(cfg, overwrite)
    for name in (*SAE_FILENAMES, *METRICS_FILENAMES):
        if (output / name).is_dir():
            raise ValueError(
                f"output_path {str(output)!r} holds a folder {name}, where a file of that "
                "name is to be written: rename it, or give another output_path."
            )
    there = [path for name in METRICS_FILENAMES if (path := output / name).exists()]
    if cfg.resume_from_checkpoint is not None and there:
        if not overwrite and _own_metrics(cfg, output) is None:
            raise ValueError(
                f"{str(there[0])!r} is of another run than the one that is resumed: move it, "
                "or give another output_path."
            )
        for path in there:
            require_rows(path)
    if holds_sae(output) and not overwrite and not _is_same_run(output, cfg):
        raise ValueError(
            f"output_path {str(output)!r} already holds an SAE: give another output_path, or "
            "overwrite=True to AllocSAETrainingRunner to replace it."
        )


def _require_own_checkpoints(
    cfg: LanguageModelSAERunnerConfig[Any], folder: Path
) -> None:
    """Raises ValueError if the folder holds checkpoints of another run, which could be mixed up."""
    resumed = cfg.resume_from_checkpoint
    if resumed is not None and folder.resolve() == folder_of_checkpoints(resumed):
        return
    if holds_checkpoints(folder):
        raise ValueError(
            f"checkpoint_path {str(folder)!r} holds the checkpoints of another run: give "
            "another checkpoint_path or logger.wandb_id, or resume that run with "
            f"resume_from_checkpoint={str(folder)!r}."
        )


def _is_same_run(output: Path, cfg: LanguageModelSAERunnerConfig[Any]) -> bool:
    """Whether an output folder holds an SAE of the run that is resumed."""
    if cfg.resume_from_checkpoint is None:
        return False
    recorded = _read(output / RUNNER_CFG_FILENAME)
    folders = {
        folder_of_checkpoints(folder)
        for folder in (
            recorded.get("checkpoint_path"),
            recorded.get("resume_from_checkpoint"),
        )
        if isinstance(folder, str)
    }
    return folder_of_checkpoints(cfg.resume_from_checkpoint) in folders


def _is_finished(output: Path) -> bool:
    """Whether the run of an SAE has ended: its metrics on held-out activations are written last."""
    metadata = _read(output / SAE_CFG_FILENAME).get("metadata")
    return isinstance(metadata, dict) and metadata.get("held_out") is not None


def _read(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file, an empty one if there is none."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _require_room(cfg: LanguageModelSAERunnerConfig[Any], n_ranks: int) -> None:
    """Raises ValueError if a disk has too little room for what the run will write to it."""
    on_disk: dict[int, list[tuple[Path, int]]] = {}
    for folder, size in estimate_disk(cfg, n_ranks).items():
        on_disk.setdefault(os.stat(folder).st_dev, []).append((folder, size))
    for parts in on_disk.values():
        needed = sum(size for _, size in parts)
        free = shutil.disk_usage(parts[0][0]).free
        if needed > free:
            what = " and ".join(f"{in_bytes(size)} to {f}" for f, size in parts)
            raise ValueError(
                f"the run will write about {what}, but that disk has {in_bytes(free)} "
                "left: free some, give other folders, or lower n_checkpoints."
            )


def estimate_disk(
    cfg: LanguageModelSAERunnerConfig[Any], n_ranks: int = 1
) -> dict[Path, int]:
    """
    Estimates the bytes that a run writes to each folder.

    - Output: rows of metrics, and the SAE twice, since the calibrated SAE replaces the one
      that was saved before calibration.
    - Checkpoints: for each, the SAE, the optimizer's state and the buffers of activations.
    """
    memory = estimate_memory(cfg)
    sizes: dict[Path, int] = {}
    if cfg.output_path is not None:
        rows = cfg.total_training_steps // cfg.logger.wandb_log_frequency
        sizes[Path(cfg.output_path)] = 2 * memory["parameters"] + rows * BYTES_PER_ROW
    if cfg.checkpoint_path is not None:
        folder = Path(cfg.checkpoint_path)
        saved = sum(path.is_dir() for path in folder.iterdir())
        # at most one a step
        n = min(cfg.n_checkpoints, cfg.total_training_steps)
        n = max(n - saved, 0) + cfg.save_final_checkpoint
        buffers = n_ranks * memory["activation buffer"] // 2
        each = memory["parameters"] + memory["optimizer"] + buffers
        sizes[folder] = sizes.get(folder, 0) + n * each
    return sizes
