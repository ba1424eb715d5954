"""The encoder learns whom to select: against a pair-by-pair reference in float64."""

from typing import Any

import pytest
import torch

from sae_lens_alloc.saes.allocation_sae import AllocationTrainingSAE
from tests.saes.conftest import (
    DenseSAE,
    active_mask,
    assert_grads_equal,
    gradients,
    make_sae,
    selection_gradient,
    tokens,
    training_step,
)

B, K, MARGIN = 16, 3, 0.25


def sae_with(margin: float, **overrides: Any) -> AllocationTrainingSAE[Any]:
    return make_sae(dtype="float64", k=K, selection_margin=margin, **overrides)


@pytest.mark.parametrize("normalize_activations", ["none", "layer_norm"])
@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
@pytest.mark.parametrize("rescale", [True, False])
def test_the_gradient_is_what_selecting_a_pair_gains(
    rescale: bool, apply_b_dec_to_input: bool, normalize_activations: str
):
    settings = {
        "rescale_acts_by_decoder_norm": rescale,
        "apply_b_dec_to_input": apply_b_dec_to_input,
        "normalize_activations": normalize_activations,
    }
    x = 3 * tokens(B, 8, dtype=torch.float64) + 1
    sae, without = sae_with(MARGIN, **settings), sae_with(0.0, **settings)
    dense = DenseSAE(without)
    gradient = selection_gradient(
        dense.affinities(x).detach(),
        B * K,
        int(MARGIN * B * K),
        lambda mask: dense.step(x, mask).mse_loss.item(),
    )
    if rescale:
        gradient = gradient * without.W_dec.detach().norm(dim=1)
    inputs, _, _ = dense._normalized(x)
    if apply_b_dec_to_input:
        inputs = inputs - dense.weights["b_dec"].detach()

    output, output_without = training_step(sae, x), training_step(without, x)
    assert torch.equal(output.sae_out, output_without.sae_out)
    assert output.loss == output_without.loss

    expected = gradients(without, output_without.loss)
    expected["W_enc"] = expected["W_enc"] + inputs.T @ gradient
    expected["b_enc"] = expected["b_enc"] + gradient.sum(0)
    if apply_b_dec_to_input:
        shift = without.W_enc.detach() @ gradient.sum(0)
        expected["b_dec"] = expected["b_dec"] - shift
    assert gradient.abs().max() > 1e-3
    assert_grads_equal(gradients(sae, output.loss), expected)


def test_shapes_of_a_batch_do_not_matter():
    x = tokens(4, 4, 8, dtype=torch.float64)
    flat, shaped = sae_with(MARGIN), sae_with(MARGIN)
    expected = gradients(flat, training_step(flat, x.reshape(B, 8)).loss)
    assert_grads_equal(gradients(shaped, training_step(shaped, x).loss), expected)


def test_heads_are_averaged_as_the_loss_is():
    """SAELens takes the loss of hook_z as a mean over heads, too."""
    flat, heads = sae_with(MARGIN), sae_with(MARGIN, reshape_activations="hook_z")
    heads.turn_on_forward_pass_hook_z_reshaping()
    x = tokens(B, 8, dtype=torch.float64)
    output = training_step(heads, x.view(B, 2, 4))
    actual = gradients(heads, output.loss)
    expected = gradients(flat, training_step(flat, x).loss)
    assert_grads_equal(actual, {name: g / 2 for name, g in expected.items()})


@pytest.mark.parametrize(
    ("architecture", "steps"),
    [
        ("feature_choice", {}),
        ("mutual_choice", {"feature_choice_steps": 1}),
    ],
)
def test_feature_choice_has_no_margin(architecture: str, steps: dict[str, int]):
    x = tokens(B, 8, dtype=torch.float64)
    grads = [
        gradients(sae, training_step(sae, x).loss)
        for sae in (
            make_sae(architecture, dtype="float64", selection_margin=margin, **steps)
            for margin in (0.0, 1.0)
        )
    ]
    assert_grads_equal(grads[0], grads[1], rtol=0, atol=0)


@pytest.mark.parametrize("margin", [0.25, 1.0])
def test_who_is_selected_does_not_depend_on_the_margin(margin: float):
    """Over steps, so that guesses of the cut come into play."""
    sae, without = sae_with(margin), sae_with(0.0)
    for step in range(3):
        x = (1 + step) * tokens(B, 8, seed=step, dtype=torch.float64)
        output, expected = (training_step(s, x, step) for s in (sae, without))
        assert torch.equal(active_mask(output), active_mask(expected))
    cut = sae.allocation.cut
    assert torch.equal(cut, without.allocation.cut)
    # thresholds went along with it; where a feature never fired, they are a little lower
    assert (sae.allocation.threshold <= cut).all()
    assert (sae.allocation.threshold > 0.99 * cut).all()


def test_a_batch_with_less_than_its_budget_of_positive_affinities():
    sae = make_sae(b_enc=-1e3, dtype="float64", selection_margin=0.5)
    grads = gradients(sae, training_step(sae, tokens(B, 8, dtype=torch.float64)).loss)
    assert all(torch.isfinite(grad).all() for grad in grads.values())
    assert not grads["W_enc"].any()


@pytest.mark.parametrize("margin", [-0.1, 1.1, float("nan")])
def test_a_margin_is_a_share_of_the_budget(margin: float):
    with pytest.raises(ValueError, match=r"selection_margin must be in \[0, 1\]"):
        make_sae(selection_margin=margin)
