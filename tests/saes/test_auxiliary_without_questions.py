"""The auxiliary loss by Triton's kernels: as by torch's, and the device is asked nothing."""

from typing import Any

import pytest
import torch

from sae_lens_alloc.ops import device_checks
from sae_lens_alloc.ops.backend import BACKEND_VARIABLE
from sae_lens_alloc.saes.allocation_sae import AllocationTrainingSAE
from tests.saes.conftest import gradients, make_sae, tokens, training_step
from tests.saes.test_aux_zipf import LOSS, dead_mask
from tests.saes.test_aux_zipf import make as make_aux_zipf
from tests.saes.test_no_host_sync import no_questions

pytestmark = pytest.mark.slow

AUX = "auxiliary_reconstruction_loss"
D_SAE = 40

ARCHITECTURES: list[dict[str, Any]] = [
    {"architecture": "mutual_choice"},
    {"architecture": "mutual_choice", "selection_margin": 0.25},
    {"architecture": "feature_choice"},
    {"architecture": "matryoshka_mutual_choice", "matryoshka_widths": [8, 20]},
]


def half_dead(step: int) -> torch.Tensor:
    """Other features in every ten steps, fewer than k_aux from step 20 on, then none."""
    n_dead = [20, 20, 2, 0][min(step // 10, 3)]
    places = torch.arange(D_SAE)
    return (places + 7 * (step // 10)) % D_SAE < n_dead


def a_step(sae: AllocationTrainingSAE[Any], step: int, device: torch.device) -> Any:
    x = tokens(12, 8, seed=step).to(device, sae.W_dec.dtype)
    return training_step(sae, x, step, half_dead(step).to(device))


@pytest.mark.parametrize("aux_loss", ["aux_k", "aux_zipf"])
@pytest.mark.parametrize("options", ARCHITECTURES)
def test_losses_and_gradients_are_those_of_torch(
    options: dict[str, Any],
    aux_loss: str,
    triton_device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
):
    settings: dict[str, Any] = {
        "d_sae": D_SAE,
        "aux_loss": aux_loss,
        "k_aux": 5,
        **options,
    }
    by_triton = make_sae(**settings).to(triton_device)
    by_torch = make_sae(**settings).to(triton_device)
    for step in (0, 10, 20, 30):
        monkeypatch.setenv(BACKEND_VARIABLE, "triton")
        output = a_step(by_triton, step, triton_device)
        grads = gradients(by_triton, output.loss)
        monkeypatch.setenv(BACKEND_VARIABLE, "torch")
        expected = a_step(by_torch, step, triton_device)
        expected_grads = gradients(by_torch, expected.loss)
        if AUX in expected.losses:
            torch.testing.assert_close(output.losses[AUX], expected.losses[AUX])
            assert output.losses[AUX] > 0
        else:
            assert step == 30 and output.losses[AUX] == 0
        for name, grad in expected_grads.items():
            torch.testing.assert_close(grads[name], grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", ["mutual_choice", "feature_choice"])
def test_without_a_flagged_feature_the_loss_is_0_and_so_are_its_gradients(
    architecture: str, triton_device: torch.device
):
    with_aux = make_sae(architecture, d_sae=D_SAE, aux_loss="aux_k").to(triton_device)
    without = make_sae(architecture, d_sae=D_SAE).to(triton_device)
    x = tokens(12, 8).to(triton_device)
    output = training_step(with_aux, x)
    assert output.losses[AUX].item() == 0.0
    assert torch.equal(output.loss, output.losses["mse_loss"])
    grads = gradients(with_aux, output.losses[AUX])
    assert all(grad.count_nonzero() == 0 for grad in grads.values())
    all_grads = gradients(with_aux, training_step(with_aux, x, 1).loss)
    training_step(without, x)
    expected = gradients(without, training_step(without, x, 1).loss)
    for name, grad in expected.items():
        assert torch.equal(all_grads[name], grad), name


@pytest.mark.parametrize("aux_loss", ["aux_k", "aux_zipf"])
@pytest.mark.parametrize("options", ARCHITECTURES)
def test_a_renewal_and_the_steps_after_it_ask_the_device_nothing(
    options: dict[str, Any],
    aux_loss: str,
    triton_device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(device_checks, "_is_late", lambda tensor: True)  # noqa: ARG005
    sae = make_sae(d_sae=D_SAE, aux_loss=aux_loss, **options).to(triton_device)
    for step in (0, 1):
        a_step(sae, step, triton_device).loss.backward()
    for step in (9, 10, 11, 12):
        x = tokens(12, 8, seed=step).to(triton_device)
        dead = half_dead(step).to(triton_device)
        before = sae.allocation.underused.clone()
        sae.checks.report(wait=True)
        with no_questions(triton_device):
            training_step(sae, x, step, dead).loss.backward()
        assert torch.equal(sae.allocation.underused, before) == (step != 10)
    sae.checks.report(wait=True)


@pytest.mark.parametrize("base", ["batchtopk", "topk", "jumprelu"])
def test_stock_architectures_learn_by_triton_as_by_torch(
    base: str, triton_device: torch.device, monkeypatch: pytest.MonkeyPatch
):
    saes = [make_aux_zipf(base, dtype="float32").to(triton_device) for _ in range(2)]
    for step in (0, 10, 20):
        x = tokens(16, 8, seed=step).to(triton_device)
        # the last time none is dead
        dead = dead_mask([] if step == 20 else [4, 9, 17 + step % 4]).to(triton_device)
        found = []
        for sae, backend in zip(saes, ("triton", "torch"), strict=True):
            monkeypatch.setenv(BACKEND_VARIABLE, backend)
            output = training_step(sae, x, step, dead)
            found.append((output.losses, gradients(sae, output.loss)))
        (losses, grads), (expected, expected_grads) = found
        aux = expected.get(LOSS, torch.zeros((), device=triton_device))
        torch.testing.assert_close(losses[LOSS], aux)
        for name, grad in expected_grads.items():
            torch.testing.assert_close(grads[name], grad, rtol=1e-4, atol=1e-5)
