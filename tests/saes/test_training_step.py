"""A training step in the sparse currency equals SAELens' dense formulas."""

import math
from typing import Any

import pytest
import torch
from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.sae import TrainStepOutput

from sae_lens_alloc.ops import block_encoder
from sae_lens_alloc.saes.allocation_sae import AllocationTrainingSAE
from tests.saes.conftest import (
    ARCHITECTURES,
    DenseSAE,
    active_mask,
    assert_grads_equal,
    changed,
    feature_mask,
    gradients,
    make_sae,
    mutual_mask,
    set_weights,
    state_of,
    tokens,
    training_step,
    weights_of,
)


def first_quotas(sae: AllocationTrainingSAE[Any], n_tokens: int) -> list[int]:
    """
    Quotas of the first Feature Choice step, before anything is known about the features:
    ranks are the feature indices, m_r is proportional to 1 / (r + 16) and sums to
    floor(k * B), and the remainders decide what is rounded up.
    """
    budget = math.floor(sae.cfg.k * n_tokens)
    law = [1 / (rank + 16) for rank in range(1, sae.cfg.d_sae + 1)]
    shares = [budget * f / sum(law) for f in law]
    assert max(shares) < sae.cfg.max_density * n_tokens  # no clamping in these tests
    carry = sae.allocation.quota_carry.tolist()
    return [
        math.floor(m + remainder) for m, remainder in zip(shares, carry, strict=True)
    ]


def expected_mask(sae: AllocationTrainingSAE[Any], x: torch.Tensor) -> torch.Tensor:
    """The first allocation by brute force on dense float64 affinities."""
    flat = x.double().reshape(-1, sae.cfg.d_in)
    affinities = DenseSAE(sae).affinities(flat).detach()
    if sae.cfg.architecture() == "mutual_choice":
        return mutual_mask(affinities, math.floor(sae.cfg.k * len(flat)))
    return feature_mask(affinities, first_quotas(sae, len(flat)))


@pytest.mark.parametrize("normalize_activations", ["none", "layer_norm"])
@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_step_equals_the_dense_formulas(
    architecture: str,
    rescale: bool,
    apply_b_dec_to_input: bool,
    normalize_activations: str,
):
    sae = make_sae(
        architecture,
        dtype="float64",
        rescale_acts_by_decoder_norm=rescale,
        apply_b_dec_to_input=apply_b_dec_to_input,
        normalize_activations=normalize_activations,
    )
    # a mean and a scale far from those of a normalized input
    x = 3 * tokens(16, 8, dtype=torch.float64) + 1
    mask = expected_mask(sae, x)
    expected = DenseSAE(sae).step(x, mask)

    output = training_step(sae, x)
    grads = gradients(sae, output.loss)

    assert torch.equal(active_mask(output), mask)
    torch.testing.assert_close(
        output.feature_acts.to_dense(), expected.affinities * mask
    )
    torch.testing.assert_close(output.sae_out, expected.sae_out)
    torch.testing.assert_close(output.loss, expected.mse_loss)
    assert output.losses.keys() == {"mse_loss"}
    assert_grads_equal(grads, expected.grads)
    assert output.hidden_pre.shape == (16, 32)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_step_in_float32_over_many_blocks_of_features(
    architecture: str, monkeypatch: pytest.MonkeyPatch
):
    # blocks of 64 features, the narrowest there are: 5 of them, the last one narrower
    monkeypatch.setitem(block_encoder._BLOCK_ELEMENTS, "cpu", 1)
    sae = make_sae(architecture, d_sae=300, d_in=16, k=5)
    x = tokens(32, 16)
    mask = expected_mask(sae, x)
    expected = DenseSAE(sae).step(x, mask)
    output = training_step(sae, x)
    grads = gradients(sae, output.loss)
    assert torch.equal(active_mask(output), mask)
    torch.testing.assert_close(output.loss, expected.mse_loss.float())
    assert_grads_equal(grads, expected.grads, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradient_reaches_an_input_that_wants_it(architecture: str, rescale: bool):
    sae = make_sae(architecture, dtype="float64", rescale_acts_by_decoder_norm=rescale)
    x = tokens(16, 8, dtype=torch.float64).requires_grad_()
    mask = expected_mask(sae, x.detach())
    output = training_step(sae, x)
    grads = gradients(sae, output.loss)
    assert x.grad is not None
    actual = x.grad.clone()

    dense = DenseSAE(sae)
    x.grad = None
    affinities = dense.affinities(x) * mask
    sae_out = dense._decode(affinities) + dense.weights["b_dec"]
    (sae_out - x).pow(2).sum(1).mean().backward()
    torch.testing.assert_close(actual, x.grad)
    assert_grads_equal(grads, dense.step(x.detach(), mask).grads)


def stock_twin(sae: AllocationTrainingSAE[Any]) -> BatchTopKTrainingSAE:
    """SAELens' own BatchTopK SAE with the same weights."""
    fields = ("d_in", "d_sae", "k", "dtype", "apply_b_dec_to_input")
    cfg = BatchTopKTrainingSAEConfig(
        **{name: getattr(sae.cfg, name) for name in fields},
        rescale_acts_by_decoder_norm=sae.cfg.rescale_acts_by_decoder_norm,
        aux_loss_coefficient=sae.cfg.aux_loss_coefficient,
    )
    stock = BatchTopKTrainingSAE(cfg)
    set_weights(stock, **weights_of(sae))
    return stock


@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
@pytest.mark.parametrize("rescale", [True, False])
def test_mutual_choice_without_aux_loss_is_sae_lens_batchtopk(
    rescale: bool, apply_b_dec_to_input: bool
):
    sae = make_sae(
        rescale_acts_by_decoder_norm=rescale, apply_b_dec_to_input=apply_b_dec_to_input
    )
    stock = stock_twin(sae)
    x = tokens(64, 8)
    ours, theirs = training_step(sae, x), training_step(stock, x)
    torch.testing.assert_close(ours.feature_acts.to_dense(), theirs.feature_acts)
    torch.testing.assert_close(ours.sae_out, theirs.sae_out)
    torch.testing.assert_close(ours.loss, theirs.loss)
    assert_grads_equal(
        gradients(sae, ours.loss), gradients(stock, theirs.loss), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("n_dead", [3, 20])
@pytest.mark.parametrize("rescale", [True, False])
def test_mutual_choice_with_aux_k_is_sae_lens_batchtopk(rescale: bool, n_dead: int):
    # k_aux is d_in // 2 = 4 in both, so that 3 dead features scale the loss by 3 / 4
    sae = make_sae(
        rescale_acts_by_decoder_norm=rescale, aux_loss="aux_k", aux_loss_coefficient=0.5
    )
    stock = stock_twin(sae)
    dead = torch.zeros(32, dtype=torch.bool)
    dead[torch.randperm(32, generator=torch.Generator().manual_seed(5))[:n_dead]] = True
    x = tokens(64, 8)
    ours, theirs = training_step(sae, x, dead=dead), training_step(stock, x, dead=dead)
    assert theirs.losses["auxiliary_reconstruction_loss"] > 0.1
    torch.testing.assert_close(ours.losses, theirs.losses)
    torch.testing.assert_close(ours.loss, theirs.loss)
    assert_grads_equal(
        gradients(sae, ours.loss), gradients(stock, theirs.loss), rtol=1e-4, atol=1e-6
    )


def assert_same_step(
    one: TrainStepOutput, other: TrainStepOutput, n_tokens: int
) -> None:
    for name in ("sae_out", "feature_acts", "hidden_pre"):
        first, second = getattr(one, name), getattr(other, name)
        if first.is_sparse:
            first, second = first.to_dense(), second.to_dense()
        torch.testing.assert_close(
            first.reshape(n_tokens, -1), second.reshape(n_tokens, -1)
        )
    torch.testing.assert_close(one.losses, other.losses)


@pytest.mark.parametrize("shape", [(1,), (24,), (4, 6), (2, 3, 4)])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_leading_dimensions_are_all_part_of_the_batch(
    architecture: str, shape: tuple[int, ...]
):
    # SAELens #570: the budget was k * (size of the first dimension)
    n_tokens = math.prod(shape)
    shape = () if shape == (1,) else shape
    settings: dict[str, Any] = {"aux_loss": "aux_k", "k_aux": 2}
    dead = torch.arange(32) % 3 == 0
    x = tokens(n_tokens, 8)
    sae, flat_sae = (
        make_sae(architecture, **settings),
        make_sae(architecture, **settings),
    )
    output = training_step(sae, x.view(*shape, 8), dead=dead)
    flat = training_step(flat_sae, x, dead=dead)

    assert output.sae_out.shape == (*shape, 8)
    assert output.feature_acts.shape == (*shape, 32)
    if architecture == "mutual_choice":
        assert active_mask(flat).sum() == 3 * n_tokens
    assert_same_step(output, flat, n_tokens)
    assert_grads_equal(gradients(sae, output.loss), gradients(flat_sae, flat.loss))
    # and so does what was learned about the features
    assert not changed(state_of(flat_sae), sae)

    for mode in (True, False):
        sae.train(mode)
        acts = sae.encode(x.view(*shape, 8))
        assert acts.shape == (*shape, 32)
        torch.testing.assert_close(acts.view(n_tokens, 32), sae.encode(x))
        torch.testing.assert_close(
            sae(x.view(*shape, 8)).view(n_tokens, 8), sae(x), rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize(
    ("k", "n_tokens", "budget"),
    # floor(k * B); 0.29 * 100 = 28.999999999999996 in floating point means 29
    [(2.5, 3, 7), (0.3, 10, 3), (0.29, 100, 29), (0.01, 50, 0), (0.5, 1, 0)],
)
def test_fractional_k(k: float, n_tokens: int, budget: int):
    sae = make_sae(k=k, b_enc=2.0)
    x = tokens(n_tokens, 8)
    output = training_step(sae, x)
    assert active_mask(output).sum() == budget
    dense = DenseSAE(sae).step(x, mutual_mask(DenseSAE(sae).affinities(x), budget))
    torch.testing.assert_close(output.loss, dense.mse_loss.float())
    assert_grads_equal(gradients(sae, output.loss), dense.grads, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_budget_of_zero_reconstructs_with_the_bias_alone(architecture: str):
    sae = make_sae(architecture, k=0.01)
    x = tokens(2, 5, 8)
    output = training_step(sae, x)
    assert active_mask(output).sum() == 0
    torch.testing.assert_close(output.sae_out, sae.b_dec.expand(2, 5, 8))
    grads = gradients(sae, output.loss)
    assert grads["W_enc"].abs().sum() == grads["W_dec"].abs().sum() == 0
    # d/db mean ||b - x||^2 = 2 mean(b - x)
    torch.testing.assert_close(
        grads["b_dec"], 2 * (sae.b_dec - x).detach().mean((0, 1))
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_thresholds_recover_from_a_first_batch_without_a_budget(architecture: str):
    # 0.5 pairs for one token: nothing is selected, and no threshold can be known yet
    sae = make_sae(architecture, k=0.5)
    training_step(sae, tokens(1, 8))
    for step in range(1, 40):
        training_step(sae, tokens(64, 8, seed=step), step)
    sae.eval()
    l0 = (sae.encode(tokens(2000, 8, seed=99)) > 0).sum(1).float().mean().item()
    assert (sae.allocation.threshold > 0).all()
    assert l0 == pytest.approx(0.5, rel=0.4)


def test_budget_larger_than_the_number_of_positive_affinities_takes_them_all():
    sae = make_sae(k=32)
    x = tokens(16, 8)
    output = training_step(sae, x)
    assert torch.equal(active_mask(output), DenseSAE(sae).affinities(x) > 0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_positive_affinity_at_all(architecture: str):
    sae = make_sae(architecture, b_enc=-100.0)
    for step in range(3):
        output = training_step(sae, tokens(16, 8), step)
        assert active_mask(output).sum() == 0
        grads = gradients(sae, output.loss)
        assert all(torch.isfinite(grad).all() for grad in grads.values())
    assert all(torch.isfinite(value).all() for value in sae.state_dict().values())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_autocast_step_is_close_to_the_float32_step(architecture: str):
    settings: dict[str, Any] = {"aux_loss": "aux_k", "k_aux": 2, "d_sae": 64}
    dead = torch.arange(64) % 4 == 0
    x = tokens(64, 8)
    sae, exact_sae = (
        make_sae(architecture, **settings),
        make_sae(architecture, **settings),
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = training_step(sae, x, dead=dead)
    exact = training_step(exact_sae, x, dead=dead)
    assert output.loss.dtype == torch.float32
    # the products have 8 significant bits, and a few pairs at the cut are swapped
    torch.testing.assert_close(output.loss, exact.loss, rtol=0.02, atol=0)
    grads, exact_grads = gradients(sae, output.loss), gradients(exact_sae, exact.loss)
    for name, grad in exact_grads.items():
        assert grads[name].dtype == torch.float32
        difference = (grads[name] - grad).norm() / grad.norm()
        assert difference < 0.2, name
    assert not torch.equal(output.loss, exact.loss)  # autocast did something
    for name, buffer in sae.allocation.named_buffers():
        assert buffer.dtype in (torch.float32, torch.bool), name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bfloat16_parameters_train(architecture: str):
    sae = make_sae(architecture, dtype="bfloat16", aux_loss="aux_k", k_aux=2)
    reference = make_sae(architecture, dtype="float32", aux_loss="aux_k", k_aux=2)
    set_weights(reference, **weights_of(sae))
    dead = torch.arange(32) % 4 == 0
    x = tokens(64, 8, dtype=torch.bfloat16)
    output = training_step(sae, x, dead=dead)
    exact = training_step(reference, x.float(), dead=dead)
    torch.testing.assert_close(output.loss.float(), exact.loss, rtol=0.02, atol=0)
    for name, grad in gradients(sae, output.loss).items():
        assert grad.dtype == torch.bfloat16, name
        assert torch.isfinite(grad).all() and grad.abs().sum() > 0, name
    for name, buffer in sae.allocation.named_buffers():
        assert buffer.dtype in (torch.float32, torch.bool), name


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_batch_with_nan_or_inf_is_refused_and_teaches_nothing(
    architecture: str, value: float
):
    sae = make_sae(architecture, aux_loss="aux_zipf")
    for step in range(7):
        training_step(sae, tokens(16, 8, seed=step), step)
    x = tokens(16, 8)
    x[3, 5] = value
    before = state_of(sae)
    with pytest.raises(ValueError) as error:
        training_step(sae, x, step=7)
    assert str(error.value) == (
        "The activations of training step 7 contain NaN or Inf: check the language model "
        "and its dtype; nothing was learned from this batch."
    )
    assert changed(before, sae) == set()


@pytest.mark.parametrize("weight", ["W_enc", "b_enc", "W_dec", "b_dec"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_diverged_weights_are_reported(architecture: str, value: float, weight: str):
    sae = make_sae(architecture)
    training_step(sae, tokens(16, 8))
    set_weights(sae, **{weight: torch.full_like(getattr(sae, weight), value)})
    with pytest.raises(ValueError, match=r"training step 1\b.*diverged"):
        training_step(sae, tokens(16, 8), step=1)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_activations_beyond_the_dtype_of_the_sae_are_not_blamed_on_the_model(
    architecture: str,
):
    sae = make_sae(architecture, dtype="float16")
    x = tokens(16, 8)
    x[3, 5] = 1e5
    with pytest.raises(ValueError, match=r"numbers beyond torch.float16, the dtype of"):
        training_step(sae, x)


def test_reconstruction_that_overflows_is_reported():
    sae = make_sae()
    # decoder norms fit into float32, squared errors of 1e46 do not
    set_weights(sae, W_dec=torch.full((32, 8), 1e18), W_enc=torch.full((8, 32), 1e5))
    with pytest.raises(ValueError) as error:
        training_step(sae, tokens(16, 8), step=4)
    assert str(error.value) == (
        "The reconstruction loss became NaN or Inf at training step 4: the weights have "
        "diverged; lower the learning rate or add warm-up steps."
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_encode_in_training_mode_refuses_nan(architecture: str):
    sae = make_sae(architecture)
    x = tokens(4, 8)
    x[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN or Inf"):
        sae.encode(x)
