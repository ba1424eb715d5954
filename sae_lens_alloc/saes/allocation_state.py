"""The running statistics of an allocation, and the allocation of each training batch."""

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn
from typing_extensions import override

from sae_lens_alloc.allocation.density import (
    density_ranks,
    fit_floor,
    underused_features,
    update_density,
)
from sae_lens_alloc.allocation.quotas import take_whole_quotas
from sae_lens_alloc.allocation.sparse_activations import SparseActivations
from sae_lens_alloc.allocation.thresholds import follow_cut, track_threshold
from sae_lens_alloc.allocation.zipf import ZipfLaw, zipf_quotas
from sae_lens_alloc.ops.encode_select import (
    Encoder,
    KnownAffinities,
    encode_feature_choice,
    encode_mutual_choice,
)

Rule = Literal["mutual", "feature"]

# Law of the quotas where no Mutual Choice came before. Densities that Mutual Choice finds by
# itself are flat for about 16 ranks and then fall with an exponent of about 1.
NATURAL_LAW = ZipfLaw(alpha=1.0, beta=16.0, scale=1.0)

# Features that fired less often in a sample of tokens say nothing about the law's tail.
MIN_EVENTS = 10


class AllocationState(nn.Module):
    """
    Thresholds, densities and quota remainders: everything that a checkpoint needs besides
    the weights. All of it stays float32 whatever the dtype of the SAE.

    Args:
        d_sae: Number of features F.
        density_window_tokens: Averaging window of the densities in tokens.
        max_density: Largest share of a batch's tokens for one feature.
        min_tokens_per_feature: Smallest quota of a feature in tokens per batch.
        device: Device of the buffers.
    """

    threshold: torch.Tensor  # (F,) inference threshold of each feature
    cut: torch.Tensor  # () running cut of Mutual Choice, 0 before the first batch
    density: (
        torch.Tensor
    )  # (F,) running demand: rate at which affinities exceed the cut
    density_tokens: torch.Tensor  # () tokens in the running densities
    n_steps: torch.Tensor  # () training steps done
    quota_carry: torch.Tensor  # (F,) remainders of the fractional quotas
    quota_law: torch.Tensor  # (2,) alpha and beta of the law that sets the quotas
    underused: torch.Tensor  # (F,) features that the auxiliary loss trains

    def __init__(
        self,
        d_sae: int,
        density_window_tokens: int,
        max_density: float,
        min_tokens_per_feature: float,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.density_window_tokens = density_window_tokens
        self.max_density = max_density
        self.min_tokens_per_feature = min_tokens_per_feature
        for name in ("threshold", "density"):
            self.register_buffer(name, torch.zeros(d_sae, device=device))
        for name in ("cut", "density_tokens", "n_steps"):
            self.register_buffer(name, torch.zeros((), device=device))
        # random, or all rare features would be paid out in the same batch
        self.register_buffer("quota_carry", torch.rand(d_sae, device=device))
        self.register_buffer(
            "quota_law",
            torch.tensor([NATURAL_LAW.alpha, NATURAL_LAW.beta], device=device),
        )
        self.register_buffer(
            "underused", torch.zeros(d_sae, dtype=torch.bool, device=device)
        )
        self._forget_derived()
        self.register_load_state_dict_post_hook(_forget_derived_after_loading)

    def _forget_derived(self) -> None:
        """Drops what is derived from the buffers, or only makes the selection faster."""
        self._cut_is_known: bool | None = None
        self._step_offset: int | None = None
        self._underused_indices: torch.Tensor | None = None
        self._rank_quotas: tuple[int, int, torch.Tensor] | None = None
        self._bounds: torch.Tensor | None = None

    @override
    def _apply(
        self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
    ) -> "AllocationState":
        # nn.Module.to(dtype) casts every float buffer; thresholds in bfloat16 would change
        # which features fire (SAELens #728). Only the move to a device is wanted.
        for name, buffer in self.named_buffers():
            moved = fn(buffer)
            if moved.dtype != buffer.dtype:
                moved = buffer.to(moved.device)
            setattr(self, name, moved)
        self._forget_derived()
        return self

    def begin_step(self, n_training_steps: int) -> int:
        """
        The number of this training step, by which rules and budgets change.

        SAELens saves the checkpoints of a run before it counts the step, so that a resumed
        trainer counts one behind; from there on the SAE's own count holds. A trainer that
        starts at 0 starts the schedules anew.
        """
        if self._step_offset is None:
            behind = int(self.n_steps) - n_training_steps
            self._step_offset = behind if n_training_steps > 0 and behind > 0 else 0
        step = n_training_steps + self._step_offset
        self.n_steps.fill_(step + 1)
        return step

    @property
    def last_step(self) -> int:
        """The number of the last training step, 0 before the first one."""
        return max(int(self.n_steps) - 1, 0)

    @torch.no_grad()
    def allocate(
        self,
        encoder: Encoder | KnownAffinities,
        x: torch.Tensor,
        budget: int,
        rule: Rule,
        previous_rule: Rule | None,
    ) -> SparseActivations:
        """
        Allocates the budget of a training batch and updates the statistics.

        Args:
            encoder: What gives the affinities.
            x: Encoder inputs of shape (B, d_in).
            budget: Number of pairs M.
            rule: Rule of this step.
            previous_rule: Rule of the step before, None at the first step.

        Raises:
            ValueError: if min_tokens_per_feature does not fit into the budget.
        """
        if rule == "mutual":
            return self._allocate_mutual(encoder, x, budget)
        if previous_rule == "mutual":
            self._anchor_quota_law(fit_floor(len(x)))
        return self._allocate_feature(encoder, x, budget, previous_rule == "mutual")

    def _allocate_mutual(
        self, encoder: Encoder | KnownAffinities, x: torch.Tensor, budget: int
    ) -> SparseActivations:
        cut = self.cut if self._knows_cut() else None
        pairs = encode_mutual_choice(encoder, x, budget, cut)
        self._track_cut(pairs)
        self.threshold.copy_(self.cut.expand_as(self.threshold))
        self._update_density(pairs.feature_counts(), len(x))
        return pairs

    def _allocate_feature(
        self,
        encoder: Encoder | KnownAffinities,
        x: torch.Tensor,
        budget: int,
        after_mutual: bool,
    ) -> SparseActivations:
        if not self._knows_cut():
            self._track_cut(encode_mutual_choice(encoder, x, budget, None))
        # never tracked from 0, which a factor would not leave
        restart = self.threshold <= (math.inf if after_mutual else 0.0)
        self.threshold.copy_(self.cut.where(restart, self.threshold))
        if self._bounds is None:
            self._bounds = torch.zeros_like(self.threshold)
        quotas = self._quotas(len(x), budget)
        selection = encode_feature_choice(
            encoder,
            x,
            take_whole_quotas(quotas, self.quota_carry),
            self.threshold,
            self.cut,
            self._bounds,
        )
        self._bounds = selection.bounds
        self.threshold.copy_(track_threshold(self.threshold, selection.above, quotas))
        self.cut.copy_(track_threshold(self.cut, selection.demand.sum(), budget))
        self._update_density(selection.demand, len(x))
        return selection.pairs

    @torch.no_grad()
    def start_from(
        self,
        encoder: Encoder | KnownAffinities,
        x: torch.Tensor,
        budget: int,
        keep_law: bool,
    ) -> None:
        """
        Takes the cut, the densities and the law of the quotas from tokens, as if these had
        been trained on already. Thresholds stay as they are.

        Args:
            encoder: What gives the affinities.
            x: Encoder inputs of shape (T, d_in), allocated as one batch.
            budget: Number of pairs M for all of them.
            keep_law: Whether the law of the quotas stays, as it should where the densities
                were shaped by it.
        """
        pairs = encode_mutual_choice(encoder, x, budget, None)
        self.cut.zero_()
        self._forget_derived()
        self._track_cut(pairs)
        self.density_tokens.zero_()
        self._update_density(pairs.feature_counts(), len(x))
        if not keep_law:
            self._anchor_quota_law(MIN_EVENTS / len(x))

    @torch.no_grad()
    def preview(
        self,
        encoder: Encoder | KnownAffinities,
        x: torch.Tensor,
        budget: int,
        rule: Rule,
    ) -> SparseActivations:
        """The allocation that a batch would get, without any change of the statistics."""
        if rule == "mutual":
            cut = self.cut if self._knows_cut() else None
            return encode_mutual_choice(encoder, x, budget, cut).without_padding()
        quotas = self._quotas(len(x), budget)
        return encode_feature_choice(
            encoder,
            x,
            take_whole_quotas(quotas, self.quota_carry.clone()),
            self.threshold,
            self.cut,
            torch.zeros_like(self.threshold),
        ).pairs

    def _quotas(self, n_tokens: int, budget: int) -> torch.Tensor:
        """Fractional quotas m_j of shape (F,): the law at the rank of each feature's demand."""
        if self._rank_quotas is None or self._rank_quotas[:2] != (n_tokens, budget):
            alpha, beta = self.quota_law.tolist()
            by_rank = zipf_quotas(
                ZipfLaw(alpha, beta, scale=1.0),
                len(self.density),
                budget,
                self.max_density * n_tokens,
                self.min_tokens_per_feature,
            )
            self._rank_quotas = (n_tokens, budget, by_rank.to(self.density))
        return self._rank_quotas[2][density_ranks(self.density)]

    def fit_law(self, n_tokens: int) -> ZipfLaw | None:
        """
        Zipf law of the running densities, None where too few features have fired.

        Args:
            n_tokens: Tokens per batch, which sets the density below which a rate is noise.
        """
        return self._fit_above(fit_floor(n_tokens))

    def _fit_above(self, floor: float) -> ZipfLaw | None:
        if int((self.density > floor).sum()) < 3:
            return None
        return ZipfLaw.fit(self.density, floor)

    def _anchor_quota_law(self, floor: float) -> None:
        """Takes the law of the quotas from what Mutual Choice found, once and for all."""
        law = self._fit_above(floor)
        if law is not None:
            self.quota_law.copy_(torch.tensor([law.alpha, law.beta]))
            self._rank_quotas = None

    def flag_underused(
        self, dead: torch.Tensor, fraction: float | None, n_tokens: int
    ) -> None:
        """
        Flags the features that the auxiliary loss trains: those below `fraction` of the law
        and the dead ones, or the dead ones only where `fraction` is None.
        """
        law = None if fraction is None else self.fit_law(n_tokens)
        self.underused.copy_(
            underused_features(self.density, dead, law, fraction or 0.0)
        )
        self._underused_indices = None

    @property
    def underused_indices(self) -> torch.Tensor:
        """Ascending indices of the flagged features, int64 of shape (U,)."""
        if self._underused_indices is None:
            self._underused_indices = self.underused.nonzero().squeeze(1)
        return self._underused_indices

    def _knows_cut(self) -> bool:
        if not self._cut_is_known:
            self._cut_is_known = bool(self.cut > 0)
        return self._cut_is_known

    def _track_cut(self, pairs: SparseActivations) -> None:
        """Moves the running cut towards the batch's own, its smallest selected affinity."""
        if len(pairs.values) == 0:
            return
        batch_cut = pairs.smallest_value().float()
        if self._knows_cut():
            batch_cut = follow_cut(self.cut, batch_cut)
        # infinite where all the pairs are padding
        self.cut.copy_(torch.where(batch_cut.isinf(), self.cut, batch_cut))

    def _update_density(self, counts: torch.Tensor, n_tokens: int) -> None:
        update_density(
            self.density,
            self.density_tokens,
            counts,
            n_tokens,
            self.density_window_tokens,
        )


def _forget_derived_after_loading(state: AllocationState, _: Any) -> None:
    state._forget_derived()


def in_bfloat16_parts(tensor: torch.Tensor) -> torch.Tensor:
    """
    A float32 tensor as three that sum to it, each of which bfloat16 holds exactly; shape
    (3, *shape). So it survives SAELens' loader, which casts all tensors of a file to the
    dtype of the weights.
    """
    first = tensor.bfloat16().float()
    second = (tensor - first).bfloat16().float()
    return torch.stack([first, second, tensor - first - second])
