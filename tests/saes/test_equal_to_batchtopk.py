"""Mutual Choice without margin and auxiliary loss is SAELens' `batchtopk`: losses and gradients."""

from itertools import product
from typing import Any

import pytest
import torch
from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig

from tests.saes.conftest import (
    gradients,
    make_sae,
    set_weights,
    tokens,
    training_step,
    weights_of,
)

# relative to the largest entry of a tensor
TOLERANCE = {"float64": 1e-14, "float32": 2e-6}


def both(**settings: Any) -> tuple[Any, BatchTopKTrainingSAE]:
    """A Mutual Choice SAE and a stock `batchtopk` SAE with the same weights."""
    ours = make_sae("mutual_choice", **settings)
    stock = BatchTopKTrainingSAE(
        BatchTopKTrainingSAEConfig(d_in=ours.cfg.d_in, d_sae=ours.cfg.d_sae, **settings)
    )
    set_weights(stock, **weights_of(ours))
    return ours, stock


def assert_equal(found: torch.Tensor, expected: torch.Tensor, dtype: str) -> None:
    assert found.dtype == expected.dtype
    largest = float(expected.detach().abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE[dtype] * largest)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("reshape", ["none", "hook_z"])
@pytest.mark.parametrize(
    "normalize",
    ["none", "expected_average_only_in", "layer_norm", "covariance_whitening"],
)
def test_losses_and_gradients_are_those_of_batchtopk(
    normalize: str, reshape: str, dtype: str
):
    shape = (24, 2, 4) if reshape == "hook_z" else (6, 4, 8)
    x = tokens(*shape, dtype=getattr(torch, dtype))
    for apply_b_dec, rescale, k in product((True, False), (True, False), (3, 2.3)):
        ours, stock = both(
            dtype=dtype,
            normalize_activations=normalize,
            reshape_activations=reshape,
            apply_b_dec_to_input=apply_b_dec,
            rescale_acts_by_decoder_norm=rescale,
            k=k,
        )
        if reshape == "hook_z":
            ours.turn_on_forward_pass_hook_z_reshaping()
            stock.turn_on_forward_pass_hook_z_reshaping()
        found, expected = training_step(ours, x), training_step(stock, x)
        acts = found.feature_acts.to_dense()
        assert int((acts != 0).sum()) == int(k * 24)
        assert torch.equal(acts != 0, expected.feature_acts != 0)
        assert_equal(acts, expected.feature_acts, dtype)
        assert_equal(found.sae_out, expected.sae_out, dtype)
        assert set(found.losses) == {"mse_loss"}
        assert_equal(found.losses["mse_loss"], expected.losses["mse_loss"], dtype)
        assert_equal(found.loss, expected.loss, dtype)
        wanted = gradients(stock, expected.loss)
        for name, gradient in gradients(ours, found.loss).items():
            assert_equal(gradient, wanted[name], dtype)
