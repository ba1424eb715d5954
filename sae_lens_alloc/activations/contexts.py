"""Held-out text as contexts of tokens, laid out as SAELens lays out training text."""

from collections.abc import Iterable

import torch
from sae_lens.tokenization_and_batching import concat_and_batch_sequences
from transformers import PreTrainedTokenizerBase


def held_out_contexts(
    texts: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    context_size: int,
    max_contexts: int | None = None,
) -> torch.Tensor:
    """
    Tokenizes texts and cuts them into contexts. BOS is first in each, and between two texts.

    Args:
        texts: Documents.
        context_size: Tokens per context, BOS included.
        max_contexts: Keep this many contexts, spread evenly over all texts. None keeps all.

    Returns:
        Token ids, int64 of shape (contexts, context_size). If the last part is too short for a
        context, it is dropped.
    """
    bos = tokenizer.bos_token_id
    sequences = (
        tokenizer(text, return_tensors="pt", truncation=False)["input_ids"][0]  # type: ignore[index]
        for text in texts
        if text
    )
    batched = list(
        concat_and_batch_sequences(
            sequences,  # type: ignore[arg-type]
            context_size=context_size,
            begin_batch_token_id=bos,  # type: ignore[arg-type]
            sequence_separator_token_id=bos,  # type: ignore[arg-type]
        )
    )
    if not batched:
        return torch.zeros(0, context_size, dtype=torch.long)
    contexts = torch.stack(batched)
    if max_contexts is None or max_contexts >= len(contexts):
        return contexts
    return contexts[torch.linspace(0, len(contexts) - 1, max_contexts).long()]
