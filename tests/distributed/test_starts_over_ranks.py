"""Runs on ranks that start from an SAE or log to W&B."""

import json
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE, TrainingSAE
from sae_lens.config import LoggingConfig

from sae_lens_alloc import AllocSAETrainingRunner, MutualChoiceTrainingSAEConfig
from sae_lens_alloc.distributed.ranks import Ranks
from sae_lens_alloc.training import fine_tuning, fine_tuning_run
from sae_lens_alloc.training import runner as runner_module
from sae_lens_alloc.training.before_run import share_features
from sae_lens_alloc.training.source_sae import load_source_sae
from tests.config.test_rank_checks import looked_at
from tests.distributed.processes import on_ranks
from tests.distributed.test_runner_over_ranks import equal, weights
from tests.training.conftest import (
    CORPUS,
    D_MODEL,
    lm_config,
    load_demo_model,
    short_documents,
)
from tests.training.test_wandb import logged_rows

D_SAE = 39


def sae_config() -> MutualChoiceTrainingSAEConfig:
    return MutualChoiceTrainingSAEConfig(
        d_in=D_MODEL, d_sae=D_SAE, k=4, feature_choice_steps=0
    )


def new_sae(seed: int) -> TrainingSAE[Any]:
    torch.manual_seed(seed)
    sae = TrainingSAE.from_dict(sae_config().to_dict())
    sae.get_parameter("b_enc").data.normal_()
    return sae


def train(cfg: Any, **overrides: Any) -> dict[str, Any]:
    runner = AllocSAETrainingRunner(
        cfg, short_documents(12), load_demo_model(), **overrides
    )
    return {"start": weights(runner.sae), "end": weights(runner.run())}


def log_to_wandb(folder: Path) -> dict[str, Any]:
    for name, value in (("MODE", "offline"), ("DIR", folder), ("SILENT", "true")):
        os.environ.setdefault(f"WANDB_{name}", str(value))
    for name in ("CACHE", "CONFIG", "DATA", "ARTIFACT"):
        os.environ[f"WANDB_{name}_DIR"] = str(folder / name)
    logger = LoggingConfig(
        log_to_wandb=True,
        wandb_project="test",
        wandb_id="run",
        wandb_log_frequency=2,
        eval_every_n_wandb_logs=1,
    )
    return train(
        lm_config(
            sae_config(),
            training_tokens=4 * 256,
            logger=logger,
            output_path=str(folder / "sae"),
        )
    )


def fine_tune(folder: Path, source: str) -> Any:
    fine_tuning.CALIBRATION_TOKENS = fine_tuning_run.EVALUATION_TOKENS = 1024
    cfg = lm_config(
        sae_config(),
        dataset_path=CORPUS,
        training_tokens=4 * 256,
        output_path=str(folder),
    )
    result = fine_tuning_run.fine_tune(cfg, load_source_sae(source, "cpu"), {"k": 5.0})
    return result and (result.before.evaluation.l0, result.after.evaluation.l0)


def hooked() -> str:
    sae = new_sae(2)
    sae.add_hook("hook_sae_acts_post", looked_at)
    with pytest.raises(ValueError) as error:
        train(lm_config(sae.cfg), override_sae=sae)
    return str(error.value)


def shared(ranks: Ranks) -> dict[str, Any]:
    """An SAE that each rank has measured on its own, with another result."""
    sae: Any = new_sae(ranks.rank)
    sae.b_dec.data += 1 + ranks.rank
    sae.allocation.cut += 2 + ranks.rank
    sae.cfg.k += ranks.rank
    share_features(sae, ranks)
    return {
        "b_dec": sae.b_dec.data,
        "cut": float(sae.allocation.cut),
        "k": sae.cfg.k,
        "b_enc": sae.b_enc.data,
        "ids": sae.shard.ids(),
    }


def scenario(ranks: Ranks, folder: str, source: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    runner_module.CALIBRATION_TOKENS = 1024
    given, trained = new_sae(1), f"{folder}/trained"
    # long enough to explain something
    settings = {"training_tokens": 40 * 256, "lr": 1e-2, "output_path": trained}
    return {
        "given": train(lm_config(given.cfg, **settings), override_sae=given),
        "pretrained": train(lm_config(sae_config(), from_pretrained_path=source)),
        "hooked": hooked(),
        "shared": shared(ranks),
        "fine_tuned": fine_tune(Path(folder, "fine-tuned"), trained),
        "logged": log_to_wandb(Path(folder, "logged")),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("starts")


@pytest.fixture(scope="module")
def by_rank(folder: Path) -> list[dict[str, Any]]:
    new_sae(3).save_model(folder / "source")
    return on_ranks(2, scenario, str(folder), str(folder / "source"))


def test_ranks_share_an_sae_that_is_given(by_rank: list[dict[str, Any]], folder: Path):
    for name, whole in (("given", new_sae(1)), ("pretrained", new_sae(3))):
        for rank in by_rank:
            assert equal(rank[name]["start"], weights(whole))
            assert not equal(rank[name]["end"], weights(whole))
            assert equal(rank[name]["end"], by_rank[0][name]["end"])


def test_what_all_ranks_must_have_the_same_is_that_of_the_first(
    by_rank: list[dict[str, Any]],
):
    for number, rank in enumerate(by_rank):
        found = rank["shared"]
        assert found["b_dec"].tolist() == [1.0] * D_MODEL
        assert (found["cut"], found["k"]) == (2.0, 4.0)
        own = new_sae(number).get_parameter("b_enc").data
        assert torch.equal(found["b_enc"], own[found["ids"]])


def test_an_sae_with_hooks_is_refused(by_rank: list[dict[str, Any]]):
    for rank in by_rank:
        assert rank["hooked"].startswith("the SAE has hooks on hook_sae_acts_post, but")


def test_ranks_fine_tune_and_rank_0_compares(
    by_rank: list[dict[str, Any]], folder: Path
):
    (_, after), other = (rank["fine_tuned"] for rank in by_rank)
    assert other is None
    sae = SAE.load_from_disk(folder / "fine-tuned")
    assert sae.W_dec.shape == (D_SAE, D_MODEL)
    assert not torch.equal(sae.W_dec, SAE.load_from_disk(folder / "trained").W_dec)
    assert (folder / "fine-tuned" / "report.html").exists()
    assert after == pytest.approx(5, rel=0.3)  # on other text than the calibration's


def test_one_run_of_wandb_has_the_metrics_of_all_features(
    by_rank: list[dict[str, Any]], folder: Path
):
    rows = logged_rows(folder / "logged")
    metrics = [row for row in rows if "metrics/cut" in row]
    assert [row["_step"] for row in metrics] == ["1", "3"]
    assert float(metrics[-1]["metrics/l0"]) == pytest.approx(4)
    assert all("held_out/l0" in row for row in metrics)
    for row in metrics:
        # of a histogram: how many features have a norm in each bin
        assert sum(json.loads(row["weights/W_dec_norms/values"])) == D_SAE
    assert equal(by_rank[0]["logged"]["end"], by_rank[1]["logged"]["end"])
