"""What several processes cannot train together is one sentence before anything is loaded."""

from typing import Any

import pytest
import torch
from sae_lens import BatchTopKTrainingSAEConfig, TrainingSAE

from sae_lens_alloc import (
    AllocSAERunnerConfig,
    MutualChoiceTrainingSAEConfig,
    RefinedMutualChoiceTrainingSAEConfig,
)
from sae_lens_alloc.config.rank_checks import check_for_ranks, require_no_hooks
from sae_lens_alloc.distributed.ranks import ALONE
from tests.distributed.test_feature_shard import RankOf

THREE = RankOf(3, 1)


def config(sae: Any = None, **overrides: Any) -> AllocSAERunnerConfig[Any]:
    settings: dict[str, Any] = {
        "train_batch_size_tokens": 96,
        "verbose": False,
        **overrides,
    }
    return AllocSAERunnerConfig(sae=sae or mutual_choice(), **settings)


def mutual_choice(**settings: Any) -> MutualChoiceTrainingSAEConfig:
    whole: dict[str, Any] = {"d_in": 8, "d_sae": 7, "k": 2, **settings}
    return MutualChoiceTrainingSAEConfig(**whole)


def test_what_works_with_three():
    check_for_ranks(config(), THREE)
    for name in ("none", "layer_norm", "expected_average_only_in"):
        check_for_ranks(config(mutual_choice(normalize_activations=name)), THREE)


@pytest.mark.parametrize(
    ("cfg", "sentence"),
    [
        (
            config(BatchTopKTrainingSAEConfig(d_in=8, d_sae=7, k=2)),
            "sae.architecture 'batchtopk' is trained by one process, not by 3: start it without "
            "torchrun, or give one that allocates, such as mutual_choice.",
        ),
        (
            config(cuda_graph=True),
            "cuda_graph is for one process, not for 3: give cuda_graph=false.",
        ),
        (
            config(RefinedMutualChoiceTrainingSAEConfig(d_in=8, d_sae=7, k=2)),
            "sae.architecture 'refined_mutual_choice' is for one process, not for 3: give "
            "'mutual_choice', or start it without torchrun.",
        ),
        (
            config(kl_finish="50%", training_tokens=960),
            "kl_finish is for one process, not for 3: give kl_finish=0, or start it without "
            "torchrun.",
        ),
        (
            config(compile_sae=True),
            "compile_sae is for one process, not for 3: give compile_sae=false.",
        ),
        (
            config(mutual_choice(normalize_activations="covariance_whitening")),
            "sae.normalize_activations 'covariance_whitening' is for one process, not for 3: "
            "give 'none', 'layer_norm' or 'expected_average_only_in'.",
        ),
        (
            config(device="mps"),
            "device is 'mps', but several processes train on 'cuda' or 'cpu': give one of these.",
        ),
        (
            config(train_batch_size_tokens=97),
            "train_batch_size_tokens (97) must be a multiple of the 3 processes, which give "
            "equal parts of each batch: give 96.",
        ),
        (
            config(train_batch_size_tokens=2),
            "train_batch_size_tokens (2) must be a multiple of the 3 processes, which give "
            "equal parts of each batch: give 3.",
        ),
        (
            config(mutual_choice(d_sae=4)),
            "sae.d_sae: 4 features cannot be shared by 3 processes so that each has some: start "
            "fewer processes, or give a larger d_sae.",
        ),
    ],
)
def test_what_does_not_is_one_sentence(cfg: Any, sentence: str):
    check_for_ranks(cfg, ALONE)
    with pytest.raises(ValueError) as error:
        check_for_ranks(cfg, THREE)
    assert str(error.value) == sentence


def looked_at(tensor: torch.Tensor, *, hook: Any) -> torch.Tensor:
    assert hook is not None
    return tensor


def test_hooks_on_the_sae_are_for_one_process():
    sae = TrainingSAE.from_dict(mutual_choice().to_dict())
    require_no_hooks(sae, THREE)
    sae.add_hook("hook_sae_acts_post", looked_at)
    require_no_hooks(sae, ALONE)
    with pytest.raises(
        ValueError, match="hooks on hook_sae_acts_post, but each of the 3"
    ):
        require_no_hooks(sae, THREE)
