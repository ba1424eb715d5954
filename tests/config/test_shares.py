"""Step counts as shares of the training, and budgets as shares of k."""

from pathlib import Path

import pytest

from tests.config.run_files import MINIMAL, error_of, load


def test_share_of_the_training_steps_becomes_a_step_count(config_path: Path):
    cfg = load(
        config_path,
        "sae.feature_choice_steps=75%",
        "sae.aux_loss_decay_start=33.4%",
        "sae.k_start=4",
        "sae.k_decay_steps=10 %",
        "lr_warm_up_steps=0%",
        "lr_decay_steps=20%",
        "dead_feature_window=100%",
    )
    # 100 steps
    assert cfg.sae.feature_choice_steps == 75
    assert cfg.sae.aux_loss_decay_start == 33
    assert cfg.sae.k_decay_steps == 10
    assert cfg.lr_warm_up_steps == 0
    assert cfg.lr_decay_steps == 20
    assert cfg.dead_feature_window == 100


@pytest.mark.parametrize(
    ("overrides", "k_start"),
    [(["sae.k=7"], 14.0), (["sae.k=0.3"], 0.6), (["sae.k=7", "sae.k_start=100%"], 7.0)],
)
def test_the_first_budget_may_be_a_share_of_k(
    config_path: Path, overrides: list[str], k_start: float
):
    cfg = load(config_path, "sae.k_decay_steps=50%", "sae.k_start=200%", *overrides)
    assert cfg.sae.k_start == pytest.approx(k_start)


@pytest.mark.parametrize(
    ("architecture", "name"),
    [
        ("feature_choice", "mutual_choice_steps"),
        ("standard", "l1_warm_up_steps"),
        ("jumprelu", "l0_warm_up_steps"),
    ],
)
def test_share_for_one_architecture(config_path: Path, architecture: str, name: str):
    text = MINIMAL.replace("mutual_choice", architecture)
    has_k = architecture == "feature_choice"
    config_path.write_text(text if has_k else text.replace("  k: 2\n", ""))
    cfg = load(config_path, f"sae.{name}=25%")
    assert getattr(cfg.sae, name) == 25


@pytest.mark.parametrize(
    ("tokens", "batch", "share", "steps"),
    [
        (500_000_000, 4096, "75%", 91_552),  # 91552.73
        (10_000, 100, "29%", 29),  # 0.29 * 100 is 28.999999999999996 in floats
        (1_000, 300, "100%", 3),
    ],
)
def test_share_is_rounded_down_exactly(
    config_path: Path, tokens: int, batch: int, share: str, steps: int
):
    cfg = load(
        config_path,
        f"training_tokens={tokens}",
        f"train_batch_size_tokens={batch}",
        "n_batches_in_buffer=1000",
        f"lr_decay_steps={share}",
    )
    assert cfg.lr_decay_steps == steps


def test_share_is_taken_of_the_default_batch_size(config_path: Path):
    config_path.write_text(
        MINIMAL.replace("train_batch_size_tokens: 100", "").replace(
            "10_000", "8_192_000"
        )
    )
    # SAELens' default of 4096 tokens a step: 2000 steps
    cfg = load(config_path, "n_batches_in_buffer=100", "lr_decay_steps=50%")
    assert cfg.lr_decay_steps == 1000


@pytest.mark.parametrize(
    "text", ["101%", "-1%", "a%", "75", "seventy", "1/0%", "1/0", "1e999999999%", "%"]
)
def test_bad_share_is_one_sentence(config_path: Path, text: str):
    assert error_of(config_path, f"lr_decay_steps='{text}'") == (
        "lr_decay_steps must be a number of steps or a share of them from '0%' to '100%', "
        f"got {text!r}."
    )


def test_shares_are_for_step_counts_only(config_path: Path):
    assert error_of(config_path, "training_tokens=75%") == (
        "training_tokens must be an integer, got '75%'."
    )
