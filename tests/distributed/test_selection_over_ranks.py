"""What ranks select together against what one process selects of the same affinities."""

import random
from typing import Any

import pytest
import torch

from sae_lens_alloc.allocation.margin import split_at_budget
from sae_lens_alloc.allocation.mutual_choice import select_mutual_choice
from sae_lens_alloc.allocation.sparse_activations import (
    PaddedActivations,
    Pairs,
    SparseActivations,
)
from sae_lens_alloc.distributed.feature_shard import FeatureShard
from sae_lens_alloc.distributed.ranks import Ranks
from sae_lens_alloc.ops.split_over_ranks import split_over_ranks
from sae_lens_alloc.ops.topk_over_ranks import topk_over_ranks
from tests.distributed.processes import on_ranks
from tests.distributed.test_feature_shard import RankOf

N_CASES = 350  # for each of three numbers of ranks

Case = dict[str, Any]


def random_case(number: int, n_ranks: int) -> Case:
    """Affinities with few values, so that they are full of ties, and what is asked of them."""
    draw = random.Random(number)
    generator = torch.Generator().manual_seed(number)
    n_tokens = draw.randint(1, 9)
    # at least so many that each rank has some
    n_features = draw.randint(n_ranks * (n_ranks - 1) + 1, n_ranks * (n_ranks - 1) + 30)
    n_values = draw.choice([1, 2, 4, 1000])
    affinities = torch.randint(
        1 - draw.randint(0, n_values),
        n_values + 1,
        (n_tokens, n_features),
        generator=generator,
    )
    dtype = draw.choice([torch.float32, torch.bfloat16, torch.float64])
    affinities = affinities.to(dtype) / 8
    only_rank = draw.choice([None, None, draw.randrange(n_ranks)])
    if only_rank is not None:  # all positives on one rank
        shard = FeatureShard(n_features, RankOf(n_ranks, only_rank))
        silent = torch.ones(n_features, dtype=torch.bool)
        silent[shard.ids()] = False
        affinities[:, silent] = 0
    most = n_tokens * n_features + 3  # beyond what there is
    return {
        "affinities": affinities,
        "budget": draw.choice([0, 1, draw.randint(0, most)]),
        "n_margin": draw.choice([0, 1, draw.randint(0, most)]),
        "padding": draw.choice([None, draw.randint(0, 5)]),
        "k": draw.randint(1, n_features),
        "subset": torch.rand(n_features, generator=generator) < draw.random(),
    }


def candidates_of(affinities: torch.Tensor, padding: int | None) -> Pairs:
    """All positive pairs of a rank, with padding behind them if there is some."""
    pairs = select_mutual_choice(affinities, affinities.numel())
    if padding is None:
        return pairs
    n_tokens, n_features = affinities.shape
    places = SparseActivations(
        torch.cat([pairs.token_indices, torch.full((padding,), n_tokens - 1)]),
        torch.cat([pairs.feature_indices, torch.full((padding,), n_features - 1)]),
        torch.cat([pairs.values, pairs.values.new_zeros(padding)]),
        pairs.shape,
    )
    n_places = torch.arange(len(places.values))
    return PaddedActivations(places, n_places < len(pairs.values))


def topk_of(
    affinities: torch.Tensor, subset: torch.Tensor, k: int
) -> SparseActivations:
    """The k largest of each token within a subset by sorting, of equal ones the first."""
    values = affinities.double().where(subset, -torch.inf)
    order = values.argsort(dim=1, descending=True, stable=True)
    chosen = order[:, : min(k, int(subset.sum()))].sort(dim=1).values
    tokens = torch.arange(len(chosen)).repeat_interleave(chosen.shape[1])
    features = chosen.flatten()
    return SparseActivations(
        tokens,
        features,
        affinities[tokens, features],
        (affinities.shape[0], affinities.shape[1]),
    )


def triples(
    pairs: Pairs, ids: torch.Tensor | None = None
) -> list[tuple[int, int, float]]:
    """The pairs, by the numbers of the features in the whole SAE."""
    real = pairs.without_padding()
    features = real.feature_indices if ids is None else ids[real.feature_indices]
    return list(
        zip(
            real.token_indices.tolist(),
            features.tolist(),
            real.values.double().tolist(),
            strict=True,
        )
    )


def selections(ranks: Ranks, numbers: range) -> list[dict[str, Any]]:
    """What this rank has of each case."""
    found = []
    for number in numbers:
        case = random_case(number, ranks.size)
        shard = FeatureShard(case["affinities"].shape[1], ranks)
        ids = shard.ids()
        own = case["affinities"][:, ids]
        pairs, margin = split_over_ranks(
            candidates_of(own, case["padding"]), case["budget"], case["n_margin"], shard
        )
        best = topk_of(own, case["subset"][ids], case["k"])
        found.append(
            {
                "selected": triples(pairs, ids),
                "margin": triples(margin.pairs, ids),
                "width": float(margin.width),
                "topk": triples(topk_over_ranks(best, case["k"], shard), ids),
            }
        )
    return found


@pytest.mark.parametrize("n_ranks", [2, 3, 4])
def test_ranks_select_what_one_process_selects(n_ranks: int):
    numbers = range(1000 * n_ranks, 1000 * n_ranks + N_CASES)
    by_rank = on_ranks(n_ranks, selections, numbers)
    for i, number in enumerate(numbers):
        case = random_case(number, n_ranks)
        affinities = case["affinities"]
        budget, n_margin = case["budget"], case["n_margin"]
        best = select_mutual_choice(affinities, budget + n_margin)
        selected, margin = split_at_budget(best, budget, n_margin)
        found = [of_rank[i] for of_rank in by_rank]
        expected = {
            "selected": triples(selected),
            "margin": triples(margin.pairs),
            "topk": triples(topk_of(affinities, case["subset"], case["k"])),
        }
        for name, wanted in expected.items():
            together = sorted(sum((part[name] for part in found), []))
            assert together == wanted, (number, name)
        assert {part["width"] for part in found} == {float(margin.width)}, number
