"""What the kernels of the selections must equal, by dense torch operations."""

import torch
from typing_extensions import override

from sae_lens_alloc.ops.encoder_tensors import EncoderTensors
from sae_lens_alloc.ops.feature_choice_keys import FeatureKeyEncoder
from sae_lens_alloc.ops.mutual_choice_keys import N_DIGITS, CollectedKeys, KeyEncoder
from sae_lens_alloc.ops.pair_keys import VALUE_BITS, pair_keys
from tests.helpers import affinities_of


def all_affinities(tensors: EncoderTensors) -> torch.Tensor:
    """Float32 of shape (B, F)."""
    return affinities_of(tensors.x, tensors.W_enc, tensors.b_enc, tensors.scale)


class ReferenceKeyEncoder(KeyEncoder):
    @override
    def collect(
        self,
        bound: torch.Tensor,
        done: torch.Tensor,
        capacity: int,
        thresholds: torch.Tensor | None = None,
    ) -> CollectedKeys:
        affinities = all_affinities(self)
        above = None
        if thresholds is not None:
            above = ((affinities > 0) & (affinities > thresholds) & ~done).sum(0)
        keys = self._all_keys()
        keys = keys[(keys >= bound) & ~done]
        buffer = keys.new_zeros(capacity)
        buffer[: len(keys)] = keys[:capacity]
        n_reached = torch.full_like(bound, len(keys))
        return CollectedKeys(buffer, n_reached, n_reached <= capacity, above)

    @override
    def histogram(
        self, prefix: torch.Tensor, shift: int, done: torch.Tensor
    ) -> torch.Tensor:
        digits = (self._all_keys() >> shift) - ((prefix >> shift) & ~(N_DIGITS - 1))
        digits = digits[(digits >= 0) & (digits < N_DIGITS) & ~done]
        return torch.bincount(digits, minlength=N_DIGITS)

    def _all_keys(self) -> torch.Tensor:
        affinities = all_affinities(self).flatten()
        positions = (affinities > 0).nonzero().squeeze(1)
        return pair_keys(affinities[positions], positions)

    @override
    def find_digit(
        self,
        counts: torch.Tensor,
        bound: torch.Tensor,
        rank: torch.Tensor,
        done: torch.Tensor,
        shift: int,
        spare: int,
    ) -> None:
        if done:
            return
        at_least = counts.flip(0).cumsum(0).flip(0)
        enough = at_least >= rank
        digit = max(int(enough.sum()) - 1, 0)
        rank -= at_least[digit] - counts[digit]
        bound |= digit << shift
        done |= bool(counts[digit] - rank <= spare) or not enough[0]


class ReferenceFeatureKeyEncoder(FeatureKeyEncoder):
    @override
    def collect(
        self,
        bounds: torch.Tensor,
        keys: torch.Tensor,
        count: torch.Tensor,
        features: torch.Tensor | None,
    ) -> torch.Tensor:
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

    @override
    def find_bounds(
        self, features: torch.Tensor, fewest: torch.Tensor, most: torch.Tensor
    ) -> torch.Tensor:
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
        affinities = all_affinities(self)
        tokens = torch.arange(len(affinities), device=affinities.device)
        bits = affinities.view(torch.int32).long()
        keys = (bits << self.token_bits) | (self.token_mask - tokens)[:, None]
        looked_at = affinities > 0
        if features is not None:
            looked_at &= features
        return affinities, keys.where(looked_at, 0)
