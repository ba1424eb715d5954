"""SAELens' activations store, with a first part of the dataset that is held out of all epochs."""

import math
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, cast

import torch
from sae_lens import logger
from sae_lens.config import HfDataset
from sae_lens.training.activations_store import ActivationsStore
from transformer_lens.HookedTransformer import HookedRootModule
from typing_extensions import Self, override

from sae_lens_alloc.activations.hook_names import hook_name_out_of, hook_names_of
from sae_lens_alloc.compat import ContextsStore
from sae_lens_alloc.errors import in_one_sentence
from sae_lens_alloc.progress import token_bar
from sae_lens_alloc.saes.rows import row_width


class HeldOutStore(ContextsStore):
    """
    SAELens' `ActivationsStore` that keeps the first contexts of the dataset out of training. Its
    messages name the dataset and the row. With `hook_name_out`, it reads the rows of a transcoder:
    the activations at both hooks for the same token, from one pass of the language model.
    """

    n_contexts_read: int = 0  # of the running epoch
    n_held_out_contexts: int = 0
    n_metrics_contexts: int = 0  # among them, those of `hold_out`
    dataset_name: str = "the dataset"
    reads_rows: bool = False
    _told_of_null: bool = False

    @override
    @classmethod
    def from_config(
        cls,
        model: HookedRootModule,
        cfg: Any,
        override_dataset: HfDataset | None = None,
    ) -> Self:
        """
        As in SAELens. Messages name `cfg.dataset_path`.

        Raises:
            ValueError: if the first row of a given dataset, which SAELens looks at, cannot be read.
        """
        path = cfg.dataset_path
        name = f"dataset_path {path!r}" if path else cls.dataset_name
        with _reading_first_row(name, override_dataset):
            store = cast(Self, super().from_config(model, cfg, override_dataset))
        store.dataset_name = name
        if hook_name_out_of(cfg) is not None:
            widths = (cfg.sae.d_in, row_width(cfg.sae) - cfg.sae.d_in)
            store.read_hooks(dict(zip(hook_names_of(cfg), widths, strict=True)))
            store.d_in, store.reads_rows = sum(widths), True
        return store

    @override
    def get_activations(self, batch_tokens: torch.Tensor) -> torch.Tensor:
        if not self.reads_rows:
            return super().get_activations(batch_tokens)
        parts = self.get_multi_hook_activations(batch_tokens).values()
        # float32, as SAELens gives those at one hook
        return torch.cat(
            [part.to(self.device, torch.float32) for part in parts], dim=-1
        )

    def require_text(self, n_tokens: int) -> None:
        """
        Checks that enough text is left to train on after some is held out. To be called before
        anything is read.

        Args:
            n_tokens: Tokens that will be held out, special ones included, in whole contexts.

        Raises:
            ValueError: if the text has too few tokens for that and one training step, or its
                contexts have room for special tokens alone.
        """
        require_ordinary_tokens(self)
        needed = n_tokens + self.train_batch_size_tokens
        found = 0
        if self.cached_activation_dataset is not None:
            found = len(self.cached_activation_dataset) * self.training_context_size
        else:
            with token_bar(needed, "checking the text") as bar:
                for _ in self.iterable_sequences:
                    found += self.training_context_size
                    bar.update(self.training_context_size)
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
        Takes activations from the beginning of the dataset. No epoch serves them. To be called
        before anything else is read.

        Args:
            n_tokens: Tokens wanted, special ones included. The number is rounded up to whole
                batches of the language model, and until at least two tokens are ordinary.

        Returns:
            Activations of shape (n_tokens, d_in), or rows of shape (n_tokens, d_in + d_out),
            special tokens excluded as in training.

        Raises:
            ValueError: if the dataset is too small.
        """
        tokens_per_batch = self.store_batch_size_prompts * self.training_context_size
        held_out: list[torch.Tensor] = []
        try:
            with token_bar(n_tokens, "holding out activations") as bar:
                while (
                    len(held_out) * tokens_per_batch < n_tokens
                    or sum(map(len, held_out)) < 2  # one alone has no variance
                ):
                    held_out.append(
                        self.get_filtered_llm_batch(raise_on_epoch_end=True)
                    )
                    bar.update(tokens_per_batch)
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
        Takes the next contexts. No epoch serves them either. To be called after `hold_out` and
        before anything else is read.

        Returns:
            Token ids of shape (n_contexts, context_size).

        Raises:
            ValueError: if there are too few, or the activations are stored without tokens.
        """
        stored = self.cached_activation_dataset
        if stored is None:
            with token_bar(n_contexts * self.context_size, "holding out text") as bar:
                taken: list[torch.Tensor] = []
                for context in islice(self.iterable_sequences, n_contexts):
                    taken.append(context)
                    bar.update(self.context_size)
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
        """Holds what has been read so far out of all epochs."""
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
                        f"{self.tokens_column!r}; such rows are skipped"
                    )
        except Exception as error:  # datasets and file formats have many of their own
            raise _unreadable(self.dataset_name, n_rows, error) from error

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


def require_ordinary_tokens(store: ActivationsStore) -> None:
    """
    Raises ValueError if a context has room for nothing but its BOS token. SAELens would make
    such contexts of the first text for ever.
    """
    if store.dataset is None or store.is_dataset_tokenized or not store.prepend_bos:
        return
    tokenizer = getattr(store.model, "tokenizer", None)
    if store.context_size == 1 and getattr(tokenizer, "bos_token_id", None) is not None:
        raise ValueError(
            "context_size is 1, which leaves no room for a token of the text after the BOS "
            "token: raise it, or give prepend_bos=false."
        )


@contextmanager
def _reading_first_row(
    name: str, given: HfDataset | None
) -> Generator[None, None, None]:
    """Within it, SAELens reads the first row of a given dataset, or finds one of its own."""
    try:
        yield
    except OSError as error:
        if given is None:
            raise
        raise _unreadable(name, 0, error) from error


def _unreadable(name: str, n_rows: int, error: BaseException) -> ValueError:
    """What to say of a dataset of which only `n_rows` can be read: the root cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    return ValueError(
        f"{name} cannot be read after row {n_rows}: {in_one_sentence(error)}"
    )
