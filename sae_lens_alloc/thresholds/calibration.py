"""Inference thresholds set on activations, so that the saved SAE has the wanted L0."""

from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from sae_lens_alloc.allocation.mutual_choice import MutualChoiceCollector, budget_for
from sae_lens_alloc.allocation.sparse_activations import SparseActivations
from sae_lens_alloc.evaluation.usage import by_pairs, measure_usage, measure_usages
from sae_lens_alloc.ops.block_encoder import Encoder, WatchedEncoder
from sae_lens_alloc.ops.encode_thresholds import ThresholdCollector
from sae_lens_alloc.ops.split_over_ranks import split_over_ranks
from sae_lens_alloc.saes.allocation_sae import AllocationTrainingSAE
from sae_lens_alloc.saes.refined_mutual_choice_sae import (
    RefinedMutualChoiceTrainingSAE,
)
from sae_lens_alloc.saes.rows import encoded_and_target
from sae_lens_alloc.thresholds.factor import (
    factor_of,
    movable_thresholds,
    relative_encoder,
    threshold_factor,
)
from sae_lens_alloc.thresholds.requirements import require_activations

BATCH_SIZE = 4096


@dataclass(frozen=True)
class CalibrationReport:
    """
    What calibration found, on the activations it was given.

    Args:
        target_l0: Wanted features per token.
        training_l0: Features per token of the training allocation.
        l0_before: Features per token by the thresholds as training left them.
        l0: Features per token by the calibrated thresholds.
        training_ev: Explained variance of the training allocation.
        ev_before: Explained variance by the thresholds as training left them.
        ev: Explained variance by the calibrated thresholds.
        n_tokens: Number of tokens used.
    """

    target_l0: float
    training_l0: float
    l0_before: float
    l0: float
    training_ev: float
    ev_before: float
    ev: float
    n_tokens: int


@torch.no_grad()
def calibrate_thresholds(
    sae: AllocationTrainingSAE[Any],
    activations: torch.Tensor,
    target_l0: float | None = None,
    batch_size: int = BATCH_SIZE,
) -> CalibrationReport:
    """
    Scales all thresholds of an SAE by one factor such that `target_l0` features per token
    are active on the given activations, and records the result in the SAE's metadata.

    One factor keeps what training found about each feature: a common threshold stays
    common, and the thresholds of Feature Choice keep their ratios.

    Args:
        sae: A Mutual Choice or Feature Choice SAE. Its thresholds are changed in place. Where
            ranks share its features, all of them must call this with the same activations.
        activations: Activations as the SAE takes them, shape (T, d_in), or the rows [x, y] of a
            transcoder, shape (T, d_in + d_out). The more the better: 65k tokens put L0 within
            about 1%.
        target_l0: Wanted features per token; the SAE's k by default.
        batch_size: Tokens per batch of the training allocation that is compared with.

    Raises:
        ValueError: if the activations are not finite and of the SAE's d_in, or no thresholds
            give the wanted L0.
    """
    wanted: float = sae.cfg.k if target_l0 is None else target_l0
    require_activations(sae, activations)
    encoded, target = encoded_and_target(sae.cfg, activations)
    if isinstance(sae, RefinedMutualChoiceTrainingSAE):
        calibrate_first_pass(sae, encoded, wanted)
    tracked = sae.allocation.threshold
    shard = sae.shard
    thresholds = movable_thresholds(tracked, shard.ranks)
    first = _FirstPass(sae, thresholds, (len(activations), wanted))
    training, before = measure_usages(
        [by_pairs(first.by_batch, shard), by_pairs(first.by_threshold, shard)],
        encoded,
        batch_size,
        target,
    )
    largest = first.largest_relative()
    tracked.copy_(thresholds * factor_of(largest, thresholds, wanted, shard.ranks))
    by_threshold = by_pairs(partial(sae.autoencode_pairs, by_threshold=True), shard)
    after = measure_usage(by_threshold, encoded, batch_size, target)
    report = CalibrationReport(
        target_l0=wanted,
        training_l0=training.l0,
        l0_before=before.l0,
        l0=after.l0,
        training_ev=training.explained_variance,
        ev_before=before.explained_variance,
        ev=after.explained_variance,
        n_tokens=len(activations),
    )
    sae.cfg.metadata.calibration = asdict(report)
    return report


def calibrate_first_pass(
    sae: RefinedMutualChoiceTrainingSAE, activations: torch.Tensor, target_l0: float
) -> None:
    """
    Sets the threshold of the first of two passes such that `target_l0` features per token are active
    in it, on activations of shape (T, d_in). Does nothing where there was none in training.
    """
    if sae.first_cut > 0:
        cut, x = sae.first_cut, sae.first_inputs(activations)
        thresholds = cut.expand(sae.cfg.d_sae)
        cut.mul_(threshold_factor(sae.encoder(), x, thresholds, target_l0))


class _FirstPass:
    """
    Encodes activations once, batch by batch, for three purposes: the training allocation, the
    thresholds as they are, and the factor by which they will be moved.

    Args:
        sae: The SAE.
        thresholds: Thresholds that a factor can move, shape (F,).
        aim: (tokens of all batches, wanted features per token).

    Attributes:
        relative: Collects the largest affinities relative to their thresholds.
    """

    def __init__(
        self,
        sae: AllocationTrainingSAE[Any],
        thresholds: torch.Tensor,
        aim: tuple[int, float],
    ) -> None:
        self.sae = sae
        n_tokens, target_l0 = aim
        self.relative = MutualChoiceCollector(
            (n_tokens, len(thresholds)), budget_for(target_l0, n_tokens), None
        )
        self._relative_encoder = relative_encoder(sae.encoder(), thresholds)
        self._n_seen = 0
        self._above: SparseActivations | None = None

    def largest_relative(self) -> SparseActivations:
        """This rank's pairs of the largest affinities relative to their thresholds."""
        largest, shard = self.relative.finish(), self.sae.shard
        if shard.is_whole:
            return largest
        best, _ = split_over_ranks(largest, self.relative.budget, 0, shard)
        return best.without_padding()

    def by_batch(self, x: torch.Tensor) -> tuple[SparseActivations, torch.Tensor]:
        """The training allocation of the next batch, and its reconstruction."""
        return self.sae.autoencode_selected(x, self._select)

    def by_threshold(self, x: torch.Tensor) -> tuple[SparseActivations, torch.Tensor]:
        """The same by the thresholds as they are, of the batch that `by_batch` was given."""
        above = self._above
        assert above is not None
        return self.sae.autoencode_selected(x, lambda _encoder, _inputs: above)

    def _select(self, encoder: Encoder, inputs: torch.Tensor) -> SparseActivations:
        by_threshold = ThresholdCollector(encoder, self.sae.allocation.threshold)
        seen: set[int] = set()

        def watch(block: slice, products: torch.Tensor) -> None:
            if block.start in seen:
                return
            seen.add(block.start)
            by_threshold.add(block, products)
            tokens, features, values = self._relative_encoder.part(block).candidates(
                products, self.relative.bound
            )
            self.relative.add(tokens + self._n_seen, features + block.start, values)

        pairs = self.sae.preview(WatchedEncoder(encoder, watch), inputs)
        self._above = by_threshold.finish(len(inputs))
        self._n_seen += len(inputs)
        return pairs
