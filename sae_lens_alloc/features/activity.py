"""Which features are active where, on the text of a run."""

from dataclasses import dataclass
from typing import Any

import torch
from sae_lens import SAE
from sae_lens.config import LanguageModelSAERunnerConfig
from sae_lens.util import get_special_token_ids
from transformer_lens.HookedTransformer import HookedRootModule

from sae_lens_alloc.activations.text_store import open_text, read_contexts
from sae_lens_alloc.allocation.sparse_activations import SparseActivations
from sae_lens_alloc.evaluation.splicing import is_ordinary
from sae_lens_alloc.features.encoding import encode_pairs
from sae_lens_alloc.progress import shown

CONTEXTS_PER_BATCH = 8
# More pairs than this take many gigabytes.
LARGEST_N_PAIRS = 2**27


@dataclass(frozen=True, eq=False)
class Activity:
    """
    What the features of an SAE do on some contexts.

    Args:
        tokens: Token ids, int64 of shape (contexts, length).
        ordinary: Which of them were measured, bool of the same shape. Special tokens such as BOS
            are not.
        pairs: The active pairs of all features. Their tokens are numbered through all contexts,
            special tokens included: context * length + position. Their values are without the
            sign that activations of abstopk SAEs have.
    """

    tokens: torch.Tensor
    ordinary: torch.Tensor
    pairs: SparseActivations

    @property
    def length(self) -> int:
        """Tokens of a context."""
        return self.tokens.shape[1]

    @property
    def n_tokens(self) -> int:
        """Number of tokens measured."""
        return int(self.ordinary.sum())

    def of_features(self, features: torch.Tensor) -> SparseActivations:
        """
        The pairs of some features, which are numbered by their place in `features`.

        Args:
            features: Numbers of features, int64 of shape (n,), each once.
        """
        pairs = self.pairs
        rows = torch.full((pairs.shape[1],), -1)
        rows[features] = torch.arange(len(features))
        row_of_pair = rows[pairs.feature_indices]
        kept = (row_of_pair >= 0).nonzero().squeeze(1)
        return SparseActivations.from_unordered(
            pairs.token_indices[kept],
            row_of_pair[kept],
            pairs.values[kept],
            (pairs.shape[0], len(features)),
        )


@torch.no_grad()
def measure_activity(
    sae: SAE[Any],
    model: HookedRootModule,
    cfg: LanguageModelSAERunnerConfig[Any],
    n_tokens: int,
) -> Activity:
    """
    Runs an SAE on the first contexts of a run's text.

    Args:
        sae: An inference SAE that takes activations of shape (B, d_in).
        model: The language model.
        cfg: A run, of which hook and text matter.
        n_tokens: Tokens wanted, special ones included, rounded up to whole contexts. There are
            fewer if the text ends before.

    Returns:
        On the CPU.

    Raises:
        ValueError: if the text holds no ordinary token, or the SAE activates so many features
            that they would not fit into memory.
    """
    store = open_text(model, cfg)
    contexts = read_contexts(store, n_tokens)
    tokens = contexts[:, slice(*store.seqpos_slice)].cpu()
    special: Any = getattr(model, "tokenizer", None)
    ordinary = is_ordinary(tokens, get_special_token_ids(special) if special else [])
    if not ordinary.any():
        raise ValueError(
            f"{store.dataset_name} holds no context of {store.context_size} tokens with an "
            "ordinary token: give more text, or other text."
        )
    parts: list[SparseActivations] = []
    batches = contexts.split(CONTEXTS_PER_BATCH)
    masks = ordinary.split(CONTEXTS_PER_BATCH)
    for batch, mask in zip(
        shown(batches, "running the SAE on the text"),
        masks,
        strict=True,
    ):
        parts.append(encode_pairs(sae, store.get_activations(batch)[mask]))
        _require_room(parts, len(batches), tokens.numel())
    return Activity(tokens, ordinary, _joined(parts, masks))


def _require_room(
    parts: list[SparseActivations], n_batches: int, n_tokens: int
) -> None:
    """Raises ValueError if the pairs of all batches are too many, by those of the first ones."""
    expected = sum(len(part.values) for part in parts) / len(parts) * n_batches
    if expected > LARGEST_N_PAIRS:
        raise ValueError(
            f"the SAE activates about {expected / n_tokens:,.0f} features per token, and all of "
            f"{n_tokens:,} tokens would not fit into memory: give --tokens "
            f"{int(n_tokens * LARGEST_N_PAIRS / expected)} or fewer."
        )


def _joined(
    parts: list[SparseActivations], masks: tuple[torch.Tensor, ...]
) -> SparseActivations:
    """The pairs of all batches, of which each has the ordinary tokens of its contexts only."""
    start, tokens = 0, list[torch.Tensor]()
    for part, mask in zip(parts, masks, strict=True):
        places = mask.flatten().nonzero().squeeze(1) + start
        tokens.append(places[part.token_indices.cpu()])
        start += mask.numel()
    return SparseActivations(
        torch.cat(tokens),
        torch.cat([part.feature_indices.cpu() for part in parts]),
        torch.cat([part.values.float().abs().cpu() for part in parts]),
        (start, parts[0].shape[1]),
    )
