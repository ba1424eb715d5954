"""Hooks on the SAE's hook points see and change what SAELens' own architectures let them."""

from typing import Any

import pytest
import torch
from transformer_lens.hook_points import HookPoint

from tests.saes.conftest import (
    ARCHITECTURES,
    DenseSAE,
    active_mask,
    assert_grads_equal,
    gradients,
    make_sae,
    set_weights,
    tokens,
    training_step,
)

HOOK_POINTS = (
    "hook_sae_input",
    "hook_sae_acts_pre",
    "hook_sae_acts_post",
    "hook_sae_recons",
)
SETTINGS: dict[str, Any] = {"dtype": "float64", "aux_loss": "aux_k", "k_aux": 2}
DEAD = torch.arange(32) % 6 == 0


class Recorder:
    """Hook that keeps what it sees and returns nothing, so that nothing changes."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def __call__(self, tensor: torch.Tensor, hook: HookPoint) -> None:
        self.seen.append(tensor.detach().clone())


def identity(tensor: torch.Tensor, hook: HookPoint) -> torch.Tensor:
    return tensor * 1.0


@pytest.mark.parametrize("normalize_activations", ["none", "layer_norm"])
@pytest.mark.parametrize("hook_name", HOOK_POINTS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_identity_hook_changes_neither_loss_nor_gradients(
    architecture: str, hook_name: str, normalize_activations: str
):
    settings: dict[str, Any] = {
        **SETTINGS,
        "normalize_activations": normalize_activations,
    }
    plain, hooked = (
        make_sae(architecture, **settings),
        make_sae(architecture, **settings),
    )
    getattr(hooked, hook_name).add_hook(identity)
    for step in range(2):  # at the second step the running cut is known
        x = tokens(16, 8, seed=step, dtype=torch.float64)
        expected = training_step(plain, x, step, dead=DEAD)
        output = training_step(hooked, x, step, dead=DEAD)
        assert torch.equal(active_mask(output), active_mask(expected))
        torch.testing.assert_close(output.sae_out, expected.sae_out)
        torch.testing.assert_close(output.losses, expected.losses)
        assert_grads_equal(
            gradients(hooked, output.loss), gradients(plain, expected.loss)
        )
    torch.testing.assert_close(hooked.state_dict(), plain.state_dict())


@pytest.mark.parametrize("shape", [(), (16,), (4, 4)])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_hooks_see_dense_tensors_of_the_inputs_shape(
    architecture: str, shape: tuple[int, ...]
):
    x = tokens(*shape, 8, dtype=torch.float64)
    sae = make_sae(architecture, **SETTINGS)
    recorders = {name: Recorder() for name in HOOK_POINTS}
    for name, recorder in recorders.items():
        getattr(sae, name).add_hook(recorder)
    output = training_step(sae, x)
    seen = {name: recorder.seen for name, recorder in recorders.items()}

    assert all(len(tensors) == 1 for tensors in seen.values())
    torch.testing.assert_close(seen["hook_sae_input"][0], x)
    hidden_pre = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    torch.testing.assert_close(seen["hook_sae_acts_pre"][0], hidden_pre.detach())
    affinities = DenseSAE(sae).affinities(x).detach()
    acts = affinities * active_mask(output).view(*shape, 32)
    torch.testing.assert_close(seen["hook_sae_acts_post"][0], acts)
    torch.testing.assert_close(seen["hook_sae_recons"][0], output.sae_out.detach())


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_acts_post_hook_changes_what_is_decoded_and_gradients_follow(
    architecture: str, rescale: bool
):
    factors = torch.ones(32, dtype=torch.float64)
    factors[:16] = 0.0
    factors[20] = 2.0

    def scale_features(tensor: torch.Tensor, hook: HookPoint) -> torch.Tensor:
        return tensor * factors

    settings: dict[str, Any] = {
        "dtype": "float64",
        "rescale_acts_by_decoder_norm": rescale,
        "k": 6,
    }
    plain, hooked = (
        make_sae(architecture, **settings),
        make_sae(architecture, **settings),
    )
    hooked.hook_sae_acts_post.add_hook(scale_features)
    x = tokens(16, 8, dtype=torch.float64)
    # the allocation comes before the hook
    mask = active_mask(training_step(plain, x))
    assert mask[:, :16].any() and mask[:, 20].any()
    expected = DenseSAE(hooked).step(x, mask * factors)

    output = training_step(hooked, x)
    torch.testing.assert_close(
        output.feature_acts, expected.affinities * mask * factors
    )
    torch.testing.assert_close(output.sae_out, expected.sae_out)
    torch.testing.assert_close(output.loss, expected.mse_loss)
    assert_grads_equal(gradients(hooked, output.loss), expected.grads)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_acts_pre_hook_changes_who_is_selected(architecture: str):
    signs = torch.ones(32, dtype=torch.float64)
    signs[::3] = -1

    def flip(tensor: torch.Tensor, hook: HookPoint) -> torch.Tensor:
        return tensor * signs

    hooked = make_sae(architecture, dtype="float64")
    flipped = make_sae(architecture, dtype="float64")
    set_weights(flipped, W_enc=flipped.W_enc * signs, b_enc=flipped.b_enc * signs)
    x = tokens(16, 8, dtype=torch.float64)
    before = training_step(make_sae(architecture, dtype="float64"), x)
    hooked.hook_sae_acts_pre.add_hook(flip)
    output, expected = training_step(hooked, x), training_step(flipped, x)
    assert not torch.equal(active_mask(output), active_mask(before))
    torch.testing.assert_close(output.feature_acts, expected.feature_acts.to_dense())
    torch.testing.assert_close(output.loss, expected.loss)
    expected_grads = gradients(flipped, expected.loss)
    expected_grads["W_enc"] = expected_grads["W_enc"] * signs
    expected_grads["b_enc"] = expected_grads["b_enc"] * signs
    assert_grads_equal(gradients(hooked, output.loss), expected_grads)


def test_recons_hook_replaces_the_reconstruction():
    def zeros(tensor: torch.Tensor, hook: HookPoint) -> torch.Tensor:
        return torch.zeros_like(tensor)

    sae = make_sae()
    sae.hook_sae_recons.add_hook(zeros)
    x = tokens(16, 8)
    output = training_step(sae, x)
    assert not output.sae_out.any()
    torch.testing.assert_close(output.loss, x.pow(2).sum(1).mean())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_input_hook_changes_what_is_encoded_but_not_the_target(architecture: str):
    def double(tensor: torch.Tensor, hook: HookPoint) -> torch.Tensor:
        return 2 * tensor

    hooked, plain = (
        make_sae(architecture, dtype="float64"),
        make_sae(architecture, dtype="float64"),
    )
    hooked.hook_sae_input.add_hook(double)
    x = tokens(16, 8, dtype=torch.float64)
    output, doubled = training_step(hooked, x), training_step(plain, 2 * x)
    torch.testing.assert_close(output.sae_out, doubled.sae_out)
    torch.testing.assert_close(output.loss, (doubled.sae_out - x).pow(2).sum(1).mean())
    expected = gradients(plain, (doubled.sae_out - x).pow(2).sum(1).mean())
    assert_grads_equal(gradients(hooked, output.loss), expected)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_hooks_act_on_encode_and_forward(architecture: str, training: bool):
    def silence_even_features(tensor: torch.Tensor, hook: HookPoint) -> torch.Tensor:
        return tensor * (torch.arange(32) % 2)

    sae = make_sae(architecture)
    for step in range(5):
        training_step(sae, tokens(64, 8, seed=step), step)
    sae.train(training)
    x = tokens(4, 16, 8)
    acts = sae.encode(x)
    assert acts[..., ::2].any()
    silenced = acts * (torch.arange(32) % 2)
    sae.hook_sae_acts_post.add_hook(silence_even_features)
    torch.testing.assert_close(sae.encode(x), silenced)
    torch.testing.assert_close(sae(x), sae.decode(silenced))


def test_backward_hook_gets_the_gradient_of_the_dense_activations():
    sae = make_sae(dtype="float64")
    recorder = Recorder()
    sae.hook_sae_acts_post.add_hook(recorder, dir="bwd")
    x = tokens(16, 8, dtype=torch.float64)
    output = training_step(sae, x)
    gradients(sae, output.loss)
    # x^ = acts / ||W_dec|| W_dec + b_dec, hence d/d acts = d/d x^ (W_dec / ||W_dec||)^T
    grad_out = 2 * (output.sae_out - x).detach() / 16
    unit_rows = sae.W_dec.detach() / sae.W_dec.detach().norm(dim=1, keepdim=True)
    torch.testing.assert_close(recorder.seen[0], grad_out @ unit_rows.T)


def test_run_with_cache_has_every_hook_point():
    sae = make_sae()
    sae.eval()
    x = tokens(4, 8)
    _, cache = sae.run_with_cache(x)
    assert {*HOOK_POINTS, "hook_sae_output"} <= set(cache)
    torch.testing.assert_close(cache["hook_sae_acts_post"], sae.encode(x))


def test_removing_the_hooks_restores_the_sparse_step():
    sae = make_sae()
    sae.hook_sae_acts_post.add_hook(identity)
    assert not training_step(sae, tokens(16, 8)).feature_acts.is_sparse
    sae.reset_hooks()
    assert training_step(sae, tokens(16, 8), step=1).feature_acts.is_sparse
