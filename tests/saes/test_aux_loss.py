"""One regression test for every bug of an auxiliary loss that SAELens' users and peers met."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sae_lens_alloc.ops import topk_selection
from sae_lens_alloc.saes.allocation_sae import AllocationTrainingSAE
from tests.saes.conftest import (
    ARCHITECTURES,
    DenseSAE,
    active_mask,
    assert_grads_equal,
    gradients,
    make_sae,
    set_weights,
    tokens,
    top_k_mask,
    training_step,
)

AUX = "auxiliary_reconstruction_loss"
DEAD = [4, 9, 17, 20, 31]


def dead_mask(features: list[int] = DEAD, d_sae: int = 32) -> torch.Tensor:
    mask = torch.zeros(d_sae, dtype=torch.bool)
    mask[features] = True
    return mask


def by_hand(**overrides: Any) -> AllocationTrainingSAE[Any]:
    """
    One token x = (3, 4) with k = 1:

    - affinities x W_enc = (3, 4, 7), so feature 2 is active
    - reconstruction 7 * (0, 2) + b_dec = (10, 24), residual e = x - x^ = (-7, -20)
    - mse = 49 + 400 = 449
    - feature 1 is dead: e^ = 4 * (0, 1) = (0, 4), and ||e^ - e||^2 = 7^2 + 24^2 = 625
    """
    sae = make_sae(
        d_in=2,
        d_sae=3,
        k=1,
        k_aux=1,
        aux_loss="aux_k",
        rescale_acts_by_decoder_norm=False,
        apply_b_dec_to_input=False,
        **overrides,
    )
    set_weights(
        sae,
        W_enc=torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]]),
        b_enc=torch.zeros(3),
        W_dec=torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 2.0]]),
        b_dec=torch.tensor([10.0, 10.0]),
    )
    return sae


@pytest.mark.parametrize("coefficient", [1.0, 0.5, 0.03125])
def test_coefficient_is_applied_once_and_b_dec_is_not_counted_in_the_aux_reconstruction(
    coefficient: float,
):
    sae = by_hand(aux_loss_coefficient=coefficient)
    output = training_step(sae, torch.tensor([[3.0, 4.0]]), dead=dead_mask([1], 3))
    assert output.losses["mse_loss"].item() == pytest.approx(449)
    # with b_dec counted again it would be (10 + 7)^2 + (14 + 20)^2 = 1445
    assert output.losses[AUX].item() == pytest.approx(625 * coefficient)
    assert output.loss.item() == pytest.approx(449 + 625 * coefficient)


def test_fewer_dead_features_than_k_aux_scale_the_loss_down():
    sae = by_hand()
    sae.cfg.k_aux = 2
    output = training_step(sae, torch.tensor([[3.0, 4.0]]), dead=dead_mask([1], 3))
    # one dead feature for k_aux = 2: half the weight
    assert output.losses[AUX].item() == pytest.approx(312.5)


def test_residual_is_detached_and_only_flagged_features_learn_from_the_aux_loss():
    sae = by_hand()
    output = training_step(sae, torch.tensor([[3.0, 4.0]]), dead=dead_mask([1], 3))
    grads = gradients(sae, output.losses[AUX])
    # d/d e^ = 2 (e^ - e) = (14, 48), e^ = (x W_enc)_1 W_dec_1, so that
    # dW_dec_1 = 4 * (14, 48), d(pre-activation) = (14, 48) . (0, 1) = 48
    torch.testing.assert_close(
        grads["W_dec"], torch.tensor([[0.0, 0.0], [56.0, 192.0], [0.0, 0.0]])
    )
    torch.testing.assert_close(
        grads["W_enc"], torch.tensor([[0.0, 144.0, 0.0], [0.0, 192.0, 0.0]])
    )
    torch.testing.assert_close(grads["b_enc"], torch.tensor([0.0, 48.0, 0.0]))
    assert grads["b_dec"].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("normalize_activations", ["none", "layer_norm"])
@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_aux_loss_and_all_gradients_equal_the_dense_formulas(
    architecture: str,
    rescale: bool,
    apply_b_dec_to_input: bool,
    normalize_activations: str,
):
    sae = make_sae(
        architecture,
        dtype="float64",
        aux_loss="aux_k",
        k_aux=3,
        aux_loss_coefficient=0.5,
        rescale_acts_by_decoder_norm=rescale,
        apply_b_dec_to_input=apply_b_dec_to_input,
        normalize_activations=normalize_activations,
    )
    x = 3 * tokens(16, 8, dtype=torch.float64) + 1
    output = training_step(sae, x, dead=dead_mask())
    dense = DenseSAE(sae)
    # the 3 best of the 5 dead features on each token, negative affinities included
    aux_mask = top_k_mask(dense.affinities(x), DEAD, 3)
    assert (dense.affinities(x)[aux_mask] < 0).any()
    expected = dense.step(x, active_mask(output), aux_mask, aux_coefficient=0.5)

    torch.testing.assert_close(output.losses["mse_loss"], expected.mse_loss)
    torch.testing.assert_close(output.losses[AUX], expected.aux_loss)
    assert expected.aux_loss > 0.1 * expected.mse_loss
    grads = gradients(sae, output.loss)
    assert_grads_equal(grads, expected.grads)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_aux_gradient_reaches_the_encoder_columns_of_the_flagged_features(
    architecture: str,
):
    sae = make_sae(architecture, aux_loss="aux_k", k_aux=5, apply_b_dec_to_input=False)
    output = training_step(sae, tokens(64, 8), dead=dead_mask())
    grads = gradients(sae, output.losses[AUX])
    for name, per_feature in (
        ("W_enc", grads["W_enc"].abs().sum(0)),
        ("b_enc", grads["b_enc"].abs()),
        ("W_dec", grads["W_dec"].abs().sum(1)),
    ):
        assert torch.equal(per_feature > 0, dead_mask()), name


def test_dead_features_that_are_also_selected_keep_both_gradients():
    # every feature is dead, so the pairs of the budget are pairs of the aux loss too
    sae = make_sae(dtype="float64", aux_loss="aux_k", k_aux=4)
    x = tokens(16, 8, dtype=torch.float64)
    output = training_step(sae, x, dead=torch.ones(32, dtype=torch.bool))
    dense = DenseSAE(sae)
    aux_mask = top_k_mask(dense.affinities(x), list(range(32)), 4)
    assert (aux_mask & active_mask(output)).any()
    expected = dense.step(x, active_mask(output), aux_mask, aux_coefficient=1.0)
    assert_grads_equal(gradients(sae, output.loss), expected.grads)


def test_layer_norm_aux_loss_does_not_depend_on_the_scale_and_mean_of_a_token():
    # In the normalized space both tokens are the same; in the space of the activations the
    # error of the second is 100 times as large, and so must be its auxiliary reconstruction.
    settings: dict[str, Any] = {
        "dtype": "float64",
        "aux_loss": "aux_k",
        "k_aux": 3,
        "normalize_activations": "layer_norm",
    }
    x = tokens(16, 8, dtype=torch.float64)
    small = training_step(make_sae(**settings), x, dead=dead_mask())
    large = training_step(make_sae(**settings), 100 * x + 7, dead=dead_mask())
    ratio = large.losses[AUX] / small.losses[AUX]
    # 1e-5 is added to a standard deviation of about 1, hence not exactly 100^2
    assert ratio.item() == pytest.approx(1e4, rel=1e-3)


@pytest.mark.parametrize("aux_loss", ["aux_k", "aux_zipf"])
def test_k_aux_defaults(aux_loss: str):
    sae = make_sae(dtype="float64", aux_loss=aux_loss, k=2.5)
    x = tokens(16, 8, dtype=torch.float64)
    output = training_step(sae, x, dead=dead_mask())
    # d_in // 2 = 4 for aux_k, k rounded up = 3 for aux_zipf
    dense = DenseSAE(sae)
    aux_mask = top_k_mask(dense.affinities(x), DEAD, 4 if aux_loss == "aux_k" else 3)
    expected = dense.step(x, active_mask(output), aux_mask, aux_coefficient=1.0)
    torch.testing.assert_close(output.losses[AUX], expected.aux_loss)


def test_aux_zipf_trains_the_features_below_the_law_and_the_dead_ones():
    sae = make_sae(dtype="float64", aux_loss="aux_zipf", k_aux=2)
    # a pure Zipf law, 0.5 / rank, on shuffled features, but for the rarest one: 0.1 of it
    order = torch.randperm(32, generator=torch.Generator().manual_seed(3))
    density = 0.5 / torch.arange(1, 33)
    density[-1] *= 0.1
    sae.allocation.density[order] = density
    rarest, most_frequent = int(order[-1]), int(order[0])
    x = tokens(16, 8, dtype=torch.float64)
    output = training_step(sae, x, dead=dead_mask([most_frequent]))

    flagged = sae.allocation.underused.nonzero().squeeze(1).tolist()
    assert flagged == sorted([rarest, most_frequent])
    dense = DenseSAE(sae)
    aux_mask = top_k_mask(dense.affinities(x), flagged, 2)
    expected = dense.step(x, active_mask(output), aux_mask, aux_coefficient=1.0)
    torch.testing.assert_close(output.losses[AUX], expected.aux_loss)
    assert_grads_equal(gradients(sae, output.loss), expected.grads)
    assert output.metrics["underused_features"]() == 2  # type: ignore[operator]


def test_aux_k_ignores_rare_features_that_are_not_dead():
    sae = make_sae(aux_loss="aux_k")
    sae.allocation.density.copy_(0.5 / torch.arange(1, 33) ** 2)
    training_step(sae, tokens(16, 8), dead=dead_mask([7]))
    assert sae.allocation.underused.nonzero().squeeze(1).tolist() == [7]


@pytest.mark.parametrize("dead", [None, dead_mask([])])
def test_no_flagged_feature_no_aux_loss(dead: torch.Tensor | None):
    output = training_step(make_sae(aux_loss="aux_k"), tokens(16, 8), dead=dead)
    assert AUX not in output.losses
    torch.testing.assert_close(output.loss, output.losses["mse_loss"])


def test_flags_are_renewed_every_tenth_step():
    sae = make_sae(aux_loss="aux_k")
    flagged: list[list[int]] = []
    for step in (0, 1, 9, 10, 11):
        training_step(sae, tokens(16, 8), step, dead=dead_mask([step]))
        flagged.append(sae.allocation.underused.nonzero().squeeze(1).tolist())
    assert flagged == [[0], [0], [0], [10], [10]]


def test_aux_loss_fades_from_aux_loss_decay_start_on():
    # gone after a tenth of 20 steps: weight 1 before step 20, 1/2 at 20, none from 21 on
    sae = make_sae(aux_loss="aux_k", aux_loss_decay_start=20)
    constant = make_sae(aux_loss="aux_k")
    weights: list[float] = []
    for step in (0, 19, 20, 21, 22, 30, 1000):
        losses = training_step(sae, tokens(16, 8), step, dead=dead_mask()).losses
        full = training_step(constant, tokens(16, 8), step, dead=dead_mask()).losses
        weights.append(losses[AUX].item() / full[AUX].item() if AUX in losses else 0.0)
    assert weights == pytest.approx([1, 1, 0.5, 0, 0, 0, 0])


def test_aux_loss_decay_start_of_zero_means_never():
    sae = make_sae(aux_loss="aux_k", aux_loss_decay_start=0)
    assert AUX not in training_step(sae, tokens(16, 8), dead=dead_mask()).losses


class CountSyncs(TorchDispatchMode):
    """Counts the operations that make a GPU wait for the host, or the other way round."""

    NAMES = (
        "aten::_local_scalar_dense",
        "aten::nonzero",
        "aten::bincount",
        "aten::equal",
        "aten::is_nonzero",
        "aten::_unique2",
        "aten::masked_select",
        "aten::repeat_interleave",
        "aten::_to_copy",
    )

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = func._schema.name
        if name in self.NAMES and (
            name != "aten::_to_copy" or (kwargs or {}).get("device") is not None
        ):
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def count_syncs(sae: AllocationTrainingSAE[Any], step: int) -> Counter[str]:
    with CountSyncs() as mode:
        training_step(sae, tokens(16, 8), step, dead=dead_mask()).loss.backward()
    return mode.counts


@pytest.mark.parametrize("aux_loss", ["aux_k", "aux_zipf"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_aux_loss_adds_no_host_sync_between_two_flag_steps(
    architecture: str, aux_loss: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(topk_selection, "asking_costs_a_wait", lambda _device: True)
    # SAELens #666: int(dead.sum()) stalls the GPU at every step
    with_aux = make_sae(architecture, aux_loss=aux_loss)
    without = make_sae(architecture, aux_loss="none")
    for sae in (with_aux, without):
        for step in range(2):
            training_step(sae, tokens(16, 8), step, dead=dead_mask())
    assert len(with_aux.allocation.flagged.indices) >= len(DEAD)
    assert count_syncs(with_aux, step=2) == count_syncs(without, step=2)
    # the counter does count: flagging looks at the densities and at the mask
    assert count_syncs(with_aux, step=10) != count_syncs(without, step=10)
