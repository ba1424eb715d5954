"""The settings of a run on one's own activations, which reads no text."""

from typing import Any

from sae_lens.config import LanguageModelSAERunnerConfig

from sae_lens_alloc.activations.buffer_setting import contexts_in_buffer


def activations_of(cfg: LanguageModelSAERunnerConfig[Any]) -> str | None:
    """
    Where a run finds its own activations, None for a run on those of a language model. SAELens' own
    configs do not say.
    """
    return getattr(cfg, "activations", None)


def activations_column_of(cfg: LanguageModelSAERunnerConfig[Any]) -> str | None:
    """The column of them that a run names, if it does."""
    return getattr(cfg, "activations_column", None)


def require_text(cfg: LanguageModelSAERunnerConfig[Any], what: str) -> None:
    """Raises ValueError if a run has no language model, which something needs."""
    own = activations_of(cfg)
    if own is not None:
        raise ValueError(
            f"{what} needs a language model and text, but the run is on activations, {own}: give "
            "the config of a run on text."
        )


def buffer_rows_of(cfg: LanguageModelSAERunnerConfig[Any]) -> int:
    """Rows of one's own activations that are shuffled together: the buffer counts batches."""
    return contexts_in_buffer(cfg) * cfg.train_batch_size_tokens
