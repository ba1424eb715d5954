"""
The weights of an SAE that ranks share in the file that one process would save. The first rank
fills it block by block: it never holds more than its own features and one block of another rank.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from sae_lens import logger
from sae_lens.constants import SAE_WEIGHTS_FILENAME

from sae_lens_alloc.distributed.feature_shard import FeatureShard
from sae_lens_alloc.distributed.together import together
from sae_lens_alloc.saes.allocation_sae import AllocationTrainingSAE
from sae_lens_alloc.saes.checkpoint_weights import feature_rows, is_by_feature
from sae_lens_alloc.saes.inference_blocks import InferenceBlocks
from sae_lens_alloc.saes.split_weights import part_filename, part_name, write_index

# Bytes of the weights that a rank sends at a time.
BLOCK_BYTES = 2**26
# An SAE of more bytes than the machine has memory is saved in several files, of so many bytes each.
LARGEST_FILE = psutil.virtual_memory().total
PART_BYTES = 2**34

# What safetensors calls the dtypes that weights may have.
DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
}


@dataclass(frozen=True)
class _File:
    """
    A file of the features `first` to `stop`.

    Args:
        name: The file's name.
        first: Its first feature.
        stop: The one after its last feature.
        tensors: Empty tensors of their dtypes and shapes, by their names in the SAE.
        names: Their names in the file.
    """

    name: str
    first: int
    stop: int
    tensors: dict[str, torch.Tensor]
    names: dict[str, str]


def write_gathered_weights(
    sae: AllocationTrainingSAE[Any], folder: Path | None
) -> None:
    """
    Writes the weights of an SAE for inference, with the bytes that SAELens would write. An SAE
    larger than memory gets several files and an index, which `load_sae` reads. All ranks must
    call it.

    Args:
        sae: The SAE, of the features of this rank.
        folder: Where to write on the first rank, None on the others.

    Raises:
        ValueError: on all ranks, if weights are not finite.
        OSError: on all ranks, if there is no room.
    """
    shard = sae.shard
    ranks = shard.ranks
    made: list[InferenceBlocks] = []
    together(ranks, lambda: made.append(InferenceBlocks(sae)))
    (blocks,) = made
    # machines may differ
    largest_file, *_ = ranks.objects(LARGEST_FILE)
    files = _files(blocks.of(slice(0, 0)), shard, largest_file)
    ids = [] if folder is None else shard.ids_by_rank()
    for file in files:
        mapped: dict[str, torch.Tensor] = {}
        together(ranks, lambda: mapped.update(_new_file(folder, file)))
        for first, stop in _ranges(file, shard):
            _fill(mapped, file.first, first, stop, shard, blocks, ids)
    if len(files) > 1:
        together(ranks, lambda: _write_index(folder, files))


def _write_index(folder: Path | None, files: list[_File]) -> None:
    if folder is None:
        return
    in_files = {name: file.name for file in files for name in file.names.values()}
    total = sum(t.nbytes for file in files for t in file.tensors.values())
    write_index(folder, in_files, total)
    logger.warning(
        f"The SAE is larger than the memory of this machine, so it is saved in {len(files)} "
        "files: load it, where there is room for it, with "
        "sae_lens_alloc.saes.saved_sae.load_sae(folder)."
    )


def _files(
    of_no_feature: dict[str, torch.Tensor], shard: FeatureShard, largest_file: int
) -> list[_File]:
    def tensors_of(n_features: int, with_others: bool) -> dict[str, torch.Tensor]:
        return {
            name: _whole(name, tensor, n_features)
            for name, tensor in of_no_feature.items()
            if with_others or is_by_feature(name)
        }

    n_features = shard.n_features
    whole = tensors_of(n_features, True)
    n_bytes = sum(tensor.nbytes for tensor in whole.values())
    if n_bytes <= max(largest_file, PART_BYTES):
        names = {name: name for name in whole}
        return [_File(SAE_WEIGHTS_FILENAME, 0, n_features, whole, names)]
    n_each = -(-n_features // -(-n_bytes // PART_BYTES))
    n_parts = -(-n_features // n_each)
    files: list[_File] = []
    for i in range(n_parts):
        first, stop = i * n_each, min((i + 1) * n_each, n_features)
        tensors = tensors_of(stop - first, i == 0)
        names = {name: part_name(name, i + 1) for name in tensors}
        files.append(_File(part_filename(i + 1, n_parts), first, stop, tensors, names))
    return files


def _whole(name: str, of_no_feature: torch.Tensor, n_features: int) -> torch.Tensor:
    """A tensor of all features that takes no memory, from one of none."""
    if not is_by_feature(name):
        return of_no_feature.to("meta")
    rows = feature_rows(name, of_no_feature)
    shape = (n_features, *rows.shape[1:])
    return torch.empty(
        shape[::-1] if name == "W_enc" else shape, dtype=rows.dtype, device="meta"
    )


def _new_file(folder: Path | None, file: _File) -> dict[str, torch.Tensor]:
    """Makes a file, on the first rank, and maps its tensors into memory."""
    if folder is None:
        return {}
    header, places = _header(file)
    path, size = folder / file.name, max(end for _, end in places.values())
    with path.open("wb") as opened:
        opened.write(header)
        opened.flush()
        # a full disk is an error here, and would be the end of the process on the mapping
        os.posix_fallocate(opened.fileno(), 0, len(header) + size)
    mapped = torch.from_file(
        str(path), shared=True, size=len(header) + size, dtype=torch.uint8
    )[len(header) :]
    return {
        name: mapped[slice(*places[name])].view(tensor.dtype).view(tensor.shape)
        for name, tensor in file.tensors.items()
    }


def _header(file: _File) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """
    What comes first in a safetensors file, and where the tensors are after it, by name: as
    safetensors orders them, the widest dtypes first and then by name.
    """
    entries: dict[str, Any] = {}
    places: dict[str, tuple[int, int]] = {}
    end = 0
    in_order = sorted(
        file.tensors, key=lambda n: (-file.tensors[n].itemsize, file.names[n])
    )
    for name in in_order:
        tensor = file.tensors[name]
        begin, end = end, end + tensor.nbytes
        places[name] = begin, end
        entries[file.names[name]] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, places


def _ranges(file: _File, shard: FeatureShard) -> Iterator[tuple[int, int]]:
    """Features of which each rank has about a block."""
    row_bytes = sum(
        tensor.nbytes // (file.stop - file.first)
        for name, tensor in file.tensors.items()
        if is_by_feature(name)
    )
    width = max(1, BLOCK_BYTES // row_bytes) * shard.ranks.size
    for first in range(file.first, file.stop, width):
        yield first, min(first + width, file.stop)


def _fill(
    mapped: dict[str, torch.Tensor],
    file_first: int,
    first: int,
    stop: int,
    shard: FeatureShard,
    blocks: InferenceBlocks,
    ids: list[torch.Tensor],
) -> None:
    """Puts what each rank has of the features from `first` to `stop` into the mapped file."""
    ranks = shard.ranks
    own: dict[str, torch.Tensor] = {}
    here = slice(shard.n_below(first), shard.n_below(stop))
    together(ranks, lambda: own.update(blocks.of(here)))
    for name in sorted(own):
        if not is_by_feature(name):
            if name in mapped:
                mapped[name].copy_(own[name])
            continue
        rows = feature_rows(name, own[name])
        if ranks.rank > 0:
            if len(rows) > 0:
                ranks.send(rows)
            continue
        for rank, features in enumerate(ids):
            begin, end = torch.searchsorted(features, torch.tensor([first, stop]))
            places = features[begin:end] - file_first
            if len(places) == 0:
                continue
            if rank > 0:
                like = rows.new_empty((len(places), *rows.shape[1:]), device="meta")
                rows = ranks.receive(like, rank)
            feature_rows(name, mapped[name])[places] = rows.cpu()
