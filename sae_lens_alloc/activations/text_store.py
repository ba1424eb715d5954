"""The store of a run's text, opened for looking at SAEs and not for training, and its contexts."""

import math
import warnings
from typing import Any

import torch
from sae_lens.config import LanguageModelSAERunnerConfig
from transformer_lens.HookedTransformer import HookedRootModule

from sae_lens_alloc.activations.held_out_store import require_ordinary_tokens
from sae_lens_alloc.activations.local_dataset import override_for_local_dataset
from sae_lens_alloc.activations.store import ResumableActivationsStore
from sae_lens_alloc.progress import token_bar


def open_text(
    model: HookedRootModule, cfg: LanguageModelSAERunnerConfig[Any]
) -> ResumableActivationsStore:
    """
    The text of a run, from its beginning.

    Raises:
        ValueError: if its contexts have room for special tokens alone.
    """
    with warnings.catch_warnings():
        # SAELens recommends tokenizing the text first, which takes longer than it saves here
        warnings.filterwarnings("ignore", "Dataset is not tokenized")
        warnings.filterwarnings("ignore", "The training dataset contains fewer")
        store = ResumableActivationsStore.from_config(
            model, cfg, override_for_local_dataset(cfg)
        )
    require_ordinary_tokens(store)
    return store


def read_contexts(store: ResumableActivationsStore, n_tokens: int) -> torch.Tensor:
    """
    Token ids of the next contexts of a text, shape (contexts, context_size).

    Args:
        store: The text.
        n_tokens: Tokens wanted, special ones included, rounded up to whole contexts. There are
            fewer if the text ends before.

    Raises:
        ValueError: if there is not one context.
    """
    wanted = math.ceil(n_tokens / store.training_context_size)
    contexts: list[torch.Tensor] = []
    with token_bar(n_tokens, "reading text") as bar:
        while len(contexts) < wanted:
            try:
                contexts.append(store.get_batch_tokens(1, raise_at_epoch_end=True))
            except StopIteration:
                break
            bar.update(store.training_context_size)
    if not contexts:
        raise ValueError(
            f"{store.dataset_name} has not one context of {store.context_size} tokens: give "
            "more text."
        )
    return torch.cat(contexts)
