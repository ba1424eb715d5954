"""Examples against a search of each feature by itself."""

import torch

from sae_lens_alloc.features.examples import (
    MIN_FIRINGS,
    N_PER_BAND,
    N_TOP,
    take_examples,
)
from tests.features.conftest import pairs_of, random_dense

LENGTH = 10
Chosen = list[tuple[int, int]]  # band and token


def by_search(activations: list[float]) -> Chosen:
    """The examples of one feature, of its activations on all tokens."""
    active = [i for i, value in enumerate(activations) if value > 0]
    ranked = sorted(active, key=lambda i: (-activations[i], i))
    chosen: Chosen = []
    contexts: set[int] = set()
    for token in ranked:
        if token // LENGTH not in contexts and len(chosen) < N_TOP:
            contexts.add(token // LENGTH)
            chosen.append((0, token))
    if len(ranked) >= MIN_FIRINGS:
        top = {token for _, token in chosen}
        for i in range(4 * N_PER_BAND):
            token = ranked[int(len(ranked) * (i + 0.5) / (4 * N_PER_BAND))]
            if token not in top:
                chosen.append((1 + i // N_PER_BAND, token))
    return chosen


def test_examples_of_each_feature():
    torch.manual_seed(0)
    # dense ones, and some with too few tokens for bands
    dense = torch.cat([random_dense(200, 6, 0.3), random_dense(200, 6, 0.03)], 1)
    examples = take_examples(pairs_of(dense), LENGTH)
    n_seen = 0
    starts = (examples.n_active.cumsum(0) - examples.n_active).tolist()
    for feature in range(dense.shape[1]):
        places = (examples.features == feature).nonzero().squeeze(1).tolist()
        found = [(int(examples.bands[i]), int(examples.tokens[i])) for i in places]
        assert found == by_search(dense[:, feature].tolist())
        for i in places:
            token = int(examples.tokens[i])
            assert examples.values[i] == dense[token, feature]
            context = dense[token // LENGTH * LENGTH :, feature][:LENGTH]
            run = slice(starts[i], starts[i] + int(examples.n_active[i]))
            positions = context.nonzero().squeeze(1)
            assert torch.equal(examples.active_positions[run], positions)
            assert torch.equal(examples.active_values[run], context[positions])
        n_seen += len(places)
    assert n_seen == len(examples.features)
    assert examples.bands.unique().tolist() == [0, 1, 2, 3, 4]
    assert not (examples.features == 11).any()  # dead


def test_no_token_is_shown_twice():
    torch.manual_seed(1)
    examples = take_examples(pairs_of(random_dense(400, 8, 0.2)), LENGTH)
    shown = examples.features * 400 + examples.tokens
    assert len(shown.unique()) == len(shown)


def test_of_dead_features_there_are_none():
    examples = take_examples(pairs_of(torch.zeros(20, 3)), LENGTH)
    assert len(examples.features) == len(examples.active_values) == 0
