"""How an SAE does on activations that it is not trained on."""

import math
from pathlib import Path
from typing import Any

import torch
from sae_lens.config import LanguageModelSAERunnerConfig
from sae_lens.saes.sae import SAE

from sae_lens_alloc.activations.row_store import saved_held_out_rows
from sae_lens_alloc.activations.store import saved_held_out_contexts
from sae_lens_alloc.distributed.ranks import ALONE, Ranks
from sae_lens_alloc.evaluation.usage import (
    Autoencode,
    as_user,
    by_pairs,
    measure_usage,
)
from sae_lens_alloc.saes.allocation_sae import AllocationTrainingSAE
from sae_lens_alloc.saes.rows import encoded_and_target
from sae_lens_alloc.training.resuming import recorded_training_tokens

# At most, and a hundredth of the training tokens in a short run.
HELD_OUT_TOKENS = 16_384


def held_out_rows(cfg: LanguageModelSAERunnerConfig[Any], n_rows: int | None) -> int:
    """
    How many rows of its own activations a run holds out for metrics: if it is resumed, as many as
    before.

    Args:
        cfg: The run.
        n_rows: How many there are, of which at most a twentieth is held out. None if that is not
            known.
    """
    if cfg.resume_from_checkpoint is not None:
        saved = saved_held_out_rows(Path(cfg.resume_from_checkpoint))
        if saved is not None:
            return saved
    wanted = min(HELD_OUT_TOKENS, math.ceil(cfg.training_tokens / 100))
    if n_rows is not None:
        wanted = min(wanted, n_rows // 20)
    return max(2, wanted)  # one alone has no variance


def held_out_tokens(
    cfg: LanguageModelSAERunnerConfig[Any],
    tokens_per_context: int,
    ranks: Ranks = ALONE,
) -> int:
    """
    How many tokens a run holds out for metrics, each rank of several its share of its own part: if
    it is resumed, as many as before, since it has trained on the next ones.
    """
    training_tokens = cfg.training_tokens
    if cfg.resume_from_checkpoint is not None:
        checkpoint = Path(cfg.resume_from_checkpoint)
        n_contexts = saved_held_out_contexts(checkpoint, ranks)
        if n_contexts is not None:
            return n_contexts * tokens_per_context
        training_tokens = recorded_training_tokens(checkpoint) or training_tokens
    wanted = min(HELD_OUT_TOKENS, math.ceil(training_tokens / 100))
    return math.ceil(wanted / ranks.size)


@torch.no_grad()
def held_out_metrics(
    sae: SAE[Any], activations: torch.Tensor, batch_size: int
) -> dict[str, float]:
    """
    Measures an SAE as it is in evaluation mode, by its thresholds; changes nothing about it
    (SAELens #446).

    Args:
        sae: Any SAE, in training or saved.
        activations: Activations as the SAE takes them, shape (n_tokens, d_in), or the rows of a
            transcoder, whose output is what is to be explained.
        batch_size: Tokens to run at once.

    Returns:
        `explained_variance` (1 - squared error / variance about the mean, over all tokens and
        dimensions), `l0` (features per token) and `dead_features` (active on no token).
    """
    was_training = sae.training
    sae.eval()
    encoded, target = encoded_and_target(sae.cfg, activations)
    usage = measure_usage(_autoencode(sae), encoded, batch_size, target)
    sae.train(was_training)
    return {
        "explained_variance": usage.explained_variance,
        "l0": usage.l0,
        "dead_features": usage.dead_features,
    }


def _autoencode(sae: SAE[Any]) -> Autoencode:
    if isinstance(sae, AllocationTrainingSAE):
        return by_pairs(
            lambda x: sae.autoencode_pairs(x.to(sae.device), True), sae.shard
        )
    return as_user(sae)
