"""A run as several processes have it: the same run on all, each with its device, and one voice."""

import copy
import logging
import os
import uuid
import warnings
from collections.abc import Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from sae_lens import logger
from sae_lens.config import LanguageModelSAERunnerConfig

from sae_lens_alloc.compat import without_progress_bars
from sae_lens_alloc.config.rank_checks import check_for_ranks
from sae_lens_alloc.distributed.agreement import failing_together, require_same
from sae_lens_alloc.distributed.launch import (
    device_of_rank,
    launch_id,
    training_ranks,
)
from sae_lens_alloc.distributed.ranks import Ranks
from sae_lens_alloc.distributed.speaking import is_first_to_say
from sae_lens_alloc.training.checkpoint import find_checkpoint, holds_checkpoints
from sae_lens_alloc.training.output_folder import is_of_launch
from sae_lens_alloc.version import __version__

DEVICE_KEYS = ("device", "llm_device", "act_store_device")
_is_quiet = False
_n_named_paths = 0


def ranks_of_run() -> Ranks:
    """
    The hosts that train together (`distributed.launch.training_ranks`), of which one says what
    all would say, rank 0 alone shows progress, and rank 0 alone tells W&B.

    Raises:
        ValueError: in one sentence, if the processes cannot find each other or have different
            versions of a library.
    """
    global _is_quiet
    ranks = training_ranks()
    if not ranks.is_alone and not _is_quiet:
        _is_quiet = True
        _speak_once()
        if ranks.rank > 0:
            without_progress_bars()
            os.environ["WANDB_MODE"] = "disabled"
        libraries = {name: version(name) for name in ("sae-lens", "torch")}
        require_same(
            "the version of ", {"sae-lens-alloc": __version__, **libraries}, ranks
        )
    return ranks


def settle_on_ranks(cfg: LanguageModelSAERunnerConfig[Any], ranks: Ranks) -> None:
    """
    Makes a run one that all ranks take part in: each has its device, all have one folder of
    checkpoints, and after a restart by torchrun the run goes on from the last whole one there.
    Does nothing for one process, and nothing the second time.

    Args:
        cfg: The run, changed in place.
        ranks: The ranks.

    Raises:
        ValueError: in one sentence, if the ranks have different configs, or cannot train this
            SAE together.
    """
    if ranks.is_alone:
        return
    _share_checkpoint_path(cfg, ranks)
    require_same("", _comparable(cfg), ranks)
    with failing_together(ranks):
        check_for_ranks(cfg, ranks)
        n_gpus = torch.cuda.device_count()
        cfg.sae = copy.copy(cfg.sae)
        for key in DEVICE_KEYS:
            setattr(cfg, key, device_of_rank(str(getattr(cfg, key)), n_gpus))
        cfg.sae.device = device_of_rank(str(cfg.sae.device), n_gpus)
    if cfg.resume_from_checkpoint is None:
        cfg.resume_from_checkpoint = _last_checkpoint(cfg, ranks)


def _comparable(cfg: LanguageModelSAERunnerConfig[Any]) -> dict[str, Any]:
    """The settings of a run, with one level of names, apart from which GPU is whose."""
    settings = _flat(cfg.to_dict())
    for key in (*DEVICE_KEYS, "sae.device"):
        settings[key] = torch.device(str(settings[key])).type
    return settings


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if key in ("sae", "logger") and isinstance(value, Mapping):
            flat.update(_flat(value, f"{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _share_checkpoint_path(
    cfg: LanguageModelSAERunnerConfig[Any], ranks: Ranks
) -> None:
    """
    SAELens ends the path with a name of its own, another one for each process, unless the config
    has a wandb_id. All get the same, and the same again when torchrun starts them again: the name
    says which launch it is, and which of its runs.
    """
    global _n_named_paths
    path = cfg.checkpoint_path
    paths, launches = zip(*ranks.objects((path, launch_id())), strict=True)
    if path is None or len(set(paths)) == 1:
        return
    name = Path(paths[0]).name
    if launches[0] is not None:
        name = uuid.uuid5(uuid.NAMESPACE_URL, f"{launches[0]} {_n_named_paths}").hex[:8]
    _n_named_paths += 1
    cfg.checkpoint_path = str(Path(path).parent / name)


def _last_checkpoint(
    cfg: LanguageModelSAERunnerConfig[Any], ranks: Ranks
) -> str | None:
    """
    The last whole checkpoint that the processes of this launch have written before torchrun started
    them again. None if there is none.
    """
    folder = Path(cfg.checkpoint_path or "")
    is_ours = cfg.checkpoint_path is not None and is_of_launch(folder, launch_id())
    # as rank 0 sees it
    if not ranks.objects(is_ours and holds_checkpoints(folder))[0]:
        return None
    try:
        return str(find_checkpoint(folder, ranks))
    except ValueError as error:
        logger.warning(str(error))
        return None


def _speak_once() -> None:
    """Messages and warnings that all ranks have are shown once."""

    def is_ours(record: logging.LogRecord) -> bool:
        return is_first_to_say(record.getMessage())

    logger.addFilter(is_ours)
    warnings.showwarning = partial(_show, warnings.showwarning)


def _show(show: Any, message: Any, category: Any, *where: Any, **more: Any) -> None:
    if is_first_to_say(f"{category.__name__}: {message}"):
        show(message, category, *where, **more)
