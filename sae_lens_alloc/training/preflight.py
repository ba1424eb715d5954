"""Checks of the machine and the files of a run, before the model is loaded."""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import torch
import wandb
from datasets import DatasetBuilder, load_dataset_builder
from sae_lens import logger
from sae_lens.config import LanguageModelSAERunnerConfig

from sae_lens_alloc.activations.buffer_setting import buffer_setting
from sae_lens_alloc.activations.language_model import find_language_model
from sae_lens_alloc.activations.local_dataset import check_local_dataset
from sae_lens_alloc.activations.own_activations import activations_of
from sae_lens_alloc.distributed.launch import ranks_on_this_machine
from sae_lens_alloc.errors import in_one_sentence
from sae_lens_alloc.training.pretrained import load_pretrained
from sae_lens_alloc.training.run_activations import rows_of_run
from sae_lens_alloc.training.summary import estimate_memory, in_bytes
from sae_lens_alloc.typed_values import shown


def check_training(cfg: LanguageModelSAERunnerConfig[Any], n_ranks: int = 1) -> None:
    """
    Checks everything that a training needs. Nothing is written, and no model is loaded.

    Args:
        cfg: The run.
        n_ranks: Number of processes that train together.

    Raises:
        ValueError: if something is missing or does not fit, in one sentence that names the
            setting.
    """
    if not (cfg.output_path or "").strip():
        raise ValueError("output_path is missing: the result would be lost.")
    for key in ("output_path", "checkpoint_path"):
        _require_writable(key, getattr(cfg, key))
    check_devices(cfg)
    check_memory(cfg, n_ranks)
    if cfg.logger.log_to_wandb:
        _require_wandb()
    if cfg.resume_from_checkpoint is None and cfg.from_pretrained_path is not None:
        load_pretrained(cfg.from_pretrained_path, cfg.sae, "cpu")
    check_activations(cfg)


def check_activations(cfg: LanguageModelSAERunnerConfig[Any]) -> None:
    """
    Checks the source of the activations: the text, the language model and its hook, or one's own.

    Raises:
        ValueError: if something is missing or does not fit, in one sentence that names the
            setting.
    """
    if activations_of(cfg) is not None:
        rows_of_run(cfg)
        return
    _check_dataset(cfg)
    if (
        cfg.use_cached_activations
        and not Path(cfg.cached_activations_path or "").is_dir()
    ):
        raise ValueError(
            f"cached_activations_path is {cfg.cached_activations_path!r}, but there is no "
            "such folder."
        )
    find_language_model(cfg)


def check_output(path: str | None, overwrite: bool, resumed: bool) -> None:
    """
    Checks that the output folder may be written to. Nothing is created.

    Raises:
        ValueError: if it is not empty, and the run may not write into it.
    """
    output = Path(path or "")
    if overwrite or resumed or not output.exists():
        return
    if any(output.iterdir()):
        raise ValueError(
            f"output_path {str(output)!r} is not empty: give --overwrite to write into it, "
            "or another output_path."
        )


def check_devices(cfg: LanguageModelSAERunnerConfig[Any]) -> None:
    """Raises ValueError if a tensor cannot be put on one of the devices and read back."""
    for key, name in (
        ("device", cfg.device),
        ("llm_device", cfg.llm_device),
        ("act_store_device", cfg.act_store_device),
        ("sae.device", cfg.sae.device),
    ):
        try:
            torch.zeros(1, device=name).item()
        except (RuntimeError, AssertionError, ImportError) as error:
            raise ValueError(
                f"{key} is {str(name)!r}, but torch finds no such device on this machine: "
                "give device=cpu to run without one."
            ) from error


def check_memory(cfg: LanguageModelSAERunnerConfig[Any], n_ranks: int = 1) -> None:
    """
    Compares the estimated memory with that of each device. Warns if less is free now. The
    processes of a machine share its memory, and each has its own GPU.

    Args:
        cfg: The run.
        n_ranks: Number of processes that train together.

    Raises:
        ValueError: if a device has less memory in total.
    """
    needed: dict[str, int] = {}
    for part, size in estimate_memory(cfg, n_ranks).items():
        buffered = part == "activation buffer"
        name = str(cfg.act_store_device if buffered else cfg.device)
        needed[name] = needed.get(name, 0) + size
    for name, size in needed.items():
        memory = _free_and_total(torch.device(name))
        if memory is None:
            continue
        free, total = memory
        if torch.device(name).type == "cpu":
            size *= min(ranks_on_this_machine(), n_ranks)
        have = f"the training needs about {in_bytes(size)} on {name}, which has"
        if size > total:
            raise ValueError(
                f"{have} {in_bytes(total)}: lower sae.d_sae, train_batch_size_tokens or "
                f"{buffer_setting()}."
            )
        if size > free:
            logger.warning(f"{have} only {in_bytes(free)} free now.")


def _free_and_total(device: torch.device) -> tuple[int, int] | None:
    """Free and total bytes of memory of a device, None if they are not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)
    if device.type == "cpu":
        memory = psutil.virtual_memory()
        return memory.available, memory.total
    return None


def _check_dataset(cfg: LanguageModelSAERunnerConfig[Any]) -> None:
    name = cfg.dataset_path
    if not name:
        raise ValueError("dataset_path is missing.")
    if Path(name).exists():
        check_local_dataset(cfg)
        return
    # a name of the hub has one slash at most
    if name.startswith((".", "~", "/")) or name.count("/") > 1 or "\\" in name:
        raise ValueError(
            f"dataset_path is {name!r}, but there is no such folder or file."
        )
    try:
        builder = load_dataset_builder(name)
    except Exception as error:  # of many kinds: datasets, huggingface_hub
        raise ValueError(
            f"dataset_path {name!r} is no folder of this machine, and cannot be loaded from "
            f"the Hugging Face hub: {in_one_sentence(error)}"
        ) from error
    require_decompressor(name, builder)


def require_decompressor(name: str, builder: DatasetBuilder) -> None:
    """
    Raises ValueError if a dataset has files that cannot be decompressed, which would show only
    when the first of them is read.
    """
    files = (builder.config.data_files or {}).values()
    compressed = any(str(file).endswith(".zst") for split in files for file in split)
    if compressed and find_spec("zstandard") is None:
        raise ValueError(
            f"dataset_path {name!r} has files that are compressed by zstd: run "
            "`pip install zstandard`."
        )


def _require_writable(key: str, path: str | None) -> None:
    """
    Raises ValueError if a folder could not be created or written to. Nothing is created: the
    last folder of the path that exists is checked.
    """
    if path is None:
        return
    try:
        there = next(
            p for p in (Path(path), *Path(path).resolve().parents) if p.exists()
        )
        works = there.is_dir() and os.access(there, os.W_OK)
    except (OSError, ValueError) as error:  # too long, or with a NUL in it
        raise ValueError(
            f"{key} {shown(path)} cannot be a folder: {in_one_sentence(error)}"
        ) from error
    if not works:
        raise ValueError(
            f"{key} is {path!r}, but {str(there)!r} is not a folder that can be written to."
        )


def _require_wandb() -> None:
    if wandb.setup().settings.mode == "online" and not wandb.api.api_key:
        raise ValueError(
            "logger.log_to_wandb is true, but nobody is logged in to W&B on this machine: "
            "run `wandb login`, set WANDB_MODE=offline, or give logger.log_to_wandb=false."
        )
