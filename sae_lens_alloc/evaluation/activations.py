"""Activations of a language model on the text that an SAE was trained on, or on other text."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from sae_lens.config import LanguageModelSAERunnerConfig, LoggingConfig
from sae_lens.load_model import load_model
from sae_lens.saes.sae import SAE
from sae_lens.saes.standard_sae import StandardTrainingSAEConfig
from sae_lens.training.activations_store import ActivationsStore

CONTEXTS_PER_BATCH = 8
# SAELens mixes the activations of so many contexts.
BUFFERED_CONTEXTS = 64


def text_of_sae(
    sae: SAE[Any],
    model_name: str | None = None,
    dataset_path: str | None = None,
    device: str = "cpu",
) -> LanguageModelSAERunnerConfig[Any]:
    """
    Where the activations of an SAE come from, as SAELens recorded it in its metadata.

    Args:
        sae: A saved SAE.
        model_name: The language model, in place of the recorded one.
        dataset_path: The text, in place of the recorded one.
        device: Where to run the language model.

    Returns:
        A config of which only the model, the hook and the text matter.

    Raises:
        ValueError: if something that is needed was not recorded, or is not there any more.
    """
    metadata = sae.cfg.metadata
    recorded: dict[str, Any] = {
        "model_name": model_name or metadata.model_name,
        "dataset_path": dataset_path or metadata.dataset_path,
        "hook_name": metadata.hook_name,
        "context_size": metadata.context_size,
    }
    missing = [name for name, value in recorded.items() if value is None]
    if missing:
        raise ValueError(
            f"the SAE's metadata does not say its {' and '.join(missing)}: give the config "
            "of a run that has them."
        )
    for name in ("model_name", "dataset_path"):
        path = Path(recorded[name])
        if (
            path.is_absolute() and not path.exists()
        ):  # recorded on another machine, perhaps
            raise ValueError(f"{name} is {str(path)!r}, but there is no such folder.")
    context_size = recorded["context_size"]
    seqpos_slice = tuple(metadata.seqpos_slice or (None,))
    tokens_per_context = len(range(context_size)[slice(*seqpos_slice)])
    optional = {
        name: metadata[name]
        for name in (
            "model_class_name",
            "hook_head_index",
            "model_from_pretrained_kwargs",
            "prepend_bos",
            "exclude_special_tokens",
            "sequence_separator_token",
            "disable_concat_sequences",
        )
        if name in metadata
    }
    return LanguageModelSAERunnerConfig(
        sae=StandardTrainingSAEConfig(d_in=sae.cfg.d_in, d_sae=sae.cfg.d_sae),
        **recorded,
        **optional,
        seqpos_slice=seqpos_slice,
        streaming=not Path(recorded["dataset_path"]).exists(),
        dataset_trust_remote_code=False,
        is_dataset_tokenized=False,
        store_batch_size_prompts=CONTEXTS_PER_BATCH,
        train_batch_size_tokens=CONTEXTS_PER_BATCH * tokens_per_context,
        n_batches_in_buffer=BUFFERED_CONTEXTS,
        device=device,
        checkpoint_path=None,
        logger=LoggingConfig(log_to_wandb=False),
        verbose=False,
    )


@torch.no_grad()
def gather_activations(
    cfg: LanguageModelSAERunnerConfig[Any], n_tokens: int
) -> torch.Tensor:
    """
    The first activations that a run would train on, shape (n_tokens, d_in), on `cfg.device`.

    Args:
        cfg: A run.
        n_tokens: Number of tokens.
    """
    torch.manual_seed(cfg.seed)  # SAELens shuffles
    model = load_model(
        cfg.model_class_name,
        cfg.model_name,
        device=cfg.llm_device,
        model_from_pretrained_kwargs=cfg.model_from_pretrained_kwargs,
        hook_names=[cfg.hook_name],
    )
    store = ActivationsStore.from_config(model, cfg)
    return take_tokens(store, n_tokens).to(cfg.device)[:n_tokens]


def take_tokens(batches: Iterator[torch.Tensor], n_tokens: int) -> torch.Tensor:
    """The next batches together, of shape (n, d_in), so many that n is at least `n_tokens`."""
    taken: list[torch.Tensor] = []
    while sum(map(len, taken)) < n_tokens:
        taken.append(next(batches))
    return torch.cat(taken)
