"""Which features a rank holds."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_lens_alloc.distributed import feature_shard
from sae_lens_alloc.distributed.feature_shard import FeatureShard, storage_order
from sae_lens_alloc.distributed.ranks import Ranks


class RankOf(Ranks):
    """What a shard needs to know of a rank."""

    def __init__(self, size: int, rank: int) -> None:
        self.size, self.rank = size, rank


def shards_of(n_features: int, n_ranks: int) -> list[FeatureShard]:
    return [FeatureShard(n_features, RankOf(n_ranks, r)) for r in range(n_ranks)]


@settings(deadline=None, max_examples=60)
@given(n_ranks=st.integers(1, 6), more=st.integers(1, 4000), width=st.integers(0, 3000))
def test_every_feature_is_on_one_rank(n_ranks: int, more: int, width: int):
    n_features = n_ranks * (n_ranks - 1) + more
    shards = shards_of(n_features, n_ranks)
    ids = [shard.ids() for shard in shards]
    assert torch.cat(ids).sort().values.tolist() == list(range(n_features))
    whole = torch.randn(n_features, 2)
    stored = []
    for shard, own in zip(shards, ids, strict=True):
        assert len(shard) == len(own) > 0
        assert (own.diff() > 0).all()
        assert shard.n_below(width) == sum(i < width for i in own.tolist())
        part = shard.own(whole)
        assert torch.equal(part, whole[own])
        in_storage = part[shard.storage_places.argsort()]
        assert torch.equal(in_storage[shard.storage_places], part)
        stored.append(in_storage)
    # one after the other they are the storage order, which is the same for any number of ranks
    assert torch.equal(torch.cat(stored), whole[storage_order(n_features)])
    assert [len(part) for part in stored] == [
        len(part) for part in whole.chunk(n_ranks)
    ]


def test_every_rank_has_its_share_of_the_first_features():
    for n_ranks in (2, 3, 8, 64):
        for width in (4096, 16384, 65536):
            counts = [shard.n_below(width) for shard in shards_of(2**18, n_ranks)]
            assert max(counts) <= 1.1 * width / n_ranks
            assert min(counts) >= 0.9 * width / n_ranks


def test_the_order_by_hand(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(feature_shard, "N_HEAPS", 3)
    assert storage_order(8).tolist() == [0, 3, 6, 1, 4, 7, 2, 5]
    first, last = shards_of(8, 2)
    assert first.ids().tolist() == [0, 1, 3, 6]
    assert last.ids().tolist() == [2, 4, 5, 7]
    assert first.storage_places.tolist() == [0, 3, 1, 2]


def test_a_rank_without_features_is_one_sentence():
    for n_features, n_ranks in ((5, 4), (1, 2), (9, 4)):
        with pytest.raises(ValueError, match=f"{n_features} features cannot be shared"):
            FeatureShard(n_features, RankOf(n_ranks, 0))
    assert len(FeatureShard(1)) == 1
