"""
Feature Choice without a question to the device: exact, in a fixed number of launches of fixed
size, so that the host never waits for a count.

Within a feature every positive affinity has a key, its float32 bits above its inverted token:
the larger key goes first, ties included. Above the inverted feature, keys of a whole batch
sort by feature and from the best token on.

1. Collect the keys that reach a guess for their feature into a buffer of fixed capacity, and
   count those that the statistics need.
2. Features that got fewer than their quota, though more are positive, are gone through again.
   As a rule they are few, and all their positive affinities fit into the buffer. Otherwise a
   search finds a bound for each that its quota reaches, and not many more. If the first keys
   overflowed the buffer, all features are gone through again. Both launches are always made;
   which features to look at is on the device, and they end at once where there is none.
3. Sort the keys, take each feature's best and bring them into row order. Quotas that cannot be
   filled leave padding in the last places.
"""

from dataclasses import dataclass

import torch

from sae_lens_alloc.allocation.sparse_activations import PaddedActivations, Pairs
from sae_lens_alloc.ops.key_selection import (
    BOUND_SHARE,
    EncoderTensors,
    pair_keys,
    pairs_of_keys,
    tensors_for_kernels,
)

# Of positive floats, which order like the floats.
VALUE_BITS = 31
# The bits of no number: a key that none reaches.
ABOVE_ALL = 2**VALUE_BITS - 1
# Candidates wanted per feature beyond twice its quota: with 8 for a quota of 1, about one
# feature in 3000 comes out short by chance.
SPARE_CANDIDATES = 6
# Places in the buffer per candidate wanted.
CAPACITY_FACTOR = 1.5


@dataclass(frozen=True)
class FeatureChoiceSelection:
    """
    Args:
        pairs: The selected pairs.
        demand: Tokens on which each feature's affinity exceeds the cut, shape (F,).
        above: Tokens on which each feature's affinity exceeds its threshold, shape (F,).
        bounds: Bounds for the next batch, shape (F,).
    """

    pairs: Pairs
    demand: torch.Tensor
    above: torch.Tensor
    bounds: torch.Tensor


@dataclass(frozen=True)
class FeatureKeyEncoder(EncoderTensors):
    """
    The keys of positive affinities by feature. F and B, rounded up to powers of two, multiply
    to 2^32 at most.

    Args:
        thresholds: Inference thresholds of shape (F,).
        cut: Running cut of Mutual Choice, scalar tensor.
    """

    thresholds: torch.Tensor
    cut: torch.Tensor

    @property
    def token_bits(self) -> int:
        return _bits(self.shape[0])

    @property
    def token_mask(self) -> int:
        return 2**self.token_bits - 1

    @property
    def least_key(self) -> int:
        """A bound that all keys reach."""
        return 1 << self.token_bits

    @property
    def above_all(self) -> int:
        """A bound that no key reaches."""
        return ABOVE_ALL << self.token_bits

    def bounds_of(self, affinities: torch.Tensor) -> torch.Tensor:
        """Bounds that positive affinities reach if they are as large, of shape (F,)."""
        bits = affinities.float().view(torch.int32).long().clamp(min=1)
        return bits << self.token_bits

    def affinities_of(self, keys: torch.Tensor) -> torch.Tensor:
        """Affinities of keys or bounds."""
        bits = (keys >> self.token_bits) & ABOVE_ALL
        return bits.int().view(torch.float32)

    def features_of(self, keys: torch.Tensor) -> torch.Tensor:
        """Features of keys. The last one for padding, which is 0."""
        return self.shape[1] - 1 - (keys >> (VALUE_BITS + self.token_bits))

    def tokens_of(self, keys: torch.Tensor) -> torch.Tensor:
        """Tokens of keys."""
        return self.token_mask - (keys & self.token_mask)

    def collect(
        self,
        bounds: torch.Tensor,
        keys: torch.Tensor,
        count: torch.Tensor,
        features: torch.Tensor | None,
    ) -> torch.Tensor:
        """
        Collects the keys that reach their feature's bound, in any order.

        Args:
            bounds: Keys without the feature, int64 of shape (F,).
            keys: Buffer of shape (capacity,), int64. Changed in place.
            count: How many of its places are taken, int64 of shape (). Grows in place by the
                number of keys that reach the bound, also where they do not fit.
            features: Boolean mask of the features to look at, shape (F,), or None for all.

        Returns:
            int64 of shape (4, F): tokens whose affinity reaches the feature's bound, is
            positive, exceeds the threshold, exceeds the cut; 0 for other features.
        """
        affinities, own = self._own_keys(features)
        reach = (own >= bounds) & (own > 0)
        inverted = self.shape[1] - 1 - torch.arange(self.shape[1], device=own.device)
        new = (own + (inverted << (VALUE_BITS + self.token_bits)))[reach]
        start = int(count)
        n_stored = min(len(new), max(len(keys) - start, 0))
        keys[start : start + n_stored] = new[:n_stored]
        count += len(new)
        positive = own > 0
        above = positive & (affinities > self.thresholds)
        demand = positive & (affinities > self.cut)
        return torch.stack([m.sum(0) for m in (reach, positive, above, demand)])

    def find_bounds(
        self, features: torch.Tensor, fewest: torch.Tensor, most: torch.Tensor
    ) -> torch.Tensor:
        """
        Bounds that no fewer and no more keys reach than wanted.

        Args:
            features: Boolean mask of the features to look at, shape (F,).
            fewest: Shape (F,), at most as many as the feature has positive affinities.
            most: Shape (F,), at least `fewest`.

        Returns:
            int64 of shape (F,). For other features, a bound that all keys reach.
        """
        _, own = self._own_keys(features)
        # the `most`-th largest, if there is one
        ordered = own.sort(dim=0, descending=True).values
        bounds = ordered.gather(0, (most - 1).clamp(0, len(own) - 1)[None])[0]
        bounds = bounds.where(most > 0, self.above_all)
        return bounds.where(features, self.least_key).clamp(min=self.least_key)

    def _own_keys(
        self, features: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Affinities, and keys without the feature, 0 where not positive; shape (B, F)."""
        affinities = self.affinities()
        tokens = torch.arange(len(affinities), device=affinities.device)
        bits = affinities.view(torch.int32).long()
        keys = (bits << self.token_bits) | (self.token_mask - tokens)[:, None]
        looked_at = affinities > 0
        if features is not None:
            looked_at &= features
        return affinities, keys.where(looked_at, 0)


def feature_key_encoder(
    W_enc: torch.Tensor,
    b_enc: torch.Tensor,
    scale: torch.Tensor | None,
    x: torch.Tensor,
    thresholds: torch.Tensor,
    cut: torch.Tensor,
) -> FeatureKeyEncoder | None:
    """The kernels that encode to keys, None where the backend has none for such tensors."""
    tensors = tensors_for_kernels(W_enc, b_enc, scale, x)
    # of the 63 bits of a key
    if tensors is None or _bits(len(x)) + _bits(W_enc.shape[1]) > 63 - VALUE_BITS:
        return None
    from sae_lens_alloc.ops.triton_feature_select import TritonFeatureKeyEncoder

    return TritonFeatureKeyEncoder(*tensors, thresholds, cut)


def select_by_feature_keys(
    encoder: FeatureKeyEncoder,
    quotas: torch.Tensor,
    max_pairs: int,
    guesses: torch.Tensor,
) -> FeatureChoiceSelection:
    """
    Selects each feature's `quotas[j]` largest positive affinities, as `encode_feature_choice`
    does.

    Args:
        encoder: What gives the keys.
        quotas: Integer quotas of shape (F,), whose sum is at most `max_pairs`.
        max_pairs: At least 1.
        guesses: Guesses of a lower bound of each feature's cut, shape (F,). They only make
            the selection faster.

    Returns:
        The selection, with padding up to min(max_pairs, B * F) pairs.
    """
    n_positions = encoder.shape[0] * encoder.shape[1]
    n_places = min(max_pairs, n_positions)
    capacity = min(_capacity(n_places, encoder.shape[1]), n_positions)
    has_quota = quotas > 0
    wanted = torch.where(has_quota, 2 * quotas + SPARE_CANDIDATES, 0)

    keys = quotas.new_zeros(capacity)
    n_taken = quotas.new_zeros(())
    bounds = encoder.bounds_of(guesses).where(has_quota, encoder.above_all)
    reached, positive, above, demand = encoder.collect(bounds, keys, n_taken, None)

    fewest, most = quotas.minimum(positive), wanted.minimum(positive)
    again = reached < fewest
    overflows = n_taken + most.where(again, 0).sum() > capacity
    again = again | (overflows & has_quota)
    n_taken = n_taken.where(~overflows, 0)
    # where all their positive affinities do not fit
    searched = again & (positive.where(again, 0).sum() > capacity - n_taken)
    bounds = encoder.find_bounds(searched, fewest, most)
    keys.masked_fill_(again[encoder.features_of(keys)], 0)
    reached_again, *_ = encoder.collect(bounds, keys, n_taken, again)

    counts = torch.where(again, reached_again, reached)
    keys = keys.sort(descending=True).values
    # where the guess did not serve, as many as there are
    ranks = torch.where(again, wanted.minimum(counts), wanted) - 1
    right_bounds = _affinities_at(encoder, keys, counts, ranks)
    next_bounds = moved_bounds(guesses, right_bounds, was_wrong=again)
    return FeatureChoiceSelection(
        _best_pairs(encoder, keys, counts, quotas, n_places),
        demand,
        above,
        next_bounds.where(has_quota, guesses),
    )


def _capacity(n_pairs: int, n_features: int) -> int:
    wanted = 2 * n_pairs + SPARE_CANDIDATES * min(n_features, n_pairs)
    return int(CAPACITY_FACTOR * wanted)


def _best_pairs(
    encoder: FeatureKeyEncoder,
    keys: torch.Tensor,
    counts: torch.Tensor,
    quotas: torch.Tensor,
    n_places: int,
) -> PaddedActivations:
    """
    The first `quotas[j]` keys of each feature j as pairs.

    Args:
        encoder: What gave the keys.
        keys: In descending order, int64 of shape (capacity,).
        counts: How many there are of each feature, shape (F,).
        quotas: Shape (F,).
        n_places: Number of pairs, of which the last ones are padding.
    """
    n_features = len(counts)
    taken = counts.minimum(quotas)
    ends = taken.cumsum(0)
    skipped = (counts - taken).cumsum(0) - (counts - taken)
    places = torch.arange(n_places, device=keys.device)
    features = torch.searchsorted(ends, places, right=True).clamp(max=n_features - 1)
    chosen = keys[(places + skipped[features]).clamp(max=len(keys) - 1)]
    positions = encoder.tokens_of(chosen) * n_features + features
    by_position = pair_keys(encoder.affinities_of(chosen), positions)
    return pairs_of_keys(by_position.where(places < ends[-1], 0), encoder.shape)


def _affinities_at(
    encoder: FeatureKeyEncoder,
    keys: torch.Tensor,
    counts: torch.Tensor,
    ranks: torch.Tensor,
) -> torch.Tensor:
    """Affinity of each feature's key at a rank from 0 on, NaN where there is none; shape (F,)."""
    places = counts.cumsum(0) - counts + ranks
    found = keys[places.clamp(0, len(keys) - 1)]
    return encoder.affinities_of(found).where(
        (ranks >= 0) & (ranks < counts), torch.nan
    )


def moved_bounds(
    bounds: torch.Tensor, right: torch.Tensor, was_wrong: torch.Tensor | bool = False
) -> torch.Tensor:
    """
    Moves each bound towards the one that gives the candidates wanted.

    Args:
        bounds: The guesses, shape (F,), 0 where there was none.
        right: What would have been right for this batch, NaN where not known, shape (F,).
        was_wrong: Where the guess did not serve, boolean of shape (F,).
    """
    moved = torch.where((bounds == 0) | was_wrong, right, (bounds + right) / 2)
    return torch.where(right.isnan(), bounds * BOUND_SHARE, moved)


def _bits(n: int) -> int:
    """Bits of the whole numbers below n."""
    return (n - 1).bit_length()
