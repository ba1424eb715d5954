"""The allocation of batches, and how it moves the running statistics."""

import math

import pytest
import torch

from sae_lens_alloc.allocation.feature_choice import select_feature_choice
from sae_lens_alloc.allocation.mutual_choice import select_mutual_choice
from sae_lens_alloc.allocation.sparse_activations import Pairs, SparseActivations
from sae_lens_alloc.allocation.zipf import ZipfLaw, zipf_quotas
from sae_lens_alloc.ops.block_encoder import Encoder, KnownAffinities
from sae_lens_alloc.saes.allocation_statistics import AllocationStatistics
from sae_lens_alloc.saes.allocator import Allocator, Guesses, Rule

B, F, D_IN, BUDGET = 64, 96, 16, 256


def new_allocator(
    d_sae: int = F, max_density: float = 0.6, min_tokens: float = 0.0
) -> Allocator:
    statistics = AllocationStatistics(d_sae, 10_000, torch.device("cpu"))
    return Allocator(statistics, max_density, min_tokens)


def random_encoder() -> Encoder:
    return Encoder(torch.randn(D_IN, F), 0.1 * torch.randn(F), torch.rand(F) + 0.5)


def buffers(state: AllocationStatistics) -> dict[str, torch.Tensor]:
    return {name: buffer.clone() for name, buffer in state.named_buffers()}


def assert_same_pairs(found: Pairs, expected: SparseActivations):
    actual = found.without_padding()
    assert torch.equal(actual.token_indices, expected.token_indices)
    assert torch.equal(actual.feature_indices, expected.feature_indices)
    assert torch.allclose(actual.values, expected.values)


def test_mutual_steps_track_cut_threshold_and_density_by_hand():
    allocator = new_allocator(d_sae=3)
    state = allocator.statistics
    first = torch.tensor([[5.0, 1.0, -1.0], [4.0, 2.0, 3.0]])
    x = torch.zeros(2, 1)
    # budget 3: [5, 4, 3], of which 3 is the smallest; the first cut is taken as it is
    pairs, _ = allocator.allocate(KnownAffinities(first), x, 3, "mutual", None)
    assert pairs.to_dense().tolist() == [[5, 0, 0], [4, 0, 3]]
    assert state.cut == 3
    assert state.threshold.tolist() == [3, 3, 3]
    # features fired on 2, 0 and 1 of 2 tokens
    assert state.density.tolist() == [1, 0, 0.5]
    assert state.density_tokens == 2
    # the smallest of the best three is 3.1, within 10%: 5% of the way
    second = torch.tensor([[3.1, 6.0, 0.1], [3.0, 2.0, 4.0]])
    allocator.allocate(KnownAffinities(second), x, 3, "mutual", "mutual")
    assert state.cut.item() == pytest.approx(3 * (3.1 / 3) ** 0.05)
    # counts so far: 3, 1, 2 of 4 tokens
    assert state.density.tolist() == pytest.approx([0.75, 0.25, 0.5])
    # the smallest is 10: far away
    third = torch.tensor([[10.0, 11.0, 12.0], [1.0, 1.0, 1.0]])
    allocator.allocate(KnownAffinities(third), x, 3, "mutual", "mutual")
    assert state.cut.item() == pytest.approx(10)
    assert state.threshold.tolist() == pytest.approx([10, 10, 10])


def test_thresholds_fall_to_where_features_fire_now_and_then_by_hand():
    """
    Budget 4 and a margin of 1: the four tens are active, 8 is the margin. Each of 3 features
    should fire on at least 0.04 * 4 / 3 = 0.0533 tokens of a batch.
    """
    strong, weak, weaker = [13, 12, 11, 10], [-1, 8, -1, -1], [2, -1, -1, 1]
    affinities = torch.tensor([strong, weak, weaker], dtype=torch.float32).T
    allocator, thresholds = new_allocator(d_sae=3), list[torch.Tensor]()
    state = allocator.statistics
    for step in range(2000):
        pairs, margin = allocator.allocate(
            KnownAffinities(affinities), torch.zeros(4, 1), 4, "mutual", "mutual", 1
        )
        assert pairs.feature_counts().tolist() == [4, 0, 0]
        # what its lower threshold alone lets in is no rival
        assert margin is not None and 2 not in margin.pairs.places.values
        if step == 1:  # the first knows no cut yet, so nothing is counted
            # none of a batch is 5% of 0.0533 of a token too few
            missing = math.exp(-0.05 * 0.16 / 3)
            assert state.threshold.tolist() == pytest.approx(
                [10, 10 * missing, 10 * missing]
            )
        thresholds.append(state.threshold.clone())
    assert state.cut == 10
    firing = torch.stack(thresholds[1000:]) < torch.tensor([10.5, 8.0, 2.0])
    expected = [1, 0.16 / 3, 0.16 / 3]
    assert firing.float().mean(0).tolist() == pytest.approx(expected, rel=0.15)


@pytest.mark.parametrize("n_margin", [0, 1, 64])
def test_mutual_steps_select_mutual_choice_of_the_batch(n_margin: int):
    """Whatever thresholds Feature Choice left, and with the true pairs below the cut."""
    torch.manual_seed(0)
    allocator, encoder = new_allocator(), random_encoder()
    state = allocator.statistics
    previous = None
    for step in range(20):
        rule = "feature" if step < 10 else "mutual"
        x = torch.randn(B, D_IN) * (1 + step % 3)
        pairs, margin = allocator.allocate(encoder, x, BUDGET, rule, previous, n_margin)
        previous = rule
        if rule == "mutual":
            affinities = encoder.affinities(x)
            assert_same_pairs(pairs, select_mutual_choice(affinities, BUDGET))
            by_size = affinities.flatten().sort(descending=True).values
            found = torch.empty(0) if margin is None else margin.pairs.places.values
            assert torch.allclose(
                found.sort(descending=True).values,
                by_size[BUDGET : BUDGET + n_margin],
            )
    assert (state.threshold < state.cut).any() == (n_margin > 0)


def test_feature_steps_give_ranks_by_demand_their_quotas():
    # natural law (alpha 1, beta 16), max_density 0.5 of 8 tokens: quotas of at most 4
    allocator = new_allocator(d_sae=4, max_density=0.5)
    state = allocator.statistics
    state.density.copy_(torch.tensor([0.1, 0.4, 0.0, 0.2]))
    state.density_tokens.fill_(1000.0)
    state.cut.fill_(100.0)
    state.quota_carry.copy_(torch.tensor([0.0, 0.5, 0.99, 0.25]))
    torch.manual_seed(0)
    affinities = torch.rand(8, 4)
    pairs, _ = allocator.allocate(
        KnownAffinities(affinities), torch.zeros(8, 1), 10, "feature", None
    )
    # ranks of features 1, 3, 0, 2: shares of 10 as 1/17 : 1/18 : 1/19 : 1/20
    total = 1 / 17 + 1 / 18 + 1 / 19 + 1 / 20
    owed = [10 / rank / total for rank in (19, 17, 20, 18)]
    with_carry = [o + c for o, c in zip(owed, (0.0, 0.5, 0.99, 0.25), strict=True)]
    # 2.42, 3.20, 3.29, 2.80
    assert [math.floor(quota) for quota in with_carry] == [2, 3, 3, 2]
    expected = select_feature_choice(affinities, torch.tensor([2, 3, 3, 2]))
    assert_same_pairs(pairs, expected)
    assert state.quota_carry.tolist() == pytest.approx(
        [quota % 1 for quota in with_carry], abs=1e-5
    )
    # nothing reaches the cut of 100, so that demand is 0 and the cut falls by 5%
    assert state.cut.item() == pytest.approx(100 * math.exp(-0.05))


def test_feature_steps_give_a_feature_no_more_than_its_largest_density():
    allocator = new_allocator(d_sae=4, max_density=0.5)
    # Half of 4 tokens for each of 4 features: 8 pairs, though the budget is 10
    affinities = KnownAffinities(torch.rand(4, 4) + 0.1)
    counts = torch.zeros(4, dtype=torch.int64)
    for _ in range(3):
        pairs, _ = allocator.allocate(
            affinities, torch.zeros(4, 1), 10, "feature", "feature"
        )
        counts += pairs.feature_counts()
    assert counts.tolist() == [6, 6, 6, 6]


def test_feature_steps_give_a_feature_no_less_than_its_smallest_quota():
    # a law that gives nearly all of the budget of 6 to the first two of 4 features
    allocator = new_allocator(d_sae=4, min_tokens=1.0)
    state = allocator.statistics
    state.quota_law.copy_(torch.tensor([20.0, 0.0]))
    state.quota_carry.zero_()
    state.density.copy_(torch.tensor([0.1, 0.2, 0.3, 0.4]))
    affinities = KnownAffinities(torch.rand(5, 4) + 0.1)
    pairs, _ = allocator.allocate(
        affinities, torch.zeros(5, 1), 6, "feature", "feature"
    )
    # 3 of 5 tokens is the largest, 1 the smallest: 3 + 1 + 1 + 1
    assert pairs.feature_counts().tolist() == [1, 1, 1, 3]
    with pytest.raises(ValueError, match="min_tokens_per_feature = 1.0"):
        allocator.allocate(affinities, torch.zeros(5, 1), 3, "feature", "feature")


def test_feature_steps_use_the_budget_exactly_in_the_long_run():
    torch.manual_seed(1)
    allocator, encoder = new_allocator(), random_encoder()
    total = 0
    for step in range(60):
        pairs, _ = allocator.allocate(
            encoder,
            torch.randn(B, D_IN),
            BUDGET,
            "feature",
            "feature" if step else None,
        )
        total += len(pairs.places.values)
        assert pairs.feature_counts().max() <= math.ceil(0.6 * B)
    # to within one pair a feature, as every feature has more positive affinities than quota
    assert abs(total - 60 * BUDGET) < F


def test_density_counts_demand_rather_than_what_feature_choice_gave():
    allocator = new_allocator(d_sae=2)
    state = allocator.statistics
    state.cut.fill_(0.5)
    # feature 0 clears the cut on 4 of 4 tokens, feature 1 on one
    affinities = torch.tensor([[0.9, 0.6], [0.8, 0.1], [0.7, 0.1], [0.6, 0.1]])
    allocator.allocate(
        KnownAffinities(affinities), torch.zeros(4, 1), 2, "feature", None
    )
    assert state.density.tolist() == pytest.approx([1.0, 0.25])


@pytest.mark.parametrize(
    ("previous", "start"), [("mutual", 2.0), (None, 7.0), ("feature", 7.0)]
)
def test_thresholds_restart_at_the_cut_at_a_change_of_rule(
    previous: Rule | None, start: float
):
    torch.manual_seed(2)
    allocator, encoder = new_allocator(), random_encoder()
    state = allocator.statistics
    state.cut.fill_(2.0)
    state.threshold.fill_(7.0)
    allocator.allocate(encoder, torch.randn(B, D_IN), BUDGET, "feature", previous)
    # one step of exp(0.05 * [-1, 3]) at most
    assert state.threshold.min() >= start * math.exp(-0.05) - 1e-5
    assert state.threshold.max() <= start * math.exp(0.15) + 1e-5


def test_quota_law_is_anchored_once_when_mutual_choice_ends():
    torch.manual_seed(3)
    allocator, encoder = new_allocator(), random_encoder()
    state = allocator.statistics
    # densities of an exact law; a step of Mutual Choice came before
    state.density.copy_(0.5 * (torch.arange(1, F + 1) + 4.0) ** -1.5)
    state.density_tokens.fill_(1e6)
    x = torch.randn(B, D_IN)
    assert state.quota_law.tolist() == [1, 16]
    allocator.allocate(encoder, x, BUDGET, "feature", "feature")
    assert state.quota_law.tolist() == [1, 16]
    state.density.copy_(0.5 * (torch.arange(1, F + 1) + 4.0) ** -1.5)
    allocator.allocate(encoder, x, BUDGET, "feature", "mutual")
    assert state.quota_law.tolist() == pytest.approx([1.5, 4], rel=1e-3)
    expected = zipf_quotas(ZipfLaw(1.5, 4, 1.0), F, BUDGET, 0.6 * B)
    state.density.copy_(torch.arange(F, 0, -1))
    assert allocator.quotas.of(state.density, B, BUDGET)[0].tolist() == pytest.approx(
        expected.tolist(), rel=1e-3
    )


@pytest.mark.parametrize("rule", ["mutual", "feature"])
def test_preview_is_the_next_allocation_and_changes_nothing(rule: Rule):
    torch.manual_seed(4)
    allocator, encoder = new_allocator(), random_encoder()
    for step in range(3):
        x = torch.randn(B, D_IN)
        allocator.allocate(encoder, x, BUDGET, rule, rule if step else None)
    state = allocator.statistics
    before, x = buffers(state), torch.randn(B, D_IN)
    preview = allocator.preview(encoder, x, BUDGET, rule)
    for name, buffer in buffers(state).items():
        assert torch.equal(buffer, before[name]), name
    assert_same_pairs(allocator.allocate(encoder, x, BUDGET, rule, rule)[0], preview)


def test_statistics_stay_float32():
    allocator = new_allocator()
    state = allocator.statistics
    torch.manual_seed(5)
    state.threshold.copy_(torch.rand(F))
    state.to(torch.bfloat16)
    assert {
        buffer.dtype for buffer in state.buffers() if buffer.is_floating_point()
    } == {torch.float32}


# bounds are not in the checkpoint, but the encoder's part of the features whose
# bound was too high rounds differently, and see
# test_counts_above_the_thresholds_do_not_depend_on_the_bounds.
@pytest.mark.parametrize("growth", [1.0, 1.1])
@pytest.mark.parametrize("rule", ["mutual", "feature"])
def test_a_reloaded_state_goes_on_bit_for_bit(rule: Rule, growth: float):
    torch.manual_seed(6)
    encoder, allocator = random_encoder(), new_allocator()
    state = allocator.statistics
    # activations that grow with the steps, as they do early in training
    batches = [torch.randn(B, D_IN) * growth**step for step in range(30)]
    for step, x in enumerate(batches[:10]):
        allocator.allocate(encoder, x, BUDGET, rule, rule if step else None)
    resumed = new_allocator()
    resumed.statistics.load_state_dict(state.state_dict())
    for x in batches[10:]:
        pairs, _ = allocator.allocate(encoder, x, BUDGET, rule, rule)
        again, _ = resumed.allocate(encoder, x, BUDGET, rule, rule)
        assert torch.equal(pairs.places.values, again.places.values)
        for name, buffer in buffers(state).items():
            assert torch.equal(buffer, buffers(resumed.statistics)[name]), name


# thresholds are set to the cut at the first step alone, and 0 stays 0.
@pytest.mark.parametrize("rule", ["mutual", "feature"])
def test_thresholds_recover_from_a_first_batch_without_positive_affinities(rule: Rule):
    torch.manual_seed(7)
    encoder = Encoder(torch.randn(D_IN, F), torch.zeros(F), None)
    allocator = new_allocator()
    state = allocator.statistics
    allocator.allocate(encoder, torch.zeros(B, D_IN), BUDGET, rule, None)
    for _ in range(3):
        allocator.allocate(encoder, torch.randn(B, D_IN), BUDGET, rule, rule)
    assert state.cut > 0
    assert (state.threshold > 0).all()


def test_a_preview_of_another_batch_leaves_the_quotas_of_the_training_alone():
    """A recorded step reads them without asking whose they are."""
    torch.manual_seed(8)
    allocator, encoder = new_allocator(), random_encoder()
    for step in range(3):
        x = torch.randn(B, D_IN)
        allocator.allocate(encoder, x, BUDGET, "feature", "feature" if step else None)
    kept = allocator.quotas.by_rank
    assert kept is not None
    before = kept.clone()
    other = allocator.preview(encoder, torch.randn(2 * B, D_IN), BUDGET, "feature")
    assert 0 < len(other.values) <= BUDGET + F
    assert allocator.quotas.by_rank is kept
    assert torch.equal(kept, before)


@pytest.mark.parametrize("replaced", ["loaded", "moved"])
def test_guesses_are_dropped_where_the_statistics_they_come_from_are_replaced(
    replaced: str,
):
    torch.manual_seed(9)
    allocator, encoder = new_allocator(), random_encoder()
    state = allocator.statistics
    for rule in ("mutual", "feature"):
        allocator.allocate(encoder, torch.randn(B, D_IN), BUDGET, rule, rule, BUDGET)
    kept = allocator.guesses
    assert kept.cut_is_known
    assert None not in (kept.bounds, kept.margin_cut, kept.lowered)
    assert None not in (allocator.quotas.by_rank, allocator.quotas.curve)
    if replaced == "loaded":
        state.load_state_dict(new_allocator().statistics.state_dict())
    else:
        state.to("cpu")
    assert allocator.guesses == Guesses()
    assert (allocator.quotas.by_rank, allocator.quotas.curve) == (None, None)
