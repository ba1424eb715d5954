"""
Tensors whose rows are features, in the files of `torch.distributed.checkpoint`. All ranks write
them, and any number of ranks, or one process without any, reads them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import (
    create_read_items_for_chunk_list,
)
from typing_extensions import override

from sae_lens_alloc.compat import read_checkpoint_metadata
from sae_lens_alloc.distributed.feature_shard import FeatureShard
from sae_lens_alloc.distributed.ranks import Ranks
from sae_lens_alloc.errors import as_reason

# Where torch.distributed.checkpoint says what is in its files.
METADATA_FILENAME = ".metadata"
# Bytes of a tensor that are written, and read, at a time.
BLOCK_BYTES = 2**26


@dataclass(frozen=True)
class FeatureRows:
    """
    The part of a tensor of all features, shape (F, ...), that a rank has. It is stored in the
    storage order of the features (feature_shard.py), in which each rank's part is contiguous:
    such as a DTensor that is split along its first dimension.

    Args:
        rows: The rows of the own features, shape (F_r, ...). A view will do, such as W_enc.T.
        shard: The features of this rank.
    """

    rows: torch.Tensor
    shard: FeatureShard

    def chunk(self) -> ChunkStorageMetadata:
        """Where the part is in the whole."""
        first = self.shard.ranks.rank * self.shard.largest
        return _chunk(first, self.rows.shape)

    def blocks(self) -> list[ChunkStorageMetadata]:
        """The part in blocks, so that none is larger than BLOCK_BYTES."""
        row_bytes = self.rows[:1].numel() * self.rows.element_size()
        n_rows = max(1, BLOCK_BYTES // max(1, row_bytes))
        (first, *_), (n_own, *others) = self.chunk().offsets, self.rows.shape
        return [
            _chunk(first + start, (min(n_rows, n_own - start), *others))
            for start in range(0, n_own, n_rows)
        ]

    def places(self, start: int, n_rows: int) -> torch.Tensor:
        """Which rows are stored at the places from `start` within the own part."""
        return self.shard.stored_rows[start : start + n_rows].to(self.rows.device)

    @property
    def whole_shape(self) -> torch.Size:
        """Shape (F, ...)."""
        return torch.Size((self.shard.n_features, *self.rows.shape[1:]))


Stored = torch.Tensor | FeatureRows


def holds_stored_tensors(folder: Path) -> bool:
    """Whether `write_stored_tensors` wrote to a folder."""
    return (folder / METADATA_FILENAME).is_file()


def write_stored_tensors(
    folder: Path, tensors: Mapping[str, Stored], ranks: Ranks
) -> None:
    """
    Writes tensors by name: the rows of each rank by that rank, and what all ranks have the same
    by the first. All ranks must call it. No more than a block of each tensor is copied.

    Args:
        folder: A folder that all ranks see.
        tensors: What this rank has.
        ranks: The ranks.

    Raises:
        Exception: on all ranks the error of the first rank that could not write.
    """
    own = {
        name: tensor
        for name, tensor in tensors.items()
        if isinstance(tensor, FeatureRows) or ranks.rank == 0
    }
    try:
        dcp.save(
            own,  # pyright: ignore[reportArgumentType]
            storage_writer=dcp.FileSystemWriter(folder),
            planner=_Writing(),
            process_group=ranks.host_group,
        )
    except dcp.CheckpointException as error:
        _, (reason, _) = min(error.failures.items())
        raise reason from None


def read_stored_tensors(folder: Path, tensors: Mapping[str, Stored]) -> None:
    """
    Fills tensors with what `write_stored_tensors` wrote. Each rank reads by itself, and no more
    than a block is copied.

    Args:
        folder: Where they are.
        tensors: Tensors to fill in place, of any device.

    Raises:
        ValueError: if one is missing there, or of another shape.
        OSError: if the files cannot be read.
    """
    metadata = _metadata(folder)
    reader = dcp.FileSystemReader(folder)
    reader.set_up_storage_reader(metadata, is_coordinator=False)
    # without dcp.load, which all ranks would have to call
    reading = _Reading(folder, tensors, metadata)
    reader.read_data(reading.create_local_plan(), reading).wait()


def _metadata(folder: Path) -> Metadata:
    """What the files in a folder hold. Nothing of what is in them is executed."""
    path = folder / METADATA_FILENAME
    try:
        with path.open("rb") as file:
            return read_checkpoint_metadata(file)
    except OSError:
        raise
    except Exception as error:  # whatever a damaged file makes pickle do
        raise ValueError(f"{str(path)!r} is damaged: {as_reason(error)}.") from error


class _Writing(dcp.DefaultSavePlanner):
    """Cuts the own rows into blocks, and puts them into storage order as they are written."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    @override
    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan(
            [
                _write_item(name, tensor, block)
                for name, tensor in self.state_dict.items()
                for block in _blocks(tensor)
            ]
        )
        return self.plan

    @override
    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        stored: Stored = self.state_dict[write_item.index.fqn]
        if isinstance(stored, torch.Tensor):
            return stored.detach()
        assert write_item.tensor_data is not None
        block = write_item.tensor_data.chunk
        start = block.offsets[0] - stored.chunk().offsets[0]
        return stored.rows.detach()[stored.places(start, block.sizes[0])]


class _Reading(dcp.LoadPlanner):
    """Reads the blocks that own rows are in, and puts the rows to their places."""

    def __init__(
        self, folder: Path, tensors: Mapping[str, Stored], metadata: Metadata
    ) -> None:
        self._folder = folder
        self._tensors = tensors
        self._stored = metadata.state_dict_metadata

    @override
    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        metadata: Metadata | None = None,
        is_coordinator: bool = False,
    ) -> None:
        raise NotImplementedError("it is set up already")

    @override
    def create_local_plan(self) -> LoadPlan:
        items: list[ReadItem] = []
        for name, tensor in self._tensors.items():
            found, wanted = self._stored.get(name), _whole_shape(tensor)
            if not isinstance(found, TensorStorageMetadata) or found.size != wanted:
                what = getattr(found, "size", None)
                raise ValueError(
                    f"{str(self._folder)!r} holds no {name} of shape {tuple(wanted)}"
                    + (
                        f", but one of shape {tuple(what)}."
                        if what is not None
                        else "."
                    )
                )
            items += create_read_items_for_chunk_list(name, found, [_own_chunk(tensor)])
        return LoadPlan(items)

    @override
    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    @override
    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    @override
    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        raise NotImplementedError("only tensors are stored")

    @override
    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        tensor = self._tensors[read_item.dest_index.fqn]
        dtype = (tensor.rows if isinstance(tensor, FeatureRows) else tensor).dtype
        return torch.empty(read_item.lengths, dtype=dtype)

    @override
    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        stored = self._tensors[read_item.dest_index.fqn]
        if isinstance(stored, torch.Tensor):
            stored.detach().copy_(tensor)
            return
        places = stored.places(read_item.dest_offsets[0], read_item.lengths[0])
        stored.rows.detach()[places] = tensor.to(stored.rows.device)


def _blocks(tensor: Stored) -> list[ChunkStorageMetadata]:
    return tensor.blocks() if isinstance(tensor, FeatureRows) else [_own_chunk(tensor)]


def _own_chunk(tensor: Stored) -> ChunkStorageMetadata:
    if isinstance(tensor, FeatureRows):
        return tensor.chunk()
    return ChunkStorageMetadata(torch.Size([0] * tensor.ndim), tensor.shape)


def _whole_shape(tensor: Stored) -> torch.Size:
    return tensor.whole_shape if isinstance(tensor, FeatureRows) else tensor.shape


def _chunk(first: int, shape: tuple[int, ...]) -> ChunkStorageMetadata:
    offsets = (first, *(0 for _ in shape[1:]))
    return ChunkStorageMetadata(torch.Size(offsets), torch.Size(shape))


def _write_item(name: str, tensor: Stored, block: ChunkStorageMetadata) -> WriteItem:
    is_split = isinstance(tensor, FeatureRows)
    values = tensor.rows if is_split else tensor
    return WriteItem(
        index=MetadataIndex(name, block.offsets),
        type=WriteItemType.SHARD if is_split else WriteItemType.TENSOR,
        tensor_data=TensorWriteData(
            chunk=block,
            properties=TensorProperties(dtype=values.dtype),
            size=_whole_shape(tensor),
        ),
    )
