"""Checks of a run on one's own activations by its config alone."""

from dataclasses import MISSING, fields
from typing import Any

from sae_lens.config import LanguageModelSAERunnerConfig

from sae_lens_alloc.activations.own_activations import (
    activations_column_of,
    activations_of,
)
from sae_lens_alloc.config.run_config import AllocSAERunnerConfig

# Settings of the language model and of its text, which have no effect without them.
TEXT_KEYS = (
    *(
        "model_name",
        "model_class_name",
        "hook_name",
        "hook_name_out",
        "hook_head_index",
    ),
    *("dataset_path", "streaming", "is_dataset_tokenized", "use_chat_formatting"),
    *("use_cached_activations", "cached_activations_path"),
    *("context_size", "seqpos_slice", "disable_concat_sequences", "prepend_bos"),
    *("sequence_separator_token", "exclude_special_tokens", "store_batch_size_prompts"),
    *("prefetch_llm_batches", "compile_llm", "llm_compilation_mode", "autocast_lm"),
    *("model_kwargs", "kl_finish"),
)


def check_own_activations(cfg: LanguageModelSAERunnerConfig[Any]) -> None:
    """
    Checks that a run reads either its own activations or those of a language model.

    Raises:
        ValueError: if it names both, in one sentence.
    """
    source, column = activations_of(cfg), activations_column_of(cfg)
    if source is None:
        if column is not None:
            raise ValueError(
                f"activations_column is {column!r}, but activations is missing: give the "
                "activations that have this column, or leave it out."
            )
        return
    if not source.strip():
        raise ValueError("activations is empty: give a file or a folder.")
    for field in fields(AllocSAERunnerConfig):
        if field.name not in TEXT_KEYS:
            continue
        factory = field.default_factory
        default = field.default if factory is MISSING else factory()
        value = getattr(cfg, field.name, default)
        if value != default:
            raise ValueError(
                f"{field.name} is {value!r}, but the run is on activations, {source}, without "
                "a language model and its text: leave one of the two out."
            )
