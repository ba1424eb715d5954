"""SAELens' activations store with a position that can be saved, and a part held out."""

import math
import warnings
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from sae_lens import logger
from sae_lens.config import HfDataset
from sae_lens.constants import ACTIVATIONS_STORE_STATE_FILENAME
from sae_lens.training.activations_store import ActivationsStore
from safetensors import safe_open
from safetensors.torch import load_file
from tqdm.auto import tqdm
from transformer_lens.HookedTransformer import HookedRootModule
from typing_extensions import Self, override

from sae_lens_alloc.activations.buffer_setting import contexts_in_buffer
from sae_lens_alloc.activations.mixing_buffer import MixingBuffer
from sae_lens_alloc.compat import ContextsStore
from sae_lens_alloc.errors import in_one_sentence


class ResumableActivationsStore(ContextsStore):
    """
    SAELens' `ActivationsStore` that yields the same batches and, after `load`, goes on with
    the very batch that would have come next. SAELens' own saves how many documents it has
    finished, neither its buffer nor how far it was in the running document.

    The state is the buffer and the number of contexts read from the running epoch. `load`
    reads these contexts again, which for text means to tokenize them again. It does nothing
    the second time, so that it can be called before a thread starts to prefetch.
    """

    n_contexts_read: int = 0
    n_held_out_contexts: int = 0
    n_metrics_contexts: int = 0  # among them, those of `hold_out`
    loaded_from: str | None = None
    dataset_name: str = "the dataset"
    batches: MixingBuffer | None = None  # from the first batch on
    _told_of_null: bool = False

    @override
    @classmethod
    def from_config(
        cls,
        model: HookedRootModule,
        cfg: Any,
        override_dataset: HfDataset | None = None,
    ) -> Self:
        """As SAELens'; messages name `cfg.dataset_path`."""
        store = cast(Self, super().from_config(model, cfg, override_dataset))
        if cfg.dataset_path:
            store.dataset_name = f"dataset_path {cfg.dataset_path!r}"
        return store

    def require_text(self, n_tokens: int) -> None:
        """
        To be called before anything is read: what is then held out must leave enough to train
        on.

        Args:
            n_tokens: Tokens to be held out, special ones included, in whole contexts.

        Raises:
            ValueError: if the text has fewer than that and one training step, or its contexts
                have no ordinary token.
        """
        require_ordinary_tokens(self)
        needed = n_tokens + self.train_batch_size_tokens
        found = 0
        if self.cached_activation_dataset is not None:
            found = len(self.cached_activation_dataset) * self.training_context_size
        else:
            for _ in self.iterable_sequences:
                found += self.training_context_size
                if found >= needed:
                    break
            self.begin_epoch()  # the first one, anew
            self.n_dataset_processed = self.n_contexts_read = 0
        if found < needed:
            raise ValueError(
                f"{self.dataset_name} has {found:,} tokens in contexts of {self.context_size}, but "
                f"{needed:,} are needed: {n_tokens:,} to be held out and "
                f"{self.train_batch_size_tokens:,} for a training step: give more text, or a "
                "smaller store_batch_size_prompts, train_batch_size_tokens or training_tokens."
            )

    def tokens_in_batches(self, n_tokens: int) -> int:
        """A number of tokens, rounded up to whole batches of the language model."""
        tokens_per_batch = self.store_batch_size_prompts * self.training_context_size
        return math.ceil(n_tokens / tokens_per_batch) * tokens_per_batch

    def hold_out(self, n_tokens: int) -> torch.Tensor:
        """
        Takes activations from the beginning of the dataset that are never served, in no
        epoch. To be called before anything else is read.

        Args:
            n_tokens: Tokens wanted, special ones included; rounded up to whole batches of
                the language model, and to so many that two are ordinary.

        Returns:
            Activations of shape (n_tokens, d_in), special tokens excluded as in training.

        Raises:
            ValueError: if the dataset is too small.
        """
        tokens_per_batch = self.store_batch_size_prompts * self.training_context_size
        held_out: list[torch.Tensor] = []
        try:
            while (
                len(held_out) * tokens_per_batch < n_tokens
                or sum(map(len, held_out)) < 2  # one alone has no variance
            ):
                held_out.append(self.get_filtered_llm_batch(raise_on_epoch_end=True))
        except StopIteration:
            raise ValueError(
                f"{self.dataset_name} has no {n_tokens:,} tokens to be held out for metrics, in "
                f"batches of store_batch_size_prompts ({self.store_batch_size_prompts}) "
                f"contexts of {self.context_size}, or only special ones: give more text, or "
                "a smaller store_batch_size_prompts or training_tokens."
            ) from None
        self.n_metrics_contexts = len(held_out) * self.store_batch_size_prompts
        self._keep_from_epochs()
        return torch.cat(held_out)

    def hold_out_contexts(self, n_contexts: int) -> torch.Tensor:
        """
        Takes the next contexts, which are never served either. To be called after `hold_out`
        and before anything else is read.

        Returns:
            Token ids of shape (n_contexts, context_size).

        Raises:
            ValueError: if there are too few, or the activations are stored without tokens.
        """
        stored = self.cached_activation_dataset
        if stored is None:
            taken = list(islice(self.iterable_sequences, n_contexts))
        elif "token_ids" in stored.column_names:
            rows = range(self.current_row_idx, len(stored))[:n_contexts]
            self.current_row_idx += len(rows)
            taken = list(stored.select(rows)["token_ids"])
        else:
            raise ValueError(
                f"the activations in {self.cached_activations_path!r} are stored without "
                "their tokens, so no text can be held out of them: give "
                "use_cached_activations=false."
            )
        if len(taken) < n_contexts:
            raise ValueError(
                f"{self.dataset_name} has {len(taken)} contexts of {self.context_size} tokens left, "
                f"but {n_contexts} are to be held out: give more text."
            )
        self._keep_from_epochs()
        return torch.stack(taken).long()

    def _keep_from_epochs(self) -> None:
        """Takes what has been read so far out of all epochs."""
        self.n_held_out_contexts = self.n_contexts_read
        if self.cached_activation_dataset is not None:
            rows = range(self.current_row_idx, len(self.cached_activation_dataset))
            self.cached_activation_dataset = self.cached_activation_dataset.select(rows)
            self.current_row_idx = 0

    @override
    def rows_of(self, dataset: Iterator[Any]) -> Iterator[Any]:
        n_rows = 0
        try:
            for content in dataset:
                n_rows += 1
                if content is not None:
                    yield content
                elif not self._told_of_null:
                    self._told_of_null = True
                    logger.warning(
                        f"row {n_rows} of {self.dataset_name} holds null in the column "
                        f"{self.tokens_column!r}; such rows are passed over"
                    )
        except Exception as error:  # datasets and file formats have many of their own
            while error.__cause__ is not None:
                error = cast(Exception, error.__cause__)
            raise ValueError(
                f"{self.dataset_name} cannot be read behind row {n_rows}: "
                f"{in_one_sentence(error)}"
            ) from error

    @override
    def contexts_of(self, epoch: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
        self.n_contexts_read = 0
        for context in epoch:
            self.n_contexts_read += 1
            if len(context) != self.context_size:
                raise ValueError(
                    f"row {self.n_contexts_read} of {self.dataset_name} has {len(context)} "
                    f"tokens, fewer than context_size ({self.context_size})."
                )
            if self.n_contexts_read > self.n_held_out_contexts:
                yield context

    def _activations(self) -> Iterator[torch.Tensor]:
        """Of one epoch after the other; SAELens' goes on for ever where no token is served."""
        found = True  # the first pass may begin near the end
        while True:
            try:
                activations = self.get_filtered_llm_batch(raise_on_epoch_end=True)
            except StopIteration:
                if not found:
                    raise ValueError(
                        f"a whole pass over {self.dataset_name} brought no token to train on: its "
                        "texts are empty, shorter than context_size or of special tokens "
                        "only, which exclude_special_tokens leaves out."
                    ) from None
                found = False
                warnings.warn(
                    "All samples in the training dataset have been exhausted, beginning new epoch."
                )
                activations = self._first_of_epoch()
            found = found or len(activations) > 0
            yield activations

    def _first_of_epoch(self) -> torch.Tensor:
        try:
            return self.get_filtered_llm_batch()
        except StopIteration:
            raise ValueError(
                f"nothing of {self.dataset_name} is left to train on behind the "
                f"{self.n_held_out_contexts} contexts that are held out: give more text."
            ) from None

    @override
    def get_data_loader(self) -> MixingBuffer:
        return MixingBuffer(
            contexts_in_buffer(self) * self.training_context_size,
            self.train_batch_size_tokens,
            self._activations(),
            self.activations_mixing_fraction,
        )

    @override
    def __next__(self) -> torch.Tensor:
        if self.batches is None:
            self.batches = self.get_data_loader()
        return next(self.batches)

    @override
    def state_dict(self) -> dict[str, torch.Tensor]:
        state = super().state_dict()
        state["n_contexts_read"] = torch.tensor(self.n_contexts_read)
        state["n_metrics_contexts"] = torch.tensor(self.n_metrics_contexts)
        if self.cached_activation_dataset is not None:
            state["current_row_idx"] = torch.tensor(self.current_row_idx)
        if self.batches is not None and self.batches.buffer is not None:
            state["buffer"] = self.batches.buffer
            state["n_to_serve"] = torch.tensor(self.batches.n_to_serve)
        return state

    @override
    def load(self, file_path: str) -> None:
        if file_path == self.loaded_from:
            return
        self.loaded_from = file_path
        state = load_file(file_path)
        if "n_contexts_read" not in state:
            logger.warning(
                f"{file_path} was not saved by AllocSAETrainingRunner: training goes on "
                "after the documents that had been read, without the activations that "
                "were in the buffer, and in another random order."
            )
            super().load(file_path)
            return
        self._go_to(int(state["n_contexts_read"]))
        self.n_dataset_processed = int(state["n_dataset_processed"])
        if self.cached_activation_dataset is not None:
            self.current_row_idx = int(state["current_row_idx"])
        # without what was read beforehand
        self.batches = self.get_data_loader()
        if "buffer" in state:
            self.batches.buffer = state["buffer"].to(self.device)
            self.batches.n_to_serve = int(state["n_to_serve"])

    def _go_to(self, n_contexts: int) -> None:
        """Goes to where `n_contexts` of an epoch have been read."""
        if n_contexts < self.n_contexts_read:
            # a later epoch had just begun, or more is read beforehand than at that time
            self.begin_epoch()
            self.n_contexts_read = 0
        with tqdm(
            total=n_contexts,
            initial=self.n_contexts_read,
            desc="Going to the checkpoint's place in the dataset",
            leave=False,
        ) as bar:
            # an epoch passes those that are held out with the first one that it serves
            while max(self.n_contexts_read, self.n_held_out_contexts) < n_contexts:
                if next(self.iterable_sequences, None) is None:
                    raise ValueError(
                        f"The dataset ends after {self.n_contexts_read} contexts, but the "
                        f"checkpoint had read {n_contexts}: it was made with another dataset "
                        "or context_size."
                    )
                bar.update(self.n_contexts_read - bar.n)


def saved_held_out_contexts(checkpoint: Path) -> int | None:
    """How many contexts the run of a checkpoint held out for metrics, None if it does not say."""
    path = checkpoint / ACTIVATIONS_STORE_STATE_FILENAME
    if not path.exists():
        return None
    with safe_open(path, "pt") as state:
        if "n_metrics_contexts" not in state.keys():  # noqa: SIM118
            return None
        return int(state.get_tensor("n_metrics_contexts"))


def require_ordinary_tokens(store: ActivationsStore) -> None:
    """
    Raises ValueError if a context has room for nothing but the BOS token in front of it. SAELens
    makes such contexts for ever, from the first text on.
    """
    if store.dataset is None or store.is_dataset_tokenized or not store.prepend_bos:
        return
    tokenizer = getattr(store.model, "tokenizer", None)
    if store.context_size == 1 and getattr(tokenizer, "bos_token_id", None) is not None:
        raise ValueError(
            "context_size is 1, which leaves no room for a token of the text behind the BOS "
            "token: raise it, or give prepend_bos=false."
        )
