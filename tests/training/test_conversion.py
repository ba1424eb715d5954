"""Conversion of SAELens' SAEs to Mutual Choice and Feature Choice, and how they start."""

import copy
import json
from pathlib import Path

import pytest
import torch
from sae_lens import (
    GatedTrainingSAE,
)
from sae_lens.registry import SAE_CLASS_REGISTRY
from sae_lens.saes.sae import SAEMetadata

from sae_lens_alloc import (
    convert_sae,
)
from tests.saes.conftest import (
    ARCHITECTURES,
    set_weights,
    statistics,
    tokens,
    training_step,
)
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


@EACH_SOURCE
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_same_affinities_and_same_reconstruction_from_the_same_pairs(
    architecture: str, name: str, training: bool, rescale: bool | None
):
    source = make_source(name, training, rescale)
    x = tokens(64, D_IN)
    with torch.no_grad():
        mask, sae_out = source.encode(x) != 0, source(x)
    assert 32 < mask.sum() < mask.numel() - 32
    converted = convert_sae(source, architecture, k=K)
    affinities = converted.encoder().affinities(converted.process_sae_in(x))
    # what does not rank its features is ranked by decoder norm from now on
    assert converted.cfg.rescale_acts_by_decoder_norm == (rescale is not False)
    expected = affinities_of(source, x)
    if rescale is None:
        expected = expected * source.W_dec.norm(dim=1)
    torch.testing.assert_close(affinities, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        reconstruct(converted, x, mask), sae_out, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
@pytest.mark.parametrize(
    "normalize_activations",
    ["none", "layer_norm", "constant_norm_rescale", "expected_average_only_in"],
)
@pytest.mark.parametrize("name", ["topk", "jumprelu", "gated", "mutual_choice"])
def test_input_normalization_and_decoder_bias_are_carried(
    name: str, normalize_activations: str, apply_b_dec_to_input: bool
):
    source = make_source(
        name,
        training=name == "mutual_choice",
        normalize_activations=normalize_activations,
        apply_b_dec_to_input=apply_b_dec_to_input,
    )
    source.eval()
    x = 3 * tokens(64, D_IN) + 1
    with torch.no_grad():
        mask, sae_out = source.encode(x) != 0, source(x)
    converted = convert_sae(source, "mutual_choice", k=K)
    assert converted.cfg.normalize_activations == normalize_activations
    torch.testing.assert_close(
        reconstruct(converted, x, mask), sae_out, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@EACH_SOURCE_WITH_THRESHOLDS
def test_evaluation_mode_is_the_source_at_inference_where_it_has_thresholds(
    architecture: str,
    name: str,
    training: bool,
    rescale: bool | None,
    dtype: str,
    tmp_path: Path,
):
    source = make_source(name, training, rescale, dtype=dtype)
    converted = convert_sae(source, architecture, k=K).eval()
    x = tokens(64, D_IN, dtype=converted.dtype)
    with torch.no_grad():
        expected = by_thresholds(source, tmp_path)
        mask = expected.encode(x) != 0
        assert 32 < mask.sum() < mask.numel() - 32
        assert torch.equal(converted.encode(x) != 0, mask)
        torch.testing.assert_close(
            converted(x), expected(x), rtol=1e-5, atol=1e-5, check_dtype=False
        )


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("name", ["topk", "batchtopk", "mutual_choice"])
def test_ranking_by_decoder_norm_can_be_switched(
    name: str, rescale: bool, tmp_path: Path
):
    source = make_source(name, rescale=rescale)
    x = tokens(256, D_IN)
    converted = convert_sae(
        source,
        "mutual_choice",
        activations=x,
        rescale_acts_by_decoder_norm=not rescale,
    )
    norms = source.W_dec.norm(dim=1)
    affinities = converted.encoder().affinities(converted.process_sae_in(x))
    expected = affinities_of(source, x) * (1 / norms if rescale else norms)
    torch.testing.assert_close(affinities, expected, rtol=1e-4, atol=1e-6)
    # who the source activates is its own affair
    report = converted.cfg.metadata.conversion
    with torch.no_grad():
        source_out = by_thresholds(source, tmp_path)(x)
    assert report["source_ev"] == pytest.approx(
        explained_variance(source_out, x), abs=1e-5
    )


@pytest.mark.parametrize("name", ["topk", "standard"])
def test_heads_are_flattened_as_for_any_training_sae(name: str):
    source = make_source(
        name,
        training=False,
        reshape_activations="hook_z",
        metadata=SAEMetadata(hook_name="blocks.0.attn.hook_z"),
    )
    converted = convert_sae(source, "mutual_choice", k=K)
    assert converted.cfg.reshape_activations == "hook_z"
    x = tokens(64, 2, D_IN // 2)
    with torch.no_grad():
        mask, sae_out = source.encode(x) != 0, source(x)
    torch.testing.assert_close(
        reconstruct(converted, x.flatten(1), mask), sae_out.flatten(1)
    )


def test_a_gated_sae_is_a_jumprelu_sae_by_hand():
    source = make_source("gated", d_in=1, d_sae=2)
    assert isinstance(source, GatedTrainingSAE)
    set_weights(
        source,
        W_enc=torch.tensor([[1.0, 1.0]]),
        W_dec=torch.tensor([[2.0], [1.0]]),
        r_mag=torch.tensor([2.0, 3.0]).log(),
        b_mag=torch.tensor([1.0, 0.5]),
        b_gate=torch.tensor([-0.5, 0.5]),
    )
    converted = convert_sae(source, "mutual_choice", k=1)
    assert converted.W_enc.tolist() == [[2.0, pytest.approx(3.0)]]
    assert converted.b_enc.tolist() == [1.0, 0.5]
    # 1 - 2 * -0.5 = 2, times the decoder norm of 2; 0.5 - 3 * 0.5 = -1 counts as 0
    assert statistics(converted).threshold.tolist() == [4.0, 0.0]


@EACH_SOURCE
def test_the_source_is_left_alone(name: str, training: bool, rescale: bool | None):
    source = make_source(name, training, rescale)
    state, cfg = copy.deepcopy(source.state_dict()), copy.deepcopy(source.cfg.to_dict())
    attributes = set(vars(source))
    converted = convert_sae(source, "mutual_choice", activations=tokens(256, D_IN))
    optimizer = torch.optim.SGD(converted.parameters(), lr=1.0)
    training_step(converted, tokens(64, D_IN)).loss.backward()
    optimizer.step()
    assert set(source.state_dict()) == set(state)
    for key, value in source.state_dict().items():
        assert torch.equal(value, state[key]), key
    assert source.cfg.to_dict() == cfg
    assert set(vars(source)) == attributes


def test_settings_and_metadata_are_carried():
    metadata = SAEMetadata(model_name="gpt2", hook_name="blocks.6.hook_resid_pre")
    source = make_source("topk", k=5, metadata=metadata, apply_b_dec_to_input=False)
    source.to(torch.bfloat16)
    converted = convert_sae(source, "feature_choice", k_aux=7)
    cfg = converted.cfg
    assert (cfg.architecture(), cfg.d_in, cfg.d_sae, cfg.k) == (
        "feature_choice",
        D_IN,
        D_SAE,
        5,
    )
    assert not cfg.apply_b_dec_to_input
    assert cfg.k_aux == 7
    assert cfg.dtype == "bfloat16" and converted.W_enc.dtype == torch.bfloat16
    assert cfg.metadata.model_name == "gpt2"
    assert cfg.metadata.hook_name == "blocks.6.hook_resid_pre"
    assert cfg.metadata.training_architecture == "feature_choice"
    assert cfg.metadata.converted_from["architecture"] == "topk"
    assert cfg.metadata.converted_from["k"] == 5
    json.dumps(cfg.to_dict())
    assert source.cfg.metadata.training_architecture == "topk"


def test_dtype_can_be_overridden():
    converted = convert_sae(make_source("topk"), "mutual_choice", dtype="float64")
    assert converted.W_enc.dtype == torch.float64
    assert converted.cfg.dtype == "float64"


def test_hyperparameters_of_the_sources_training_are_not_carried():
    source = make_source(
        "mutual_choice",
        k_start=6,
        k_decay_steps=10,
        feature_choice_steps=4,
        max_density=0.1,
    )
    cfg = convert_sae(source, "mutual_choice").cfg
    assert (cfg.k_start, cfg.k_decay_steps, cfg.max_density) == (None, 0, 0.6)


def test_features_of_a_trained_sae_need_no_share_first():
    source = make_source("topk")
    assert convert_sae(source, "mutual_choice").cfg.feature_choice_steps == 0  # type: ignore[attr-defined]
    given = convert_sae(source, "mutual_choice", feature_choice_steps=7)
    assert given.cfg.feature_choice_steps == 7  # type: ignore[attr-defined]


def test_nested_levels_are_given_with_the_target():
    source = make_source("matryoshka_batchtopk", k=2.5)
    converted = convert_sae(source, "matryoshka_mutual_choice", matryoshka_widths=[4])
    assert converted.cfg.matryoshka_widths == [4]
    torch.testing.assert_close(converted.W_dec, source.W_dec)
    with pytest.raises(ValueError, match="matryoshka_widths must be ascending"):
        convert_sae(source, "matryoshka_mutual_choice")


def test_k_is_the_sources_or_the_given_one():
    source = make_source("batchtopk", k=2.5)
    assert convert_sae(source, "mutual_choice").cfg.k == 2.5
    assert convert_sae(source, "mutual_choice", k=4).cfg.k == 4


@pytest.mark.parametrize("name", ["jumprelu", "standard", "gated"])
def test_k_is_measured_where_the_source_has_none(name: str):
    source = make_source(name)
    x = tokens(512, D_IN)
    l0 = (source.encode(x) != 0).sum().item() / 512
    converted = convert_sae(
        source, "feature_choice", activations=x, k_start=30.0, k_decay_steps=9
    )
    assert converted.cfg.k == l0
    details = converted.cfg.metadata.training_architecture_details
    assert details["k"] == l0
    with pytest.raises(ValueError, match=f"a {name} SAE has no k of its own: give k"):
        convert_sae(source, "feature_choice")


def test_what_cannot_be_converted_is_refused():
    topk = make_source("topk")
    for name in ("transcoder", "jumprelu_transcoder", "matching_pursuit"):
        sae_class, config_class = SAE_CLASS_REGISTRY[name]
        source = sae_class(
            config_class(d_in=D_IN, d_sae=D_SAE, apply_b_dec_to_input=False)
        )
        with pytest.raises(ValueError, match=f"a {name} SAE cannot be converted"):
            convert_sae(source, "mutual_choice", k=K)
    # a subclass of topk, whose features may be negative
    with pytest.raises(ValueError, match="a abstopk SAE cannot be converted"):
        convert_sae(make_source("abstopk", k=K), "mutual_choice")
    targets = "feature_choice, matryoshka_mutual_choice, mutual_choice or refined_mu"
    with pytest.raises(ValueError, match=f"to {targets}tual_choice, not"):
        convert_sae(topk, "topk")
    with pytest.raises(ValueError, match="d_sae cannot be overridden"):
        convert_sae(topk, "mutual_choice", d_sae=64)
    with pytest.raises(ValueError, match="normalized by 'none'.*not to 'layer_norm'"):
        convert_sae(topk, "mutual_choice", normalize_activations="layer_norm")
    with pytest.raises(ValueError, match="'expected_average_only_in' without it"):
        convert_sae(
            topk, "mutual_choice", normalize_activations="expected_average_only_in"
        )


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("name", ["topk", "batchtopk"])
def test_the_scaling_factor_is_folded_into_the_weights(
    name: str, rescale: bool, tmp_path: Path
):
    normalization = "expected_average_only_in"
    source = make_source(name, rescale=rescale, normalize_activations=normalization)
    x = tokens(256, D_IN)  # scaled, as the source takes them
    converted = convert_sae(
        source, "mutual_choice", activations=x / 0.05, scaling_factor=0.05
    )
    assert converted.cfg.normalize_activations == "none"
    with torch.no_grad():
        mask, sae_out = source.encode(x) != 0, source(x)
        source_out = by_thresholds(source, tmp_path)(x)
    torch.testing.assert_close(
        reconstruct(converted, x / 0.05, mask), sae_out / 0.05, rtol=1e-4, atol=1e-4
    )
    assert converted.cfg.metadata.conversion["source_ev"] == pytest.approx(
        explained_variance(source_out, x), abs=1e-5
    )


def test_the_scaling_factor_is_taken_out_of_folded_weights():
    source = make_source("jumprelu", training=False)
    x = tokens(64, D_IN)
    converted = convert_sae(
        source,
        "mutual_choice",
        k=K,
        scaling_factor=0.05,
        normalize_activations="expected_average_only_in",
    ).eval()
    assert converted.cfg.normalize_activations == "expected_average_only_in"
    with torch.no_grad():
        acts = converted.encode(0.05 * x)
        assert torch.equal(acts != 0, source.encode(x) != 0)
        torch.testing.assert_close(
            converted(0.05 * x) / 0.05, source(x), rtol=1e-4, atol=1e-5
        )
