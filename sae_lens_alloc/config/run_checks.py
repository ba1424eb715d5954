"""Checks of a run by its config alone, without a look at files or devices."""

import json
from dataclasses import fields
from importlib.util import find_spec
from typing import Any

import torch
from sae_lens.config import LanguageModelSAERunnerConfig, SAETrainerConfig
from sae_lens.constants import DTYPE_MAP
from sae_lens.saes.sae import TrainingSAEConfig

from sae_lens_alloc.activations.buffer_setting import NAMES as BUFFER_SETTING_NAMES
from sae_lens_alloc.activations.buffer_setting import buffer_setting, contexts_in_buffer
from sae_lens_alloc.activations.own_activations import activations_of
from sae_lens_alloc.allocation.mutual_choice import budget_for
from sae_lens_alloc.allocation.schedule import budget_per_token
from sae_lens_alloc.compat import compile_modes
from sae_lens_alloc.config.hook_checks import check_hooks
from sae_lens_alloc.config.kl_checks import check_kl_finish
from sae_lens_alloc.config.own_checks import check_own_activations
from sae_lens_alloc.config.run_config import OPTIMIZERS, optimizer_of
from sae_lens_alloc.saes.allocation_sae_config import AllocationTrainingSAEConfig
from sae_lens_alloc.saes.feature_choice_sae import FeatureChoiceTrainingSAEConfig
from sae_lens_alloc.saes.mutual_choice_sae import MutualChoiceTrainingSAEConfig
from sae_lens_alloc.typed_values import check_choice, check_number, shown

SAE_SCHEDULE_KEYS = (
    "feature_choice_steps",
    "mutual_choice_steps",
    "topk_steps",
    "aux_loss_decay_start",
    "k_decay_steps",
)
# SAELens divides by these. With less than 1, some of its loops never run or never end.
AT_LEAST_ONE = (
    "context_size",
    "eval_batch_size_prompts",
    "feature_sampling_window",
    "n_batches_for_norm_estimate",
    *BUFFER_SETTING_NAMES,
    "n_restart_cycles",
    "store_batch_size_prompts",
    "train_batch_size_tokens",
    "training_tokens",
    "logger.eval_every_n_wandb_logs",
    "logger.wandb_log_frequency",
    "sae.d_in",
    "sae.d_out",
    "sae.d_sae",
)
AT_LEAST_ZERO = (
    "dead_feature_window",
    "kl_finish",
    "lr_decay_steps",
    "lr_warm_up_steps",
    "n_checkpoints",
    "prefetch_llm_batches",
)
# SAELens makes a list of all positions of a context, so this must be checked before that.
LONGEST_CONTEXT = 10**7
# torch.manual_seed takes no larger one.
LARGEST_SEED = 2**63 - 1
MODEL_CLASSES = ("HookedTransformer", "HookedMamba", "AutoModelForCausalLM")
LR_SCHEDULERS = ("constant", "cosineannealing", "cosineannealingwarmrestarts")


def check_value(key: str, value: Any) -> None:
    """
    Raises ValueError if no run can work with a value, whatever the other settings are.

    Args:
        key: The setting, named as in a YAML file.
        value: Its value, of the right type.
    """
    if key == "seed":
        if not 0 <= abs(value) <= LARGEST_SEED:
            raise ValueError(
                f"seed must be between -(2**63 - 1) and 2**63 - 1, got {shown(value)}."
            )
        return
    check_number(key, value)
    if value is None:
        return
    if key in AT_LEAST_ONE and value < 1:
        raise ValueError(f"{key} must be at least 1, got {value}.")
    if key in AT_LEAST_ZERO and value < 0:
        raise ValueError(f"{key} must be at least 0, got {value}.")
    if key in ("lr", "kl_weight", "sae.decoder_init_norm") and value <= 0:
        raise ValueError(f"{key} must be greater than 0, got {value}.")
    if key in ("adam_beta1", "adam_beta2") and not 0 <= value < 1:
        raise ValueError(f"{key} must be in [0, 1), got {value}.")
    if key == "context_size" and value > LONGEST_CONTEXT:
        raise ValueError(f"context_size must be at most 10,000,000, got {value:,}.")
    if key == "seqpos_slice" and not 1 <= len(value) <= 3:
        raise ValueError(
            f"seqpos_slice must have 1 to 3 numbers: [end], [start, end] or "
            f"[start, end, step]; got {len(value)}."
        )
    if key == "checkpoint_path" and not value.strip():
        raise ValueError(
            "checkpoint_path is empty: give a folder, or null for no checkpoints."
        )


def check_run(cfg: LanguageModelSAERunnerConfig[Any]) -> None:
    """
    Checks a run by its config alone, without a look at files or devices.

    Args:
        cfg: A run, from a file or made in Python.

    Raises:
        ValueError: if the run could not work, in one sentence that names the setting.
    """
    for prefix, section in (("", cfg), ("logger.", cfg.logger), ("sae.", cfg.sae)):
        for field in fields(section):
            if field.name not in ("sae", "logger", "metadata"):
                check_value(f"{prefix}{field.name}", getattr(section, field.name))
    _check_names(cfg)
    _check_schedule(cfg)
    check_learning_rate(cfg)
    _check_sae(cfg.sae, cfg.train_batch_size_tokens, cfg.total_training_steps)
    check_optimizer(cfg, cfg.sae)
    check_own_activations(cfg)
    check_kl_finish(cfg)
    _check_mixing(cfg)
    if activations_of(cfg) is None:
        check_hooks(cfg)
        _check_buffer(cfg)
    _check_outputs(cfg)


def check_device(key: str, device: Any) -> None:
    """Raises ValueError if `device`, the value of `key`, is not a torch device."""
    try:
        torch.device(str(device))
    except RuntimeError:
        raise ValueError(
            f"{key} must be a torch device such as 'cpu' or 'cuda:0', got {shown(device)}."
        ) from None


def check_learning_rate(
    cfg: LanguageModelSAERunnerConfig[Any] | SAETrainerConfig,
) -> None:
    """
    Checks that SAELens can make the learning-rate schedule without dividing by zero, and that
    the rate is neither negative nor annealed upwards.

    Raises:
        ValueError: if one of these fails, in one sentence that names the setting.
    """
    check_choice("lr_scheduler_name", cfg.lr_scheduler_name.lower(), LR_SCHEDULERS)
    for key in ("lr", "lr_end", "lr_warm_up_steps", "lr_decay_steps"):
        check_value(key, getattr(cfg, key))
    if cfg.lr_end is None:
        raise ValueError(
            "lr_end is None, and SAETrainerConfig does not derive it: give the learning "
            "rate to end with, such as lr / 10."
        )
    steps = cfg.total_training_steps
    annealed = steps - cfg.lr_warm_up_steps - cfg.lr_decay_steps
    if annealed < 0:
        raise ValueError(
            f"lr_warm_up_steps ({cfg.lr_warm_up_steps}) and lr_decay_steps "
            f"({cfg.lr_decay_steps}) together exceed the {steps} training steps."
        )
    if cfg.lr_scheduler_name.lower() == "constant":
        return  # this one ignores lr_end and n_restart_cycles
    if not 0 <= cfg.lr_end <= cfg.lr:
        raise ValueError(
            f"lr_end must be between 0 and lr ({cfg.lr}), from which {cfg.lr_scheduler_name} "
            f"falls, got {cfg.lr_end}."
        )
    if cfg.lr_decay_steps and cfg.lr_end == 0:
        raise ValueError(
            f"lr_decay_steps ({cfg.lr_decay_steps}) would decay from lr_end = 0 to 0: give a "
            "larger lr_end, or lr_decay_steps=0."
        )
    cycles = 1
    if cfg.lr_scheduler_name.lower() == "cosineannealingwarmrestarts":
        cycles = cfg.n_restart_cycles
        check_value("n_restart_cycles", cycles)
    if annealed < cycles:
        raise ValueError(
            f"lr_scheduler_name {cfg.lr_scheduler_name!r} needs a step for each of its "
            f"cycles ({cycles}), but lr_warm_up_steps and lr_decay_steps leave {annealed} "
            f"of the {steps} training steps."
        )


def check_optimizer(
    cfg: LanguageModelSAERunnerConfig[Any] | SAETrainerConfig, sae: TrainingSAEConfig
) -> None:
    """Raises ValueError if there is no such optimizer, or it cannot train such an SAE."""
    name = optimizer_of(cfg)
    check_choice("optimizer", name, OPTIMIZERS)
    if name == "adam":
        return
    if name == "row_sparse_adam" and not isinstance(sae, AllocationTrainingSAEConfig):
        raise ValueError(
            f"optimizer {name!r} needs an SAE with an allocation, such as mutual_choice, got "
            f"{sae.architecture()!r}: leave it out."
        )
    if sae.dtype != "float32":
        raise ValueError(
            f"optimizer {name!r} needs float32 weights, got sae.dtype {sae.dtype!r}: set it to "
            "'float32', or leave the optimizer out."
        )


def _check_names(cfg: LanguageModelSAERunnerConfig[Any]) -> None:
    check_choice("model_class_name", cfg.model_class_name, MODEL_CLASSES)
    if cfg.model_class_name == "HookedMamba" and find_spec("mamba_lens") is None:
        raise ValueError(
            "model_class_name 'HookedMamba' needs mamba-lens: install sae-lens[mamba]."
        )
    for key, dtype in (("dtype", cfg.dtype), ("sae.dtype", cfg.sae.dtype)):
        if not isinstance(dtype, torch.dtype):
            check_choice(key, dtype, DTYPE_MAP)
    for key, device in (
        ("device", cfg.device),
        ("llm_device", cfg.llm_device),
        ("act_store_device", cfg.act_store_device),
        ("sae.device", cfg.sae.device),
    ):
        check_device(key, device)
    for compiles, key in (
        (cfg.compile_llm, "llm_compilation_mode"),
        (cfg.compile_sae, "sae_compilation_mode"),
    ):
        mode = getattr(cfg, key)
        if compiles and mode is not None:
            check_choice(key, mode, compile_modes())


def _check_schedule(cfg: LanguageModelSAERunnerConfig[Any]) -> None:
    steps = cfg.total_training_steps
    if steps == 0:
        raise ValueError(
            f"training_tokens ({cfg.training_tokens}) is less than train_batch_size_tokens "
            f"({cfg.train_batch_size_tokens}), so there is not one training step."
        )
    for name in SAE_SCHEDULE_KEYS:
        value = getattr(cfg.sae, name, None)
        if value is not None and value > steps:
            raise ValueError(
                f"sae.{name} ({value}) exceeds the {steps} training steps."
            )
    most = max(steps, LanguageModelSAERunnerConfig.n_batches_for_norm_estimate)
    if cfg.n_batches_for_norm_estimate > most:
        raise ValueError(
            f"n_batches_for_norm_estimate ({cfg.n_batches_for_norm_estimate}) must be at "
            f"most {most}: estimating a norm would take longer than the training."
        )


def _check_sae(sae: TrainingSAEConfig, batch_tokens: int, steps: int) -> None:
    """Raises ValueError if the SAE cannot select its pairs from one batch."""
    k = getattr(sae, "k", None)
    if k is None:
        return
    if not 0 < k <= sae.d_sae:
        raise ValueError(f"sae: k must be in (0, d_sae = {sae.d_sae}], got {k}.")
    if budget_for(k, batch_tokens) < 1:
        raise ValueError(
            f"sae.k ({k}) times train_batch_size_tokens ({batch_tokens}) is less than one "
            "active feature in a batch: raise one of them."
        )
    if isinstance(sae, AllocationTrainingSAEConfig):
        _check_smallest_quota(sae, batch_tokens, steps)


def _check_smallest_quota(
    sae: AllocationTrainingSAEConfig, batch_tokens: int, steps: int
) -> None:
    """Raises ValueError if the smallest quotas of Feature Choice exceed the budget at some step."""
    last = _last_feature_choice_step(sae, steps)
    if last is None:
        return
    # the budget never grows, so it is smallest at the last step
    k = budget_per_token(last, sae.k, sae.k_start, sae.k_decay_steps)
    wanted, budget = sae.min_tokens_per_feature * sae.d_sae, budget_for(k, batch_tokens)
    if wanted > budget:
        raise ValueError(
            f"sae.min_tokens_per_feature ({sae.min_tokens_per_feature}) for {sae.d_sae} "
            f"features needs {wanted:.0f} pairs per batch, but Feature Choice has only "
            f"{budget} at step {last}: lower it, or raise sae.k or train_batch_size_tokens."
        )


def _last_feature_choice_step(
    sae: AllocationTrainingSAEConfig, steps: int
) -> int | None:
    if isinstance(sae, MutualChoiceTrainingSAEConfig):
        return (sae.feature_choice_steps or 0) - 1 if sae.feature_choice_steps else None
    if isinstance(sae, FeatureChoiceTrainingSAEConfig):
        return steps - 1 if sae.mutual_choice_steps < steps else None
    return None


def _check_mixing(cfg: LanguageModelSAERunnerConfig[Any]) -> None:
    """Raises ValueError for a fault that SAELens finds only after the language model has run."""
    if not 0 <= cfg.activations_mixing_fraction <= 1:
        raise ValueError(
            "activations_mixing_fraction must be between 0 and 1, "
            f"got {cfg.activations_mixing_fraction}."
        )


def _check_buffer(cfg: LanguageModelSAERunnerConfig[Any]) -> None:
    """Raises ValueError for another one."""
    tokens_per_context = len(range(cfg.context_size)[slice(*cfg.seqpos_slice)])
    n_contexts, name = contexts_in_buffer(cfg), buffer_setting()
    buffer_tokens = n_contexts * tokens_per_context
    if buffer_tokens < cfg.train_batch_size_tokens:
        enough = -(-cfg.train_batch_size_tokens // tokens_per_context)
        raise ValueError(
            f"the activation buffer holds {name} ({n_contexts}) "
            f"times {tokens_per_context} tokens, fewer than train_batch_size_tokens "
            f"({cfg.train_batch_size_tokens}): {name} must be at least {enough}."
        )


def _check_outputs(cfg: LanguageModelSAERunnerConfig[Any]) -> None:
    for key in ("n_checkpoints", "save_final_checkpoint"):
        if cfg.checkpoint_path is None and getattr(cfg, key):
            raise ValueError(
                f"{key} is {getattr(cfg, key)}, but checkpoint_path is null, so no "
                "checkpoint would be saved: give a checkpoint_path."
            )
    if cfg.n_checkpoints > cfg.total_training_steps:
        raise ValueError(
            f"n_checkpoints ({cfg.n_checkpoints}) exceeds the {cfg.total_training_steps} "
            "training steps."
        )
    if cfg.logger.log_to_wandb and cfg.n_eval_batches < 1:
        raise ValueError(
            f"n_eval_batches must be at least 1, got {cfg.n_eval_batches}: SAELens cannot "
            "evaluate for W&B without a batch."
        )
    try:
        json.dumps(cfg.to_dict())
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"the settings cannot be written to runner_cfg.json: {error}."
        ) from error
