"""
Everything private in SAELens and torch that this package touches, each in one place.

A name that begins with an underscore may change in any release. Each seam below says what the
host does, why no public way exists, and what breaks if the host changes. `tests/test_compat.py`
(of bars: `tests/test_progress.py`, of metadata: `tests/training/test_own_activations.py`) runs the
host itself against each of them, and `make test-newest` does so with the newest releases. Whatever
the host offers in public is used directly and is not listed here.
"""

import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partialmethod
from typing import IO, Any, TypeVar

import torch
from sae_lens.llm_sae_training_runner import LanguageModelSAETrainingRunner
from sae_lens.saes.sae import (
    T_TRAINING_SAE,
    T_TRAINING_SAE_CONFIG,
    TrainStepOutput,
)

# What SAELens' runner raises when a run is interrupted, so that one `except` works for its
# runner and ours. Only a private module defines it. If it moves, importing this package fails.
from sae_lens.training._interruption import InterruptedException
from sae_lens.training.activations_store import ActivationsStore
from sae_lens.training.sae_trainer import SAETrainer
from torch import nn
from tqdm.auto import tqdm as tqdm_auto
from tqdm.std import tqdm as tqdm_std
from typing_extensions import override

T_MODULE = TypeVar("T_MODULE", bound="ModuleOfKeptDtypes")

__all__ = [
    "ContextsStore",
    "InterruptedException",
    "MetadataRunner",
    "ModuleOfKeptDtypes",
    "StepwiseTrainer",
    "compile_modes",
    "read_checkpoint_metadata",
    "has_hooks",
    "require_methods",
    "stored_entries",
    "without_progress_bars",
]


def require_methods(owner: type, names: Iterable[str]) -> None:
    """
    Raises ImportError if a class of SAELens lacks a method. Python would accept ours all the
    same, and SAELens would never call it.
    """
    for name in names:
        if not hasattr(owner, name):
            raise ImportError(f"{owner.__name__} has no {name}", name=owner.__module__)


require_methods(SAETrainer, ["_checkpoint_if_needed", "_update_pbar"])
require_methods(LanguageModelSAETrainingRunner, ["_set_sae_metadata"])
require_methods(
    ActivationsStore,
    [
        "_iterate_raw_dataset",
        "_iterate_tokenized_sequences",
        "get_multi_hook_activations",
    ],
)


class StepwiseTrainer(SAETrainer[T_TRAINING_SAE, T_TRAINING_SAE_CONFIG]):
    """
    SAELens' trainer with a place between two steps, `between_steps`, and a bar that moves in short
    runs, too.

    SAELens: `fit()` calls `_checkpoint_if_needed()` once after each step and its evaluations,
    and counts the step in `n_training_steps` right after that.
    No public way: `step()` ends before the evaluations, which draw from the same activations,
    and nothing public is called after the last step in all releases of 6.54.
    If it changes: checkpoints count a step too few or too many, so that a resumed run takes
    other steps than the one it resumes, or interrupted runs do not stop.

    SAELens: `_update_pbar()` moves the bar at every 100th step, by so many steps.
    No public way: no setting says how often.
    If it changes: the bar of a run of under 100 steps stays at 0.
    """

    @override
    def _update_pbar(
        self,
        step_output: TrainStepOutput,
        pbar: Any,
        update_interval: int = 100,
    ) -> None:
        hundredth = max(1, self.cfg.total_training_steps // 100)
        super()._update_pbar(step_output, pbar, min(update_interval, hundredth))

    @override
    def _checkpoint_if_needed(self) -> None:
        # SAELens saves before it counts the step, so that a resumed trainer is one behind
        self.n_training_steps += 1
        self.between_steps()
        self.n_training_steps -= 1

    def between_steps(self) -> None:
        """Called after each step, which `n_training_steps` counts by now."""
        super()._checkpoint_if_needed()


class MetadataRunner(LanguageModelSAETrainingRunner):
    """
    SAELens' runner with a place for a subclass where what is known of the activations goes into the
    metadata of the SAE: `set_metadata`.

    SAELens: `run()` calls `_set_sae_metadata()` first, which writes the model, hook and text of the
    config over whatever the metadata says.
    No public way: a run without a language model has none of these to tell.
    If it changes: SAEs of one's own activations say that they are of SAELens' default model.
    """

    @override
    def _set_sae_metadata(self) -> None:
        self.set_metadata()

    def set_metadata(self) -> None:
        """Writes what the config says of the activations into the metadata of the SAE."""
        super()._set_sae_metadata()


class ContextsStore(ActivationsStore):
    """
    SAELens' store with two places for a subclass: what it reads passes through `rows_of`, and
    what is made of that through `contexts_of`.

    SAELens: at the start of each epoch `_iterate_tokenized_sequences()` makes contexts of what
    `_iterate_raw_dataset()` reads, a row at a time.
    No public way: SAELens begins an epoch in the middle of a batch, with these methods.
    If it changes: contexts that are held out are trained on, and a resumed run goes on at
    another place of the text.
    """

    def read_hooks(self, widths: Mapping[str, int]) -> None:
        """
        Lets `get_multi_hook_activations` read some hooks.

        SAELens: keeps their names and widths in these attributes.
        No public way: only `from_config_multi_hook` sets them, which takes no config of a run.
        If it changes: a RuntimeError that says so, or an AttributeError.

        Args:
            widths: Number of dimensions by hook.
        """
        self._hook_names, self._hook_d_ins = list(widths), dict(widths)
        self._hook_head_indices = {}

    def begin_epoch(self) -> None:
        """Goes to the beginning of the dataset."""
        self.iterable_sequences = self._iterate_tokenized_sequences()

    def rows_of(self, dataset: Iterator[Any]) -> Iterator[Any]:
        """What one pass over the dataset yields, the content of a row each."""
        return dataset

    def contexts_of(self, epoch: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
        """What an epoch yields, token ids of shape (context_size,) each."""
        return epoch

    @override
    def _iterate_raw_dataset(self) -> Any:
        return self.rows_of(super()._iterate_raw_dataset())

    @override
    def _iterate_tokenized_sequences(self) -> Any:
        return self.contexts_of(super()._iterate_tokenized_sequences())


class ModuleOfKeptDtypes(nn.Module):
    """
    A module without parameters whose buffers keep their dtypes when an SAE that it belongs to is
    cast: thresholds in bfloat16 would change which features fire (SAELens #728).

    torch: `to()`, `half()`, `cuda()` and the like call `_apply()` of each module within with what
    casts or moves a tensor.
    No public way: the `to()` that is called is the SAE's, not that of the modules within.
    If it changes: the buffers are cast with the SAE.
    """

    @override
    def _apply(
        self: T_MODULE, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
    ) -> T_MODULE:
        for name, buffer in self.named_buffers():
            moved = fn(buffer)
            if moved.dtype != buffer.dtype:
                moved = buffer.to(moved.device)
            setattr(self, name, moved)
        self.after_moving()
        return self

    def after_moving(self) -> None:
        """Called when the buffers have been moved."""


def has_hooks(module: nn.Module) -> bool:
    """
    Whether somebody looks at, or changes, what passes a module.

    torch: keeps the hooks of a module in these dictionaries.
    No public way: TransformerLens lists its own hooks only, not those of torch.
    If it changes: an AttributeError, or hooks on an SAE that are not called.
    """
    return len(module._forward_hooks) > 0 or len(module._backward_hooks) > 0


def stored_entries(sparse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The entries of a sparse COO tensor as they are stored: indices of shape (n_dims, n_entries)
    and values of shape (n_entries,).

    torch: `indices()` and `values()` want each index to be stored once, and padding repeats one.
    No public way: `coalesce()` sums repeated ones, for which a GPU is waited for.
    If it changes: an AttributeError.
    """
    return sparse._indices(), sparse._values()


def compile_modes() -> list[str]:
    """
    The modes of torch.compile.

    torch: its documentation of `torch.compile` names `torch._inductor.list_mode_options()`.
    No public way: there is no other list of them.
    If it changes: an AttributeError where a run is to be compiled.
    """
    return list(torch._inductor.list_mode_options())


# What torch.distributed.checkpoint pickles, by module, beside torch's dtypes.
METADATA_NAMES = {
    "torch": ["Size"],
    "torch.serialization": ["_get_layout"],
    "torch.distributed.checkpoint.filesystem": ["_StorageInfo"],
    "torch.distributed.checkpoint.metadata": [
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata"),
        *("ChunkStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING"),
    ],
    **{m: ["PosixPath", "WindowsPath"] for m in ("pathlib", "pathlib._local")},
}


def read_checkpoint_metadata(file: IO[bytes]) -> Any:
    """
    What torch.distributed.checkpoint says about the tensors in its files. Nothing in the file is
    executed.

    torch: pickles it in `.metadata`, and unpickles whatever is there, so that a checkpoint from
    elsewhere could execute anything.
    No public way: `torch.load(weights_only=True)` reads its own files only.
    If it changes: no checkpoint of ranks can be read, with the name that is missing above.

    Raises:
        ValueError: if it refers to anything else.
    """
    return _MetadataUnpickler(file).load()


class _MetadataUnpickler(pickle.Unpickler):
    @override
    def find_class(self, module_name: str, global_name: str, /) -> Any:
        is_dtype = module_name == "torch" and isinstance(
            getattr(torch, global_name, None), torch.dtype
        )
        if is_dtype or global_name in METADATA_NAMES.get(module_name, ()):
            return super().find_class(module_name, global_name)
        raise ValueError(
            f"it refers to {module_name}.{global_name}, which has no place there."
        )


def without_progress_bars() -> None:
    """
    Lets this process show no progress bar from now on.

    tqdm: reads TQDM_DISABLE when it is imported, which SAELens does before anything of ours runs.
    No public way: SAELens' trainer makes its bar itself, without a setting for it.
    If it changes: each process of a training shows a bar.
    """
    for bar in {tqdm_std, tqdm_auto}:
        setattr(bar, "__init__", partialmethod(bar.__init__, disable=True))  # noqa: B010
