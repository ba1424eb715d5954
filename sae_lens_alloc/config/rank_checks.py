"""What a training by several processes cannot do, found from its config alone."""

from typing import Any

import torch
from sae_lens.config import LanguageModelSAERunnerConfig
from sae_lens.saes.sae import TrainingSAE

from sae_lens_alloc.compat import has_hooks
from sae_lens_alloc.config.run_config import kl_finish_of
from sae_lens_alloc.distributed.feature_shard import FeatureShard
from sae_lens_alloc.distributed.ranks import Ranks
from sae_lens_alloc.saes.allocation_sae_config import AllocationTrainingSAEConfig
from sae_lens_alloc.saes.refined_mutual_choice_sae import (
    RefinedMutualChoiceTrainingSAEConfig,
)


def check_for_ranks(cfg: LanguageModelSAERunnerConfig[Any], ranks: Ranks) -> None:
    """
    Checks a run by several processes. Nothing is checked for one.

    Raises:
        ValueError: in one sentence that names the setting, if they cannot train that SAE
            together.
    """
    if ranks.is_alone:
        return
    n = ranks.size
    sae = cfg.sae
    if not isinstance(sae, AllocationTrainingSAEConfig):
        raise ValueError(
            f"sae.architecture {sae.architecture()!r} is trained by one process, not by {n}: "
            "start it without torchrun, or give one that allocates, such as mutual_choice."
        )
    for key in ("cuda_graph", "compile_sae"):
        if getattr(cfg, key, False):
            raise ValueError(
                f"{key} is for one process, not for {n}: give {key}=false."
            )
    if kl_finish_of(cfg):
        raise ValueError(
            f"kl_finish is for one process, not for {n}: give kl_finish=0, or start it without "
            "torchrun."
        )
    if sae.normalize_activations == "covariance_whitening":
        raise ValueError(
            f"sae.normalize_activations 'covariance_whitening' is for one process, not for {n}: "
            "give 'none', 'layer_norm' or 'expected_average_only_in'."
        )
    if getattr(sae, "topk_steps", 0):
        raise ValueError(
            f"sae.topk_steps is for one process, not for {n}: give sae.topk_steps=0, or start it "
            "without torchrun."
        )
    if isinstance(sae, RefinedMutualChoiceTrainingSAEConfig):
        raise ValueError(
            f"sae.architecture 'refined_mutual_choice' is for one process, not for {n}: give "
            "'mutual_choice', or start it without torchrun."
        )
    if torch.device(cfg.device).type not in ("cpu", "cuda"):
        raise ValueError(
            f"device is {str(cfg.device)!r}, but several processes train on 'cuda' or 'cpu': "
            "give one of these."
        )
    rest = cfg.train_batch_size_tokens % n
    if rest:
        raise ValueError(
            f"train_batch_size_tokens ({cfg.train_batch_size_tokens}) must be a multiple of the "
            f"{n} processes, which give equal parts of each batch: give "
            f"{cfg.train_batch_size_tokens - rest or n}."
        )
    try:
        FeatureShard(sae.d_sae, ranks)
    except ValueError as error:
        raise ValueError(f"sae.d_sae: {error}") from None


def require_no_hooks(sae: TrainingSAE[Any], ranks: Ranks) -> None:
    """Raises ValueError if somebody looks at the activations of an SAE shared by ranks."""
    if ranks.is_alone:
        return
    hooked = [name for name, hook in sae.hook_dict.items() if has_hooks(hook)]
    if hooked:
        raise ValueError(
            f"the SAE has hooks on {', '.join(hooked)}, but each of the {ranks.size} processes "
            "has the activations of its own features only: take them off, or start one process."
        )
