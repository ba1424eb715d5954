import math
from typing import Any

from sae_lens_alloc.comparison.cell import Cell
from sae_lens_alloc.comparison.choice import choose, other_seeds


def cell(row: str, sparsity: float, lr: float, l0s: tuple[float, ...], seed: int = 0):
    return Cell(row, "k", sparsity, lr, seed, l0s, {}, "stream")


def result(**evs: float | None) -> dict[str, Any]:
    """Result of a cell with explained variances by L0, as in l8=0.5."""
    return {
        "validation": {
            name[1:]: {"unreachable": "why"}
            if ev is None
            else {"explained_variance": ev}
            for name, ev in evs.items()
        }
    }


def test_the_best_learning_rate_on_the_validation_split_is_chosen():
    cells = [cell("a", 8, lr, (8,)) for lr in (1e-3, 2e-3, 4e-3)]
    scores = (0.7, 0.8, 0.6)
    results = {c.key: result(l8=ev) for c, ev in zip(cells, scores, strict=True)}
    (choice,) = choose(cells, results, {})
    assert choice.cell == cells[1]
    assert [t["validation_explained_variance"] for t in choice.tried] == list(scores)


def test_a_coefficient_may_stand_for_any_k():
    """The sparse SAE cannot reach 16 features, the dense one is better at both."""
    sparse, dense = (cell("a", c, 1e-3, (8, 16)) for c in (1.0, 0.1))
    results = {
        sparse.key: result(l8=0.5, l16=None),
        dense.key: result(l8=0.6, l16=0.7),
    }
    assert [choice.cell for choice in choose([sparse, dense], results, {})] == [
        dense,
        dense,
    ]
    results[sparse.key] = result(l8=0.65, l16=None)
    assert [c.cell for c in choose([sparse, dense], results, {})] == [sparse, dense]


def test_no_cell_may_reach_an_l0():
    only = cell("a", 1.0, 1e-3, (8,))
    (choice,) = choose([only], {only.key: result(l8=None)}, {})
    assert choice.cell is None
    assert other_seeds([only], [choice]) == []


def test_other_seeds_train_with_what_was_chosen():
    cells = [cell("a", 8, lr, (8,), seed) for seed in (0, 1) for lr in (1e-3, 2e-3)]
    first = cells[:2]
    choices = choose(first, {c.key: result(l8=c.lr) for c in first}, {})
    assert other_seeds(cells, choices) == [cells[1], cells[3]]


def test_what_is_no_number_is_never_the_best():
    cells = [cell("a", 8, lr, (8,)) for lr in (1e-3, 2e-3, 4e-3)]
    scores = (math.nan, 0.1, math.inf)
    results = {c.key: result(l8=ev) for c, ev in zip(cells, scores, strict=True)}
    (choice,) = choose(cells, results, {})
    assert choice.cell == cells[1]
    tried = [t["validation_explained_variance"] for t in choice.tried]
    assert tried == [None, 0.1, None]


def test_what_failed_is_told_and_the_others_are_chosen_from():
    cells = [cell("a", 8, lr, (8,)) for lr in (1e-3, 2e-3, 4e-3)]
    failures = {cells[0].key: "why"}
    (choice,) = choose(cells, {cells[1].key: result(l8=0.1)}, failures)
    assert choice.cell == cells[1]
    # the third has not been trained yet
    assert [t.get("failed") for t in choice.tried] == ["why", None]
    (choice,) = choose(cells[:1], {}, failures)
    assert choice.cell is None
    assert choice.tried[0]["failed"] == "why"
