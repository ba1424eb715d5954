"""Per-token top-k where the features are spread over ranks."""

import torch

from sae_lens_alloc.allocation.sparse_activations import Pairs
from sae_lens_alloc.distributed.feature_shard import FeatureShard
from sae_lens_alloc.ops.sparse import row_offsets


def topk_over_ranks(best: Pairs, k: int, shard: FeatureShard) -> Pairs:
    """
    The pairs of this rank that are among the `k` best of their token on all ranks; of equal
    affinities the first features. All ranks send each other their k best of every token.

    Args:
        best: The `k` best of each token within this rank, or all where there are fewer, negative
            affinities too; in row order.
        k: Features per token.
        shard: The features of this rank.
    """
    places, real = best.places, best.real
    tokens, values = places.token_indices, places.values
    n_tokens = places.shape[0]
    ids = shard.ids(values.device)[places.feature_indices].int()
    in_row = torch.arange(len(tokens), device=tokens.device)
    in_row = in_row - row_offsets(tokens, n_tokens)[tokens]
    # one column more, for padding
    in_row = in_row.clamp(max=k) if real is None else in_row.where(real, k)
    all_values = values.new_full((n_tokens, k + 1), -torch.inf)
    all_ids = ids.new_full((n_tokens, k + 1), shard.n_features)
    all_values[tokens, in_row], all_ids[tokens, in_row] = values, ids
    last_value, last_id = _last_of_all(all_values[:, :k], all_ids[:, :k], shard)
    last_value, last_id = last_value[tokens], last_id[tokens]
    return best.only(
        (values > last_value) | ((values == last_value) & (ids <= last_id))
    )


def _last_of_all(
    values: torch.Tensor, ids: torch.Tensor, shard: FeatureShard
) -> tuple[torch.Tensor, torch.Tensor]:
    """Value and id of the last of each token's k best on all ranks, both of shape (B,)."""
    n_tokens, k = values.shape
    by_rank = (shard.ranks.size, n_tokens, k)
    ids, values = (
        shard.ranks.gather(own).view(by_rank).transpose(0, 1).flatten(1)
        for own in (ids, values)
    )
    ids, order = ids.sort(dim=1)
    values, order = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    return values[:, k - 1], ids.gather(1, order)[:, k - 1]
