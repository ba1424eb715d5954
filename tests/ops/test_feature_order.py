"""Pairs by feature: one sort for all pairs and for the first of them, by hand and brute force."""

import pytest
import torch

from sae_lens_alloc.ops.feature_order import FeatureOrder


def test_order_by_hand():
    order = FeatureOrder(torch.tensor([2, 0, 2, 1, 0]), None, 3)
    features, places = order.of_all
    assert features.tolist() == [0, 0, 1, 2, 2]
    assert places.tolist() == [1, 4, 3, 0, 2]
    # of [2, 0, 2]
    features, places = order.of_first(3)
    assert features.tolist() == [0, 2, 2]
    assert places.tolist() == [1, 0, 2]


@pytest.mark.usefixtures("triton_device")
def test_padding_is_behind_all_features_for_kernels():
    real = torch.tensor([True, False, True, True, False])
    order = FeatureOrder(torch.tensor([2, 0, 2, 1, 0]), real, 3)
    features, places = order.of_all
    assert features.tolist() == [1, 2, 2, 3, 3]
    assert places.tolist() == [3, 0, 2, 1, 4]
    features, places = order.of_first(3)
    assert features.tolist() == [2, 2, 3]
    assert places.tolist() == [0, 2, 1]


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("n", [0, 1, 37, 99, 100])
def test_the_order_of_the_first_is_that_of_them_alone(n: int):
    torch.manual_seed(0)
    features, real = torch.randint(7, (100,)), torch.rand(100) < 0.8
    found = FeatureOrder(features, real, 7).of_first(n)
    alone = FeatureOrder(features[:n], real[:n], 7).of_all
    assert torch.equal(found[0], alone[0])
    assert torch.equal(found[1], alone[1])
