"""Conversion of SAELens' SAEs to Mutual Choice and Feature Choice, and how they start."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import (
    SAE,
    BatchTopKTrainingSAE,
    GatedTrainingSAE,
)
from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY
from sae_lens.saes.sae import SAEMetadata

from sae_lens_alloc import (
    convert_sae,
)
from sae_lens_alloc.allocation.sparse_activations import SparseActivations
from sae_lens_alloc.saes.allocation_sae import AllocationTrainingSAE
from tests.saes.conftest import (
    ARCHITECTURES,
    make_sae,
    set_weights,
    statistics,
    tokens,
    training_step,
)

D_IN, D_SAE, K = 8, 32, 3
RANKING = ("topk", "batchtopk", "matryoshka_batchtopk")
# architecture, whether a training SAE, whether it ranks by decoder norm (None: it does not rank)
SOURCES = [
    *[(name, True, rescale) for name in RANKING for rescale in (True, False)],
    *[("topk", False, rescale) for rescale in (True, False)],
    *[
        (name, training, None)
        for name in ("jumprelu", "standard", "gated")
        for training in (True, False)
    ],
    *[(name, True, rescale) for name in ARCHITECTURES for rescale in (True, False)],
    *[(f"{name}_aux_zipf", True, True) for name in RANKING],
    *[(f"{name}_aux_zipf", True, None) for name in ("jumprelu", "standard", "gated")],
]
VARIANT = ("name", "training", "rescale")
EACH_SOURCE = pytest.mark.parametrize(VARIANT, SOURCES)
EACH_SOURCE_WITH_THRESHOLDS = pytest.mark.parametrize(
    VARIANT, [source for source in SOURCES if not source[0].startswith("topk")]
)


def make_source(
    name: str, training: bool = True, rescale: bool | None = None, **settings: Any
) -> SAE[Any]:
    """An SAE with random weights, decoder norms between 0.3 and 3, and random thresholds."""
    if rescale is not None:
        settings["rescale_acts_by_decoder_norm"] = rescale
    if name in ARCHITECTURES:
        sae = make_sae(name, **{"d_in": D_IN, "d_sae": D_SAE, "k": K, **settings})
        statistics(sae).threshold.copy_(0.1 + torch.rand(D_SAE))
        return sae
    base = name.removesuffix("_aux_zipf")
    if base in RANKING:
        settings.setdefault("k", K)
    if base == "matryoshka_batchtopk":
        settings["matryoshka_widths"] = [8, D_SAE]
    registry: dict[str, Any] = (
        SAE_TRAINING_CLASS_REGISTRY if training else SAE_CLASS_REGISTRY
    )
    sae_class, config_class = registry[name]
    sae = sae_class(config_class(**{"d_in": D_IN, "d_sae": D_SAE, **settings}))
    weights = make_sae(d_in=sae.cfg.d_in, d_sae=sae.cfg.d_sae, k=1)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter_name, parameter in sae.named_parameters():
            if parameter_name in ("W_enc", "W_dec", "b_dec"):
                parameter.copy_(weights.get_parameter(parameter_name))
            else:  # biases, and thresholds of both signs
                parameter.copy_(0.3 * torch.randn(sae.cfg.d_sae, generator=generator))
        if base == "jumprelu" and training:
            sae.threshold.clamp_(min=0.0)  # as each of its training steps does
        if "topk_threshold" in dict(sae.named_buffers()):
            sae.topk_threshold.fill_(0.8)
    return sae


def affinities_of(source: SAE[Any], x: torch.Tensor) -> torch.Tensor:
    """Pre-activations as the source's own hook shows them, times the norm where it ranks so."""
    seen: list[torch.Tensor] = []

    def take(pre_acts: torch.Tensor, hook: Any) -> None:
        seen.append(pre_acts)

    with torch.no_grad():
        source.run_with_hooks(x, fwd_hooks=[("hook_sae_acts_pre", take)])
    if getattr(source.cfg, "rescale_acts_by_decoder_norm", False):
        return seen[0] * source.W_dec.norm(dim=1)
    return seen[0]


def reconstruct(
    sae: AllocationTrainingSAE[Any], x: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """The SAE's reconstruction from the pairs of a mask, in the sparse currency."""

    def select(encoder: Any, inputs: torch.Tensor) -> SparseActivations:
        rows, features = mask.nonzero(as_tuple=True)
        values = encoder.affinities(inputs)[rows, features]
        return SparseActivations(rows, features, values, (len(x), D_SAE))

    return sae.autoencode_selected(x, select)[1]


def explained_variance(sae_out: torch.Tensor, x: torch.Tensor) -> float:
    residual = (sae_out.double() - x.double()).pow(2).sum()
    return 1 - (residual / (x.double() - x.double().mean(0)).pow(2).sum()).item()


def by_thresholds(source: SAE[Any], folder: Path) -> SAE[Any]:
    """What the source is at inference: of batchtopk, the JumpReLU SAE that SAELens saves."""
    if not isinstance(source, BatchTopKTrainingSAE):
        return source.eval()
    source.save_inference_model(folder)
    return SAE.load_from_disk(folder)


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
    targets = "feature_choice, matryoshka_mutual_choice or mutual_choice"
    with pytest.raises(ValueError, match=f"to {targets}, not"):
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
