"""Changes of the rule and of the budget, and the statistics that each step leaves behind."""

import logging
import math
from typing import Any

import pytest
import torch
from sae_lens import TopKTrainingSAEConfig

from sae_lens_alloc import MutualChoiceTrainingSAEConfig, ZipfLaw
from sae_lens_alloc.allocation.density import fit_floor
from sae_lens_alloc.allocation.zipf import NATURAL_LAW
from sae_lens_alloc.saes.matryoshka_mutual_choice_sae import (
    MatryoshkaMutualChoiceTrainingSAEConfig,
)
from sae_lens_alloc.saes.mutual_choice_sae import (
    MutualChoiceTrainingSAE,
    with_schedule,
)
from tests.saes.conftest import (
    ARCHITECTURES,
    DenseSAE,
    active_mask,
    changed,
    feature_mask,
    make_sae,
    mutual_mask,
    state_of,
    tokens,
    training_step,
)

N_TOKENS, K = 64, 3


def rule_of(mask: torch.Tensor, affinities: torch.Tensor) -> str:
    """Which rule a selection follows, by brute force."""
    is_mutual = torch.equal(mask, mutual_mask(affinities, K * N_TOKENS))
    is_feature = torch.equal(mask, feature_mask(affinities, mask.sum(0).tolist()))
    assert is_feature  # of each feature its best tokens: true of Mutual Choice as well
    return "mutual" if is_mutual else "feature"


@pytest.mark.parametrize(
    ("architecture", "schedule", "rules"),
    [
        ("mutual_choice", {}, ["mutual"] * 5),
        (
            "mutual_choice",
            {"feature_choice_steps": 3},
            ["feature"] * 3 + ["mutual"] * 2,
        ),
        ("mutual_choice", {"feature_choice_steps": 99}, ["feature"] * 5),
        ("feature_choice", {}, ["feature"] * 5),
        (
            "feature_choice",
            {"mutual_choice_steps": 3},
            ["mutual"] * 3 + ["feature"] * 2,
        ),
    ],
)
def test_rule_of_each_step(
    architecture: str, schedule: dict[str, int], rules: list[str]
):
    sae = make_sae(architecture, dtype="float64", **schedule)
    found: list[str] = []
    for step in range(5):
        x = tokens(N_TOKENS, 8, seed=step, dtype=torch.float64)
        mask = active_mask(training_step(sae, x, step))
        found.append(rule_of(mask, DenseSAE(sae).affinities(x).detach()))
    assert found == rules


def test_quota_law_comes_from_the_mutual_densities_once():
    sae = make_sae("feature_choice", mutual_choice_steps=20)
    state = sae.allocation
    natural = [NATURAL_LAW.alpha, NATURAL_LAW.beta]
    for step in range(20):
        training_step(sae, tokens(N_TOKENS, 8, seed=step), step)
        assert state.quota_law.tolist() == natural
    density = state.density.clone()
    training_step(sae, tokens(N_TOKENS, 8, seed=20), 20)
    law = ZipfLaw.fit(density, fit_floor(N_TOKENS))
    assert state.quota_law.tolist() == pytest.approx([law.alpha, law.beta])
    assert state.quota_law.tolist() != natural
    for step in range(21, 30):
        training_step(sae, tokens(N_TOKENS, 8, seed=step), step)
    assert state.quota_law.tolist() == pytest.approx([law.alpha, law.beta])


def test_quotas_follow_the_fitted_law_and_the_rank_of_each_features_demand():
    sae = make_sae("feature_choice", mutual_choice_steps=20, b_enc=0.0)
    for step in range(20):
        training_step(sae, tokens(N_TOKENS, 8, seed=step), step)
    density = sae.allocation.density.clone()
    carry = sae.allocation.quota_carry.clone()
    counts = active_mask(training_step(sae, tokens(N_TOKENS, 8, seed=20), 20)).sum(0)
    alpha, beta = sae.allocation.quota_law.tolist()
    # by rank from the densest feature on, clamped to 0.6 * 64 = 38.4 tokens
    ranks = torch.empty(32)
    ranks[density.argsort(descending=True, stable=True)] = torch.arange(1, 33.0)
    shape = (ranks.double() + beta) ** -alpha
    shares = shape / shape.sum() * K * N_TOKENS
    while (excess := (shares - 38.4).clamp(min=0).sum()) > 1e-9:
        shares = shares.clamp(max=38.4)
        free = shares < 38.4
        shares[free] *= 1 + excess / shares[free].sum()
    quotas = (shares + carry).floor().long()
    # a feature cannot take more tokens than it has positive affinities on, about 32
    assert (counts <= quotas).all()
    has_enough = quotas < 16
    assert has_enough.sum() > 20
    assert torch.equal(counts[has_enough], quotas[has_enough])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_thresholds_start_from_the_cut_at_a_change_of_rule(architecture: str):
    field = {
        "mutual_choice": "feature_choice_steps",
        "feature_choice": "mutual_choice_steps",
    }[architecture]
    sae = make_sae(architecture, **{field: 60})
    state = sae.allocation
    for step in range(60):
        training_step(sae, tokens(N_TOKENS, 8, seed=step), step)
    per_feature, cut = state.threshold.clone(), state.cut.clone()
    training_step(sae, tokens(N_TOKENS, 8, seed=60), 60)
    if architecture == "mutual_choice":
        assert per_feature.max() / per_feature.min() > 2
        assert torch.equal(state.threshold, state.cut.expand(32))
    else:
        assert torch.equal(per_feature, cut.expand(32))
        # one step moves a threshold by a factor of at most exp(0.05 * 3)
        assert ((state.threshold / cut).log().abs() <= 0.15 + 1e-6).all()
        assert len(state.threshold.unique()) > 5


@pytest.mark.parametrize(
    ("settings", "steps", "schedule"),
    [
        ({}, 103, (25, 6, 25)),
        # 2 k would be more features than there are
        ({"k": 20}, 100, (25, 32, 25)),
        # what is given stays
        ({"k_start": 4, "k_decay_steps": 10}, 100, (25, 4, 10)),
        ({"k_decay_steps": 10}, 100, (25, 6, 10)),
        ({"feature_choice_steps": 0}, 100, (0, None, 0)),
        ({"feature_choice_steps": 50}, 100, (50, None, 0)),
        # too short for a quarter
        ({}, 3, (0, None, 0)),
    ],
)
def test_the_schedule_is_the_recipes_where_it_is_left_open(
    settings: dict[str, Any], steps: int, schedule: tuple[int, float | None, int]
):
    fields: dict[str, Any] = {"d_in": 8, "d_sae": 32, "k": 3, **settings}
    for cfg, training_steps in (
        (MutualChoiceTrainingSAEConfig(**fields), steps),
        # half of the training instead of a quarter: as much in half the steps
        (
            MatryoshkaMutualChoiceTrainingSAEConfig(**fields, matryoshka_widths=[8]),
            steps // 2,
        ),
    ):
        before = cfg.to_dict()
        filled = with_schedule(cfg, training_steps)
        assert (filled.feature_choice_steps, filled.k_start, filled.k_decay_steps) == (
            schedule
        )
        assert type(filled) is type(cfg)
        assert cfg.to_dict() == before


def test_other_architectures_keep_their_config():
    cfg = TopKTrainingSAEConfig(d_in=8, d_sae=32, k=3)
    assert with_schedule(cfg, 100) is cfg


def test_without_steps_feature_choice_comes_first_and_nobody_is_warned(
    caplog: pytest.LogCaptureFixture,
):
    cfg = MutualChoiceTrainingSAEConfig(d_in=8, d_sae=32, k=3)
    with caplog.at_level(logging.WARNING, logger="sae_lens"):
        sae = MutualChoiceTrainingSAE(cfg)
    assert sae.rule_at(0) == sae.rule_at(10**6) == "feature"
    assert caplog.text == ""


def test_budget_falls_linearly_from_k_start_to_k():
    # k 2, k_start 6: 6, 5, 4, 3 pairs per token in the 4 decay steps, then 2
    sae = make_sae(k=2, k_start=6, k_decay_steps=4, b_enc=1.0)
    selected = [
        int(active_mask(training_step(sae, tokens(10, 8, seed=step), step)).sum())
        for step in range(7)
    ]
    assert selected == [60, 50, 40, 30, 20, 20, 20]


def test_feature_choice_gives_out_the_budget_in_the_long_run():
    sae = make_sae("feature_choice", k=2.3, k_start=4, k_decay_steps=8, b_enc=1.0)
    budget, selected = 0, 0
    for step in range(40):
        mask = active_mask(training_step(sae, tokens(N_TOKENS, 8, seed=step), step))
        k = 4 - (4 - 2.3) * step / 8 if step < 8 else 2.3
        budget += math.floor(k * N_TOKENS + 1e-9)
        selected += int(mask.sum())
        # what is still owed to the 32 features is less than one pair each
        assert abs(selected - budget) <= 32


@pytest.mark.parametrize("schedule", [0, 100])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_thresholds_give_an_l0_of_k_on_data_like_the_training_data(
    architecture: str, schedule: int
):
    field = {
        "mutual_choice": "feature_choice_steps",
        "feature_choice": "mutual_choice_steps",
    }[architecture]
    sae = make_sae(architecture, **{field: schedule})
    for step in range(250):
        training_step(sae, tokens(512, 8, seed=step), step)
    x = tokens(20_000, 8, seed=1000)
    trained = (sae.encode(x) > 0).sum().item() / 20_000
    sae.eval()
    l0 = (sae.encode(x) > 0).sum().item() / 20_000
    # what training allocates, before any calibration; for Feature Choice that is less than k
    # where features have fewer positive affinities than their quota
    assert l0 == pytest.approx(trained, rel=0.03)
    if architecture == "mutual_choice":
        assert trained == K


def test_bounds_of_feature_choice_only_make_it_faster():
    # the second SAE forgets its bounds before every step, as a resumed one does
    kept, forgetful = make_sae("feature_choice"), make_sae("feature_choice")
    for step in range(40):
        # activations grow by a factor of 2 after 20 steps, and the bounds lag behind
        x = tokens(256, 8, seed=step) * (1 + step // 20)
        forgetful.allocation.forget_derived()
        output, expected = (
            training_step(forgetful, x, step),
            training_step(kept, x, step),
        )
        assert torch.equal(
            output.feature_acts.to_dense(), expected.feature_acts.to_dense()
        )
        assert changed(state_of(kept), forgetful) == set()


def test_densities_are_the_demand_in_both_rules():
    # 5 batches of 64 tokens within the window: an exact mean of the rates above the cut
    sae = make_sae(density_window_tokens=10_000)
    counts = torch.zeros(32)
    for step in range(5):
        counts += active_mask(
            training_step(sae, tokens(N_TOKENS, 8, seed=step), step)
        ).sum(0)
    assert sae.allocation.density_tokens.item() == 5 * N_TOKENS
    torch.testing.assert_close(sae.allocation.density, counts / (5 * N_TOKENS))

    # Feature Choice: its own firing rate would be its quota, so it counts above the cut
    sae = make_sae("feature_choice", dtype="float64")
    x = tokens(N_TOKENS, 8, dtype=torch.float64)
    output = training_step(sae, x)
    affinities = DenseSAE(sae).affinities(x)
    cut = affinities[mutual_mask(affinities, K * N_TOKENS)].min()
    demand = (affinities > cut.float()).sum(0) / N_TOKENS
    torch.testing.assert_close(sae.allocation.density, demand)
    assert not torch.equal(demand, active_mask(output).sum(0) / N_TOKENS)


def test_metrics_are_what_their_names_say():
    sae = make_sae(aux_loss="aux_zipf", dtype="float64")
    for step in range(29):
        training_step(sae, tokens(200, 8, seed=step, dtype=torch.float64), step)
    x = tokens(200, 8, seed=29, dtype=torch.float64)
    output = training_step(sae, x, 29)
    metrics = {
        name: float(value() if callable(value) else value)
        for name, value in output.metrics.items()
    }
    state = sae.allocation
    affinities = DenseSAE(sae).affinities(x)
    law = ZipfLaw.fit(state.density, fit_floor(200))
    per_token = active_mask(output).sum(1)
    assert metrics == pytest.approx(
        {
            "threshold_l0": (affinities > state.threshold).sum().item() / 200,
            "mean_threshold": state.threshold.mean().item(),
            "cut": state.cut.item(),
            "underused_features": state.underused.sum().item(),
            "zipf_alpha": law.alpha,
            "zipf_beta": law.beta,
            "zipf_r2": law.r2,
            "zipf_r2_middle": law.r2_middle,
            # 1% of 200 tokens are the 2 with the most features, of 600 pairs
            "top_1pct_tokens_budget_share": per_token.topk(2).values.sum().item() / 600,
        }
    )
