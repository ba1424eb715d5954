"""How converted SAEs start: statistics, thresholds and quality, measured on activations."""

from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import (
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
)
from sae_lens.saes.jumprelu_sae import JumpReLUSAE
from sae_lens.saes.sae import TrainingSAE

from sae_lens_alloc import (
    ZipfLaw,
    calibrate_thresholds,
    convert_sae,
    select_feature_choice,
)
from sae_lens_alloc.allocation.zipf import zipf_quotas
from sae_lens_alloc.ops import block_encoder
from sae_lens_alloc.saes.allocation_sae import AllocationTrainingSAE
from sae_lens_alloc.thresholds.factor import set_l0
from tests.ops.test_no_dense_matrix import LargestTensor
from tests.saes.conftest import (
    ARCHITECTURES,
    active_mask,
    changed,
    make_sae,
    mutual_mask,
    state_of,
    statistics,
    tokens,
    training_step,
)
from tests.training.conftest import make_trainer
from tests.training.source_saes import (
    D_IN,
    D_SAE,
    EACH_SOURCE,
    EACH_SOURCE_WITH_THRESHOLDS,
    K,
    affinities_of,
    by_thresholds,
    explained_variance,
    make_source,
    reconstruct,
)
from tests.training.test_sae_trainer import synthetic


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_statistics_start_as_measured_on_the_activations(architecture: str):
    source = make_source("jumprelu")
    x = tokens(512, D_IN)
    converted = convert_sae(source, architecture, activations=x, k=2.5)
    affinities = converted.encoder().affinities(converted.process_sae_in(x))
    mask = mutual_mask(affinities, budget=1280)
    state = statistics(converted)
    assert state.cut == affinities[mask].min()
    assert torch.equal(state.density, mask.sum(0) / 512)
    assert state.density_tokens == 512
    assert state.n_steps == 0
    # of features with more than 10 events in the 512 tokens
    law = ZipfLaw.fit(state.density, 10 / 512)
    assert state.quota_law.tolist() == pytest.approx([law.alpha, law.beta])


def test_statistics_start_at_the_budget_of_the_first_step():
    source = make_source("jumprelu")
    settings = {"k": 1.5, "k_start": 6.0, "k_decay_steps": 10}
    x = tokens(512, D_IN)
    converted = convert_sae(source, "mutual_choice", activations=x, **settings)
    assert statistics(converted).density.sum().item() == pytest.approx(6.0)
    report = converted.cfg.metadata.conversion
    assert report["training_l0"] == 6.0
    assert report["l0"] == 1.5


@EACH_SOURCE
def test_report_says_how_good_the_source_is(
    name: str, training: bool, rescale: bool | None, tmp_path: Path
):
    source = make_source(name, training, rescale)
    x = tokens(512, D_IN)
    report = convert_sae(source, "mutual_choice", activations=x).cfg.metadata.conversion
    with torch.no_grad():
        expected = by_thresholds(source, tmp_path)
        acts, sae_out = expected.encode(x), expected(x)
    assert report["source_l0"] == (acts != 0).sum().item() / 512
    assert report["source_ev"] == pytest.approx(
        explained_variance(sae_out, x), abs=1e-5
    )
    assert report["n_tokens"] == 512


@EACH_SOURCE_WITH_THRESHOLDS
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_converted_sae_starts_at_the_sources_quality_at_its_l0(
    architecture: str, name: str, training: bool, rescale: bool | None
):
    source = make_source(name, training, rescale)
    x = tokens(512, D_IN)
    first = convert_sae(source, architecture, activations=x).cfg.metadata.conversion
    converted = convert_sae(source, architecture, activations=x, k=first["source_l0"])
    report = converted.cfg.metadata.conversion
    assert report["l0"] == report["source_l0"]
    assert report["ev"] == pytest.approx(report["source_ev"], abs=1e-5)
    with torch.no_grad():
        sae_out = converted.eval()(x)
    assert explained_variance(sae_out, x) == pytest.approx(report["ev"], abs=1e-5)


@pytest.mark.parametrize("name", ["batchtopk", "jumprelu", "gated", "standard"])
def test_thresholds_are_moved_to_another_l0_by_one_factor(name: str, tmp_path: Path):
    source = make_source(name)
    x = tokens(2048, D_IN)
    converted = convert_sae(source, "feature_choice", activations=x, k=2.0)
    report = converted.cfg.metadata.conversion
    assert report["source_l0"] > 3
    assert report["l0"] == pytest.approx(2.0, rel=1e-3)
    if name == "batchtopk":  # the stock SAE, moved to the same L0
        stock = by_thresholds(source, tmp_path)
        assert isinstance(stock, JumpReLUSAE)
        set_l0(stock, x, 2.0)
        assert report["ev"] == pytest.approx(explained_variance(stock(x), x), abs=1e-5)
    if name == "jumprelu":
        assert isinstance(source, TrainingSAE)
        before = source.get_parameter("threshold") * source.W_dec.norm(dim=1)
        factors = (statistics(converted).threshold / before)[before > 0]
        torch.testing.assert_close(factors, factors[:1].expand_as(factors))


def test_features_with_a_threshold_of_0_do_not_keep_the_others_from_moving():
    source = make_source("gated")
    converted = convert_sae(source, "mutual_choice", k=K)
    state = statistics(converted)
    assert (state.threshold == 0).any() and (state.threshold > 0).any()
    report = calibrate_thresholds(converted, tokens(2048, D_IN), target_l0=2.0)
    assert report.l0 == pytest.approx(2.0, rel=1e-3)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("others", ["positive", "zero"])
def test_silenced_features_stay_silenced_and_keep_the_others_l0(
    architecture: str, others: str
):
    """By hand: of a factor that gives the source's own L0, no threshold moves."""
    source, x = make_source("jumprelu", training=False), tokens(500, D_IN)
    threshold = torch.full((D_SAE,), torch.inf)
    threshold[8:] = torch.linspace(0.2, 1.5, D_SAE - 8) if others == "positive" else 0.0
    with torch.no_grad():
        source.get_parameter("threshold").copy_(threshold)
    converted = convert_sae(source, architecture, activations=x)
    active = source.encode(x) > 0
    l0 = active.sum().item() / len(x)
    assert l0 > 1
    assert active[:, :8].sum() == 0
    report = converted.cfg.metadata.conversion
    assert report["source_l0"] == pytest.approx(l0)
    assert report["l0"] == pytest.approx(l0, abs=1 / len(x))
    assert converted.allocation.threshold.isinf().tolist() == [
        i < 8 for i in range(D_SAE)
    ]
    found = converted.eval().encode(x).to_dense() > 0
    assert (found != active).sum() <= 1

    # at another L0 all others move by one factor
    half = convert_sae(source, architecture, activations=x, k=l0 / 2)
    assert half.cfg.metadata.conversion["l0"] == pytest.approx(l0 / 2, abs=1 / len(x))
    ratios = half.allocation.threshold[8:] / converted.allocation.threshold[8:]
    torch.testing.assert_close(ratios, ratios[:1].expand_as(ratios))


def test_a_feature_without_a_decoder_row_is_silenced():
    source, x = make_source("jumprelu"), tokens(500, D_IN)
    with torch.no_grad():
        source.W_dec[3] = 0.0
        source.get_parameter("threshold")[3] = torch.inf
    converted = convert_sae(source, "mutual_choice", activations=x)
    report = converted.cfg.metadata.conversion
    assert report["l0"] == pytest.approx(report["source_l0"], abs=1 / len(x))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_silenced_feature_does_not_harm_the_training(architecture: str):
    source, x = make_source("jumprelu"), tokens(500, D_IN)
    with torch.no_grad():
        source.get_parameter("threshold")[:8] = torch.inf
    converted = convert_sae(source, architecture, activations=x)
    for step in range(20):
        training_step(converted, x, step)
    assert not converted.allocation.threshold.isnan().any()
    calibrate_thresholds(converted, x)
    l0 = (converted.eval().encode(x).to_dense() > 0).sum().item() / len(x)
    assert l0 == pytest.approx(converted.cfg.k, abs=1 / len(x))


def test_a_reconstruction_that_is_not_finite_is_refused():
    source = make_source("topk")
    with torch.no_grad():
        source.W_dec.fill_(3e38)
    with pytest.raises(ValueError, match="explains .* of the variance"):
        convert_sae(source, "mutual_choice", activations=tokens(500, D_IN))


def test_thresholds_of_nan_are_refused():
    source = make_source("jumprelu", training=False)
    with torch.no_grad():
        source.get_parameter("threshold")[:2] = torch.nan
    with pytest.raises(ValueError, match="2 thresholds of the SAE are NaN"):
        convert_sae(source, "mutual_choice", k=K)


def test_a_calibration_that_fails_leaves_the_thresholds():
    converted = convert_sae(make_source("topk"), "mutual_choice")
    assert not converted.allocation.threshold.any()
    with pytest.raises(ValueError, match="no thresholds give an L0 of 31"):
        calibrate_thresholds(converted, tokens(500, D_IN), 31.0)
    assert not converted.allocation.threshold.any()


def test_topk_starts_with_one_threshold_at_its_own_l0():
    source = make_source("topk", rescale=True)
    x = tokens(512, D_IN)
    converted = convert_sae(source, "mutual_choice", activations=x)
    state = statistics(converted)
    assert (state.threshold == state.threshold[0]).all()
    affinities = affinities_of(source, x)
    mask = mutual_mask(affinities, budget=K * 512)
    report = converted.cfg.metadata.conversion
    assert report["l0"] == K
    expected = explained_variance(reconstruct(converted, x, mask), x)
    assert report["ev"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [("mutual_choice", {"feature_choice_steps": 5}), ("feature_choice", {})],
)
def test_feature_choice_starts_with_the_quotas_of_the_measured_law(
    architecture: str, settings: dict[str, int]
):
    source = make_source("batchtopk", rescale=True)
    converted = convert_sae(
        source, architecture, activations=tokens(2048, D_IN), **settings
    )
    state = statistics(converted)
    ranks = state.density.argsort(descending=True, stable=True).argsort()
    law = ZipfLaw(*state.quota_law.tolist(), scale=1.0)
    owed = zipf_quotas(law, D_SAE, K * 64, max_quota=0.6 * 64)[ranks]
    quotas = (owed + state.quota_carry).floor().long()
    thresholds = state.threshold.clone()
    x = tokens(64, D_IN, seed=3)
    affinities = converted.encoder().affinities(converted.process_sae_in(x))
    expected = select_feature_choice(affinities, quotas).to_dense() != 0
    assert torch.equal(active_mask(training_step(converted, x)), expected)
    # tracked from the source's thresholds on, by at most one step
    factors = statistics(converted).threshold / thresholds
    assert factors.min() > 0.95 and factors.max() < 1.17
    assert state.density_tokens == 2048 + 64


def test_mutual_choice_starts_from_the_measured_cut_and_densities():
    source = make_source("batchtopk", rescale=True)
    converted = convert_sae(source, "mutual_choice", activations=tokens(2048, D_IN))
    state = statistics(converted)
    cut, density = state.cut.clone(), state.density.clone()
    x = tokens(64, D_IN, seed=3)
    counts = active_mask(training_step(converted, x)).sum(0)
    assert state.cut == pytest.approx(cut.item(), rel=0.1)
    torch.testing.assert_close(state.density, (2048 * density + counts) / (2048 + 64))


def test_underused_features_are_flagged_at_the_first_step():
    source = make_source("batchtopk", rescale=True)
    with torch.no_grad():
        source.get_parameter("b_enc")[:4] = -100.0
    converted = convert_sae(source, "mutual_choice", activations=tokens(2048, D_IN))
    output = training_step(converted, tokens(64, D_IN, seed=3))
    assert statistics(converted).underused[:4].all()
    assert output.losses["auxiliary_reconstruction_loss"] > 0


def test_without_activations_a_stock_sae_starts_without_statistics():
    converted = convert_sae(make_source("batchtopk"), "feature_choice")
    state = statistics(converted)
    assert state.cut == 0 and state.density_tokens == 0
    assert converted.cfg.metadata.conversion is None
    training_step(converted, tokens(64, D_IN))
    assert state.cut > 0


def trained_by_us(architecture: str, **settings: Any) -> AllocationTrainingSAE[Any]:
    sae = make_sae(architecture, d_in=D_IN, d_sae=D_SAE, k=K, **settings)
    for step in range(7):
        training_step(sae, tokens(64, D_IN, seed=step), step)
    return sae


@pytest.mark.parametrize("source_name", ARCHITECTURES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_statistics_of_our_own_saes_are_carried_and_schedules_start_anew(
    architecture: str, source_name: str
):
    source = trained_by_us(source_name)
    before = state_of(source)
    converted = convert_sae(source, architecture)
    assert changed(before, converted) == {"allocation.n_steps"}
    assert statistics(converted).n_steps == 0
    assert converted.step_count.last == 0


def test_the_first_rule_of_the_schedule_comes_first_again():
    source = trained_by_us("mutual_choice", feature_choice_steps=4)
    converted = convert_sae(source, "mutual_choice", feature_choice_steps=4)
    x = tokens(64, D_IN, seed=9)
    affinities = converted.encoder().affinities(converted.process_sae_in(x))
    mutual = mutual_mask(affinities, K * 64)
    # the source is past its Feature Choice and counts on where it stopped
    assert torch.equal(active_mask(training_step(source, x, 7)), mutual)
    assert not torch.equal(active_mask(training_step(converted, x, 0)), mutual)


def test_the_law_that_shaped_the_densities_is_kept():
    x = tokens(2048, D_IN)
    by_feature = trained_by_us("feature_choice")
    kept = statistics(convert_sae(by_feature, "feature_choice", activations=x))
    assert torch.equal(kept.quota_law, by_feature.allocation.quota_law)
    by_mutual = trained_by_us("mutual_choice")
    fitted = statistics(convert_sae(by_mutual, "feature_choice", activations=x))
    assert not torch.equal(fitted.quota_law, by_mutual.allocation.quota_law)


def test_activations_that_do_not_fit_are_refused():
    source = make_source("topk")
    for bad in (tokens(64, D_IN + 1), tokens(4, 4, D_IN)):
        with pytest.raises(ValueError, match=r"must have shape \(tokens, 8\)"):
            convert_sae(source, "mutual_choice", activations=bad)
    with pytest.raises(ValueError, match="activations contain NaN"):
        convert_sae(
            source, "mutual_choice", activations=torch.full((64, D_IN), torch.nan)
        )


@pytest.mark.parametrize("name", ["topk", "batchtopk"])
def test_no_tensor_of_the_start_is_near_tokens_times_features(
    name: str, monkeypatch: pytest.MonkeyPatch
):
    # blocks of 64 features, or 64 tokens for topk
    monkeypatch.setattr(block_encoder, "_BLOCK_ELEMENTS", {"cpu": 1})
    n_tokens, n_features = 1024, 1024
    source = make_source(name, d_sae=n_features)
    if isinstance(source, BatchTopKTrainingSAE):
        source.topk_threshold.fill_(2.5)  # active pairs are held, and should be few
    largest = LargestTensor()
    with largest:
        convert_sae(source, "mutual_choice", activations=tokens(n_tokens, D_IN))
    assert largest.n_elements < n_tokens * n_features // 4, largest.operation


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_trained_sae_is_fine_tuned_from_its_own_quality(
    architecture: str, tmp_path: Path
):
    torch.manual_seed(0)
    source = BatchTopKTrainingSAE(
        BatchTopKTrainingSAEConfig(d_in=D_IN, d_sae=64, k=K, topk_threshold_lr=0.1)
    )
    batches = [synthetic(64, seed) for seed in range(160)]
    make_trainer(source, batches[:80], 80).fit()
    converted = convert_sae(source, architecture, activations=synthetic(4096, seed=500))
    report = converted.cfg.metadata.conversion
    held_out = synthetic(4096, seed=501)
    stock = by_thresholds(source, tmp_path / "stock")
    assert isinstance(stock, JumpReLUSAE)
    set_l0(stock, synthetic(4096, seed=500), K)
    ev_before = explained_variance(stock(held_out), held_out)
    assert report["l0"] == pytest.approx(K, rel=1e-3)
    assert explained_variance(converted.eval()(held_out), held_out) == pytest.approx(
        ev_before, abs=1e-4
    )

    # as SAELens' from_pretrained_path would load it
    converted.save_model(tmp_path / "converted")
    loaded = TrainingSAE.load_from_disk(tmp_path / "converted")
    assert changed(state_of(converted), loaded) == set()
    assert isinstance(loaded, AllocationTrainingSAE)
    make_trainer(loaded, batches[80:], 80).fit()
    calibrate_thresholds(loaded, synthetic(4096, seed=500))
    after = loaded.eval()(held_out)
    assert explained_variance(after, held_out) > ev_before
