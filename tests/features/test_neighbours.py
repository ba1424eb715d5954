"""Nearest features against all pairs of features."""

import pytest
import torch

from sae_lens_alloc.features import neighbours
from sae_lens_alloc.features.neighbours import nearest_by_activity, nearest_by_decoder
from tests.features.conftest import pairs_of, random_dense

SOME = torch.tensor([5, 0, 3, 19])


@pytest.mark.parametrize("largest_block", [2**24, 30])
def test_by_decoder(monkeypatch: pytest.MonkeyPatch, largest_block: int):
    monkeypatch.setattr(neighbours, "LARGEST_BLOCK", largest_block)
    torch.manual_seed(0)
    directions = torch.randn(20, 6) * torch.rand(20, 1)
    found = nearest_by_decoder(directions, SOME, k=4)
    cosines = torch.nn.functional.cosine_similarity(
        directions[:, None].double(), directions[None].double(), dim=-1
    )
    for row, feature in enumerate(SOME.tolist()):
        others = [other for other in range(20) if other != feature]
        nearest = sorted(others, key=lambda i: -cosines[feature, i].item())[:4]
        assert found.features[row].tolist() == nearest
        assert found.nearness[row].tolist() == pytest.approx(
            cosines[feature, nearest].tolist(), abs=1e-6
        )


@pytest.mark.parametrize("largest_block", [2**24, 30])
def test_by_activity(monkeypatch: pytest.MonkeyPatch, largest_block: int):
    monkeypatch.setattr(neighbours, "LARGEST_BLOCK", largest_block)
    torch.manual_seed(0)
    dense = random_dense(100, 20, 0.08)
    found = nearest_by_activity(pairs_of(dense), SOME, k=6)
    active = dense > 0
    for row, feature in enumerate(SOME.tolist()):
        overlaps = {
            other: int((active[:, feature] & active[:, other]).sum())
            / max(1, int((active[:, feature] | active[:, other]).sum()))
            for other in range(20)
            if other != feature
        }
        expected = sorted(overlaps.values(), reverse=True)[:6]
        assert found.nearness[row].tolist() == pytest.approx(expected)
        for other, nearness in zip(
            found.features[row].tolist(), found.nearness[row].tolist(), strict=True
        ):
            if other < 0:
                assert nearness == 0
            else:
                assert nearness == pytest.approx(overlaps[other]) and nearness > 0
    # the last one is dead, and has no neighbours
    assert found.features[3].tolist() == [-1] * 6


def test_of_many_active_features_some_tokens_do(monkeypatch: pytest.MonkeyPatch):
    """A quarter of the tokens, every fourth."""
    torch.manual_seed(0)
    dense = torch.rand(100, 20) * (torch.arange(20) % 2 == 0)  # 10 on each token
    monkeypatch.setattr(neighbours, "LARGEST_N_TOGETHER", 100 * 10**2 // 4)
    dense[3::4, 2:5:2] = 0.0
    dense[3::4, 1:4:2] = 1.0
    found = nearest_by_activity(pairs_of(dense), torch.tensor([0, 2]), k=12)
    # of what is looked at, all these are active on all tokens, and 2 and 4 on none
    together = [1, 3, 6, 8, 10, 12, 14, 16, 18]
    assert sorted(found.features[0].tolist()) == [-1, -1, -1, *together]
    assert found.nearness[0].tolist() == [1.0] * 9 + [0.0] * 3
    assert found.features[1].tolist() == [-1] * 12


def test_fewer_features_than_neighbours():
    found = nearest_by_decoder(torch.eye(3), torch.arange(3))
    assert found.features.shape == (3, 2)
