"""A description of a run, and an estimate of its memory."""

import math
from typing import Any

import torch
from sae_lens.config import LanguageModelSAERunnerConfig
from sae_lens.saes.sae import TrainingSAEConfig
from sae_lens.util import str_to_dtype

from sae_lens_alloc.activations.buffer_setting import contexts_in_buffer
from sae_lens_alloc.activations.hook_names import hook_names_of
from sae_lens_alloc.activations.own_activations import (
    activations_column_of,
    activations_of,
    buffer_rows_of,
)
from sae_lens_alloc.config.run_config import (
    OPTIMIZERS,
    kl_finish_of,
    optimizer_of,
)
from sae_lens_alloc.distributed.cost import Step, bytes_per_step
from sae_lens_alloc.ops.block_encoder import block_width
from sae_lens_alloc.saes.allocation_sae_config import AllocationTrainingSAEConfig
from sae_lens_alloc.saes.auxiliary_loss import AuxiliaryLossTrainingSAEConfig
from sae_lens_alloc.saes.feature_choice_sae import FeatureChoiceTrainingSAEConfig
from sae_lens_alloc.saes.matryoshka_mutual_choice_sae import (
    MatryoshkaMutualChoiceTrainingSAEConfig,
)
from sae_lens_alloc.saes.mutual_choice_sae import MutualChoiceTrainingSAEConfig
from sae_lens_alloc.saes.rows import output_width, row_width

# SAELens keeps buffered activations in float32, whatever `dtype` says.
BUFFER_ITEM_SIZE = 4


def describe_run(cfg: LanguageModelSAERunnerConfig[Any], n_ranks: int = 1) -> str:
    """
    SAE, schedule, data, length, memory and folders of a run, one on each line.

    Args:
        cfg: The run.
        n_ranks: Number of processes that train together.
    """
    sae = cfg.sae
    steps = cfg.total_training_steps
    memory = estimate_memory(cfg, n_ranks)
    parts = ", ".join(f"{name} {in_bytes(size)}" for name, size in memory.items())
    lines = {
        "SAE": f"{sae.architecture()}, {sae.d_in} -> {sae.d_sae} features "
        f"({sae.d_sae / sae.d_in:g}x){_output(sae)}{_sparsity(sae)}, {sae.dtype} on {cfg.device}",
        "processes": _processes(cfg, n_ranks),
        "schedule": _schedule(sae, steps),
        **_source(cfg),
        "training": f"{cfg.training_tokens:,} tokens = {steps:,} steps of "
        f"{cfg.train_batch_size_tokens:,}; {_learning_rate(cfg)}{_kl_finish(cfg)}",
        "memory": f"about {in_bytes(sum(memory.values()))} ({parts})"
        f"{'' if n_ranks == 1 else ' in each process'}"
        f"{'' if activations_of(cfg) else ' beside the language model'}",
        "output": cfg.output_path or "not saved",
        "checkpoints": _checkpoints(cfg),
    }
    return "\n".join(f"{name:<12}{text}" for name, text in lines.items() if text)


def _source(cfg: LanguageModelSAERunnerConfig[Any]) -> dict[str, str]:
    """Where the activations come from."""
    own, column = activations_of(cfg), activations_column_of(cfg)
    if own is not None:
        return {"activations": own if column is None else f"{own}, column {column}"}
    hooks = " to ".join(hook_names_of(cfg))
    return {
        "model": f"{cfg.model_name} at {hooks}, contexts of {cfg.context_size} tokens, on "
        f"{cfg.llm_device}",
        "dataset": cfg.dataset_path or "(none)",
    }


def _processes(cfg: LanguageModelSAERunnerConfig[Any], n_ranks: int) -> str:
    """Nothing for one."""
    if n_ranks == 1:
        return ""
    sent = bytes_per_step(_costliest_step(cfg), n_ranks)
    part = "" if activations_of(cfg) else ", from its own part of the dataset"
    return (
        f"{n_ranks}, each with {features_of_rank(cfg.sae.d_sae, n_ranks):,} features and "
        f"{cfg.train_batch_size_tokens // n_ranks:,} tokens of a batch{part}; "
        f"each sends about {in_bytes(sent)} a step"
    )


def _costliest_step(cfg: LanguageModelSAERunnerConfig[Any]) -> Step:
    """The step of a run in which ranks send most, but for those that renew flags."""
    sae = cfg.sae
    assert isinstance(sae, AllocationTrainingSAEConfig)
    return Step(
        cfg.train_batch_size_tokens,
        sae.d_in,
        sae.d_sae,
        "feature" if isinstance(sae, FeatureChoiceTrainingSAEConfig) else "mutual",
        has_margin=sae.selection_margin > 0,
        k_aux=0 if sae.aux_loss == "none" else sae.features_per_token_in_aux_loss(),
        n_inner_levels=_n_nested(sae),
        subtracts_b_dec=sae.apply_b_dec_to_input,
        d_out=output_width(sae),
    )


def features_of_rank(d_sae: int, n_ranks: int) -> int:
    """The most features that one of several processes has."""
    return math.ceil(d_sae / n_ranks)


def estimate_memory(
    cfg: LanguageModelSAERunnerConfig[Any], n_ranks: int = 1
) -> dict[str, int]:
    """
    Estimates the bytes of memory that training the SAE takes in each process, without the
    language model.

    With P = 2 * d_in * d_sae + d_sae + d_in parameters of s bytes each, and B tokens a step (in a
    transcoder, d_in + d_out takes the place of 2 * d_in and of each other d_in, b_dec has d_out
    numbers, and W_skip d_in * d_out):

    - parameters, gradients: P * s each; optimizer: 2 * P * s, or P * s of muon, which makes the
      half of it anew in a step;
    - activation buffer: 2 * (buffered tokens + one batch of contexts) * d_in * 4 bytes, twice
      because shuffling copies it, and the prefetched batches. Of one's own activations, the
      buffered batches, twice;
    - step, in float32: for Mutual and Feature Choice, 16 matrices of B x d_in, 4 blocks of
      affinities, and 64 bytes for each selected pair, each pair of the margin and each pair of
      the auxiliary loss. On a GPU, the encoder's gradient once more, which is transposed. For
      each nested reconstruction, 7 matrices and the selected pairs once more. For other
      architectures, which work on dense matrices, 8 matrices of B x d_sae. A CUDA graph holds
      the memory of its step, and its gradients are those above.

    Each of S processes has d_sae / S features, and its own buffer, from which it gives B / S
    tokens a step. It has places for all pairs, though it fills only its share.

    Returns:
        Bytes by name of the part.
    """
    n_tokens, optimizer = cfg.train_batch_size_tokens, optimizer_of(cfg)
    sae = cfg.sae
    d_sae, d_out = features_of_rank(sae.d_sae, n_ranks), output_width(sae) or sae.d_in
    parameters = (sae.d_in + d_out) * d_sae + d_sae + d_out
    parameters += sae.d_in * d_out * getattr(sae, "skip_connection", False)
    parameters *= str_to_dtype(sae.dtype).itemsize
    tokens_per_context = len(range(cfg.context_size)[slice(*cfg.seqpos_slice)])
    buffered_contexts = contexts_in_buffer(cfg) + cfg.store_batch_size_prompts
    # batches that a thread has prefetched
    waiting = int(cfg.prefetch_llm_batches) * n_tokens // n_ranks
    buffer = 2 * buffered_contexts * tokens_per_context + waiting
    if activations_of(cfg) is not None:
        buffer = 2 * buffer_rows_of(cfg)
    buffer *= row_width(sae) * BUFFER_ITEM_SIZE
    return {
        "parameters": parameters,
        "gradients": parameters,
        "optimizer": OPTIMIZERS[optimizer] * parameters,
        "activation buffer": buffer,
        "step": _step_bytes(sae, n_tokens, torch.device(cfg.device), n_ranks)
        + parameters // 2 * (optimizer == "muon"),
    }


def _step_bytes(
    sae: TrainingSAEConfig, n_tokens: int, device: torch.device, n_ranks: int
) -> int:
    d_sae = features_of_rank(sae.d_sae, n_ranks)
    if not isinstance(sae, AllocationTrainingSAEConfig):
        return 8 * n_tokens * d_sae * 4
    k = sae.k if sae.k_start is None else sae.k_start
    n_nested = _n_nested(sae)
    k *= 1 + n_nested
    k += sae.selection_margin * sae.k
    k_aux = 0 if sae.aux_loss == "none" else sae.features_per_token_in_aux_loss()
    pairs = n_tokens * (k + k_aux)
    block = n_tokens * min(block_width(n_tokens, device), d_sae)
    elements = (16 + 7 * n_nested) * n_tokens * row_width(sae) + 4 * block
    if device.type != "cpu":
        elements += sae.d_in * d_sae
    return 4 * elements + 64 * math.ceil(pairs)


def _n_nested(sae: TrainingSAEConfig) -> int:
    """Number of nested reconstructions beside that of all features."""
    nested = isinstance(sae, MatryoshkaMutualChoiceTrainingSAEConfig)
    return len(sae.inner_widths()) if nested else 0


def _output(sae: TrainingSAEConfig) -> str:
    """Where a transcoder leads, an empty string for an SAE, which leads back."""
    d_out = output_width(sae)
    skip = " and a skip connection" if getattr(sae, "skip_connection", False) else ""
    return "" if d_out is None else f" -> {d_out}{skip}"


def _sparsity(sae: TrainingSAEConfig) -> str:
    k = getattr(sae, "k", None)
    if k is None:
        return ""
    start = getattr(sae, "k_start", None)
    return f", k {k:g}" if start is None else f", k {start:g} falling to {k:g}"


def _schedule(sae: TrainingSAEConfig, steps: int) -> str:
    """The rules in their order, and the duration of the auxiliary loss."""
    return "; ".join(filter(None, [_rules(sae), _auxiliary_loss(sae, steps)]))


def _rules(sae: TrainingSAEConfig) -> str:
    """The rules in their order, an empty string for stock architectures."""
    if not isinstance(sae, AllocationTrainingSAEConfig):
        return ""
    if isinstance(sae, MutualChoiceTrainingSAEConfig) and sae.feature_choice_steps:
        return (
            f"Feature Choice for {sae.feature_choice_steps:,} steps, then Mutual Choice"
        )
    if isinstance(sae, MutualChoiceTrainingSAEConfig) and sae.topk_steps:
        return f"from TopK to Mutual Choice over {sae.topk_steps:,} steps"
    if isinstance(sae, FeatureChoiceTrainingSAEConfig) and sae.mutual_choice_steps:
        return (
            f"Mutual Choice for {sae.mutual_choice_steps:,} steps, then Feature Choice"
        )
    return "one rule throughout"


def _auxiliary_loss(sae: TrainingSAEConfig, steps: int) -> str:
    """The auxiliary loss and its end, an empty string for architectures with another loss or none."""
    if not isinstance(sae, AuxiliaryLossTrainingSAEConfig):
        return ""
    name = sae.aux_loss if isinstance(sae, AllocationTrainingSAEConfig) else "aux_zipf"
    if name == "none":
        return "no auxiliary loss"
    if sae.aux_loss_decay_start is None or sae.aux_loss_decay_start >= steps:
        return f"{name} to the end"
    return f"{name} until step {sae.aux_loss_decay_start:,}"


def _learning_rate(cfg: LanguageModelSAERunnerConfig[Any]) -> str:
    text = f"lr {cfg.lr:g} {cfg.lr_scheduler_name}"
    if cfg.lr_warm_up_steps:
        text += f", warming up over {cfg.lr_warm_up_steps:,} steps"
    if cfg.lr_scheduler_name.lower() != "constant":
        text += f" to {cfg.lr_end:g}"
    if cfg.lr_decay_steps:
        text += f", falling to 0 over the last {cfg.lr_decay_steps:,}"
    return text


def _kl_finish(cfg: LanguageModelSAERunnerConfig[Any]) -> str:
    """The steps whose loss has the KL divergence, an empty string if there are none."""
    steps = kl_finish_of(cfg)
    return f"; with the KL divergence in the last {steps:,}" if steps else ""


def _checkpoints(cfg: LanguageModelSAERunnerConfig[Any]) -> str:
    if cfg.checkpoint_path is None:
        return "none"
    if cfg.n_checkpoints == 0:
        return f"{cfg.checkpoint_path}, only if the run is interrupted"
    return f"{cfg.checkpoint_path}, {cfg.n_checkpoints} on the way"


def in_bytes(size: float) -> str:
    """A number of bytes in words, such as "3.1 MB"."""
    if size >= 1e9:
        return f"{size / 1e9:.1f} GB"
    return f"{size / 1e6:.0f} MB" if size >= 1e7 else f"{size / 1e6:.1f} MB"
