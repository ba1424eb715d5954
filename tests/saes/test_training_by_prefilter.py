"""Training where bfloat16 products choose the candidates is training by float32 products."""

from typing import Any

import pytest
import torch

from sae_lens_alloc.ops import device_checks
from sae_lens_alloc.ops.backend import BACKEND_VARIABLE
from tests.saes.conftest import make_sae, tokens, training_step
from tests.saes.test_no_host_sync import (
    D_SAE,
    assert_trained_alike,
    no_questions,
    train,
)

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"selection_margin": 0.25, "feature_choice_steps": 1},
        {"aux_loss": "aux_zipf", "rescale_acts_by_decoder_norm": False},
        # few affinities are positive: the rest of the budget is padding
        {"selection_margin": 0.5, "b_enc": -2.0},
        {"architecture": "feature_choice", "mutual_choice_steps": 1},
    ],
)
def test_training_by_the_prefilter_is_training_by_triton(
    options: dict[str, Any],
    triton_device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
):
    by_triton = train(3, triton_device, **options)
    monkeypatch.setenv(BACKEND_VARIABLE, "triton_prefilter")
    assert_trained_alike(train(3, triton_device, **options), by_triton)


def test_a_step_by_the_prefilter_asks_the_device_nothing(
    triton_device: torch.device, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(device_checks, "_is_late", lambda tensor: True)  # noqa: ARG005
    monkeypatch.setenv(BACKEND_VARIABLE, "triton_prefilter")
    sae = make_sae(d_sae=D_SAE, selection_margin=0.25).to(triton_device)
    for step in range(2):
        training_step(sae, tokens(12, 8).to(triton_device), step)
    # a good guess, and one that is not
    for step, size in ((2, 1), (3, 100)):
        x = size * tokens(12, 8, seed=step).to(triton_device)
        sae.checks.report(wait=True)
        with no_questions(triton_device):
            training_step(sae, x, step).loss.backward()
    sae.checks.report(wait=True)
