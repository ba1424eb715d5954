"""aux_zipf_loss on SAELens' own architectures."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE, BatchTopKTrainingSAE
from sae_lens.registry import (
    get_sae_training_class,
)
from sae_lens.saes.sae import TrainingSAE
from safetensors.torch import load_file

from sae_lens_alloc import AuxZipfLoss
from tests.saes.conftest import (
    LN_EPS,
    assert_grads_equal,
    changed,
    gradients,
    state_of,
    tokens,
    top_k_mask,
    training_step,
)
from tests.training.conftest import make_trainer

BASES = (
    "batchtopk",
    "gated",
    "jumprelu",
    "matryoshka_batchtopk",
    "standard",
    "topk",
)
DEAD = [4, 9, 17, 20, 31]
LOSS = "aux_zipf_loss"


def settings(base: str, **overrides: Any) -> dict[str, Any]:
    """8 inputs, 32 features, and what the architecture cannot do without."""
    own: dict[str, Any] = {}
    if "topk" in base:
        own["k"] = 3
    if base == "matryoshka_batchtopk":
        own["matryoshka_widths"] = [8, 32]
    return {"d_in": 8, "d_sae": 32, "dtype": "float64", **own, **overrides}


def make_stock(architecture: str, cfg: dict[str, Any]) -> TrainingSAE[Any]:
    """SAE with random weights and decoder norms that differ."""
    sae_class, config_class = get_sae_training_class(architecture)
    sae = sae_class(config_class(**cfg))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, parameter in sorted(sae.named_parameters()):
            values = torch.randn(parameter.shape, generator=generator).double()
            parameter.copy_(0.4 * values)
        if "jumprelu" in architecture:
            sae.get_parameter("threshold").abs_()
    return sae


def make(base: str, **overrides: Any) -> AuxZipfLoss:
    sae = make_stock(f"{base}_aux_zipf", settings(base, **overrides))
    assert isinstance(sae, AuxZipfLoss)
    return sae


def dead_mask(features: list[int] = DEAD) -> torch.Tensor:
    mask = torch.zeros(32, dtype=torch.bool)
    mask[features] = True
    return mask


def used_sae(base: str, **overrides: Any) -> AuxZipfLoss:
    """An SAE that has seen 7 batches, with flags."""
    sae = make(base, dtype="float32", **overrides)
    for step in range(7):
        training_step(sae, tokens(37, 8, seed=step), step, dead_mask())
    assert sae.aux_zipf.density_tokens == 7 * 37
    assert sae.aux_zipf.underused.any()
    return sae


def normalized(
    x: torch.Tensor, normalize_activations: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The normalized input, and what the output is scaled by."""
    if normalize_activations == "layer_norm":
        std = x.std(-1, keepdim=True)
        return (x - x.mean(-1, keepdim=True)) / (std + LN_EPS), std
    if normalize_activations == "constant_norm_rescale":
        norm = x.norm(dim=-1, keepdim=True)
        return x * 8**0.5 / norm, norm / 8**0.5
    return x, torch.ones_like(x[:, :1])


@pytest.mark.parametrize("k_aux", [3, 10])
@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
@pytest.mark.parametrize(
    ("base", "normalize_activations"),
    [
        (base, normalize_activations)
        for base in BASES
        for normalize_activations in ("none", "layer_norm", "constant_norm_rescale")
        # whose inner levels ask SAELens for statistics that decoding has used up
        if (base, normalize_activations == "none") != ("matryoshka_batchtopk", False)
    ],
)
def test_loss_and_all_gradients_equal_the_dense_formulas(
    base: str, normalize_activations: str, apply_b_dec_to_input: bool, k_aux: int
):
    cfg = settings(
        base,
        normalize_activations=normalize_activations,
        apply_b_dec_to_input=apply_b_dec_to_input,
    )
    sae = make_stock(
        f"{base}_aux_zipf", {**cfg, "k_aux": k_aux, "aux_loss_coefficient": 0.5}
    )
    x = 3 * tokens(16, 8, dtype=torch.float64) + 1
    output = training_step(sae, x, dead=dead_mask())

    stock = make_stock(base, cfg)
    expected = training_step(stock, x)  # aux_k has no dead features here
    inputs, scale = normalized(x, normalize_activations)
    if apply_b_dec_to_input:
        inputs = inputs - stock.b_dec
    bias = stock.get_parameter("b_gate" if base == "gated" else "b_enc")
    pre_acts = inputs @ stock.W_enc + bias
    norms = stock.W_dec.norm(dim=1) if "topk" in base else torch.ones(32)
    # the best of the 5 dead features on each token, negative affinities included
    mask = top_k_mask(pre_acts * norms, DEAD, k_aux)
    assert (pre_acts[mask] < 0).any()
    residual = (x - expected.sae_out).detach()
    error = scale * ((mask * pre_acts) @ stock.W_dec) - residual
    # 5 features for k_aux = 10: half the weight
    aux = 0.5 * min(5 / k_aux, 1) * error.pow(2).sum(1).mean()

    torch.testing.assert_close(output.losses[LOSS], aux)
    torch.testing.assert_close(output.loss, expected.loss + aux)
    assert set(output.losses) - {LOSS} == set(expected.losses) - (
        {"auxiliary_reconstruction_loss"} if "topk" in base else set()
    )
    assert_grads_equal(
        gradients(sae, output.loss), gradients(stock, expected.loss + aux)
    )


@pytest.mark.parametrize("base", BASES)
def test_density_is_the_rate_at_which_a_feature_fires(base: str):
    sae = make(base)
    fired = []
    for step in range(3):
        x = tokens(16, 8, seed=step, dtype=torch.float64)
        fired.append(training_step(sae, x, step).feature_acts > 0)
    rate = torch.cat(fired).double().mean(0)
    assert rate.min() < rate.max()
    torch.testing.assert_close(sae.aux_zipf.density.double(), rate, rtol=1e-5, atol=0)


def test_density_of_sparse_activations_counts_what_fires():
    # on one token all affinities are negative: SAELens keeps k zeros of it as entries
    sparse: dict[str, Any] = {"rescale_acts_by_decoder_norm": False}
    saes = [make("topk", use_sparse_activations=use, **sparse) for use in (True, False)]
    x = tokens(4, 8, dtype=torch.float64)
    for sae in saes:
        with torch.no_grad():
            sae.get_parameter("b_enc").copy_(-(x[0] - sae.b_dec) @ sae.W_enc - 0.01)
    outputs = [training_step(sae, x) for sae in saes]
    assert outputs[0].feature_acts.is_sparse
    assert not (outputs[1].feature_acts[0] > 0).any()
    assert torch.equal(saes[0].aux_zipf.density, saes[1].aux_zipf.density)
    assert saes[0].aux_zipf.density.sum() * 4 <= 9


def test_features_below_the_law_and_dead_ones_are_flagged_every_tenth_step():
    sae = make("batchtopk")
    order = torch.randperm(32, generator=torch.Generator().manual_seed(3))
    density = 0.5 / torch.arange(1, 33)
    density[-1] *= 0.1
    sae.aux_zipf.density[order] = density
    rarest, most_frequent = int(order[-1]), int(order[0])
    x = tokens(16, 8, dtype=torch.float64)
    output = training_step(sae, x, dead=dead_mask([most_frequent]))
    flagged = sae.aux_zipf.underused.nonzero().squeeze(1).tolist()
    assert flagged == sorted([rarest, most_frequent])
    assert output.metrics["underused_features"]() == 2  # type: ignore[operator]
    training_step(sae, x, step=9, dead=dead_mask([]))
    assert sae.aux_zipf.underused[most_frequent]
    training_step(sae, x, step=10, dead=dead_mask([]))
    assert not sae.aux_zipf.underused[most_frequent]


def test_loss_fades_from_aux_loss_decay_start_on():
    # gone after a tenth of 20 steps: weight 1 before step 20, 1/2 at 20, none from 21 on
    fading = make("topk", aux_loss_decay_start=20)
    constant = make("topk")
    x = tokens(16, 8, dtype=torch.float64)
    weights: list[float] = []
    for step in (0, 19, 20, 21):
        losses = training_step(fading, x, step, dead_mask()).losses
        full = training_step(constant, x, step, dead_mask()).losses[LOSS].item()
        weights.append(losses[LOSS].item() / full if LOSS in losses else 0.0)
    assert weights == pytest.approx([1, 1, 0.5, 0])


@pytest.mark.parametrize(("base", "k_aux"), [("batchtopk", 3), ("standard", 6)])
def test_k_aux_is_k_or_the_features_per_token_when_the_flags_were_renewed(
    base: str, k_aux: int
):
    default, given = make(base), make(base, k_aux=k_aux)
    if base == "batchtopk":
        default.cfg.k = 2.5  # type: ignore[attr-defined]
    x = tokens(16, 8, dtype=torch.float64)
    dead = torch.arange(32) >= 20
    for sae in (default, given):
        sae.aux_zipf.density.fill_(5.5 / 32)
        training_step(sae, x, 0, dead)
    # the densities move on, the flags of step 0 stay
    losses = [training_step(sae, x, 1, dead).losses[LOSS] for sae in (default, given)]
    torch.testing.assert_close(losses[0], losses[1])


@pytest.mark.parametrize("base", BASES)
def test_saved_for_inference_as_the_base_architecture(base: str, tmp_path: Path):
    sae = used_sae(base)
    stock = make_stock(base, settings(base, dtype="float32"))
    stock.load_state_dict(
        {k: v for k, v in sae.state_dict().items() if not k.startswith("aux_zipf.")}
    )
    before = state_of(sae)
    sae.save_inference_model(tmp_path / "ours")
    stock.save_inference_model(tmp_path / "stock")
    assert changed(before, sae) == set()

    saved = load_file(tmp_path / "ours" / "sae_weights.safetensors")
    expected = load_file(tmp_path / "stock" / "sae_weights.safetensors")
    assert set(saved) == set(expected)
    assert all(torch.equal(saved[name], expected[name]) for name in saved)
    cfg = json.loads((tmp_path / "ours" / "cfg.json").read_text())
    expected_cfg = json.loads((tmp_path / "stock" / "cfg.json").read_text())
    assert cfg.pop("metadata")["training_architecture"] == f"{base}_aux_zipf"
    expected_cfg.pop("metadata")
    assert cfg == expected_cfg
    loaded = SAE.load_from_disk(tmp_path / "ours")
    assert type(loaded) is type(SAE.load_from_disk(tmp_path / "stock"))


@pytest.mark.parametrize("base", BASES)
def test_checkpoint_restores_densities_flags_and_thresholds(base: str, tmp_path: Path):
    sae = used_sae(base)
    before = state_of(sae)
    sae.save_model(tmp_path)
    assert changed(before, sae) == set()
    restored = make(base, dtype="float32")
    assert changed(before, restored)
    restored.load_weights_from_checkpoint(tmp_path)
    assert changed(before, restored) == set()
    x = tokens(37, 8, seed=50)
    output, expected = training_step(restored, x, 7), training_step(sae, x, 7)
    assert LOSS in output.losses
    torch.testing.assert_close(output.losses, expected.losses, rtol=0, atol=0)
    assert changed(state_of(sae), restored) == set()


def test_load_from_disk_in_bfloat16_keeps_the_densities(tmp_path: Path):
    sae = used_sae("batchtopk")
    sae.save_model(tmp_path)
    loaded = TrainingSAE.load_from_disk(tmp_path, dtype="bfloat16")
    assert isinstance(loaded, AuxZipfLoss)
    assert loaded.W_enc.dtype == torch.bfloat16
    assert loaded.cfg.architecture() == "batchtopk_aux_zipf"
    for name, buffer in sae.aux_zipf.named_buffers():
        assert torch.equal(loaded.aux_zipf.get_buffer(name), buffer), name


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("base", BASES)
def test_saelens_trainer_trains_it(base: str, autocast: bool):
    sae = make(base, dtype="float32", normalize_activations="expected_average_only_in")
    before = state_of(sae)
    batches = [tokens(64, 8, seed=step) for step in range(20)]
    make_trainer(sae, batches, 12, autocast=autocast).fit()
    assert sae.aux_zipf.density_tokens == 12 * 64
    assert all(torch.isfinite(value).all() for value in sae.state_dict().values())
    assert {"W_enc", "W_dec", "aux_zipf.density"} <= changed(before, sae)


def test_aux_zipf_takes_the_place_of_aux_k():
    sae = make("batchtopk")
    assert isinstance(sae, BatchTopKTrainingSAE)
    x = tokens(16, 8, dtype=torch.float64)
    losses = training_step(sae, x, dead=dead_mask()).losses
    assert set(losses) == {"mse_loss", LOSS}


@pytest.mark.parametrize(
    ("base", "normalize_activations"),
    [
        *((base, "none") for base in BASES),
        # SAELens' matryoshka decodes several times, which its layer_norm cannot
        *((base, "layer_norm") for base in BASES if "matryoshka" not in base),
    ],
)
def test_hooks_on_the_inputs_fire_once_a_step_and_count_in_the_loss(
    base: str, normalize_activations: str
):
    x, shift = tokens(16, 8, dtype=torch.float64), torch.linspace(-1, 1, 8).double()
    hooked, plain = (
        make(base, normalize_activations=normalize_activations) for _ in "12"
    )
    calls: list[int] = []

    def add(tensor: torch.Tensor, *, hook: Any) -> torch.Tensor:
        calls.append(1)
        return tensor + shift

    hooked.hook_sae_input.add_hook(add)
    found = training_step(hooked, x, dead=dead_mask())
    assert len(calls) == 1
    assert len(hooked.hook_sae_input.fwd_hooks) == 1
    # the loss of the same features for the error that is left of the bare activations
    expected = training_step(plain, x + shift, dead=dead_mask())
    assert torch.equal(found.feature_acts.to_dense(), expected.feature_acts.to_dense())
    assert found.losses[LOSS] > 0
