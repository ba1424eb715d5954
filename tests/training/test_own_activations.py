"""A training on one's own activations is a run as any other, without a language model."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import load_from_disk
from sae_lens import SAE
from sae_lens.cache_activations_runner import CacheActivationsRunner
from sae_lens.config import (
    CacheActivationsRunnerConfig,
    LanguageModelSAERunnerConfig,
    LoggingConfig,
)
from sae_lens.saes.sae import TrainingSAEConfig
from sae_lens.saes.topk_sae import TopKTrainingSAEConfig

from sae_lens_alloc import (
    AllocSAERunnerConfig,
    AllocSAETrainingRunner,
    MutualChoiceTrainingSAEConfig,
    MutualChoiceTrainingTranscoderConfig,
    train_on_activations,
)
from sae_lens_alloc.activations.row_order import RowOrder
from sae_lens_alloc.activations.row_source import RowSource, open_rows
from sae_lens_alloc.compat import InterruptedException
from sae_lens_alloc.evaluation.usage import as_user, measure_usage
from sae_lens_alloc.saes.saved_sae import load_sae
from sae_lens_alloc.training.checkpoint import find_checkpoint
from sae_lens_alloc.training.fine_tuning import FineTuningRunner
from sae_lens_alloc.training.source_sae import load_source_sae
from sae_lens_alloc.training.trainer import AllocSAETrainer
from tests.training.conftest import (
    D_MODEL,
    HOOK,
    MODEL,
    MODEL_CLASS,
    short_documents,
)

D_IN, D_SAE, BATCH, N_STEPS = 12, 48, 64, 24

pytestmark = pytest.mark.usefixtures("few_calibration_tokens", "restore_signals")


def activations(n: int = 3000, width: int = D_IN) -> torch.Tensor:
    """Sparse combinations of known directions about a mean, exact in float32."""
    generator = torch.Generator().manual_seed(5)
    codes = torch.rand(n, 30, generator=generator)
    codes *= torch.rand(n, 30, generator=generator) < 0.1
    return codes @ torch.randn(30, width, generator=generator) + 0.5


def sae_config(**settings: Any) -> MutualChoiceTrainingSAEConfig:
    return MutualChoiceTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, k=3, **settings)


def config(
    folder: Path | None = None, sae: TrainingSAEConfig | None = None, **settings: Any
) -> AllocSAERunnerConfig[Any]:
    logger = LoggingConfig(
        log_to_wandb=False,
        wandb_id="run",
        wandb_log_frequency=4,
        eval_every_n_wandb_logs=2,
    )
    common: dict[str, Any] = {
        "training_tokens": N_STEPS * BATCH,
        "train_batch_size_tokens": BATCH,
        "n_batches_for_norm_estimate": 3,
        "lr": 2e-2,
        "logger": logger,
        "checkpoint_path": None,
        "output_path": None if folder is None else str(folder / "sae"),
        "verbose": False,
    }
    return AllocSAERunnerConfig(sae=sae or sae_config(), **{**common, **settings})


def weights(sae: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in sae.state_dict().items()}


def assert_same(ours: Any, theirs: Any) -> None:
    ours, theirs = weights(ours), weights(theirs)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def test_a_run_leaves_what_other_runs_leave(tmp_path: Path):
    rows = activations()
    cfg = config(tmp_path)
    sae = train_on_activations(rows, cfg)
    assert not sae.training and cfg.activations is None
    folder = tmp_path / "sae"
    assert {path.name for path in folder.iterdir()} == {
        *("cfg.json", "sae_weights.safetensors", "sparsity.safetensors"),
        *("runner_cfg.json", "metrics.jsonl"),
    }
    found = [json.loads(row) for row in (folder / "metrics.jsonl").open()]
    assert [row["step"] for row in found] == [3, 7, 11, 15, 19, 23]
    with_held_out = [row["step"] for row in found if "held_out/l0" in row]
    assert with_held_out == [7, 15, 23]
    saved = SAE.load_from_disk(folder)
    assert saved.cfg.architecture() == "jumprelu"
    metadata = saved.cfg.metadata
    assert metadata.activations == "a tensor of shape (3000, 12)"
    assert metadata.model_name is None and metadata.dataset_path is None
    assert metadata.calibration["l0"] == pytest.approx(3, rel=0.01)
    # the metrics are of rows that the order holds out: a hundredth of the training tokens
    order = RowOrder(3000, 16, 1, cfg.seed)
    held_out = torch.cat([rows[start:stop] for start, stop in order.held_out])
    usage = measure_usage(as_user(saved), held_out)
    assert metadata.held_out["n_tokens"] == len(held_out) == 16
    assert metadata.held_out["l0"] == pytest.approx(usage.l0, rel=1e-6)
    ev = metadata.held_out["explained_variance"]
    assert ev == pytest.approx(usage.explained_variance, rel=1e-5) and ev > 0.1
    assert metadata.held_out["dead_features"] == usage.dead_features


def test_held_out_rows_are_never_trained_on(monkeypatch: pytest.MonkeyPatch):
    seen: list[torch.Tensor] = []
    step = AllocSAETrainer.step

    def spying(trainer: Any, batch: torch.Tensor) -> Any:
        seen.append(batch.clone())
        return step(trainer, batch)

    monkeypatch.setattr(AllocSAETrainer, "step", spying)
    rows = torch.randn(500, D_IN, generator=torch.Generator().manual_seed(0))
    runner = AllocSAETrainingRunner(config(), override_activations=rows)
    runner.run()
    # 24 * 64 tokens are three epochs of the rest
    trained, held_out = torch.cat(seen), runner.held_out
    assert len(trained) == N_STEPS * BATCH
    matches = (trained[:, None] == rows[None]).all(-1).sum(0)
    is_held_out = (rows[:, None] == held_out[None]).all(-1).any(1)
    assert is_held_out.sum() == len(held_out) == 16
    assert matches[is_held_out].sum() == 0
    assert matches[~is_held_out].min() == 3 and matches[~is_held_out].max() == 4


def test_the_form_of_the_activations_makes_no_difference(tmp_path: Path):
    rows = activations()
    np.save(tmp_path / "1.npy", rows[:1000].numpy())
    np.save(tmp_path / "2.npy", rows[1000:].numpy())
    cfg = config()
    expected = train_on_activations(rows, cfg)
    assert_same(train_on_activations(tmp_path, cfg), expected)
    named = config(activations=str(tmp_path))
    assert_same(AllocSAETrainingRunner(named).run(), expected)
    # SAELens' own config will do
    names = LanguageModelSAERunnerConfig.__dataclass_fields__
    stock = LanguageModelSAERunnerConfig(
        **{name: value for name, value in vars(cfg).items() if name in names}
    )
    assert_same(train_on_activations(rows.numpy(), stock), expected)
    assert not hasattr(stock, "activations")


def generated() -> Iterator[torch.Tensor]:
    yield from activations().split(100)


@pytest.mark.parametrize("normalization", ["none", "expected_average_only_in"])
@pytest.mark.parametrize("source", ["rows", "callable", "generator"])
def test_a_resumed_run_is_bit_identical(
    source: str, normalization: str, tmp_path: Path
):
    def train(name: str, **settings: Any) -> Any:
        cfg = config(
            tmp_path / name,
            sae_config(normalize_activations=normalization),
            n_checkpoints=3,
            checkpoint_path=str(tmp_path / name / "checkpoints"),
            **settings,
        )
        given = {"rows": activations(), "callable": generated, "generator": generated()}
        return train_on_activations(given[source], cfg)

    whole = train("whole")
    checkpoints = tmp_path / "whole" / "checkpoints" / "run"
    assert {path.name for path in checkpoints.iterdir()} == {"448", "832", "1216"}
    for at in ("448", "1216"):
        resumed = train(f"from {at}", resume_from_checkpoint=str(checkpoints / at))
        assert_same(resumed, whole)
        assert resumed.cfg.metadata.held_out == whole.cfg.metadata.held_out
        assert resumed.cfg.metadata.calibration == whole.cfg.metadata.calibration


def test_sigterm_saves_a_checkpoint_that_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    rows = activations()
    expected = train_on_activations(rows, config())
    step = AllocSAETrainer.step

    def signalling(trainer: Any, batch: torch.Tensor) -> Any:
        if trainer.n_training_steps == 9:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(trainer, batch)

    folder = str(tmp_path / "checkpoints")
    with monkeypatch.context() as patch:
        patch.setattr(AllocSAETrainer, "step", signalling)
        with pytest.raises(InterruptedException):
            train_on_activations(rows, config(checkpoint_path=folder))
    checkpoint = find_checkpoint(f"{folder}/run")
    assert checkpoint.name == str(10 * BATCH)
    again = config(resume_from_checkpoint=f"{folder}/run", output_path=None)
    assert_same(train_on_activations(rows, again), expected)


def test_a_longer_resumed_run_holds_out_the_same_rows(tmp_path: Path):
    rows = activations()
    first = config(n_checkpoints=1, checkpoint_path=str(tmp_path))
    train_on_activations(rows, first)
    longer = config(
        training_tokens=3 * N_STEPS * BATCH,
        resume_from_checkpoint=str(tmp_path / "run"),
    )
    runner = AllocSAETrainingRunner(longer, override_activations=rows)
    assert len(runner.held_out) == 16  # and not 3 times as many
    runner.run()
    with pytest.raises(ValueError, match="run has activations .*3000.* this run has"):
        train_on_activations(rows[:2000], longer)


def test_stock_architectures_and_scales_are_trained(tmp_path: Path):
    sae = TopKTrainingSAEConfig(
        d_in=D_IN, d_sae=D_SAE, k=3, normalize_activations="expected_average_only_in"
    )
    train_on_activations(100 * activations(), config(tmp_path, sae))
    saved = SAE.load_from_disk(tmp_path / "sae")
    assert saved.cfg.metadata.held_out["explained_variance"] > 0


def test_a_transcoder_has_rows_of_input_and_output(tmp_path: Path):
    sae = MutualChoiceTrainingTranscoderConfig(d_in=7, d_out=5, d_sae=D_SAE, k=3)
    trained = train_on_activations(activations(), config(tmp_path, sae))
    assert trained.cfg.metadata.held_out["explained_variance"] > 0
    saved = SAE.load_from_disk(tmp_path / "sae")
    assert saved(activations()[:9, :7]).shape == (9, 5)
    with pytest.raises(ValueError, match=r"12 numbers.*sae.d_in \+ sae.d_out = 13"):
        train_on_activations(
            activations(),
            config(
                sae=MutualChoiceTrainingTranscoderConfig(
                    d_in=7, d_out=6, d_sae=D_SAE, k=3
                )
            ),
        )


def test_a_run_starts_from_a_checkpoint(tmp_path: Path):
    rows = activations()
    first = config(n_checkpoints=1, checkpoint_path=str(tmp_path))
    train_on_activations(rows, first)
    start = find_checkpoint(tmp_path / "run")
    runner = AllocSAETrainingRunner(
        config(from_pretrained_path=str(start)), override_activations=rows
    )

    assert torch.equal(runner.sae.W_dec, load_sae(start).W_dec)
    runner.run()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_name": "gpt2"}, "model_name is 'gpt2', but the run is on activations"),
        ({"hook_name": "blocks.1.hook_resid_pre"}, "hook_name is"),
        ({"dataset_path": "some/text"}, "dataset_path is 'some/text'"),
        ({"context_size": 64}, "context_size is 64"),
        ({"use_cached_activations": True}, "use_cached_activations is True"),
        ({"activations": "elsewhere"}, "are given beside the config, too"),
        ({"activations_column": "x"}, "Tensor has no columns"),
    ],
)
def test_contradictions_are_one_sentence(
    change: dict[str, Any], message: str, tmp_path: Path
):
    with pytest.raises(ValueError, match=message):
        train_on_activations(activations(), config(tmp_path, **change))
    assert not (tmp_path / "sae" / "cfg.json").exists()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            activations(width=11),
            "rows of 11 numbers, but sae.d_in is 12: give sae.d_in=11",
        ),
        (activations()[0], "two dimensions"),
        (activations().int(), "floating-point"),
        (activations()[:60], "has 60 rows"),
        (
            activations().index_fill(0, torch.tensor([2990]), torch.nan),
            "row 2990 of a tensor",
        ),
        (iter([activations(width=11)]), "rows of 11 numbers, but sae.d_in is 12"),
        (iter([activations()[:5]]), "has 5 rows, but 16 are to be held out"),
        (
            "no/such/folder",
            "activations is 'no/such/folder', but there is no such file",
        ),
    ],
)
def test_activations_that_do_not_fit_are_one_sentence(rows: Any, message: str):
    with pytest.raises(ValueError, match=message):
        train_on_activations(rows, config())


def test_a_generator_that_ends_too_early_says_how_far_it_came():
    with pytest.raises(
        ValueError, match="the generator ended after 1,000 rows, of which 16"
    ):
        train_on_activations(activations(1000).split(50).__iter__(), config())


def test_activations_that_sae_lens_has_cached_are_trained_on(tmp_path: Path):
    cache = CacheActivationsRunnerConfig(
        dataset_path="",
        model_name=MODEL,
        model_class_name=MODEL_CLASS,
        hook_name=HOOK,
        d_in=D_MODEL,
        model_batch_size=4,
        training_tokens=64 * 32,
        context_size=32,
        new_cached_activations_path=str(tmp_path / "cached"),
        buffer_size_gb=1e-3,
        device="cpu",
    )
    CacheActivationsRunner(cache, override_dataset=short_documents(20)).run()
    cfg = config(
        tmp_path,
        MutualChoiceTrainingSAEConfig(d_in=D_MODEL, d_sae=256, k=8),
        activations=str(tmp_path / "cached"),
        lr=2e-3,
    )
    AllocSAETrainingRunner(cfg).run()
    saved = SAE.load_from_disk(tmp_path / "sae")
    assert saved.cfg.metadata.calibration["l0"] == pytest.approx(8, rel=0.01)
    dataset = load_from_disk(tmp_path / "cached")
    stored = torch.tensor(dataset[:][HOOK]).view(-1, D_MODEL)
    source = open_rows(tmp_path / "cached")
    assert isinstance(source, RowSource) and source.n_rows == len(stored) >= 64 * 32
    assert torch.equal(source.read(0, len(stored)), stored)


def test_a_topk_sae_is_trained_further_as_mutual_choice(tmp_path: Path):
    sae = TopKTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, k=3)
    np.save(tmp_path / "x.npy", activations().numpy())
    source: dict[str, Any] = {"activations": str(tmp_path / "x.npy")}
    AllocSAETrainingRunner(config(tmp_path, sae, **source)).run()
    runner = FineTuningRunner(
        config(tmp_path / "finer", **source),
        load_source_sae(str(tmp_path / "sae"), "cpu"),
        {},
    )
    assert runner.start.source_l0 == pytest.approx(3, rel=0.1)
    trained = runner.run()
    before = SAE.load_from_disk(tmp_path / "sae").cfg.metadata.held_out
    after = trained.cfg.metadata.held_out
    assert after["explained_variance"] > before["explained_variance"]
    saved = SAE.load_from_disk(tmp_path / "finer" / "sae")
    assert saved.cfg.architecture() == "jumprelu"


def test_what_the_owner_knows_of_the_activations_is_kept(tmp_path: Path):
    cfg = config(tmp_path)
    cfg.sae.metadata.model_name, cfg.sae.metadata.hook_name = "gpt2", "blocks.8"
    train_on_activations(activations(), cfg)
    metadata = SAE.load_from_disk(tmp_path / "sae").cfg.metadata
    assert (metadata.model_name, metadata.hook_name) == ("gpt2", "blocks.8")
