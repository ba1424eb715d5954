"""Refinement: a second pass over inputs moved towards what the first one left unexplained."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE
from sae_lens.saes.jumprelu_sae import JumpReLUSAE
from sae_lens.saes.sae import TrainingSAE

from sae_lens_alloc import (
    AllocSAETrainer,
    AllocSAETrainerConfig,
    RefinedJumpReLUSAE,
    RefinedJumpReLUSAEConfig,
    calibrate_thresholds,
)
from sae_lens_alloc.saes.allocation_sae import AllocationTrainingSAE
from sae_lens_alloc.saes.refined_mutual_choice_sae import (
    RefinedMutualChoiceTrainingSAE,
)
from sae_lens_alloc.saes.saved_sae import load_sae
from sae_lens_alloc.sharing.other_forms import SAVE_FOR
from sae_lens_alloc.thresholds.operating_point import at_l0
from tests.saes.conftest import (
    DenseSAE,
    active_mask,
    assert_grads_equal,
    changed,
    gradients,
    make_sae,
    mutual_mask,
    state_of,
    tokens,
    training_step,
)

ETA = 0.4


def refined(**overrides: Any) -> RefinedMutualChoiceTrainingSAE:
    settings: dict[str, Any] = {"refinement": ETA, **overrides}
    sae = make_sae("refined_mutual_choice", **settings)
    assert isinstance(sae, RefinedMutualChoiceTrainingSAE)
    return sae


def load(folder: Path) -> RefinedJumpReLUSAE:
    saved = SAE.load_from_disk(folder)
    assert isinstance(saved, RefinedJumpReLUSAE)
    return saved


class TwoPasses:
    """Both passes by dense formulas in float64; the share that is added gets no gradient."""

    def __init__(self, sae: AllocationTrainingSAE[Any], x: torch.Tensor) -> None:
        dense = DenseSAE(sae)
        weights, cfg = dense.weights, sae.cfg
        flat = x.double().reshape(-1, cfg.d_in)
        inputs, mean, std = dense._normalized(flat)
        if cfg.apply_b_dec_to_input:
            inputs = inputs - weights["b_dec"]
        self.budget = math.floor(cfg.k * len(flat))

        def pass_over(sae_in: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            affinities = sae_in @ weights["W_enc"] + weights["b_enc"]
            if cfg.rescale_acts_by_decoder_norm:
                affinities = affinities * weights["W_dec"].norm(dim=1)
            mask = mutual_mask(affinities.detach(), self.budget)
            return affinities * mask, dense._decode(affinities * mask)

        first, recons = pass_over(inputs)
        unexplained = inputs - recons
        if not cfg.apply_b_dec_to_input:
            unexplained = unexplained - weights["b_dec"]
        share = ETA * unexplained * (first > 0).any(1, keepdim=True)
        self.first = first.detach()
        second, recons_2 = pass_over(inputs + share.detach())
        self.acts = second.detach()
        outs = [(r + weights["b_dec"]) * std + mean for r in (recons_2, recons)]
        self.sae_out = outs[0].detach()
        self.losses = [(out - flat).pow(2).sum(1).mean() for out in outs]
        names = list(weights)
        grads = torch.autograd.grad(
            torch.stack(self.losses).sum(), [weights[n] for n in names]
        )
        self.grads = dict(zip(names, grads, strict=True))


@pytest.mark.parametrize("normalize_activations", ["none", "layer_norm"])
@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
@pytest.mark.parametrize("rescale", [True, False])
def test_a_step_equals_the_dense_formulas(
    normalize_activations: str, apply_b_dec_to_input: bool, rescale: bool
):
    sae = refined(
        dtype="float64",
        normalize_activations=normalize_activations,
        apply_b_dec_to_input=apply_b_dec_to_input,
        rescale_acts_by_decoder_norm=rescale,
    )
    x = tokens(20, 8, dtype=torch.float64)
    expected = TwoPasses(sae, x)
    output = training_step(sae, x)
    assert torch.equal(active_mask(output), expected.acts != 0)
    assert not torch.equal(expected.acts != 0, expected.first != 0)
    torch.testing.assert_close(output.sae_out, expected.sae_out)
    for name, loss in zip(
        ("mse_loss", "first_pass_loss"), expected.losses, strict=True
    ):
        torch.testing.assert_close(output.losses[name], loss.detach())
    if not rescale:
        # otherwise SAELens' gradient runs through the decoder norms, where it cancels
        assert_grads_equal(gradients(sae, output.loss), expected.grads)


def test_gradients_with_decoder_norms_are_those_of_the_pre_activations():
    sae = refined(dtype="float64")
    x = tokens(20, 8, dtype=torch.float64)
    expected = TwoPasses(sae, x)
    assert_grads_equal(
        gradients(sae, training_step(sae, x).loss), expected.grads, rtol=1e-8
    )


def test_hooks_on_the_activations_change_nothing():
    plain, hooked = (refined(dtype="float64", seed=3) for _ in range(2))
    x = tokens(20, 8, dtype=torch.float64)
    hooked.hook_sae_acts_post.add_hook(lambda tensor, hook: tensor)  # noqa: ARG005
    expected = gradients(plain, training_step(plain, x).loss)
    assert_grads_equal(gradients(hooked, training_step(hooked, x).loss), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"selection_margin": 0.5, "aux_loss": "aux_zipf"},
        {"apply_b_dec_to_input": False, "selection_margin": 1.0},
    ],
    ids=str,
)
@pytest.mark.slow
def test_triton_selects_and_learns_the_same(
    options: dict[str, Any],
    triton_device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
):
    from sae_lens_alloc.ops.backend import BACKEND_VARIABLE

    found = []
    for backend in ("reference", "triton"):
        monkeypatch.setenv(BACKEND_VARIABLE, backend)
        sae = refined(**options).to(triton_device)
        dead = torch.arange(32, device=triton_device) % 5 == 0
        batches = [tokens(12, 8, seed=seed).to(triton_device) for seed in range(3)]
        for step, x in enumerate(batches[:2]):
            training_step(sae, x, step, dead)
        output = training_step(sae, batches[2], 2, dead)
        grads = gradients(sae, output.loss)
        found.append((active_mask(output), grads, sae.first_cut))
    (mask, grads, cut), (mask_2, grads_2, cut_2) = found
    assert torch.equal(mask, mask_2)
    torch.testing.assert_close(cut, cut_2)
    for name, gradient in grads.items():
        torch.testing.assert_close(grads_2[name], gradient, rtol=1e-4, atol=1e-5)


def test_the_first_cut_follows_the_steps():
    sae = refined(dtype="float64")
    cuts = []
    for step in range(2):
        x = tokens(20, 8, seed=step, dtype=torch.float64)
        cuts.append(TwoPasses(sae, x).first)
        training_step(sae, x, step)
    smallest = [float(first[first > 0].min()) for first in cuts]
    # the first one as it is, and then a twentieth of the way, as the other cut
    from sae_lens_alloc.allocation.thresholds import follow_cut

    expected = follow_cut(*map(torch.tensor, smallest))
    assert float(sae.first_cut) == pytest.approx(float(expected), rel=1e-5)


def test_feature_choice_has_one_pass():
    sae = refined(feature_choice_steps=2)
    plain = make_sae(feature_choice_steps=2)
    for step in range(2):
        x = tokens(20, 8, seed=step)
        output, expected = (training_step(each, x, step) for each in (sae, plain))
        assert torch.equal(output.sae_out, expected.sae_out)
        assert "first_pass_loss" not in output.losses
    assert sae.first_cut == 0
    x = tokens(20, 8, seed=5)
    assert torch.equal(sae.eval().encode(x), plain.eval().encode(x))


def stepped(**overrides: Any) -> RefinedMutualChoiceTrainingSAE:
    sae = refined(**overrides)
    for step in range(3):
        training_step(sae, tokens(40, 8, seed=step), step)
    return sae


@pytest.mark.parametrize("normalize_activations", ["none", "layer_norm"])
@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
def test_the_saved_sae_is_the_sae_in_evaluation_mode(
    normalize_activations: str, apply_b_dec_to_input: bool, tmp_path: Path
):
    sae = stepped(
        normalize_activations=normalize_activations,
        apply_b_dec_to_input=apply_b_dec_to_input,
    ).eval()
    sae.save_inference_model(tmp_path)
    saved = load(tmp_path)
    x = tokens(30, 8, seed=9)
    acts = saved.encode(x)
    torch.testing.assert_close(acts, sae.encode(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(saved(x), sae(x), rtol=1e-4, atol=1e-5)
    pairs, recons = sae.autoencode_pairs(x, by_threshold=True)
    torch.testing.assert_close(pairs.to_dense(), acts, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(recons, saved(x), rtol=1e-4, atol=1e-5)
    # a token gives the same whatever it came with
    torch.testing.assert_close(saved.encode(x[3:4]), acts[3:4])
    torch.testing.assert_close(saved.encode(x.view(5, 6, 8)).view(30, -1), acts)
    assert isinstance(load_sae(tmp_path), RefinedJumpReLUSAE)


def test_encoding_by_hand():
    """Two features in one dimension each; the first pass sees one of them."""
    sae = RefinedJumpReLUSAE(
        RefinedJumpReLUSAEConfig(
            d_in=2, d_sae=2, refinement=0.5, apply_b_dec_to_input=False
        )
    )
    with torch.no_grad():
        sae.W_enc.copy_(torch.tensor([[1.0, 0.0], [0.0, 0.5]]))
        sae.W_dec.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        sae.b_dec.copy_(torch.tensor([0.0, 1.0]))
        sae.first_threshold.fill_(1.0)
        sae.threshold.fill_(0.5)
    # first pass: affinities 3 and 0.75, the second is below 1; unexplained: 0 and 1.5 - 1;
    # second pass: input (3, 1.75), affinities 3 and 0.875
    assert sae.encode(torch.tensor([[3.0, 1.5]])).tolist() == [[3.0, 0.875]]
    # nothing passes the first threshold: as it is
    assert sae.encode(torch.tensor([[0.9, 1.5]])).tolist() == [
        [pytest.approx(0.9), 0.75]
    ]


def test_the_stock_form_is_the_first_pass_and_needs_no_plugin(tmp_path: Path):
    sae = stepped(selection_margin=0.0).eval()
    sae.save_inference_model(tmp_path)
    saved = load(tmp_path)
    stock = saved.stock_form()
    assert type(stock) is JumpReLUSAE
    x = tokens(30, 8, seed=9)
    affinities = DenseSAE(sae).affinities(x).detach()
    expected = affinities * (affinities > sae.first_cut)
    torch.testing.assert_close(stock.encode(x).double(), expected, rtol=1e-4, atol=1e-5)
    folder = tmp_path / "stock"
    stock.save_model(folder)
    torch.save((x, stock.encode(x)), tmp_path / "expected.pt")
    code = f"""
import sys, torch
from sae_lens import SAE
sae = SAE.load_from_disk({str(folder)!r})
x, expected = torch.load({str(tmp_path / "expected.pt")!r})
assert torch.equal(sae.encode(x), expected)
assert not any(name.startswith("sae_lens_alloc") for name in sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_stock_form_keeps_what_features_lack_of_the_cut():
    saved = RefinedJumpReLUSAE(RefinedJumpReLUSAEConfig(d_in=2, d_sae=3))
    with torch.no_grad():
        saved.first_threshold.fill_(3.0)
        saved.threshold.copy_(torch.tensor([2.0, 0.5, math.inf]))
    assert saved.stock_form().threshold.tolist() == [3.0, 0.75, math.inf]


def test_without_a_first_pass_it_is_a_jumprelu_sae(tmp_path: Path):
    sae = refined(feature_choice_steps=5)
    plain = make_sae(feature_choice_steps=5)
    x = tokens(30, 8)
    for step in range(3):
        for each in (sae, plain):
            training_step(each, tokens(40, 8, seed=step), step)
    for name, each in (("refined", sae), ("plain", plain)):
        each.save_inference_model(tmp_path / name)
    saved = load(tmp_path / "refined")
    assert saved.first_threshold.isinf().all()
    assert torch.equal(
        saved.encode(x), SAE.load_from_disk(tmp_path / "plain").encode(x)
    )


def test_folding_keeps_the_output(tmp_path: Path):
    x = tokens(30, 8, seed=9)
    for fold in ("norm", "factor"):
        sae = stepped().eval()
        expected = sae(x)
        if fold == "norm":
            sae.fold_W_dec_norm()
        else:
            sae.fold_activation_norm_scaling_factor(4.0)
        actual = sae(x) if fold == "norm" else 4.0 * sae(x / 4.0)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    sae = stepped().eval()
    sae.save_inference_model(tmp_path)
    saved = load(tmp_path)
    with torch.no_grad():  # so that there is something to fold
        norms = torch.linspace(0.5, 2, 32)
        saved.W_dec.mul_(norms[:, None])
        for tensor in (
            saved.W_enc,
            saved.b_enc,
            saved.threshold,
            saved.first_threshold,
        ):
            tensor.div_(norms)
    expected = saved(x)
    saved.fold_W_dec_norm()
    torch.testing.assert_close(saved(x), expected, rtol=1e-4, atol=1e-4)


def test_whitening_folds_into_both_passes():
    generator = torch.Generator().manual_seed(5)
    matrix = torch.randn(8, 8, generator=generator, dtype=torch.float64)
    mean = torch.randn(8, generator=generator, dtype=torch.float64)
    sae = stepped(dtype="float64").eval()
    x = tokens(30, 8, seed=9, dtype=torch.float64)
    expected = sae(x)
    # x is the whitened form of raw
    raw = x @ torch.linalg.inv(matrix) + mean
    sae.fold_activation_whitening(mean, matrix, torch.linalg.inv(matrix))
    torch.testing.assert_close(
        (sae(raw) - mean) @ matrix, expected, rtol=1e-6, atol=1e-8
    )


def test_calibration_brings_both_passes_to_the_wanted_l0():
    sae = stepped(d_sae=64)
    x = tokens(400, 8, seed=11)
    report = calibrate_thresholds(sae, x)
    assert report.l0 == pytest.approx(3, abs=0.01)
    affinities = DenseSAE(sae).affinities(x)
    first = (affinities > sae.first_cut).sum() / len(x)
    assert float(first) == pytest.approx(3, abs=0.01)


def test_at_l0_moves_the_second_pass_alone(tmp_path: Path):
    sae = stepped()
    sae.save_inference_model(tmp_path)
    saved = load(tmp_path)
    first = saved.first_threshold.clone()
    x = tokens(200, 8, seed=11)
    moved = at_l0(saved, x, 2.0)
    assert isinstance(moved, RefinedJumpReLUSAE)
    assert torch.equal(moved.first_threshold, first)
    assert float((moved.encode(x) != 0).sum() / 200) == pytest.approx(2, abs=0.01)


def test_a_checkpoint_keeps_the_first_cut(tmp_path: Path):
    sae = stepped()
    sae.save_model(tmp_path)
    loaded = TrainingSAE.load_from_disk(tmp_path)
    assert changed(state_of(sae), loaded) == set()
    for step in (3, 4):
        x = tokens(20, 8, seed=step)
        outputs = [training_step(each, x, step) for each in (sae, loaded)]
        assert torch.equal(outputs[0].sae_out, outputs[1].sae_out)
    assert changed(state_of(sae), loaded) == set()
    # as an SAE for inference
    assert isinstance(SAE.load_from_disk(tmp_path), RefinedJumpReLUSAE)


def test_parts_of_a_step_move_the_cut_as_the_step_would():
    """With as many tokens in each part, to the mean of the cuts of the parts."""
    sae = refined()
    x = tokens(40, 8)
    expected = [TwoPasses(sae, part).first for part in x.split(20)]
    training_step(sae, x[:20])
    training_step(sae, x[20:])
    mean = sum(float(first[first > 0].min()) for first in expected) / 2
    assert float(sae.first_cut) == pytest.approx(mean, rel=1e-5)


@pytest.mark.parametrize("optimizer", ["adam", "muon", "row_sparse_adam"])
def test_it_trains_with_every_optimizer(optimizer: str):
    sae = refined(d_sae=40, selection_margin=0.5)
    cfg = AllocSAETrainerConfig(
        total_training_samples=12 * 40,
        train_batch_size_samples=12,
        lr=1e-2,
        lr_end=1e-3,
        optimizer=optimizer,
    )
    batches = [tokens(12, 8, seed=seed % 4) for seed in range(40)]
    x = torch.cat(batches[:4])
    before = (sae.eval()(x) - x).square().sum().detach()
    AllocSAETrainer(cfg, sae.train(), iter(batches)).fit()
    assert (sae.eval()(x) - x).square().sum() < 0.5 * before


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"refinement": 0.0}, r"refinement must be in \(0, 1\], got 0.0."),
        ({"refinement": 1.5}, r"refinement must be in \(0, 1\], got 1.5."),
        ({"topk_steps": 4, "feature_choice_steps": None}, "topk_steps must be 0"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(settings: dict[str, Any], sentence: str):
    with pytest.raises(ValueError, match=sentence):
        refined(**settings)


@pytest.mark.parametrize("library", sorted(SAVE_FOR))
def test_other_libraries_have_no_such_form(library: str, tmp_path: Path):
    stepped().save_inference_model(tmp_path / "sae")
    saved = load(tmp_path / "sae")
    with pytest.raises(ValueError, match="encodes twice .* stock_jumprelu"):
        SAVE_FOR[library](saved, tmp_path / "out")


def test_its_settings_survive_json():
    sae = refined()
    settings = json.loads(json.dumps(sae.cfg.get_inference_sae_cfg_dict()))
    assert settings["architecture"] == "refined_jumprelu"
    assert settings["refinement"] == ETA
