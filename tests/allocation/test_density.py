import pytest
import torch

from sae_lens_alloc.allocation.density import (
    density_ranks,
    fit_floor,
    underused_features,
    update_density,
)
from sae_lens_alloc.allocation.zipf import ZipfLaw


def test_update_density_is_the_exact_mean_over_the_first_window():
    torch.manual_seed(0)
    density, tokens_seen = torch.zeros(5), torch.zeros(())
    counts_so_far = torch.zeros(5, dtype=torch.float64)
    n_so_far = 0
    # batches of unequal size, 500 tokens in all: the mean weighs tokens, not batches
    for n_tokens in (100, 7, 250, 60, 83):
        counts = torch.randint(0, n_tokens + 1, (5,))
        update_density(density, tokens_seen, counts, n_tokens, window_tokens=500)
        counts_so_far += counts
        n_so_far += n_tokens
        expected = (counts_so_far / n_so_far).tolist()
        assert density.tolist() == pytest.approx(expected, rel=1e-5)
        assert tokens_seen == n_so_far
    assert n_so_far == 500


def test_update_density_is_an_exponential_average_after_the_first_window():
    density, tokens_seen = torch.tensor([0.5, 0.0]), torch.tensor(1000.0)
    # 100 of 1000 tokens: a weight of 0.1 for rates of [1, 0.2]
    update_density(density, tokens_seen, torch.tensor([100, 20]), 100, 1000)
    # 0.9 * 0.5 + 0.1 * 1 = 0.55; 0.1 * 0.2 = 0.02
    assert density.tolist() == pytest.approx([0.55, 0.02])
    update_density(density, tokens_seen, torch.tensor([0, 50]), 100, 1000)
    # 0.9 * 0.55 = 0.495; 0.9 * 0.02 + 0.1 * 0.5 = 0.068
    assert density.tolist() == pytest.approx([0.495, 0.068])
    assert tokens_seen == 1200


def test_update_density_of_a_batch_that_crosses_the_end_of_the_window():
    density, tokens_seen = torch.tensor([0.2]), torch.tensor(950.0)
    # 150 of 1000 tokens, not of 1100
    update_density(density, tokens_seen, torch.tensor([150]), 150, 1000)
    assert density.item() == pytest.approx(0.85 * 0.2 + 0.15)


def test_update_density_of_a_batch_larger_than_the_window_is_its_own_rate():
    density, tokens_seen = torch.tensor([0.9]), torch.tensor(5000.0)
    update_density(density, tokens_seen, torch.tensor([50]), 200, window_tokens=100)
    assert density.item() == pytest.approx(0.25)


def test_density_ranks_settles_ties_by_feature():
    density = torch.tensor([0.1, 0.5, 0.1, 0.0, 0.9, 0.5])
    # From the densest: features 4, 1, 5, 0, 2, 3
    ranks = density_ranks(density)
    assert ranks.tolist() == [3, 1, 4, 5, 0, 2]
    assert ranks.dtype == torch.int64


def test_density_ranks_of_many_ties():
    # from 16 elements on, sorts that are not stable show it
    assert density_ranks(torch.zeros(1000)).tolist() == list(range(1000))


def test_fit_floor_is_one_event_in_a_hundred_batches():
    assert fit_floor(2048) == pytest.approx(1 / 204_800)


NONE_DEAD = torch.zeros(8, dtype=torch.bool)


def test_underused_features_are_those_below_a_fraction_of_the_law_at_their_rank():
    # The law: 0.8 / rank = 0.8, 0.4, 0.267, 0.2, 0.16, 0.133, 0.114, 0.1 (ranks 1 ... 8)
    law = ZipfLaw(alpha=1.0, beta=0.0, scale=0.8)
    density = torch.tensor([0.8, 0.04, 0.4, 0.07, 0.2, 0.25, 0.15, 0.06])
    # By rank: 0.8 0.4 0.25 0.2 | 0.15 0.07 0.06 0.04 of features 0 2 5 4 | 6 3 7 1
    # Half the law for the last four: 0.08, 0.0667, 0.0571, 0.05: only feature 1 is below
    flagged = underused_features(density, NONE_DEAD, law, 0.5)
    assert flagged.nonzero().flatten().tolist() == [1]
    # 0.6 of it: 0.096, 0.08, 0.0686, 0.06: features 3, 7, 1 are below
    flagged = underused_features(density, NONE_DEAD, law, 0.6)
    assert flagged.nonzero().flatten().tolist() == [1, 3, 7]


def test_underused_features_are_not_at_the_fraction_itself():
    # law at every rank: 0.5; half of it is 0.25
    law = ZipfLaw(alpha=0.0, beta=0.0, scale=0.5)
    density = torch.tensor([0.5, 0.5, 0.25, 0.24])
    flagged = underused_features(density, NONE_DEAD[:4], law, 0.5)
    assert flagged.tolist() == [False, False, False, True]


def test_underused_features_are_at_most_half_of_all_the_least_dense_first():
    law = ZipfLaw(alpha=0.0, beta=0.0, scale=1.0)
    density = torch.tensor([0.01, 0.05, 0.03, 0.04, 0.02, 0.06, 0.07, 0.08])
    # All are below 0.5 * 1. The least dense four: 0.01, 0.02, 0.03, 0.04
    flagged = underused_features(density, NONE_DEAD, law, 0.5)
    assert flagged.nonzero().flatten().tolist() == [0, 2, 3, 4]
    # of seven features at most three
    flagged = underused_features(density[:7], NONE_DEAD[:7], law, 0.5)
    assert flagged.nonzero().flatten().tolist() == [0, 2, 4]


def test_underused_features_always_include_the_dead():
    law = ZipfLaw(alpha=0.0, beta=0.0, scale=1.0)
    density = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.9, 0.9, 0.9, 0.9])
    # dead features may still have a running density, and may be more than half
    dead = torch.tensor([True, True, True, True, True, True, False, False])
    assert torch.equal(underused_features(density, dead, law, 0.5), dead)


def test_underused_features_without_a_law_are_the_dead():
    dead = torch.tensor([False, True, False, False, False, False, False, True])
    flagged = underused_features(torch.zeros(8), dead, None, 0.5)
    assert torch.equal(flagged, dead)
    flagged[0] = True
    assert not dead[0]
