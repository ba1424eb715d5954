"""A run of a transcoder by two processes: both hooks of each one's text, one saved transcoder."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE
from sae_lens.saes.transcoder import JumpReLUSkipTranscoder

from sae_lens_alloc import AllocSAETrainingRunner
from sae_lens_alloc.activations.language_model import load_language_model
from sae_lens_alloc.distributed.ranks import Ranks
from sae_lens_alloc.training import runner as runner_module
from sae_lens_alloc.training.checkpoint import find_checkpoint
from tests.distributed.processes import on_ranks
from tests.training.conftest import D_MODEL, short_documents
from tests.training.test_transcoder_runs import MLP_IN, MLP_OUT, transcoder_run

N_STEPS, BATCH = 10, 256


def train(folder: Path, **overrides: Any) -> dict[str, Any]:
    cfg = transcoder_run(
        output_path=str(folder / "sae"),
        checkpoint_path=str(folder / "checkpoints"),
        n_checkpoints=1,
        training_tokens=N_STEPS * BATCH,
        **overrides,
    )
    model = load_language_model(cfg)
    runner = AllocSAETrainingRunner(cfg, short_documents(24), model)
    sae: Any = runner.run()
    return {
        "W_skip": sae.W_skip.data.clone(),
        "W_dec": sae.shard.gather(sae.W_dec.data.clone()),
        "held_out": runner.held_out,
        "metadata": dict(sae.cfg.metadata.__dict__),
    }


def scenario(ranks: Ranks, folder: str) -> list[dict[str, Any]]:
    """A run, and one that goes on from a checkpoint of it."""
    assert ranks.size == 2
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    runner_module.CALIBRATION_TOKENS = 1024
    whole = train(Path(folder, "whole"))
    (run,) = Path(folder, "whole", "checkpoints").iterdir()
    last = find_checkpoint(str(run))
    resumed = train(Path(folder, "resumed"), resume_from_checkpoint=str(last))
    return [whole, resumed]


def test_two_processes_train_and_save_one_transcoder(tmp_path: Path):
    first, second = on_ranks(2, scenario, str(tmp_path))
    for mine, theirs in zip(first, second, strict=True):
        for name in ("W_skip", "W_dec", "held_out"):
            assert torch.equal(mine[name], theirs[name]), name
    whole, resumed = first
    assert whole["W_skip"].any()
    for name in ("W_skip", "W_dec", "held_out"):
        assert torch.equal(whole[name], resumed[name]), name
    saved = SAE.load_from_disk(tmp_path / "whole" / "sae")
    assert isinstance(saved, JumpReLUSkipTranscoder)
    metadata = saved.cfg.metadata
    assert (metadata.hook_name, metadata.hook_name_out) == (MLP_IN, MLP_OUT)
    x, y = whole["held_out"].split(D_MODEL, dim=-1)
    with torch.no_grad():
        error = (saved(x) - y).square().sum()
    explained = 1 - error / (y - y.mean(0)).square().sum()
    recorded = whole["metadata"]["held_out"]["explained_variance"]
    assert recorded == pytest.approx(explained.item(), abs=1e-3)
