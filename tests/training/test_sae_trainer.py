"""SAELens' own trainer, and ours, on synthetic activations."""

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer

from sae_lens_alloc import (
    AllocSAETrainer,
    MutualChoiceTrainingSAE,
    MutualChoiceTrainingSAEConfig,
    calibrate_thresholds,
)
from sae_lens_alloc.saes.allocation_sae import AllocationTrainingSAE
from tests.saes.conftest import (
    ARCHITECTURES,
    changed,
    make_sae,
    state_of,
    tokens,
    weights_of,
)
from tests.training.conftest import make_trainer

NORMALIZATIONS = (
    "none",
    "expected_average_only_in",
    "layer_norm",
    "covariance_whitening",
)
K = 3


def synthetic(n_tokens: int, seed: int) -> torch.Tensor:
    """
    Sums of about 3 of 24 directions in 8 dimensions, twice as long as one would like and
    away from 0.
    """
    directions = tokens(24, 8, seed=1000)
    directions /= directions.norm(dim=1, keepdim=True)
    generator = torch.Generator().manual_seed(seed)
    active = torch.rand(n_tokens, 24, generator=generator) < K / 24
    strengths = 1 + torch.rand(n_tokens, 24, generator=generator)
    return 2 * (active * strengths) @ directions + 1


def batches(n: int) -> list[torch.Tensor]:
    return [synthetic(64, seed) for seed in range(n)]


def fresh_sae(architecture: str, **overrides: Any) -> AllocationTrainingSAE[Any]:
    """An SAE as SAELens initializes it, with an encoder that is the decoder's transpose."""
    settings = {"d_in": 8, "d_sae": 64, "k": K, "k_aux": 3, **overrides}
    if architecture == "mutual_choice":
        settings.setdefault("feature_choice_steps", 0)
    torch.manual_seed(0)
    return type(make_sae(architecture))(type(make_sae(architecture).cfg)(**settings))


def explained_variance(sae: AllocationTrainingSAE[Any], x: torch.Tensor) -> float:
    residual = (sae(x) - x).pow(2).sum()
    return 1 - (residual / (x - x.mean(0)).pow(2).sum()).item()


@pytest.mark.parametrize("normalize_activations", NORMALIZATIONS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_fit_with_every_normalization(architecture: str, normalize_activations: str):
    sae = fresh_sae(architecture, normalize_activations=normalize_activations)
    n_steps = 80
    trainer = make_trainer(sae, batches(n_steps + 4), n_steps)
    trained = trainer.fit()
    assert trained is sae
    # what is estimated from the activations is folded into the weights at the end
    folded = normalize_activations in (
        "expected_average_only_in",
        "covariance_whitening",
    )
    assert sae.cfg.normalize_activations == (
        "none" if folded else normalize_activations
    )
    assert sae.cfg.metadata.l0 == pytest.approx(K, rel=0.25)

    # on raw activations that it has never seen
    x = synthetic(4096, seed=5000)
    sae.eval()
    assert explained_variance(sae, x) > 0.5
    assert (sae.encode(x) > 0).sum().item() / 4096 == pytest.approx(K, rel=0.3)
    report = calibrate_thresholds(sae, synthetic(8192, seed=5001))
    assert report.l0 == pytest.approx(K, rel=0.01)
    assert (sae.encode(x) > 0).sum().item() / 4096 == pytest.approx(K, rel=0.05)
    assert explained_variance(sae, x) > 0.5


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_fit_with_autocast(architecture: str):
    sae = fresh_sae(architecture)
    make_trainer(sae, batches(80), 80, autocast=True).fit()
    sae.eval()
    assert {value.dtype for value in weights_of(sae).values()} == {torch.float32}
    assert explained_variance(sae, synthetic(4096, seed=5000)) > 0.5


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_fit_with_bfloat16_parameters(architecture: str):
    sae = fresh_sae(architecture, dtype="bfloat16")
    make_trainer(sae, batches(80), 80).fit()
    sae.eval()
    x = synthetic(4096, seed=5000).bfloat16()
    assert {value.dtype for value in weights_of(sae).values()} == {torch.bfloat16}
    assert explained_variance(sae, x.float()) > 0.5
    for name, buffer in sae.allocation.named_buffers():
        assert buffer.dtype in (torch.float32, torch.bool), name


@pytest.mark.parametrize("trainer_class", [SAETrainer, AllocSAETrainer])
def test_nan_stops_the_trainer_with_its_weights_untouched(
    trainer_class: type[SAETrainer[Any, Any]], tmp_path: Path
):
    sae = fresh_sae("mutual_choice")
    bad = synthetic(64, seed=7)
    bad[10, 3] = float("nan")
    trainer = make_trainer(sae, [*batches(5), bad, *batches(5)], 11, trainer_class)
    with pytest.raises(
        ValueError, match="^The activations of training step 5 contain NaN"
    ):
        trainer.fit()
    assert trainer.n_training_steps == 5
    expected = fresh_sae("mutual_choice")
    make_trainer(expected, batches(5), 5, trainer_class).fit()
    assert changed(state_of(expected), sae) == set()


def test_learning_rate_that_is_far_too_high_is_reported():
    sae = fresh_sae("mutual_choice")
    trainer = make_trainer(sae, batches(200), 200, lr=1e30, lr_end=1e30)
    with pytest.raises(
        ValueError, match=r"training step \d+\b.*diverged.*learning rate"
    ):
        trainer.fit()


def test_our_trainer_learns_what_sae_lens_trainer_learns(tmp_path: Path):
    ours, theirs = fresh_sae("mutual_choice"), fresh_sae("mutual_choice")
    trainer = make_trainer(ours, batches(20), 20, AllocSAETrainer)
    trainer.fit()
    make_trainer(theirs, batches(20), 20).fit()
    assert all(group["fused"] for group in trainer.optimizer.param_groups)
    # fused Adam rounds differently
    for name, value in weights_of(theirs).items():
        torch.testing.assert_close(weights_of(ours)[name], value, rtol=1e-3, atol=1e-4)


def strict_json(line: str) -> dict[str, Any]:
    """Parses JSON as everybody but Python reads it: NaN and Infinity are no JSON."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not valid JSON")

    return json.loads(line, parse_constant=refuse)


METRICS = {
    "metrics/l0",
    "metrics/threshold_l0",
    "metrics/explained_variance",
    "metrics/mean_threshold",
    "metrics/cut",
    "metrics/underused_features",
    "metrics/zipf_alpha",
    "metrics/zipf_beta",
    "metrics/zipf_r2",
    "metrics/zipf_r2_middle",
    "metrics/top_1pct_tokens_budget_share",
    "sparsity/dead_features",
    "losses/overall_loss",
    "losses/mse_loss",
    "details/n_training_samples",
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_our_trainer_writes_metrics_as_json_lines(architecture: str, tmp_path: Path):
    from sae_lens.config import LoggingConfig

    logger = LoggingConfig(log_to_wandb=False, wandb_log_frequency=5)
    trainer = make_trainer(
        fresh_sae(architecture), batches(20), 20, AllocSAETrainer, logger=logger
    )
    assert isinstance(trainer, AllocSAETrainer)
    trainer.metrics_path = tmp_path / "metrics.jsonl"
    trainer.fit()
    lines = [json.loads(line) for line in trainer.metrics_path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [4, 9, 14, 19]
    assert [line["details/n_training_samples"] for line in lines] == [
        320,
        640,
        960,
        1280,
    ]
    for line in lines:
        assert set(line) >= METRICS
        if architecture == "mutual_choice":
            assert line["metrics/l0"] == pytest.approx(K)


def test_metrics_are_json_before_there_is_anything_to_fit_a_law_to(tmp_path: Path):
    from sae_lens.config import LoggingConfig

    # d_sae = 2: never the 3 features that a law needs
    logger = LoggingConfig(log_to_wandb=False, wandb_log_frequency=1)
    sae = fresh_sae("mutual_choice", d_sae=2, k=1, k_aux=1)
    trainer = make_trainer(sae, batches(2), 2, AllocSAETrainer, logger=logger)
    assert isinstance(trainer, AllocSAETrainer)
    trainer.metrics_path = tmp_path / "metrics.jsonl"
    trainer.fit()
    for line in trainer.metrics_path.read_text().splitlines():
        assert "metrics/l0" in strict_json(line)


def test_our_trainer_trains_stock_architectures(tmp_path: Path):
    torch.manual_seed(0)
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=8, d_sae=64, k=K))
    trainer = make_trainer(sae, batches(20), 20, AllocSAETrainer)
    assert isinstance(trainer, AllocSAETrainer)
    trainer.metrics_path = tmp_path / "metrics.jsonl"
    before = state_of(sae)
    trainer.fit()
    assert changed(before, sae) >= {"W_enc", "W_dec", "b_enc", "b_dec"}
    (first, second) = trainer.metrics_path.read_text().splitlines()
    assert strict_json(first)["step"] == 9
    assert strict_json(second)["metrics/l0"] <= K


def test_our_trainer_puts_in_the_schedule_and_sae_lens_own_leaves_it_open():
    for trainer_class, steps in ((AllocSAETrainer, 2), (SAETrainer, None)):
        sae = fresh_sae("mutual_choice", feature_choice_steps=None)
        make_trainer(sae, batches(11), 11, trainer_class).fit()
        assert sae.cfg.feature_choice_steps == steps
        assert [sae.rule_at(step) for step in (1, 2)] == [
            "feature",
            "feature" if steps is None else "mutual",
        ]


# what our trainer is given


def our_trainer(batches: Any, **overrides: Any) -> AllocSAETrainer[Any, Any]:
    settings: dict[str, Any] = {
        "total_training_samples": 256,
        "train_batch_size_samples": 64,
        "lr_end": 1e-4,
        **overrides,
    }
    sae = MutualChoiceTrainingSAE(
        MutualChoiceTrainingSAEConfig(d_in=16, d_sae=64, k=4, feature_choice_steps=0)
    )
    return AllocSAETrainer(SAETrainerConfig(**settings), sae, batches)


@pytest.mark.parametrize(
    ("batches", "overrides", "sentence"),
    [
        (iter([]), {"lr_end": None}, "lr_end is None, and SAETrainerConfig does not"),
        (iter([]), {"lr": -1.0}, "lr must be greater than 0, got -1.0."),
        (iter([]), {"lr_decay_steps": 5}, "together exceed the 4 training steps"),
        (torch.zeros(64, 16), {}, "such as iter(batches), got Tensor."),
        ([torch.zeros(64, 16)], {}, "such as iter(batches), got list."),
    ],
)
def test_a_wrong_argument_is_one_sentence(
    batches: Any, overrides: dict[str, Any], sentence: str
):
    with pytest.raises(ValueError) as error:
        our_trainer(batches, **overrides)
    assert sentence in str(error.value)


def test_batches_that_end_before_the_training_are_one_sentence():
    trainer = our_trainer(iter(torch.randn(3, 64, 16)))
    with pytest.raises(ValueError) as error:
        trainer.fit()
    assert str(error.value) == (
        "data_provider ended after 192 of the 256 tokens to train on: give an iterator "
        "that goes on, or lower total_training_samples."
    )
    our_trainer(iter(torch.randn(4, 64, 16))).fit()


@pytest.mark.parametrize("shape", [(64, 15), (64, 1), (4, 16, 16), (16,)])
def test_batches_of_another_shape_are_one_sentence(shape: tuple[int, ...]):
    trainer = our_trainer(iter([torch.randn(shape)] * 4))
    with pytest.raises(ValueError, match=r"batches of shape \(B, d_in = 16\), got"):
        trainer.fit()


def test_our_trainer_takes_the_types_that_sae_lens_trainer_takes():
    trainer_class = AllocSAETrainer[TopKTrainingSAE, TopKTrainingSAEConfig]
    assert get_args(trainer_class) == (TopKTrainingSAE, TopKTrainingSAEConfig)


def test_a_trainer_in_place_of_another_leaves_the_schedule_to_the_sae():
    def sae() -> MutualChoiceTrainingSAE:
        return MutualChoiceTrainingSAE(
            MutualChoiceTrainingSAEConfig(d_in=8, d_sae=64, k=K)
        )

    # the recipe's quarter of 8 steps, where the trainer is made for itself
    alone = make_trainer(sae(), batches(8), 8, AllocSAETrainer)
    assert alone.sae.cfg.feature_choice_steps == 2
    stock = make_trainer(sae(), batches(8), 8)
    settled = stock.sae.cfg
    ours = AllocSAETrainer.in_place_of(stock)
    assert ours.sae.cfg is settled
    assert settled.feature_choice_steps is None
    assert (ours.sae, ours.data_provider) == (stock.sae, stock.data_provider)
