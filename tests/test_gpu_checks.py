"""The checks of the campaign on a GPU find what is wrong, and nothing where nothing is."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks.gpu import gradient_checks, kernel_checks, large_checks
from benchmarks.gpu.agreement import Among, disagreement, distance, wrong_counts
from benchmarks.gpu.inputs import exact_inputs, random_inputs
from benchmarks.shape import Shape
from sae_lens_alloc.allocation.sparse_activations import SparseActivations
from sae_lens_alloc.ops.backend import BACKEND_VARIABLE
from tests.helpers import one_thread

__all__ = ["one_thread"]

SHAPE = Shape(d_in=12, d_sae=70, k=3, batch=20)
# The largest two of the batch, of ties the first: (0, 1) and (1, 0). Of features 0 and 1 one
# each: (1, 0) and (0, 1). Of each token one of features 0 and 2: (0, 0) and (1, 0).
AFFINITIES = torch.tensor([[1.0, 3.0, -1.0], [2.0, 2.0, -3.0]], dtype=torch.float64)


def pairs(*positions: tuple[int, int], off: float = 0.0) -> SparseActivations:
    tokens, features = torch.tensor(positions, dtype=torch.int64).view(-1, 2).T
    values = AFFINITIES[tokens, features].float() + off
    return SparseActivations(tokens, features, values, (2, 3))


@pytest.mark.parametrize(
    ("among", "numbers", "right", "wrong"),
    [
        ("batch", [2], [(0, 1), (1, 0)], [(0, 1), (1, 1)]),
        ("batch", [9], [(0, 0), (0, 1), (1, 0), (1, 1)], [(0, 0), (0, 1), (1, 0)]),
        ("feature", [1, 1, 0], [(0, 1), (1, 0)], [(0, 0), (0, 1)]),
        # none of feature 2 is positive
        ("feature", [0, 0, 2], [], [(0, 2)]),
    ],
)
def test_a_selection_by_hand(
    among: Among, numbers: list[int], right: list[Any], wrong: list[Any]
):
    for tolerance in (0.0, 1e-6):
        arguments = (AFFINITIES, torch.tensor(numbers), among, tolerance)
        assert disagreement(pairs(*right), *arguments) is None
        is_tie = wrong == [(0, 1), (1, 1)]
        complaint = disagreement(pairs(*wrong), *arguments)
        # with a tolerance either of two equal ones will do
        assert (complaint is None) == (is_tie and tolerance > 0)


def test_a_choice_of_each_token_takes_negative_ones():
    flagged = AFFINITIES.where(torch.tensor([True, False, True]), -torch.inf)
    numbers = torch.tensor([2, 2])
    both = pairs((0, 0), (0, 2), (1, 0), (1, 2))
    unflagged = pairs((0, 0), (0, 1), (1, 0), (1, 2))
    for tolerance in (0.0, 1e-6):
        arguments = (flagged, numbers, "token", tolerance, False)
        assert disagreement(both, *arguments) is None
        assert disagreement(unflagged, *arguments) is not None


def test_wrong_values_and_orders_are_found():
    arguments = (AFFINITIES, torch.tensor([2]), "batch")
    right = pairs((0, 1), (1, 0))
    off = replace(right, values=right.values + 1e-3)
    assert disagreement(off, *arguments, 1e-2) is None
    assert "off by 1.0e-03" in (disagreement(off, *arguments, 1e-4) or "")
    nan = replace(right, values=right.values * torch.nan)
    assert "off by nan" in (disagreement(nan, *arguments, 1e-4) or "")
    backwards = pairs((1, 0), (0, 1))
    assert "row order" in (disagreement(backwards, *arguments, 1e-4) or "")
    twice = pairs((0, 1), (0, 1))
    assert "twice" in (disagreement(twice, *arguments, 1e-4) or "")


def test_wrong_counts_are_found():
    # above 1.5 and 0: one token of feature 0, both of feature 1, none of feature 2
    bound = torch.tensor(1.5)
    assert wrong_counts(torch.tensor([1, 2, 0]), AFFINITIES, bound, 0.0) is None
    wrong = wrong_counts(torch.tensor([1, 1, 1]), AFFINITIES, bound, 0.0)
    assert wrong == "2 counts are wrong"
    # what is positive is more than 0, whatever the bound is
    below = torch.tensor([-9.0, -9.0, -9.0])
    assert wrong_counts(torch.tensor([2, 2, 0]), AFFINITIES, below, 0.0) is None
    # 1.0 may or may not exceed 1.0001 where affinities are off by 1e-3
    for count in (1, 2):
        counts = torch.tensor([count, 2, 0])
        bound = torch.tensor(1.0001)
        assert wrong_counts(counts, AFFINITIES, bound, 1e-3) is None


def test_distance_is_relative_and_nan_is_never_near():
    assert distance(torch.tensor([3.0, 5.0]), torch.tensor([3.0, 4.0])) == 1 / 5
    assert not distance(torch.tensor([torch.nan]), torch.tensor([1.0])) <= 1e9


@pytest.mark.parametrize("dtype", kernel_checks.DTYPES)
def test_exact_inputs_are_exact_and_tied(dtype: torch.dtype):
    inputs = exact_inputs(SHAPE, dtype, "cpu")
    products = inputs.x @ inputs.encoder.W_enc
    assert inputs.encoder.scale is not None
    computed = (products + inputs.encoder.b_enc) * inputs.encoder.scale
    assert torch.equal(computed.double(), inputs.affinities)
    assert len(inputs.affinities.unique()) < inputs.affinities.numel() / 5
    assert inputs.tolerance(dtype) == 0


def test_random_inputs_are_off_by_less_than_the_tolerance():
    for dtype in kernel_checks.DTYPES:
        inputs = random_inputs(SHAPE, dtype, "cpu")
        off = inputs.encoder.affinities(inputs.x).double() - inputs.affinities
        assert 0 < off.abs().max() < inputs.tolerance(dtype)
        assert inputs.tolerance(dtype) < inputs.affinities.abs().max()


def check(kernel: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    monkeypatch.setenv(BACKEND_VARIABLE, "torch")  # put back afterwards
    found = kernel_checks.check_kernels(kernel, "torch", torch.float32, (SHAPE,), "cpu")
    assert found["n_cases"] >= 3
    return found["wrong"]


@pytest.mark.parametrize(
    ("kernel", "function"),
    [
        ("products", "sparse_times_dense"),
        ("products", "sparse_times_dense_transposed"),
        ("products", "sampled_products"),
        ("mutual_choice", "encode_and_count"),
        ("feature_choice", "encode_feature_choice"),
        ("auxiliary", "encode_topk"),
    ],
)
def test_a_broken_kernel_is_found_and_the_others_are_right(
    kernel: str, function: str, monkeypatch: pytest.MonkeyPatch
):
    assert check(kernel, monkeypatch) == {}
    real = getattr(kernel_checks, function)

    def first_token_lost(found: Any) -> Any:
        if isinstance(found, torch.Tensor):
            found.view(-1)[0] += 1
            return found
        if isinstance(found, tuple):
            return first_token_lost(found[0]), *found[1:]
        if isinstance(found, SparseActivations):
            return found.only(found.token_indices > 0)
        return replace(found, pairs=first_token_lost(found.pairs))

    monkeypatch.setattr(
        kernel_checks, function, lambda *args: first_token_lost(real(*args))
    )
    wrong = check(kernel, monkeypatch)
    assert wrong
    if kernel == "products":
        assert {name.split(",")[0] for name in wrong} == {function}

    def refuse(*_: Any) -> None:
        raise RuntimeError("no kernel image\nis available")

    monkeypatch.setattr(kernel_checks, function, refuse)
    assert "RuntimeError: no kernel image" in check(kernel, monkeypatch).values()


@pytest.mark.parametrize("lost", [None, 0, -1])
def test_a_pair_that_is_lost_among_many_is_found(
    lost: int | None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv(BACKEND_VARIABLE, "torch")
    monkeypatch.setattr(large_checks, "BLOCK_ELEMENTS", 20 * 32)
    mutual, feature = (
        large_checks.encode_and_count,
        large_checks.encode_feature_choice,
    )

    def with_a_loss(pairs: SparseActivations) -> SparseActivations:
        """One pair exchanged for another that is smaller."""
        if lost is None:
            return pairs
        free = torch.ones(pairs.shape, dtype=torch.bool)
        free[pairs.token_indices, pairs.feature_indices] = False
        token = int(pairs.token_indices[lost])
        features = pairs.feature_indices.clone()
        features[lost] = free[token].nonzero()[0, 0]
        order = (pairs.token_indices * pairs.shape[1] + features).argsort()
        return replace(pairs, feature_indices=features).at(order).without_padding()

    def mutual_choice(*args: Any) -> Any:
        pairs, counts = mutual(*args)
        return with_a_loss(pairs.without_padding()), counts

    def feature_choice(*args: Any) -> Any:
        found = feature(*args)
        return replace(found, pairs=with_a_loss(found.pairs.without_padding()))

    monkeypatch.setattr(large_checks, "encode_and_count", mutual_choice)
    monkeypatch.setattr(large_checks, "encode_feature_choice", feature_choice)
    found = large_checks.check_large("torch", SHAPE, "cpu")
    wrong = [] if lost is None else ["mutual_choice", "feature_choice"]
    assert list(found["wrong"]) == wrong


def test_wrong_gradients_are_found(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(BACKEND_VARIABLE, "torch")
    shape = Shape(d_in=5, d_sae=33, k=3, batch=9)
    right = gradient_checks.check_gradients("torch", shape, "cpu")
    # W_enc, b_enc, W_dec and b_dec of each
    assert right == {
        "n_cases": 4 * len(gradient_checks.architectures(shape, "cpu")),
        "wrong": {},
    }
    real = gradient_checks._gradients

    def gradients(name: str, backend: str, *args: Any) -> dict[str, torch.Tensor]:
        found = real(name, backend, *args)
        if name == "feature_choice" and backend == "torch":
            found["W_dec"] *= 1.01
        return found

    monkeypatch.setattr(gradient_checks, "_gradients", gradients)
    found = gradient_checks.check_gradients("torch", shape, "cpu")
    assert list(found["wrong"]) == ["feature_choice, W_dec"]
