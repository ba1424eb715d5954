"""Selections among more than 2^32 affinities, which are compared a block of features at a time."""

import os
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.gpu.agreement import disagreement
from benchmarks.gpu.inputs import ROUNDING
from benchmarks.shape import Shape
from sae_lens_alloc.allocation.sparse_activations import SparseActivations
from sae_lens_alloc.ops.backend import BACKEND_VARIABLE
from sae_lens_alloc.ops.block_encoder import Encoder
from sae_lens_alloc.ops.encode_select import encode_and_count, encode_feature_choice

# Affinities of a block, in float64.
BLOCK_ELEMENTS = 2**25


def check_large(backend: str, shape: Shape, device: str) -> dict[str, Any]:
    """
    Compares Mutual Choice and Feature Choice, in float32, with plain formulas.

    Returns:
        How many cases there were, and what was wrong with those that disagree.
    """
    os.environ[BACKEND_VARIABLE] = backend
    torch.set_float32_matmul_precision("highest")
    torch.manual_seed(0)
    W_enc = torch.randn(shape.d_in, shape.d_sae, device=device) / shape.d_in**0.5
    encoder = Encoder(W_enc, torch.zeros(shape.d_sae, device=device), None)
    x = torch.randn(shape.batch, shape.d_in, device=device)
    complaints = {
        "mutual_choice": wrong_mutual_choice(encoder, x, shape.k * shape.batch),
        "feature_choice": wrong_feature_choice(encoder, x),
    }
    wrong = {name: what for name, what in complaints.items() if what is not None}
    return {"n_cases": len(complaints), "wrong": wrong}


def wrong_mutual_choice(encoder: Encoder, x: torch.Tensor, budget: int) -> str | None:
    """What is wrong with the largest of all affinities, None if nothing is."""
    selected, _ = encode_and_count(encoder, x, budget, None, None)
    pairs = selected.without_padding()
    if len(pairs.values) != budget:
        return f"{len(pairs.values)} pairs instead of {budget}"
    cut = pairs.values.min().double()
    for block, affinities in _blocks(encoder, x):
        # no more than the budget are selected, so that none may be left out above the cut
        above = (affinities > cut + _tolerance(affinities)).sum()
        own = _within(pairs, block)
        numbers = torch.tensor([len(own.values)], device=x.device)
        if above > numbers:
            return f"{int(above - numbers)} pairs of features {block} are missing"
        wrong = disagreement(own, affinities, numbers, "batch", _tolerance(affinities))
        if wrong is not None:
            return f"features {block}: {wrong}"
    return None


def wrong_feature_choice(encoder: Encoder, x: torch.Tensor) -> str | None:
    """What is wrong with the largest affinity of every feature, None if nothing is."""
    quotas = torch.ones(encoder.n_features, dtype=torch.int64, device=x.device)
    never = torch.full((encoder.n_features,), 1e9, device=x.device)
    selection = encode_feature_choice(
        encoder,
        x,
        quotas,
        never,
        never[0],
        torch.zeros_like(never),
        encoder.n_features,
    )
    pairs = selection.pairs.without_padding()
    for block, affinities in _blocks(encoder, x):
        wrong = disagreement(
            _within(pairs, block),
            affinities,
            quotas[block],
            "feature",
            _tolerance(affinities),
        )
        if wrong is not None:
            return f"features {block}: {wrong}"
    return None


def _blocks(encoder: Encoder, x: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Blocks of features, and their affinities in float64."""
    width = max(1, BLOCK_ELEMENTS // len(x))
    for start in range(0, encoder.n_features, width):
        block = slice(start, start + width)
        yield block, x.double() @ encoder.W_enc[:, block].double()


def _within(pairs: SparseActivations, block: slice) -> SparseActivations:
    """The pairs of a block of features, counted from its first one."""
    features = pairs.feature_indices
    own = (features >= block.start) & (features < block.stop)
    return SparseActivations(
        pairs.token_indices[own],
        features[own] - block.start,
        pairs.values[own],
        (pairs.shape[0], block.stop - block.start),
    )


def _tolerance(affinities: torch.Tensor) -> float:
    return float(ROUNDING * torch.finfo(torch.float32).eps * affinities.abs().max())
