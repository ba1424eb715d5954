"""The settings of a resumed run, and which of them may differ from those of its checkpoint."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from sae_lens import logger
from sae_lens.config import LanguageModelSAERunnerConfig
from sae_lens.constants import RUNNER_CFG_FILENAME, SAE_CFG_FILENAME
from sae_lens.saes.sae import TrainingSAEConfig

from sae_lens_alloc.config.run_checks import SAE_SCHEDULE_KEYS
from sae_lens_alloc.distributed.ranks import ALONE, Ranks
from sae_lens_alloc.distributed.together import together
from sae_lens_alloc.training.checkpoint import find_checkpoint
from sae_lens_alloc.typed_values import shown

# Settings that may change: length, learning rate, machine, output and logging. With another value of
# the rest, the run would be another one.
FREE_KEYS = (
    "training_tokens",
    *("lr", "lr_end", "lr_scheduler_name", "lr_warm_up_steps", "lr_decay_steps"),
    "n_restart_cycles",
    *("dead_feature_window", "kl_finish"),  # may be shares of the training
    *("n_checkpoints", "checkpoint_path", "save_final_checkpoint", "output_path"),
    "resume_from_checkpoint",
    *("device", "llm_device", "act_store_device", "prefetch_llm_batches"),
    *("compile_llm", "llm_compilation_mode", "compile_sae", "sae_compilation_mode"),
    "cuda_graph",
    *("logger", "verbose", "n_eval_batches", "eval_batch_size_prompts"),
    *("streaming", "dataset_trust_remote_code"),
    # SAELens writes these and reads them nowhere
    *("is_dataset_tokenized", "hook_eval", "dead_feature_threshold"),
    *("sae_lens_version", "sae_lens_training_version"),
)
PATH_KEYS = (
    "model_name",
    "dataset_path",
    "activations",
    "cached_activations_path",
    "from_pretrained_path",
)
FREE_SAE_KEYS = (
    "device",
    "metadata",
    "sae_lens_version",
    "sae_lens_training_version",
)
# The schedule, which may be given as shares of the training.
KEPT_SAE_KEYS = (
    *SAE_SCHEDULE_KEYS,
    *("k_start", "l1_warm_up_steps", "l0_warm_up_steps"),
)


def settle_resumed_run(
    cfg: LanguageModelSAERunnerConfig[Any],
    sae_is_known: bool = True,
    ranks: Ranks = ALONE,
) -> None:
    """
    Prepares the config of a run that resumes from a checkpoint. Does nothing for other runs.

    `cfg.resume_from_checkpoint` becomes the checkpoint itself. If `training_tokens` has changed,
    `cfg.sae` keeps the schedule that the training began with.

    Args:
        cfg: The run, changed in place.
        sae_is_known: Whether `cfg.sae` is the SAE to be trained. In a fine-tuning it is not, until
            the source is converted.
        ranks: Those that resume it, which share the reading. All of them must call it.

    Raises:
        ValueError: if there is no whole checkpoint, or a setting has changed that must not, in one
            sentence with both values.
    """
    folder = cfg.resume_from_checkpoint
    if folder is None:
        return
    together(ranks, lambda: _require_folder(folder))
    checkpoint = find_checkpoint(folder, ranks)
    cfg.resume_from_checkpoint = str(checkpoint)
    recorded = _recorded(checkpoint)
    wanted = _as_json(cfg.to_dict())
    for key in sorted(recorded.keys() & wanted.keys() - {"sae", *FREE_KEYS}):
        same_path = key in PATH_KEYS and _is_same_path(recorded[key], wanted[key])
        if recorded[key] != wanted[key] and not same_path:
            raise _other(checkpoint, key, recorded[key], wanted[key])
    if sae_is_known:
        cfg.sae = resumed_sae_config(checkpoint, cfg.sae, cfg.training_tokens)


def _require_folder(folder: str) -> None:
    if not Path(folder).is_dir():
        raise ValueError(
            f"resume_from_checkpoint is {folder!r}, but there is no such folder."
        )


def resumed_sae_config(
    checkpoint: Path, cfg: TrainingSAEConfig, training_tokens: int
) -> TrainingSAEConfig:
    """
    The config of the SAE that resumes from a checkpoint. If the length of the training has
    changed, the schedule of the checkpoint is kept.

    Args:
        checkpoint: The checkpoint.
        cfg: The wanted config.
        training_tokens: The wanted length of the training.

    Raises:
        ValueError: if another setting differs, in one sentence with both values.
    """
    recorded: dict[str, Any] = json.loads((checkpoint / SAE_CFG_FILENAME).read_text())
    wanted = _as_json(cfg.to_dict())
    tokens = recorded_training_tokens(checkpoint)
    # SAELens' runner leaves None, with which the switch to Mutual Choice times itself
    times_itself = recorded.get("feature_choice_steps", 0) is None
    keeps_schedule = times_itself or tokens not in (None, training_tokens)
    kept: dict[str, Any] = {}
    for key in sorted(wanted.keys() & recorded.keys() - {*FREE_SAE_KEYS}):
        if recorded[key] == wanted[key]:
            continue
        if not keeps_schedule or key not in KEPT_SAE_KEYS:
            raise _other(checkpoint, f"sae.{key}", recorded[key], wanted[key])
        kept[key] = recorded[key]
    if not kept:
        return cfg
    changes = ", ".join(
        f"sae.{key} {value} instead of {wanted[key]}" for key, value in kept.items()
    )
    logger.warning(f"the run keeps the schedule that it began with: {changes}.")
    return replace(cfg, **kept)


def recorded_training_tokens(checkpoint: Path) -> int | None:
    """`training_tokens` of the run of a checkpoint, None if not known."""
    return _recorded(checkpoint).get("training_tokens")


def _recorded(checkpoint: Path) -> dict[str, Any]:
    """The settings of the run of a checkpoint. AllocSAETrainer by itself saves none."""
    path = checkpoint / RUNNER_CFG_FILENAME
    return json.loads(path.read_text()) if path.exists() else {}


def _other(checkpoint: Path, key: str, recorded: Any, wanted: Any) -> ValueError:
    return ValueError(
        f"The checkpoint {checkpoint} cannot be resumed: its run has {key} "
        f"{shown(recorded)}, but this run has {shown(wanted)}, and that must not change: give "
        "the value of the checkpoint, or start anew without resume_from_checkpoint."
    )


def _as_json(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings as they are after writing and reading them: tuples become lists."""
    return json.loads(json.dumps(settings))


def _is_same_path(one: Any, other: Any) -> bool:
    paths = [path for path in (one, other) if isinstance(path, str)]
    return len(paths) == 2 and len({Path(path).resolve() for path in paths}) == 1
