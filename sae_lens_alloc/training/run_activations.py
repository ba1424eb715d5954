"""The activations of a run: what is trained on, and what is held out of that."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from sae_lens.config import LanguageModelSAERunnerConfig
from sae_lens.training.activations_store import ActivationsStore

from sae_lens_alloc.activations.batch_store import BatchStore
from sae_lens_alloc.activations.gathered import gathered_rows
from sae_lens_alloc.activations.own_activations import (
    activations_column_of,
    activations_of,
    buffer_rows_of,
)
from sae_lens_alloc.activations.row_order import RowOrder
from sae_lens_alloc.activations.row_source import BatchSource, RowSource, open_rows
from sae_lens_alloc.activations.row_store import RowStore
from sae_lens_alloc.activations.store import ResumableActivationsStore
from sae_lens_alloc.distributed.agreement import failing_together
from sae_lens_alloc.distributed.ranks import Ranks
from sae_lens_alloc.saes.rows import output_width, row_width
from sae_lens_alloc.training.held_out import held_out_rows, held_out_tokens


class BatchesOfRun(Protocol):
    """What a run trains on: endless batches with a position that can be saved."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Itself."""
        ...

    def __next__(self) -> torch.Tensor:
        """The next batch of this rank, shape (B / S, width)."""
        ...

    def save_to_checkpoint(self, checkpoint_path: str | Path) -> None:
        """Saves the position."""

    def load_from_checkpoint(self, checkpoint_path: str | Path) -> None:
        """Goes to the position of a checkpoint."""


@dataclass(frozen=True, eq=False)
class RunActivations:
    """
    Where a run gets its activations.

    Args:
        store: What this rank reads of the text, or of activations of one's own.
        held_out: Activations that nobody trains on, the same on all ranks, (n_tokens, d_in).
        evaluation_contexts: Contexts that nobody trains on either, int64 of shape
            (n_contexts, context_size), the same on all ranks.
    """

    store: BatchesOfRun
    held_out: torch.Tensor
    evaluation_contexts: torch.Tensor


def open_activations(
    store: ActivationsStore,
    cfg: LanguageModelSAERunnerConfig[Any],
    ranks: Ranks,
    n_evaluation_contexts: int,
) -> RunActivations:
    """
    Opens the text of a run and holds out the first contexts of it, each rank of several its share
    of its own part.

    Args:
        store: The store that SAELens has made of the run, which nobody has read.
        cfg: The run.
        ranks: The ranks, which all must call this.
        n_evaluation_contexts: Contexts to set aside beside those for metrics.

    Raises:
        ValueError: if the text is too short, on all ranks where it is on one.
    """
    n_contexts = math.ceil(n_evaluation_contexts / ranks.size)
    with failing_together(ranks):
        ours = ResumableActivationsStore.in_place_of(store, cfg, ranks)
        n_tokens = held_out_tokens(cfg, ours.training_context_size, ranks)
        ours.require_text(
            ours.tokens_in_batches(n_tokens) + n_contexts * ours.training_context_size
        )
        held_out = ours.hold_out(n_tokens)
        contexts = torch.zeros(0, cfg.context_size, dtype=torch.int64)
        if n_contexts:
            contexts = ours.hold_out_contexts(n_contexts)
        contexts = contexts.to(str(cfg.llm_device))
    return RunActivations(
        ours,
        gathered_rows(held_out, ranks, cfg.device),
        gathered_rows(contexts, ranks, cfg.device),
    )


def rows_of_run(cfg: LanguageModelSAERunnerConfig[Any]) -> RowSource | BatchSource:
    """
    The activations that a run names, found to be such as it can train on.

    Raises:
        ValueError: if there are none, or they do not fit, in one sentence.
    """
    rows = open_rows(activations_of(cfg), activations_column_of(cfg))
    check_rows_of_run(rows, cfg)
    return rows


def check_rows_of_run(
    rows: RowSource | BatchSource, cfg: LanguageModelSAERunnerConfig[Any]
) -> None:
    """
    Checks that a run can train on activations. Of a generator nothing is known yet.

    Raises:
        ValueError: if they are too few, have another width than the SAE or hold a number that is
            not finite, in one sentence.
    """
    if isinstance(rows, BatchSource):
        return
    _require_width(rows.name, rows.width, cfg)
    n_held_out = held_out_rows(cfg, rows.n_rows)
    if rows.n_rows < n_held_out + cfg.train_batch_size_tokens:
        raise ValueError(
            f"{rows.name} has {rows.n_rows:,} rows, but {n_held_out:,} are to be held out and "
            f"{cfg.train_batch_size_tokens:,} are needed for a training step: give more "
            "activations, or a smaller train_batch_size_tokens."
        )
    rows.require_finite()


def open_own_activations(
    rows: RowSource | BatchSource,
    cfg: LanguageModelSAERunnerConfig[Any],
    ranks: Ranks,
) -> RunActivations:
    """
    Opens activations of one's own and holds out some of them.

    Args:
        rows: The activations, the same on all ranks, which `check_rows_of_run` has checked.
        cfg: The run.
        ranks: The ranks, which all must call this.

    Raises:
        ValueError: if a generator is to be read by several ranks, or its rows do not fit.
    """
    batch_size, device = cfg.train_batch_size_tokens, str(cfg.act_store_device)
    no_contexts = torch.zeros(0, cfg.context_size, dtype=torch.int64)
    with failing_together(ranks):
        if isinstance(rows, BatchSource):
            if not ranks.is_alone:
                raise ValueError(
                    f"{rows.name} of activations is read by one process, not by {ranks.size}: "
                    "give a file or a tensor, or start one process."
                )
            store = BatchStore(
                rows,
                batch_size,
                buffer_rows_of(cfg),
                cfg.activations_mixing_fraction,
                device,
            )
            held_out = store.hold_out(held_out_rows(cfg, None))
            _require_width(rows.name, held_out.shape[1], cfg)
            return RunActivations(store, held_out, no_contexts)
        order = RowOrder(
            rows.n_rows,
            held_out_rows(cfg, rows.n_rows),
            buffer_rows_of(cfg),
            cfg.seed,
            shuffles=cfg.activations_mixing_fraction > 0,
        )
        store = RowStore(rows, order, batch_size, device, ranks)
        return RunActivations(store, store.held_out(), no_contexts)


def _require_width(
    name: str, width: int, cfg: LanguageModelSAERunnerConfig[Any]
) -> None:
    if width == row_width(cfg.sae):
        return
    if output_width(cfg.sae) is None:
        raise ValueError(
            f"{name} has rows of {width} numbers, but sae.d_in is {cfg.sae.d_in}: give "
            f"sae.d_in={width}, or other activations."
        )
    raise ValueError(
        f"{name} has rows of {width} numbers, but a transcoder needs its input and its output in "
        f"each, sae.d_in + sae.d_out = {row_width(cfg.sae)}: give such rows."
    )
