"""Checks of a finish by the KL divergence of the language model by the config alone."""

from typing import Any

from sae_lens.config import LanguageModelSAERunnerConfig

from sae_lens_alloc.config.run_config import kl_finish_of
from sae_lens_alloc.saes.allocation_sae_config import AllocationTrainingSAEConfig


def check_kl_finish(cfg: LanguageModelSAERunnerConfig[Any]) -> None:
    """
    Raises ValueError if the last steps of a run cannot have the KL divergence of the language
    model in their loss, in one sentence. A run on activations of one's own is refused elsewhere.
    """
    steps = kl_finish_of(cfg)
    if not steps:
        return
    if steps > cfg.total_training_steps:
        raise ValueError(
            f"kl_finish ({steps}) exceeds the {cfg.total_training_steps} training steps."
        )
    if not isinstance(cfg.sae, AllocationTrainingSAEConfig):
        raise ValueError(
            f"kl_finish needs an SAE with an allocation, such as mutual_choice, got "
            f"{cfg.sae.architecture()!r}: give kl_finish=0."
        )
    if cfg.use_cached_activations:
        raise ValueError(
            "kl_finish runs the language model on its text, but use_cached_activations is true, so "
            "that the run reads neither: give use_cached_activations=false or kl_finish=0."
        )
    if cfg.hook_head_index is not None:
        raise ValueError(
            f"kl_finish replaces all activations at hook_name, but hook_head_index is "
            f"{cfg.hook_head_index}, and the SAE has one head alone: give kl_finish=0."
        )
    n_tokens = len(range(cfg.context_size)[slice(*cfg.seqpos_slice)])
    if n_tokens > cfg.train_batch_size_tokens:
        raise ValueError(
            f"kl_finish puts a whole context into a batch, but a context has {n_tokens} tokens "
            f"and train_batch_size_tokens is {cfg.train_batch_size_tokens}: raise it, or give "
            "kl_finish=0."
        )
