"""SAELens' TopK and BatchTopK with another output, which ours are compared with."""

from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
from sae_lens.saes.sae import TrainingSAE

from sae_lens_alloc import AllocSAETrainer, AllocSAETrainerConfig
from sae_lens_alloc.thresholds.operating_point import at_l0
from tests.saes.conftest import gradients, set_weights, tokens, training_step
from tests.saes.transcoders import D_IN, D_OUT, D_SAE, make_rows, make_transcoder


def reference(architecture: str, **overrides: Any) -> TrainingSAE[Any]:
    sae_class, config_class = SAE_TRAINING_CLASS_REGISTRY[architecture]
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "d_in": D_IN,
        "d_out": D_OUT,
        "d_sae": D_SAE,
        "k": 3,
        **overrides,
    }
    return sae_class(config_class(**settings))


@pytest.mark.parametrize("name", ["topk", "batchtopk"])
def test_from_activations_to_themselves_they_are_the_stock_saes(name: str):
    sae_class, config_class = SAE_TRAINING_CLASS_REGISTRY[name]
    stock = sae_class(
        config_class(d_in=D_IN, d_sae=D_SAE, k=3, apply_b_dec_to_input=False)  # type: ignore[call-arg]
    )
    set_weights(stock, b_dec=0.1 * tokens(D_IN, seed=9))  # ours would start at the mean
    ours = reference(f"{name}_transcoder", d_out=D_IN, center_inputs=False)
    set_weights(ours, **dict(stock.named_parameters()))
    x = tokens(64, D_IN)
    dead = torch.arange(D_SAE) % 3 == 0
    steps = [
        training_step(sae, rows, dead=dead)
        for sae, rows in ((stock, x), (ours, torch.cat([x, x], dim=1)))
    ]
    assert steps[0].losses["auxiliary_reconstruction_loss"] > 0
    torch.testing.assert_close(steps[1].losses, steps[0].losses)
    expected = gradients(stock, steps[0].loss)
    for weight, gradient in gradients(ours, steps[1].loss).items():
        torch.testing.assert_close(gradient, expected[weight])


def test_batchtopk_transcoder_is_mutual_choice_without_what_is_ours():
    ours = make_transcoder(aux_loss="aux_k", aux_loss_coefficient=1.0, k_aux=D_OUT // 2)
    theirs = reference("batchtopk_transcoder")
    set_weights(theirs, **dict(ours.named_parameters()))
    dead = torch.arange(D_SAE) % 3 == 0
    rows = make_rows(64)
    found, expected = (training_step(sae, rows, dead=dead) for sae in (ours, theirs))
    assert torch.equal(found.feature_acts.to_dense() > 0, expected.feature_acts > 0)
    torch.testing.assert_close(found.losses, expected.losses)


@pytest.mark.parametrize("name", ["topk_transcoder", "batchtopk_transcoder"])
def test_trained_and_saved_at_its_l0(name: str, tmp_path: Path):
    sae = reference(name)
    cfg = AllocSAETrainerConfig(
        total_training_samples=64 * 200,
        train_batch_size_samples=64,
        lr=1e-2,
        lr_end=1e-3,
        dead_feature_window=20,
    )
    AllocSAETrainer(cfg, sae, (make_rows(64, seed) for seed in range(200))).fit()
    x, y = make_rows(2000, seed=999).split([D_IN, D_OUT], dim=1)
    sae.save_inference_model(tmp_path)
    saved = at_l0(SAE.load_from_disk(tmp_path), x, 3)
    acts = saved.encode(x)
    if name == "topk_transcoder":
        assert torch.equal((acts > 0).sum(1), torch.full((2000,), 3))
        torch.testing.assert_close(saved(x), sae(x), rtol=1e-4, atol=1e-4)
    assert (acts > 0).sum() / 2000 == pytest.approx(3, rel=0.01)
    explained = 1 - (saved(x) - y).square().sum() / (y - y.mean(0)).square().sum()
    assert explained > 0.5
