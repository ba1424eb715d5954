"""Figures of features, one by one in plain Python."""

import pytest
import torch

from sae_lens_alloc.features.figures import N_BINS, measure_figures, strongest_last
from tests.features.conftest import pairs_of, random_dense


def test_figures_of_each_feature():
    torch.manual_seed(0)
    dense = random_dense(300, 12, 0.2)
    figures = measure_figures(pairs_of(dense))
    for feature in range(12):
        values = sorted(v for v in dense[:, feature].tolist() if v > 0)
        assert figures.firings[feature] == len(values)
        if not values:
            assert feature == 11
            assert figures.mean[feature] == 0
            assert figures.quantiles[feature].tolist() == [0] * 5
            assert figures.histogram[feature].sum() == 0
            continue
        assert figures.mean[feature].item() == pytest.approx(sum(values) / len(values))
        last = len(values) - 1
        assert figures.quantiles[feature].tolist() == pytest.approx(
            [values[round(q * last)] for q in (0, 0.25, 0.5, 0.75, 1)]
        )
        assert figures.largest[feature] == values[-1]
        histogram = [0] * N_BINS
        for value in values:
            histogram[min(int(value / values[-1] * N_BINS), N_BINS - 1)] += 1
        assert figures.histogram[feature].tolist() == histogram


def test_the_strongest_of_each_feature_comes_last():
    dense = torch.tensor([[0.0, 2.0], [1.0, 5.0], [3.0, 2.0], [1.0, 0.0]])
    pairs = pairs_of(dense)
    order = strongest_last(pairs)
    # of equals the later token first, so that the first one is the stronger
    assert pairs.feature_indices[order].tolist() == [0, 0, 0, 1, 1, 1]
    assert pairs.token_indices[order].tolist() == [3, 1, 2, 2, 0, 1]
