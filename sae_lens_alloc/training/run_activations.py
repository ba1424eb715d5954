"""The activations of a run: what is trained on, and what is held out of that."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from sae_lens.config import LanguageModelSAERunnerConfig
from sae_lens.training.activations_store import ActivationsStore

from sae_lens_alloc.activations.gathered import gathered_rows
from sae_lens_alloc.activations.store import ResumableActivationsStore
from sae_lens_alloc.distributed.agreement import failing_together
from sae_lens_alloc.distributed.ranks import Ranks
from sae_lens_alloc.training.held_out import held_out_tokens


@dataclass(frozen=True, eq=False)
class RunActivations:
    """
    Where a run gets its activations.

    Args:
        store: What this rank reads of the text.
        held_out: Activations that nobody trains on, the same on all ranks, (n_tokens, d_in).
        evaluation_contexts: Contexts that nobody trains on either, int64 of shape
            (n_contexts, context_size), the same on all ranks.
    """

    store: ResumableActivationsStore
    held_out: torch.Tensor
    evaluation_contexts: torch.Tensor


def open_activations(
    store: ActivationsStore,
    cfg: LanguageModelSAERunnerConfig[Any],
    ranks: Ranks,
    n_evaluation_contexts: int,
) -> RunActivations:
    """
    Opens the text of a run and holds out the first contexts of it, each rank of several its share
    of its own part.

    Args:
        store: The store that SAELens has made of the run, which nobody has read.
        cfg: The run.
        ranks: The ranks, which all must call this.
        n_evaluation_contexts: Contexts to set aside beside those for metrics.

    Raises:
        ValueError: if the text is too short, on all ranks where it is on one.
    """
    n_contexts = math.ceil(n_evaluation_contexts / ranks.size)
    with failing_together(ranks):
        ours = ResumableActivationsStore.in_place_of(store, cfg, ranks)
        n_tokens = held_out_tokens(cfg, ours.training_context_size, ranks)
        ours.require_text(
            ours.tokens_in_batches(n_tokens) + n_contexts * ours.training_context_size
        )
        held_out = ours.hold_out(n_tokens)
        contexts = torch.zeros(0, cfg.context_size, dtype=torch.int64)
        if n_contexts:
            contexts = ours.hold_out_contexts(n_contexts)
        contexts = contexts.to(str(cfg.llm_device))
    return RunActivations(
        ours,
        gathered_rows(held_out, ranks, cfg.device),
        gathered_rows(contexts, ranks, cfg.device),
    )
