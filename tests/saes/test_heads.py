"""A training step on attention heads (hook_z) is that on their concatenation."""

from typing import Any

import pytest
import torch
from sae_lens.saes.sae import TrainingSAE

from sae_lens_alloc import AuxZipfLoss
from sae_lens_alloc.saes.allocation_sae import AllocationTrainingSAE
from tests.saes.conftest import make_sae, tokens, training_step
from tests.saes.test_aux_zipf import BASES, dead_mask, make

B = 24
# SAELens' own gated and matryoshka_batchtopk cannot train on heads
WITH_HEADS = sorted({*BASES} - {"gated", "matryoshka_batchtopk"})


def made(architecture: str, **settings: Any) -> TrainingSAE[Any]:
    if architecture in BASES:
        return make(architecture, **settings)
    widths: dict[str, Any] = (
        {"matryoshka_widths": [8]} if "matryoshka" in architecture else {}
    )
    return make_sae(
        architecture, aux_loss="aux_zipf", dtype="float64", **widths, **settings
    )


@pytest.mark.parametrize(
    "architecture",
    ["mutual_choice", "feature_choice", "matryoshka_mutual_choice", *WITH_HEADS],
)
def test_heads_of_a_token_are_one_token(architecture: str):
    flat = made(architecture)
    heads = made(architecture, reshape_activations="hook_z")
    heads.turn_on_forward_pass_hook_z_reshaping()
    x = tokens(B, 8, dtype=torch.float64)
    expected = training_step(flat, x, 0, dead_mask())
    found = training_step(heads, x.view(B, 2, 4), 0, dead_mask())
    assert found.sae_out.shape == (B, 2, 4)
    torch.testing.assert_close(found.sae_out.view(B, 8), expected.sae_out)
    torch.testing.assert_close(
        found.feature_acts.to_dense(), expected.feature_acts.to_dense()
    )
    # SAELens takes the error of heads as a mean over them
    for name, loss in expected.losses.items():
        is_error = "mse" in name or name in (
            "aux_zipf_loss",
            "auxiliary_reconstruction_loss",
        )
        torch.testing.assert_close(found.losses[name], loss / 2 if is_error else loss)
    for sae in (flat, heads):
        assert isinstance(sae, AllocationTrainingSAE | AuxZipfLoss)
        state = sae.aux_zipf if isinstance(sae, AuxZipfLoss) else sae.allocation
        assert state.density_tokens == B
