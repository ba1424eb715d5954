"""Matryoshka Mutual Choice: SAELens' nested losses, in the sparse currency."""

from typing import Any

import pytest
import torch
from sae_lens import (
    SAE,
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
)

from sae_lens_alloc import MatryoshkaMutualChoiceTrainingSAEConfig
from sae_lens_alloc.saes.allocation_sae import AllocationTrainingSAE
from tests.saes.conftest import (
    DenseSAE,
    assert_grads_equal,
    gradients,
    make_sae,
    mutual_mask,
    selection_gradient,
    set_weights,
    tokens,
    training_step,
    weights_of,
)

WIDTHS = [4, 16, 32]


def make(**overrides: Any) -> AllocationTrainingSAE[Any]:
    settings: dict[str, Any] = {"matryoshka_widths": WIDTHS, **overrides}
    return make_sae("matryoshka_mutual_choice", **settings)


@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("widths", [WIDTHS, WIDTHS[:-1]])
def test_without_aux_loss_it_is_sae_lens_matryoshka_batchtopk(
    rescale: bool, apply_b_dec_to_input: bool, widths: list[int]
):
    sae = make(
        rescale_acts_by_decoder_norm=rescale,
        apply_b_dec_to_input=apply_b_dec_to_input,
        matryoshka_widths=widths,
    )
    stock = MatryoshkaBatchTopKTrainingSAE(
        MatryoshkaBatchTopKTrainingSAEConfig(
            d_in=8,
            d_sae=32,
            k=3,
            apply_b_dec_to_input=apply_b_dec_to_input,
            rescale_acts_by_decoder_norm=rescale,
            matryoshka_widths=list(WIDTHS),
        )
    )
    set_weights(stock, **weights_of(sae))
    x = tokens(64, 8)
    ours, theirs = training_step(sae, x), training_step(stock, x)
    theirs.losses.pop("auxiliary_reconstruction_loss")  # 0
    torch.testing.assert_close(ours.losses, theirs.losses)
    assert set(ours.losses) == {"mse_loss", "inner_mse_loss_4", "inner_mse_loss_16"}
    torch.testing.assert_close(ours.loss, theirs.loss)
    torch.testing.assert_close(ours.sae_out, theirs.sae_out)
    assert_grads_equal(
        gradients(sae, ours.loss), gradients(stock, theirs.loss), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("normalize_activations", ["none", "layer_norm"])
def test_the_margin_counts_the_mean_gain_of_a_pairs_levels(normalize_activations: str):
    settings = {"dtype": "float64", "normalize_activations": normalize_activations}
    x = 2 * tokens(16, 8, dtype=torch.float64) + 1
    sae, without = make(selection_margin=0.25, **settings), make(**settings)
    dense = DenseSAE(without)

    affinities = dense.affinities(x).detach()
    selected = mutual_mask(affinities, 48)

    def error(mask: torch.Tensor) -> float:
        """How much more than with what is selected."""
        levels = [torch.arange(32) < width for width in WIDTHS]
        changes = [
            dense.step(x, mask & level).mse_loss.item()
            - dense.step(x, selected & level).mse_loss.item()
            for level in levels
            if (mask & level != selected & level).any()
        ]
        return sum(changes) / max(len(changes), 1)

    gradient = selection_gradient(affinities, 48, 12, error)
    gradient *= without.W_dec.detach().norm(dim=1)
    inputs = dense._normalized(x)[0] - dense.weights["b_dec"].detach()

    output, output_without = training_step(sae, x), training_step(without, x)
    expected = gradients(without, output_without.loss)
    expected["W_enc"] = expected["W_enc"] + inputs.T @ gradient
    expected["b_enc"] = expected["b_enc"] + gradient.sum(0)
    expected["b_dec"] = expected["b_dec"] - without.W_enc.detach() @ gradient.sum(0)
    assert_grads_equal(gradients(sae, output.loss), expected)


def test_with_the_auxiliary_loss_and_hooks_the_losses_are_the_same():
    x = tokens(64, 8)
    dead = torch.arange(32) < 5
    plain, hooked = make(aux_loss="aux_k"), make(aux_loss="aux_k")
    hooked.hook_sae_acts_post.add_hook(lambda tensor, *, hook: tensor)  # noqa: ARG005
    expected, actual = (training_step(sae, x, dead=dead) for sae in (plain, hooked))
    assert set(expected.losses) == {
        "mse_loss",
        "inner_mse_loss_4",
        "inner_mse_loss_16",
        "auxiliary_reconstruction_loss",
    }
    torch.testing.assert_close(actual.losses, expected.losses)
    assert_grads_equal(
        gradients(hooked, actual.loss),
        gradients(plain, expected.loss),
        rtol=1e-4,
        atol=1e-5,
    )


def test_it_is_saved_as_a_jumprelu_sae(tmp_path: Any):
    sae = make(selection_margin=0.25)
    x = tokens(64, 8)
    training_step(sae, x)
    sae.save_inference_model(tmp_path)
    loaded = SAE.load_from_disk(tmp_path)
    assert loaded.cfg.architecture() == "jumprelu"
    torch.testing.assert_close(loaded(x), sae.eval()(x))


def test_padding_does_not_reach_inner_levels(triton_device: torch.device):
    """On a GPU what is outside a level becomes padding; the result is that of the CPU."""
    x = tokens(24, 8)
    on_cpu, on_device = make(b_enc=-2.0), make(b_enc=-2.0).to(triton_device)
    expected = training_step(on_cpu, x)
    actual = training_step(on_device, x.to(triton_device))
    for name, loss in expected.losses.items():
        torch.testing.assert_close(actual.losses[name].cpu(), loss)


@pytest.mark.parametrize("widths", [[], [32], [0, 32], [16, 16], [16, 8], [64]])
def test_widths_must_ascend_below_d_sae(widths: list[int]):
    with pytest.raises(ValueError, match="matryoshka_widths must be ascending"):
        MatryoshkaMutualChoiceTrainingSAEConfig(
            d_in=8, d_sae=32, k=3, matryoshka_widths=widths
        )
