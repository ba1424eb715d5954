"""What the metadata of an SAE says of the activations that it was trained on."""

from typing import Any

from sae_lens.config import LanguageModelSAERunnerConfig
from sae_lens.saes.sae import SAEMetadata

from sae_lens_alloc.activations.own_activations import (
    activations_column_of,
    activations_of,
)

# As LanguageModelSAETrainingRunner records them.
OF_A_LANGUAGE_MODEL = (
    *("dataset_path", "hook_name", "model_name", "model_class_name"),
    *("hook_head_index", "context_size", "seqpos_slice"),
    *("model_from_pretrained_kwargs", "prepend_bos", "exclude_special_tokens"),
    *("sequence_separator_token", "disable_concat_sequences"),
)


def record_language_model(
    metadata: SAEMetadata, cfg: LanguageModelSAERunnerConfig[Any]
) -> None:
    """Records model, hook and text of a run that no runner of SAELens records."""
    for name in OF_A_LANGUAGE_MODEL:
        metadata[name] = getattr(cfg, name)


def record_own_activations(
    metadata: SAEMetadata, cfg: LanguageModelSAERunnerConfig[Any]
) -> None:
    """Records the path of one's own activations. Of a model, whoever knows it has told."""
    metadata.activations = activations_of(cfg)
    metadata.activations_column = activations_column_of(cfg)
