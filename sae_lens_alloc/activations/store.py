"""SAELens' activations store with a position that can be saved."""

import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from sae_lens import logger
from sae_lens.constants import ACTIVATIONS_STORE_STATE_FILENAME
from sae_lens.training.activations_store import ActivationsStore
from safetensors import safe_open
from safetensors.torch import load_file
from tqdm.auto import tqdm
from typing_extensions import Self, override

from sae_lens_alloc.activations.buffer_setting import contexts_in_buffer
from sae_lens_alloc.activations.held_out_store import HeldOutStore
from sae_lens_alloc.activations.mixing_buffer import MixingBuffer
from sae_lens_alloc.activations.parts import part_of_dataset, settings_of_rank
from sae_lens_alloc.distributed.rank_files import file_of_rank, files_of_ranks
from sae_lens_alloc.distributed.ranks import ALONE, Ranks


class ResumableActivationsStore(HeldOutStore):
    """
    SAELens' `ActivationsStore` with the same batches. After `load`, it continues with the batch
    that would have come next. SAELens' own store saves how many documents it has finished. It
    saves neither its buffer nor its place in the running document.

    The state is the buffer and the number of contexts read from the running epoch. `load`
    reads these contexts again, and tokenizes them again if they are text. A second `load` of
    the same file does nothing, so `load` can be called before a thread starts to prefetch.

    Each of several ranks has a store of its part of the text, and its own file in a checkpoint.
    """

    loaded_from: str | None = None
    batches: MixingBuffer | None = None  # from the first batch on
    ranks: Ranks = ALONE

    @classmethod
    def in_place_of(
        cls, store: ActivationsStore, cfg: Any, ranks: Ranks = ALONE
    ) -> Self:
        """
        A store of the same text as SAELens' store of `cfg`, from which nothing has been read. Of
        several ranks each gets a store of its own part of it.

        Raises:
            ValueError: if there is nothing to read for this rank.
        """
        dataset, name = store.dataset, f"dataset_path {cfg.dataset_path!r}"
        if not ranks.is_alone:
            cfg = settings_of_rank(cfg, ranks)
            if dataset is not None:
                dataset = part_of_dataset(dataset, name, ranks)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # those of the first store
            ours = cls.from_config(store.model, cfg, dataset)
        if not ranks.is_alone:
            ours._read_part(ranks, name)
        return ours

    def _read_part(self, ranks: Ranks, name: str) -> None:
        self.ranks = ranks
        if self.dataset_name == name:
            self.dataset_name = f"the part of {name} of rank {ranks.rank}"
        stored = self.cached_activation_dataset
        if stored is not None:
            self.cached_activation_dataset = part_of_dataset(  # pyright: ignore
                stored,
                f"cached_activations_path {self.cached_activations_path!r}",
                ranks,
            )

    def _activations(self) -> Iterator[torch.Tensor]:
        """
        Activations of one epoch after the other. Where no token is served, this is an error;
        SAELens' would continue for ever.
        """
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
                f"nothing of {self.dataset_name} is left to train on after the "
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
    def save_to_checkpoint(self, checkpoint_path: str | Path) -> None:
        """Saves the state of this rank."""
        path = Path(checkpoint_path, ACTIVATIONS_STORE_STATE_FILENAME)
        self.save(str(file_of_rank(path, self.ranks)))

    @override
    def load_from_checkpoint(self, checkpoint_path: str | Path) -> None:
        """
        Goes to the place of a checkpoint. One of another number of ranks, which had other parts of
        the text, says how far a part had been read.
        """
        path = Path(checkpoint_path, ACTIVATIONS_STORE_STATE_FILENAME)
        files = files_of_ranks(path)
        if len(files) in (0, self.ranks.size):
            self.load(str(file_of_rank(path, self.ranks)))
        elif str(path) != self.loaded_from:
            self.loaded_from = str(path)
            self._go_to_share(files)

    @override
    def load(self, file_path: str) -> None:
        if file_path == self.loaded_from:
            return
        self.loaded_from = file_path
        state = load_file(file_path)
        if "n_contexts_read" not in state:
            logger.warning(
                f"{file_path} was not saved by AllocSAETrainingRunner: training continues "
                "after the documents that had been read, without the activations that "
                "were in the buffer, and in another random order."
            )
            super().load(file_path)
            return
        self._go_to(int(state["n_contexts_read"]))
        self.n_dataset_processed = int(state["n_dataset_processed"])
        if self.cached_activation_dataset is not None:
            self.current_row_idx = int(state["current_row_idx"])
        # a new one, without what was read before `load`
        self.batches = self.get_data_loader()
        if "buffer" in state:
            self.batches.buffer = state["buffer"].to(self.device)
            self.batches.n_to_serve = int(state["n_to_serve"])

    def _go_to_share(self, files: list[Path]) -> None:
        """Goes to where as large a share of the own part has been read as of those of `files`."""
        logger.warning(
            f"the checkpoint is of {len(files)} and the run of {self.ranks.size} processes, which "
            "read other parts of the text: training goes on at about the same place of each, "
            "in another random order, without the activations that were in the buffers and with "
            "others held out, on which the run may have trained before."
        )
        stored = self.cached_activation_dataset
        key = "n_contexts_read" if stored is None else "current_row_idx"
        n_read = sum(_numbers(files, key)) // self.ranks.size
        if stored is None:
            self._go_to(n_read, or_begin=True)
        else:  # whose rows are read in whole batches
            n_read -= n_read % self.store_batch_size_prompts
            self.current_row_idx = n_read if n_read < len(stored) else 0

    def _go_to(self, n_contexts: int, or_begin: bool = False) -> None:
        """
        Goes to the place where `n_contexts` of an epoch have been read. If there are not as many, that is
        an error, or, with `or_begin`, the next epoch begins.
        """
        if n_contexts < self.n_contexts_read:
            # a later epoch had just begun, or more has been read now than at that time
            self.begin_epoch()
            self.n_contexts_read = 0
        with tqdm(
            total=n_contexts,
            initial=self.n_contexts_read,
            desc="Going to the checkpoint's place in the dataset",
            leave=False,
        ) as bar:
            # to serve its first context, an epoch reads all those that are held out
            while max(self.n_contexts_read, self.n_held_out_contexts) < n_contexts:
                if next(self.iterable_sequences, None) is None:
                    if or_begin:
                        self.begin_epoch()
                        return
                    raise ValueError(
                        f"The dataset ends after {self.n_contexts_read} contexts, but the "
                        f"checkpoint had read {n_contexts}: it was made with another dataset "
                        "or context_size."
                    )
                bar.update(self.n_contexts_read - bar.n)


def saved_held_out_contexts(checkpoint: Path, ranks: Ranks = ALONE) -> int | None:
    """
    Contexts that a rank holds out for metrics in a run that goes on from a checkpoint: as many
    as before, or, with another number of ranks, its share of all. None if it does not say.
    """
    path = checkpoint / ACTIVATIONS_STORE_STATE_FILENAME
    files = files_of_ranks(path)
    if len(files) == ranks.size:
        own = _numbers([file_of_rank(path, ranks)], "n_metrics_contexts")
        return own[0] if own else None
    known = _numbers(files, "n_metrics_contexts")
    return -(-sum(known) // ranks.size) if known else None


def _numbers(files: Iterable[Path], key: str) -> list[int]:
    """A number that states of stores have, those of SAELens not."""
    found: list[int] = []
    for file in files:
        with safe_open(file, "pt") as state:
            if key in state.keys():  # noqa: SIM118
                found.append(int(state.get_tensor(key)))
    return found
