"""Activations of a language model on the text that an SAE was trained on, or on other text."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

import torch
from sae_lens.config import LanguageModelSAERunnerConfig, LoggingConfig
from sae_lens.saes.sae import SAE, TrainingSAEConfig
from sae_lens.saes.standard_sae import StandardTrainingSAEConfig

from sae_lens_alloc.activations.buffer_setting import buffer_setting
from sae_lens_alloc.activations.language_model import (
    check_language_model,
    load_language_model,
)
from sae_lens_alloc.activations.own_activations import (
    activations_column_of,
    activations_of,
)
from sae_lens_alloc.activations.row_order import RowOrder
from sae_lens_alloc.activations.row_source import BatchSource, open_rows
from sae_lens_alloc.activations.text_store import open_text
from sae_lens_alloc.progress import token_bar
from sae_lens_alloc.saes.mutual_choice_transcoder import (
    MutualChoiceTrainingTranscoderConfig,
)
from sae_lens_alloc.saes.rows import output_width
from sae_lens_alloc.typed_values import convert, in_words, shown

CONTEXTS_PER_BATCH = 8
# SAELens mixes the activations of so many contexts.
BUFFERED_CONTEXTS = 64
# What else SAELens may have recorded of a run.
OPTIONAL_METADATA = (
    "model_class_name",
    "hook_head_index",
    "model_from_pretrained_kwargs",
    "prepend_bos",
    "exclude_special_tokens",
    "sequence_separator_token",
    "disable_concat_sequences",
)


@dataclass
class _Text(LanguageModelSAERunnerConfig[Any]):
    hook_name_out: str | None = None
    activations: str | None = None
    activations_column: str | None = None


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
        A config. Only its model, hook and text matter.

    Raises:
        ValueError: if something that is needed was not recorded, does not exist any more, or has
            the wrong type or value.
    """
    metadata = sae.cfg.metadata
    recorded: dict[str, Any] = {
        "model_name": model_name or metadata.model_name,
        "dataset_path": dataset_path or metadata.dataset_path,
        "hook_name": metadata.hook_name,
        "context_size": metadata.context_size,
    }
    d_out = output_width(sae.cfg)
    if d_out is not None:
        recorded["hook_name_out"] = metadata.hook_name_out
    missing = [name for name, value in recorded.items() if value is None or value == ""]
    if missing:
        raise ValueError(
            f"the SAE's metadata does not say its {' and '.join(missing)}: give the config "
            "of a run that has them."
        )
    optional = {name: metadata[name] for name in OPTIONAL_METADATA if name in metadata}
    optional["seqpos_slice"] = metadata.seqpos_slice or [None]
    _require_types({**recorded, **optional})
    _require_folders(recorded)
    optional["seqpos_slice"] = tuple(optional["seqpos_slice"])
    tokens_per_context = _tokens_per_context(
        recorded["context_size"], optional["seqpos_slice"]
    )
    optional[buffer_setting()] = BUFFERED_CONTEXTS
    return _Text(
        sae=_of_the_size_of(sae),
        **recorded,
        **optional,
        streaming=not Path(recorded["dataset_path"]).exists(),
        dataset_trust_remote_code=False,
        is_dataset_tokenized=False,
        store_batch_size_prompts=CONTEXTS_PER_BATCH,
        train_batch_size_tokens=CONTEXTS_PER_BATCH * tokens_per_context,
        device=device,
        checkpoint_path=None,
        logger=LoggingConfig(log_to_wandb=False),
        verbose=False,
    )


def own_run_of_sae(
    sae: SAE[Any], device: str = "cpu"
) -> LanguageModelSAERunnerConfig[Any]:
    """
    The activations of its owner that an SAE was trained on, as its metadata says.

    Returns:
        A config, of which only they matter.

    Raises:
        ValueError: if they are no file or folder, or not there any more.
    """
    recorded = str(sae.cfg.metadata.activations)
    if not Path(recorded).exists():
        raise ValueError(
            f"the SAE was trained on activations, {recorded}, which are no file or folder here: "
            "give the config of a run with activations."
        )
    return _Text(
        sae=_of_the_size_of(sae),
        activations=recorded,
        activations_column=sae.cfg.metadata.activations_column,
        device=device,
        checkpoint_path=None,
        logger=LoggingConfig(log_to_wandb=False),
        verbose=False,
    )


def _of_the_size_of(sae: SAE[Any]) -> TrainingSAEConfig:
    """A config that says how wide the activations of an SAE are."""
    size: dict[str, Any] = {"d_in": sae.cfg.d_in, "d_sae": sae.cfg.d_sae}
    d_out = output_width(sae.cfg)
    if d_out is None:
        return StandardTrainingSAEConfig(**size)
    return MutualChoiceTrainingTranscoderConfig(**size, d_out=d_out, k=1)


def _require_folders(recorded: dict[str, Any]) -> None:
    """Raises ValueError if a recorded path, perhaps of another machine, does not exist here."""
    for name in ("model_name", "dataset_path"):
        path = Path(recorded[name])
        if path.is_absolute() and not path.exists():
            raise ValueError(f"{name} is {str(path)!r}, but there is no such folder.")


def _tokens_per_context(context_size: int, seqpos_slice: tuple[int | None, ...]) -> int:
    """
    Tokens of a context that are trained on.

    Raises:
        ValueError: if there are none, or the slice cannot be one.
    """
    try:
        n_tokens = len(range(context_size)[slice(*seqpos_slice)])
    except (OverflowError, TypeError, ValueError):  # four numbers, a step of 0
        n_tokens = 0
    if n_tokens == 0:
        raise ValueError(
            f"the SAE's metadata says a context_size of {context_size} and a seqpos_slice of "
            f"{list(seqpos_slice)}, which leave no token of a context: give the config of a run."
        )
    return n_tokens


def _require_types(settings: dict[str, Any]) -> None:
    """Raises ValueError if a setting of a run does not have its type."""
    hints = get_type_hints(_Text)
    for name, value in settings.items():
        try:
            convert(value, hints[name])
        except TypeError:
            raise ValueError(
                f"the SAE's metadata says that its {name} is {shown(value)}, but it must "
                f"be {in_words(hints[name])}: give the config of a run."
            ) from None


@torch.no_grad()
def gather_activations(
    cfg: LanguageModelSAERunnerConfig[Any], n_tokens: int
) -> torch.Tensor:
    """
    Activations on the text of a run, in two halves that share no context. The contexts go to
    the halves in turn, since L0 differs between documents. Each is read once. Of a run on one's own
    activations, blocks of neighbouring rows take the place of contexts.

    Args:
        cfg: A run.
        n_tokens: Number of tokens, without the special ones that training excludes.

    Returns:
        Shape (n_tokens, d_in), or rows of shape (n_tokens, d_in + d_out), on `cfg.device`. The first half is the first n_tokens // 2 rows.

    Raises:
        ValueError: if the model has no such hook, or the text is too short.
    """
    if activations_of(cfg) is not None:
        return _gather_rows(cfg, n_tokens)
    model = load_language_model(cfg)
    check_language_model(model, cfg)
    store = open_text(model, cfg)
    store.store_batch_size_prompts = 1
    wanted = (n_tokens // 2, n_tokens - n_tokens // 2)
    halves: tuple[list[torch.Tensor], ...] = ([], [])
    missing = list(wanted)
    with token_bar(n_tokens, "reading activations") as bar:
        while max(missing) > 0:
            try:
                context = store.get_filtered_llm_batch(raise_on_epoch_end=True)
            except StopIteration:
                given = 2 * min(n - m for n, m in zip(wanted, missing, strict=True))
                raise ValueError(
                    f"{n_tokens:,} tokens are wanted, half of them to check what the other "
                    f"half sets, but {cfg.dataset_path!r} has only {given:,} if no context "
                    "is to be in both halves: give more text, or ask for fewer tokens."
                ) from None
            half = int(missing[1] > missing[0])
            halves[half].append(context)
            missing[half] -= len(context)
            bar.update(len(context))
    return torch.cat(
        [torch.cat(half)[:n] for n, half in zip(wanted, halves, strict=True)]
    ).to(cfg.device)


def _gather_rows(cfg: LanguageModelSAERunnerConfig[Any], n_rows: int) -> torch.Tensor:
    rows = open_rows(activations_of(cfg), activations_column_of(cfg))
    if isinstance(rows, BatchSource) or rows.n_rows < n_rows:
        there = "no" if isinstance(rows, BatchSource) else f"{rows.n_rows:,}"
        raise ValueError(
            f"{n_rows:,} tokens are wanted, but {rows.name} has {there} rows: ask for fewer "
            "tokens, or give other activations."
        )
    order = RowOrder(rows.n_rows, n_rows, buffer_rows=1, seed=cfg.seed)
    blocks = [rows.read(start, stop) for start, stop in order.held_out]
    return torch.cat([*blocks[::2], *blocks[1::2]])[:n_rows].to(cfg.device)


def take_tokens(batches: Iterator[torch.Tensor], n_tokens: int) -> torch.Tensor:
    """
    The next batches in one tensor of shape (n, d_in), until n is at least `n_tokens`.

    Raises:
        ValueError: if there are too few batches.
    """
    taken: list[torch.Tensor] = []
    with token_bar(n_tokens, "reading activations") as bar:
        while (n := sum(map(len, taken))) < n_tokens:
            batch = next(batches, None)
            if batch is None:
                raise ValueError(
                    f"activations of {n_tokens:,} tokens are wanted, but they end after {n:,}: "
                    "give more activations."
                )
            taken.append(batch)
            bar.update(len(batch))
    return torch.cat(taken)
