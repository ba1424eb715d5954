"""
An SAE in several files: blocks of features, one after the other, with an index of the form that
Hugging Face gives models in several files.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open

from sae_lens_alloc.saes.checkpoint_weights import is_by_feature

INDEX_FILENAME = "sae_weights.safetensors.index.json"


def split_weight_files(folder: Path) -> list[Path]:
    """The files in a folder that are of an SAE in several files."""
    patterns = (INDEX_FILENAME, "sae_weights-*-of-*.safetensors")
    return [path for pattern in patterns for path in sorted(folder.glob(pattern))]


def part_filename(number: int, n_parts: int) -> str:
    """The file of a part, numbered from 1."""
    return f"sae_weights-{number:05d}-of-{n_parts:05d}.safetensors"


def part_name(name: str, number: int) -> str:
    """What a tensor is called in a part: "W_enc.00001" of the first one's features."""
    return f"{name}.{number:05d}" if is_by_feature(name) else name


def write_index(folder: Path, files: Mapping[str, str], total_size: int) -> None:
    """
    Writes the index.

    Args:
        folder: Where the parts are.
        files: The file of each tensor, by its name there.
        total_size: Bytes of all tensors.
    """
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(files)}
    (folder / INDEX_FILENAME).write_text(json.dumps(index, indent=2))


def read_split_weights(
    folder: Path, dtype: torch.dtype, device: str
) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """
    The tensors of an SAE in several files, and what safetensors calls their types, by name.

    Args:
        folder: Where the index and the parts are.
        dtype: What the tensors are to be.
        device: Where they are to be.

    Raises:
        Exception: if a file is missing or damaged, of whatever kind the libraries raise.
    """
    files: dict[str, str] = json.loads((folder / INDEX_FILENAME).read_text())[
        "weight_map"
    ]
    dtypes: dict[str, str] = {}
    parts: dict[str, list[torch.Tensor]] = {}
    for stored in sorted(files, key=_number):
        name = stored.partition(".")[0]
        # mapped into memory, so that only the whole tensor is copied
        with safe_open(folder / Path(files[stored]).name, framework="pt") as file:
            dtypes[name] = file.get_slice(stored).get_dtype()
            parts.setdefault(name, []).append(file.get_tensor(stored))
    weights = {
        name: torch.cat(tensors, dim=1 if name == "W_enc" else 0).to(device, dtype)
        for name, tensors in parts.items()
    }
    return dtypes, weights


def _number(stored: str) -> float:
    _, _, number = stored.partition(".")
    return int(number) if number else math.inf
