"""The part of a text that one of several ranks reads."""

import copy
from typing import Any

from datasets import Dataset
from datasets.distributed import split_dataset_by_node
from sae_lens.config import HfDataset, LanguageModelSAERunnerConfig

from sae_lens_alloc.distributed.ranks import Ranks


def part_of_dataset(dataset: HfDataset, name: str, ranks: Ranks) -> HfDataset:
    """
    The rows of a dataset that a rank reads: of a dataset on the disk the rank-th part, of one
    that is streamed whole files where they can be shared evenly, otherwise every S-th row.

    Args:
        dataset: The dataset, the same on all ranks.
        name: What to call it in messages.
        ranks: The ranks.

    Raises:
        ValueError: if it has no row for this rank.
    """
    too_few = ValueError(
        f"{name} has too few rows for {ranks.size} processes, of which each reads its own: give "
        "more text, or start fewer processes."
    )
    # datasets makes no empty part of such a dataset
    if isinstance(dataset, Dataset) and len(dataset) < ranks.size:
        raise too_few
    part: Any = split_dataset_by_node(dataset, ranks.rank, ranks.size)  # pyright: ignore
    if next(iter(part), None) is None:
        raise too_few
    return part


def settings_of_rank(
    cfg: LanguageModelSAERunnerConfig[Any], ranks: Ranks
) -> LanguageModelSAERunnerConfig[Any]:
    """The config of a rank's own activations, which gives its share of each batch."""
    cfg = copy.copy(cfg)
    cfg.train_batch_size_tokens //= ranks.size
    return cfg
