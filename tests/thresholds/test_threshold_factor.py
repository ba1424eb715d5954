"""The factor that brings thresholds to an L0 counts pairs and never padding."""

import pytest
import torch

from sae_lens_alloc.ops.block_encoder import Encoder
from sae_lens_alloc.thresholds.factor import threshold_factor
from tests.helpers import exact_tensors


def test_the_factor_is_the_same_by_every_backend(backend: str):
    torch.manual_seed(0)
    x, W_enc, b_enc, scale = exact_tensors(60, 50)
    thresholds = torch.full((50,), 2.0)
    encoder = Encoder(W_enc, b_enc, scale)
    affinities = (x @ W_enc + b_enc) * scale
    factor = threshold_factor(encoder, x, thresholds, 3)
    fourth = affinities.flatten().sort(descending=True).values[3 * 60 - 1]
    torch.testing.assert_close(factor, fourth / 2, rtol=1e-5, atol=0)


def test_too_few_positive_affinities_are_an_error_by_every_backend(backend: str):
    """Triton fills up with padding, whose factor of 0 would silence nothing."""
    torch.manual_seed(0)
    x, W_enc, _, _ = exact_tensors(60, 50)
    encoder = Encoder(W_enc, torch.full((50,), -4.0), None)
    positive = (x @ W_enc - 4 > 0).sum() / 60
    assert 0 < positive < 12
    with pytest.raises(ValueError, match="no thresholds give an L0 of 12"):
        threshold_factor(encoder, x, torch.ones(50), 12)
