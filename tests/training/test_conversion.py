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
    BatchTopKTrainingSAEConfig,
    GatedTrainingSAE,
)
from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY
from sae_lens.saes.jumprelu_sae import JumpReLUSAE
from sae_lens.saes.sae import SAEMetadata, TrainingSAE

from sae_lens_alloc import (
    ZipfLaw,
    calibrate_thresholds,
    convert_sae,
    select_feature_choice,
)
from sae_lens_alloc.allocation.sparse_activations import SparseActivations
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
    set_weights,
    state_of,
    statistics,
    tokens,
    training_step,
)
from tests.training.conftest import make_trainer
from tests.training.test_sae_trainer import synthetic

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
    assert statistics(converted).last_step == 0


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
