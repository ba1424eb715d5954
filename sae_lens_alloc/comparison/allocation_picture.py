"""Figure 1 of the paper on real activations: one budget, allocated by three rules."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE

from sae_lens_alloc.allocation.feature_choice import select_feature_choice
from sae_lens_alloc.allocation.mutual_choice import select_mutual_choice
from sae_lens_alloc.allocation.quotas import MAX_DENSITY
from sae_lens_alloc.allocation.sparse_activations import SparseActivations
from sae_lens_alloc.allocation.zipf import NATURAL_LAW, zipf_quotas
from sae_lens_alloc.comparison.cell import cell_folder, sae_folder
from sae_lens_alloc.comparison.config import ComparisonConfig
from sae_lens_alloc.comparison.results import middle_k
from sae_lens_alloc.comparison.stream import Stream
from sae_lens_alloc.saes.rows import encoded_and_target
from sae_lens_alloc.saes.saved_sae import load_sae

N_TOKENS, N_FEATURES = 40, 40
PAIRS_PER_TOKEN = 4


@torch.no_grad()
def allocation_picture(sae: SAE[Any], activations: torch.Tensor) -> dict[str, Any]:
    """
    The pairs that each rule activates with the same budget, 4 pairs per token. The tokens are
    the first 40. The features are the 40 that are most active on them.

    Args:
        sae: A saved SAE with decoder norms folded in, so that its pre-activations are
            affinities.
        activations: Activations of successive tokens, shape (T, d_in), or a transcoder's rows.

    Returns:
        By rule, the affinities of the active pairs, tokens x features, 0 where inactive.
    """
    tokens, _ = encoded_and_target(sae.cfg, activations[:N_TOKENS].to(sae.device))
    active = sae.encode(tokens).to_dense()
    features = active.sum(0).argsort(descending=True, stable=True)[:N_FEATURES]
    x = sae.process_sae_in(tokens)
    bias = getattr(sae, "b_enc", 0.0)
    affinities = (x @ sae.W_enc + bias)[:, features].relu()
    # the feature with the most positive affinities first
    affinities = affinities[:, (affinities > 0).sum(0).argsort(descending=True)]
    budget = PAIRS_PER_TOKEN * len(tokens)
    return {
        "topk": _rounded(_top_k(affinities)),
        "mutual_choice": _rounded(select_mutual_choice(affinities, budget).to_dense()),
        "feature_choice": _rounded(_feature_choice(affinities, budget).to_dense()),
    }


def _top_k(affinities: torch.Tensor) -> torch.Tensor:
    values, indices = affinities.topk(PAIRS_PER_TOKEN, dim=1)
    return torch.zeros_like(affinities).scatter(1, indices, values)


def _feature_choice(affinities: torch.Tensor, budget: int) -> SparseActivations:
    """Feature Choice with the law that it starts from by default."""
    quotas = zipf_quotas(
        NATURAL_LAW, affinities.shape[1], budget, MAX_DENSITY * len(affinities)
    )
    # whole numbers that sum to the budget
    whole = quotas.cumsum(0).round().diff(prepend=torch.zeros(1, dtype=quotas.dtype))
    return select_feature_choice(affinities, whole.long().to(affinities.device))


def _rounded(values: torch.Tensor) -> list[list[float]]:
    return [[round(value, 3) for value in row] for row in values.tolist()]


def shown_allocation(
    config: ComparisonConfig,
    points: Sequence[dict[str, Any]],
    output: Path,
    stream: Stream | None,
    earlier: Mapping[str, Any] | None,
) -> dict[str, Any] | None:
    """
    The picture of one SAE at the middle k. This is the SAE of the first mutual_choice row, or
    else of the first row. If no SAE is in the folder, it is the earlier picture.

    Args:
        config: The comparison.
        points: The points of the results.
        output: Folder of the comparison.
        stream: The activations, if they are there.
        earlier: An earlier results.json.
    """
    k = middle_k(config.k)
    shown = [
        (point["row"], sae_folder(cell_folder(output, point["runs"][0]["cell"]), k))
        for point in points
        if point["k"] == k and point["runs"]
    ]
    here = [(row, folder) for row, folder in shown if folder.exists()]
    ours = [
        (row, folder)
        for row, folder in here
        if config.rows[row]["architecture"].startswith("mutual_choice")
    ]
    picture = None if earlier is None else earlier["allocation"]
    if stream is None or not here or (picture is not None and not ours):
        return picture
    row, folder = (ours or here)[0]
    try:
        sae = load_sae(folder)
    except ValueError:  # damaged since it was measured
        return picture
    activations = stream.split(config.measured_on)
    return {"row": row, "k": k, "rules": allocation_picture(sae, activations)}
