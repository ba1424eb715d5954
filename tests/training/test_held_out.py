"""Metrics on held-out activations, by the dense formulas."""

from typing import Any

import pytest
import torch
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.saes.sae import TrainingSAE

from sae_lens_alloc.training.held_out import held_out_metrics
from tests.saes.conftest import changed, make_sae, state_of, statistics, tokens


def topk() -> TrainingSAE[Any]:
    torch.manual_seed(0)
    return TopKTrainingSAE(TopKTrainingSAEConfig(d_in=8, d_sae=32, k=3))


def mutual_choice() -> TrainingSAE[Any]:
    sae = make_sae("mutual_choice")
    statistics(sae).threshold.fill_(1.5)
    return sae


@pytest.mark.parametrize("make", [topk, mutual_choice])
def test_metrics_are_those_of_the_dense_formulas(make: Any):
    sae, x = make(), tokens(20, 8)
    sae.eval()
    acts = sae.encode(x)
    active = acts.to_dense() != 0
    error = (sae.decode(acts) - x).double().pow(2).sum()
    sae.train()
    before = state_of(sae)

    metrics = held_out_metrics(sae, x, batch_size=8)
    assert metrics["l0"] == pytest.approx(active.sum().item() / 20)
    assert metrics["dead_features"] == (~active.any(0)).sum().item() > 0
    assert metrics["explained_variance"] == pytest.approx(
        1 - (error / (x - x.mean(0)).double().pow(2).sum()).item()
    )
    assert sae.training and changed(before, sae) == set()
