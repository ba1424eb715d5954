"""A run of one process that goes on from a checkpoint of ranks."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformer_lens.HookedTransformer import HookedRootModule

from sae_lens_alloc.distributed.feature_shard import FeatureShard
from sae_lens_alloc.distributed.ranks import Ranks
from sae_lens_alloc.distributed.stored_tensors import holds_stored_tensors
from sae_lens_alloc.saes.saved_sae import load_sae
from sae_lens_alloc.saes.sharding import keep_own_features
from sae_lens_alloc.training.sharded_trainer import ShardedSAETrainer
from tests.distributed.processes import on_ranks
from tests.distributed.test_training_over_ranks import Run, batches, trainer_config
from tests.training.conftest import demo_model, demo_text, few_calibration_tokens
from tests.training.test_resume import our_runner

__all__ = ["demo_model", "demo_text", "few_calibration_tokens"]


def save_anew(ranks: Ranks, checkpoint: Path, folder: Path) -> None:
    """Saves by ranks what a checkpoint of one process holds, and the runner's files beside."""
    sae: Any = load_sae(checkpoint)
    keep_own_features(sae, FeatureShard(sae.cfg.d_sae, ranks))
    for weight in sae.parameters():
        weight.data.zero_()
    trainer = ShardedSAETrainer(trainer_config(Run("recipe")), sae, batches())
    trainer.load_trainer_state(checkpoint)
    sae.load_weights_from_checkpoint(checkpoint)

    def save_the_rest(checkpoint_path: Path | None) -> None:
        assert checkpoint_path is not None
        for path in checkpoint.iterdir():
            is_of_sae = path.name in ("sae_weights.safetensors", "checkpoint.json")
            new = checkpoint_path / path.name
            if ranks.rank == 0 and not is_of_sae and not new.exists():
                shutil.copyfile(path, new)

    trainer.save_checkpoint_fn = save_the_rest
    trainer.save_checkpoint(checkpoint.name, folder)


@pytest.mark.usefixtures("few_calibration_tokens")
def test_one_process_ends_a_run_of_ranks_bit_for_bit(
    demo_model: HookedRootModule, demo_text: Dataset, tmp_path: Path
):
    our_runner(tmp_path / "whole", demo_model, demo_text).run()
    checkpoint = tmp_path / "whole" / "checkpoints" / "run" / "768"
    on_ranks(3, save_anew, checkpoint, tmp_path / "sharded")
    assert holds_stored_tensors(tmp_path / "sharded" / "768")
    resumed = our_runner(
        tmp_path / "resumed",
        demo_model,
        demo_text,
        resume_from_checkpoint=str(tmp_path / "sharded"),
    )
    resumed.run()
    for file in ("sae_weights.safetensors", "sparsity.safetensors", "cfg.json"):
        expected, found = (
            tmp_path / run / "sae" / file for run in ("whole", "resumed")
        )
        assert found.read_bytes() == expected.read_bytes(), file
