"""The training step of transcoders, and that it is the SAE's."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from sae_lens.saes.sae import TrainingSAE
from sae_lens.training.activation_scaler import ActivationScaler

from sae_lens_alloc import (
    AllocSAETrainer,
    AllocSAETrainerConfig,
    MutualChoiceTrainingTranscoder,
    MutualChoiceTrainingTranscoderConfig,
)
from sae_lens_alloc.saes.allocation_sae import AllocationTrainingSAE
from sae_lens_alloc.training.row_scaler import RowScaler
from tests.saes.conftest import (
    active_mask,
    assert_grads_equal,
    changed,
    gradients,
    make_sae,
    mutual_mask,
    selection_gradient,
    set_weights,
    state_of,
    tokens,
    top_k_mask,
    training_step,
)
from tests.saes.transcoders import (
    ARCHITECTURES,
    D_IN,
    D_OUT,
    D_SAE,
    make_rows,
    make_transcoder,
)


def twins(
    architecture: str, **overrides: Any
) -> tuple[AllocationTrainingSAE[Any], AllocationTrainingSAE[Any]]:
    """An SAE, and a transcoder of the same weights."""
    sae = make_sae(architecture, apply_b_dec_to_input=False, **overrides)
    transcoder = make_transcoder(
        f"{architecture}_transcoder",
        d_out=sae.cfg.d_in,
        center_inputs=False,
        **overrides,
    )
    set_weights(transcoder, **dict(sae.named_parameters()))
    with torch.no_grad():
        transcoder.allocation.load_state_dict(sae.allocation.state_dict())
    return sae, transcoder


def train(
    sae: TrainingSAE[Any], batches: Iterator[torch.Tensor], **overrides: Any
) -> None:
    """30 steps of our trainer."""
    settings: dict[str, Any] = {
        "total_training_samples": 64 * 30,
        "train_batch_size_samples": 64,
        "lr": 1e-2,
        "lr_end": 1e-3,
        "dead_feature_window": 2,
        "n_batches_for_norm_estimate": 3,
        **overrides,
    }
    AllocSAETrainer(AllocSAETrainerConfig(**settings), sae, batches).fit()


@pytest.mark.parametrize("optimizer", ["adam", "muon", "row_sparse_adam"])
@pytest.mark.parametrize("normalize", ["none", "expected_average_only_in"])
@pytest.mark.parametrize("architecture", ["mutual_choice", "feature_choice"])
def test_a_transcoder_from_activations_to_themselves_is_the_sae_bit_for_bit(
    architecture: str, normalize: str, optimizer: str
):
    rules = {"mutual_choice": "feature_choice", "feature_choice": "mutual_choice"}
    settings: dict[str, Any] = {
        "normalize_activations": normalize,
        "aux_loss": "aux_zipf",
        "selection_margin": 1.0,
        # the other rule comes first, and the budget falls
        f"{rules[architecture]}_steps": 10,
        "k_start": 5.0,
        "k_decay_steps": 10,
    }
    sae, transcoder = twins(architecture, **settings)
    before = state_of(sae)
    batches = [3 * tokens(64, 8, seed=seed) for seed in range(33)]
    train(sae, iter(batches), optimizer=optimizer)
    rows = (torch.cat([batch, batch], dim=1) for batch in batches)
    train(transcoder, rows, optimizer=optimizer)
    assert {"W_enc", "b_enc", "W_dec", "b_dec"} <= changed(before, sae)
    assert changed(state_of(sae), transcoder) == set()
    x = tokens(20, 8, seed=99)
    assert torch.equal(sae.encode(x), transcoder.encode(x))
    assert torch.equal(sae(x), transcoder(x))


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("normalize", ["none", "layer_norm"])
def test_step_equals_the_dense_formulas(normalize: str, skip: bool, rescale: bool):
    sae = make_transcoder(
        dtype="float64",
        rescale_acts_by_decoder_norm=rescale,
        skip_connection=skip,
        normalize_activations=normalize,
        aux_loss="aux_k",
        k_aux=2,
        selection_margin=1.0,
    )
    rows = make_rows(16, dtype=torch.float64)
    x, y = rows[:, :D_IN], rows[:, D_IN:]
    sae.input_mean.copy_(tokens(D_IN, seed=8))  # as an earlier batch left it
    dead = torch.arange(D_SAE) % 3 == 0
    weights = {
        name: value.detach().clone().requires_grad_()
        for name, value in sae.named_parameters()
    }
    inputs = x
    if normalize == "layer_norm":
        centred = x - x.mean(1, keepdim=True)
        inputs = centred / (centred.std(1, keepdim=True) + 1e-5)
    pre_acts = (inputs - sae.input_mean) @ weights["W_enc"] + weights["b_enc"]
    norms = weights["W_dec"].norm(dim=1).detach()
    affinities = (pre_acts * norms if rescale else pre_acts).detach()

    def output(mask: torch.Tensor) -> torch.Tensor:
        out = (pre_acts * mask) @ weights["W_dec"] + weights["b_dec"]
        return out + x @ weights["W_skip"].T if skip else out

    def error(mask: torch.Tensor) -> float:
        return (output(mask) - y).pow(2).sum().item() / len(x)

    mask = mutual_mask(affinities, 3 * 16)
    mse_loss = (output(mask) - y).pow(2).sum(1).mean()
    aux_mask = top_k_mask(affinities, dead.nonzero()[:, 0].tolist(), 2)
    aux_out = (pre_acts * aux_mask) @ weights["W_dec"]
    aux_loss = (aux_out - (y - output(mask)).detach()).pow(2).sum(1).mean()
    margin = selection_gradient(affinities, 3 * 16, 3 * 16, error)
    if rescale:
        margin = margin * norms
    loss = mse_loss + aux_loss + (margin * pre_acts).sum()
    expected = torch.autograd.grad(loss, list(weights.values()))

    found = training_step(sae, rows, dead=dead)
    assert torch.equal(active_mask(found), mask)
    torch.testing.assert_close(found.sae_out, output(mask).detach())
    assert torch.equal(found.sae_in, y)  # what SAELens' metrics compare with
    torch.testing.assert_close(found.losses["mse_loss"], mse_loss.detach())
    torch.testing.assert_close(
        found.losses["auxiliary_reconstruction_loss"], aux_loss.detach()
    )
    assert_grads_equal(
        gradients(sae, found.loss), dict(zip(weights, expected, strict=True))
    )


@pytest.mark.parametrize("optimizer", ["adam", "muon", "row_sparse_adam"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_skip_connection_learns_what_is_linear(architecture: str, optimizer: str):
    sae = make_transcoder(architecture, skip_connection=True)
    set_weights(sae, W_skip=torch.zeros(D_OUT, D_IN), W_dec=torch.zeros(D_SAE, D_OUT))
    mixing = tokens(D_OUT, D_IN, seed=5) / 4
    x = [tokens(64, D_IN, seed=seed) for seed in range(400)]
    rows = (torch.cat([part, part @ mixing.T], dim=1) for part in x)
    train(sae, rows, total_training_samples=64 * 400, optimizer=optimizer)
    # of which the features have learned a part
    assert (sae.W_skip - mixing).norm() < 0.3 * mixing.norm()


def test_kernels_take_the_step_that_torch_takes(
    triton_device: torch.device, monkeypatch: pytest.MonkeyPatch
):
    settings: dict[str, Any] = {
        "aux_loss": "aux_k",
        "k_aux": 2,
        "selection_margin": 1.0,
        "skip_connection": True,
    }
    rows = make_rows(16).to(triton_device)
    dead = torch.arange(D_SAE, device=triton_device) % 3 == 0
    outputs, grads = [], []
    for backend in ("triton", "torch"):
        monkeypatch.setenv("SAE_LENS_ALLOC_BACKEND", backend)
        sae = make_transcoder(**settings).to(triton_device)
        outputs.append(training_step(sae, rows, dead=dead))
        grads.append(gradients(sae, outputs[-1].loss))
    torch.testing.assert_close(outputs[0].losses, outputs[1].losses)
    assert_grads_equal(grads[0], grads[1], rtol=1e-4, atol=1e-5)


def test_new_transcoder_has_an_encoder_of_its_own():
    torch.manual_seed(0)
    sae = MutualChoiceTrainingTranscoder(
        MutualChoiceTrainingTranscoderConfig(
            d_in=8, d_out=8, d_sae=32, k=2, skip_connection=True
        )
    )
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.full((32,), 0.1))
    # as kaiming_uniform_ draws it for SAELens' transcoders: variance 2 / d_sae
    bound = (6 / 32) ** 0.5
    assert 0.9 * bound < sae.W_enc.abs().max() < bound
    assert sae.W_enc.var().item() == pytest.approx(2 / 32, rel=0.2)
    assert sae.W_skip.shape == (8, 8) and not sae.W_skip.any()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"d_out": 0}, "d_out must be >= 1, got 0."),
        (
            {"apply_b_dec_to_input": True},
            "apply_b_dec_to_input must be False in a transcoder, whose b_dec belongs to the "
            "output, got True.",
        ),
        (
            {"normalize_activations": "covariance_whitening"},
            "normalize_activations must be 'none', 'expected_average_only_in' or 'layer_norm' in "
            "a transcoder, whose output would need a whitening of its own, got "
            "'covariance_whitening'.",
        ),
        (
            {"reshape_activations": "hook_z"},
            "reshape_activations must be 'none' in a transcoder, as SAELens runs them, got "
            "'hook_z'.",
        ),
    ],
)
def test_settings_that_no_transcoder_can_have(settings: dict[str, Any], sentence: str):
    with pytest.raises(ValueError) as error:
        make_transcoder(**settings)
    assert str(error.value) == sentence


def test_activations_without_an_output_are_refused():
    # as SAELens' own runner would give them
    with pytest.raises(ValueError, match="d_in \\+ d_out = 13 numbers, but got 8"):
        training_step(make_transcoder(), tokens(16, D_IN))
    with pytest.raises(ValueError, match=r"shape \(B, d_in \+ d_out = 13\), got"):
        train(make_transcoder(), iter([tokens(64, D_IN)]))


def test_scaler_has_a_factor_for_the_input_and_one_for_the_output(tmp_path: Any):
    x, y = 3 * tokens(100, D_IN), 50 * tokens(100, D_OUT, seed=2)
    rows = torch.cat([x, y], dim=1)
    scaler = RowScaler(D_IN)
    scaler.estimate_scaling_factor(D_IN, iter([rows[:60], rows[60:]]), 2)
    scaled = scaler(rows)
    for part, alone in ((scaled[:, :D_IN], x), (scaled[:, D_IN:], y)):
        assert part.norm(dim=1).mean() == pytest.approx(part.shape[1] ** 0.5, rel=1e-5)
        # as SAELens' scaler would do for one of them
        stock = ActivationScaler()
        stock.estimate_scaling_factor(alone.shape[1], iter([alone]), 1)
        torch.testing.assert_close(part, stock(alone))
    torch.testing.assert_close(scaler.unscale(scaled), rows)
    scaler.save(str(tmp_path / "scaler.json"))
    loaded = RowScaler(D_IN)
    loaded.load(tmp_path / "scaler.json")
    assert torch.equal(loaded(rows), scaled)


@pytest.mark.parametrize("optimizer", ["adam", "muon", "row_sparse_adam"])
def test_training_in_units_of_its_own_is_folded_away(optimizer: str):
    # the same training in two units of input and output
    outputs = []
    for of_input, of_output in ((1.0, 1.0), (4.0, 0.125)):
        sae = make_transcoder(
            normalize_activations="expected_average_only_in", skip_connection=True
        )
        units = torch.tensor([of_input] * D_IN + [of_output] * D_OUT)
        train(sae, (make_rows(64, s) * units for s in range(40)), optimizer=optimizer)
        assert sae.cfg.normalize_activations == "none"
        sae.eval()
        x = make_rows(200, seed=50)[:, :D_IN]
        outputs.append(sae(x * of_input) / of_output)
        assert (sae.encode(x * of_input) > 0).sum() > 100
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("normalize", ["none", "layer_norm"])
@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_first_batch_gives_the_start(architecture: str, skip: bool, normalize: str):
    sae = make_transcoder(
        architecture,
        skip_connection=skip,
        normalize_activations=normalize,
        dtype="float64",
    )
    d_out, d_in = D_OUT, D_IN
    set_weights(sae, b_enc=torch.zeros(D_SAE), b_dec=torch.zeros(d_out))
    if skip:
        set_weights(sae, W_skip=torch.zeros(d_out, d_in))
    before = state_of(sae)
    rows = make_rows(64, dtype=torch.float64) + 3
    x, y = rows[:, :d_in], rows[:, d_in:]
    training_step(sae, rows, 0)

    inputs = x
    if normalize == "layer_norm":
        inputs = (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-5)
    torch.testing.assert_close(sae.input_mean, inputs.mean(0))
    torch.testing.assert_close(sae.b_dec.data, y.mean(0))
    same = {"W_enc", "b_enc", "W_dec", *(["W_skip"] if skip else [])}
    assert changed(before, sae).isdisjoint(same)
    # the second batch changes none of it
    started = state_of(sae)
    training_step(sae, 2 * rows, 1)
    assert changed(started, sae).isdisjoint({"input_mean", "b_dec", *same})


@pytest.mark.parametrize("skip", [True, False])
def test_trained_transcoder_stays_what_it_is_in_a_new_training(skip: bool):
    sae = make_transcoder(skip_connection=skip, dtype="float64").eval()
    rows = make_rows(64, dtype=torch.float64) + 3
    before = sae(rows[:, :D_IN])
    sae.train()
    training_step(sae, rows, 0)  # without an optimizer
    sae.eval()
    sae.allocation.threshold.zero_()  # which the step moves
    assert sae.input_mean.any()
    torch.testing.assert_close(sae(rows[:, :D_IN]), before)


def test_batch_that_is_not_finite_gives_no_start():
    sae = make_transcoder(skip_connection=True)
    set_weights(sae, W_skip=torch.zeros(D_OUT, D_IN), b_dec=torch.zeros(D_OUT))
    before = state_of(sae)
    rows = make_rows(16)
    rows[3, 2] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        training_step(sae, rows, 0)
    assert changed(before, sae) == set()
