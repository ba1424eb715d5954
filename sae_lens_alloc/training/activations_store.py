"""SAELens' activations store with a position that can be saved, and a part held out."""

import math
from collections.abc import Generator
from typing import cast

import torch
from sae_lens import logger
from sae_lens.training.activations_store import ActivationsStore
from safetensors.torch import load_file
from tqdm.auto import tqdm
from typing_extensions import override

from sae_lens_alloc.buffer_setting import contexts_in_buffer
from sae_lens_alloc.training.mixing_buffer import MixingBuffer


class ResumableActivationsStore(ActivationsStore):
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
    loaded_from: str | None = None

    def hold_out(self, n_tokens: int) -> torch.Tensor:
        """
        Takes activations from the beginning of the dataset that are never served, in no
        epoch. To be called before anything else is read.

        Args:
            n_tokens: Tokens wanted, special ones included; rounded up to whole batches of
                the language model.

        Returns:
            Activations of shape (n_tokens, d_in), special tokens excluded as in training.

        Raises:
            ValueError: if the dataset is too small.
        """
        tokens_per_batch = self.store_batch_size_prompts * self.training_context_size
        try:
            held_out = torch.cat(
                [
                    self.get_filtered_llm_batch(raise_on_epoch_end=True)
                    for _ in range(math.ceil(n_tokens / tokens_per_batch))
                ]
            )
        except StopIteration:
            raise ValueError(
                f"The dataset has fewer than the {n_tokens} tokens that are to be held out "
                "for metrics, in contexts of "
                f"{self.context_size}: use more text, or a smaller "
                "store_batch_size_prompts or training_tokens."
            ) from None
        self.n_held_out_contexts = self.n_contexts_read
        if self.cached_activation_dataset is not None:
            rows = range(self.current_row_idx, len(self.cached_activation_dataset))
            self.cached_activation_dataset = self.cached_activation_dataset.select(rows)
            self.current_row_idx = 0
        return held_out

    # private in SAELens, but the only place that sees every context of every epoch
    @override
    def _iterate_tokenized_sequences(self) -> Generator[torch.Tensor, None, None]:
        self.n_contexts_read = 0
        for context in super()._iterate_tokenized_sequences():
            self.n_contexts_read += 1
            if self.n_contexts_read > self.n_held_out_contexts:
                yield context

    @override
    def get_data_loader(self) -> MixingBuffer:
        return MixingBuffer(
            contexts_in_buffer(self) * self.training_context_size,
            self.train_batch_size_tokens,
            self._iterate_filtered_activations(),
            self.activations_mixing_fraction,
        )

    @override
    def state_dict(self) -> dict[str, torch.Tensor]:
        state = super().state_dict()
        state["n_contexts_read"] = torch.tensor(self.n_contexts_read)
        if self.cached_activation_dataset is not None:
            state["current_row_idx"] = torch.tensor(self.current_row_idx)
        loader = cast(MixingBuffer | None, self._dataloader)
        if loader is not None and loader.buffer is not None:
            state["buffer"] = loader.buffer
            state["n_to_serve"] = torch.tensor(loader.n_to_serve)
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
        self._read_up_to(int(state["n_contexts_read"]))
        self.n_dataset_processed = int(state["n_dataset_processed"])
        if self.cached_activation_dataset is not None:
            self.current_row_idx = int(state["current_row_idx"])
        if "buffer" in state:
            self._dataloader = loader = self.get_data_loader()
            loader.buffer = state["buffer"].to(self.device)
            loader.n_to_serve = int(state["n_to_serve"])

    def _read_up_to(self, n_contexts: int) -> None:
        """Reads on until `n_contexts` of the epoch have been read."""
        for _ in tqdm(
            range(n_contexts - self.n_contexts_read),
            desc="Going to the checkpoint's place in the dataset",
            leave=False,
        ):
            if next(self.iterable_sequences, None) is None:
                raise ValueError(
                    f"The dataset ends after {self.n_contexts_read} contexts, but the "
                    f"checkpoint had read {n_contexts}: it was made with another dataset "
                    "or context_size."
                )


def make_resumable(store: ActivationsStore) -> ResumableActivationsStore:
    """
    Turns a store from which nothing has been read into a resumable one, in place: SAELens'
    runner builds its store itself and offers no seam to pass another class.
    """
    store.__class__ = ResumableActivationsStore
    resumable = cast(ResumableActivationsStore, store)
    if resumable.dataset is not None:
        resumable.iterable_sequences = resumable._iterate_tokenized_sequences()
    return resumable
