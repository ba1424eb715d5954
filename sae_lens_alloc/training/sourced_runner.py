"""Where the activations of a run come from: a language model that reads text, or one's own."""

import copy
from pathlib import Path
from typing import Any

import torch
from sae_lens.config import HfDataset, LanguageModelSAERunnerConfig
from sae_lens.saes.sae import TrainingSAE
from transformer_lens.HookedTransformer import HookedRootModule
from typing_extensions import override

from sae_lens_alloc.activations.language_model import (
    check_language_model,
    load_language_model,
)
from sae_lens_alloc.activations.local_dataset import override_for_local_dataset
from sae_lens_alloc.activations.own_activations import (
    activations_column_of,
    activations_of,
)
from sae_lens_alloc.activations.recorded_source import record_own_activations
from sae_lens_alloc.activations.row_source import BatchSource, RowSource, open_rows
from sae_lens_alloc.compat import MetadataRunner
from sae_lens_alloc.distributed.agreement import failing_together
from sae_lens_alloc.distributed.ranks import Ranks
from sae_lens_alloc.training.before_run import (
    no_warning_of_overrides,
    require_rows,
    shard_of_run,
)
from sae_lens_alloc.training.rng_state import seed_all, seed_of_rank
from sae_lens_alloc.training.run_activations import (
    RunActivations,
    check_rows_of_run,
    open_activations,
    open_own_activations,
)

Rows = RowSource | BatchSource


class SourcedRunner(MetadataRunner):
    """
    SAELens' runner, whose activations need not come from a language model. On one's own it has
    neither a model nor an evaluator.
    """

    held_out: torch.Tensor  # activations that are not trained on, (n_tokens, d_in)
    evaluation_contexts: torch.Tensor  # nor these, if any, (n_contexts, context_size)
    ranks: Ranks

    def begin(
        self,
        cfg: LanguageModelSAERunnerConfig[Any],
        dataset: HfDataset | None,
        model: HookedRootModule | None,
        sae: TrainingSAE[Any] | None,
        rows: Rows | None,
        n_evaluation_contexts: int,
    ) -> None:
        """
        Does what SAELens' runner does when it is made, and holds activations out.

        Args:
            cfg: The run.
            dataset: In place of the config's.
            model: In place of the config's.
            sae: In place of the config's.
            rows: Own activations in place of the config's.
            n_evaluation_contexts: Contexts of text to set aside.

        Raises:
            ValueError: if the activations do not fit the run, or are too few.
        """
        if activations_of(cfg) is None:
            activations = self._begin_with_text(
                cfg, dataset, model, sae, n_evaluation_contexts
            )
            self.evaluator.activations_store = activations.store  # type: ignore[assignment]
        else:
            activations = self._begin_with_rows(cfg, sae, rows)
        self.activations_store = activations.store  # type: ignore[assignment]
        self.held_out = activations.held_out
        self.evaluation_contexts = activations.evaluation_contexts

    def _begin_with_text(
        self,
        cfg: LanguageModelSAERunnerConfig[Any],
        dataset: HfDataset | None,
        model: HookedRootModule | None,
        sae: TrainingSAE[Any] | None,
        n_evaluation_contexts: int,
    ) -> RunActivations:
        require_rows(dataset)
        with no_warning_of_overrides(dataset=dataset is None, model=model is None):
            super().__init__(
                cfg,
                override_for_local_dataset(cfg) if dataset is None else dataset,
                load_language_model(cfg) if model is None else model,
                shard_of_run(cfg, sae, self.ranks),
            )
        check_language_model(self.model, cfg)
        if not self.ranks.is_alone:  # each shuffles on its own
            seed_all(seed_of_rank(cfg.seed, self.ranks))
        return open_activations(
            self.activations_store, cfg, self.ranks, n_evaluation_contexts
        )

    def _begin_with_rows(
        self,
        cfg: LanguageModelSAERunnerConfig[Any],
        sae: TrainingSAE[Any] | None,
        rows: Rows | None,
    ) -> RunActivations:
        with failing_together(self.ranks):
            if rows is None:
                rows = open_rows(activations_of(cfg), activations_column_of(cfg))
            check_rows_of_run(rows, cfg)
        activations = open_own_activations(rows, cfg, self.ranks)
        self.cfg = cfg
        self.evaluator = None  # type: ignore[assignment]
        sae = shard_of_run(cfg, sae, self.ranks)
        if sae is None:
            sae = TrainingSAE.from_dict(cfg.get_training_sae_cfg_dict())
        self.sae = sae.to(cfg.device)
        return activations

    @override
    def set_metadata(self) -> None:
        if activations_of(self.cfg) is None:
            super().set_metadata()
        else:
            # what SAELens records is of a language model
            record_own_activations(self.sae.cfg.metadata, self.cfg)


def with_rows(
    cfg: LanguageModelSAERunnerConfig[Any], source: Any
) -> tuple[LanguageModelSAERunnerConfig[Any], Rows | None]:
    """
    A run on activations that are given beside its config.

    Args:
        cfg: The run, which is left as it is.
        source: The activations, see `open_rows`, or None for those that the config names.

    Returns:
        The run, which says what they are, and the activations.

    Raises:
        ValueError: if the config names others, or they are nothing of the kind.
    """
    if source is None:
        return cfg, None
    named = activations_of(cfg)
    if named is not None:
        raise ValueError(
            f"activations is {named!r}, but activations are given beside the config, too: leave "
            "one of the two out."
        )
    rows = open_rows(source, activations_column_of(cfg))
    name = str(source) if isinstance(source, str | Path) else rows.name
    cfg = copy.copy(cfg)
    setattr(cfg, "activations", name)  # noqa: B010 (SAELens' own has no such field)
    return cfg, rows
