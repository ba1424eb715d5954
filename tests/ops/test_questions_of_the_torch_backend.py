"""What torch's own kernels ask a GPU in a step: once, whatever the number of blocks."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sae_lens_alloc.ops import (
    block_encoder,
    device_checks,
    encode_select,
    topk_selection,
)
from sae_lens_alloc.ops.backend import BACKEND_VARIABLE
from sae_lens_alloc.ops.block_encoder import Encoder
from sae_lens_alloc.ops.encode_select import encode_and_count, encode_feature_choice
from tests.helpers import exact_tensors
from tests.questions import CountsQuestions
from tests.saes.conftest import make_sae, tokens, training_step

B, F = 48, 500
MANY_BLOCKS, ONE_BLOCK = 64, 512  # of so many features


@pytest.fixture(autouse=True)
def torch_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(BACKEND_VARIABLE, "torch")


def in_fixed_places(fixed: bool, width: int) -> pytest.MonkeyPatch:
    """What a GPU does, or what a CPU does, in blocks of so many features."""
    patch = pytest.MonkeyPatch()
    for module in (encode_select, topk_selection):
        patch.setattr(module, "asking_costs_a_wait", lambda _device: fixed)
    patch.setitem(block_encoder._BLOCK_ELEMENTS, "cpu", B * width)
    return patch


def with_and_without(width: int, select: Callable[[], Any]) -> tuple[Any, Any, int]:
    """What a GPU and a CPU select, and how often the GPU was asked."""
    with CountsQuestions() as questions:
        patch = in_fixed_places(True, width)
        on_gpu = select()
        patch.undo()
    patch = in_fixed_places(False, width)
    on_cpu = select()
    patch.undo()
    return on_gpu, on_cpu, len(questions.asked)


def assert_same_pairs(found: Any, expected: Any):
    for name in ("token_indices", "feature_indices", "values"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name


def real_numbers(dtype: torch.dtype = torch.float32) -> tuple[Encoder, torch.Tensor]:
    torch.manual_seed(0)
    scale = torch.rand(F) + 0.5
    weights, biases = torch.randn(16, F), 0.3 * torch.randn(F)
    encoder = Encoder(weights.to(dtype), biases.to(dtype), scale)
    return encoder, torch.randn(B, 16).to(dtype)


@pytest.mark.parametrize("width", [MANY_BLOCKS, ONE_BLOCK])
@pytest.mark.parametrize("counts", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mutual_choice_asks_once(dtype: torch.dtype, counts: bool, width: int):
    encoder, x = real_numbers(dtype)
    affinities = encoder.affinities(x)
    cut = affinities.flatten().sort(descending=True).values[600]
    thresholds = cut * torch.rand(F) if counts else None
    on_gpu, on_cpu, n_asked = with_and_without(
        width, lambda: encode_and_count(encoder, x, 600, cut, thresholds)
    )
    assert n_asked == 1
    assert len(on_gpu[0].values) == 600
    assert_same_pairs(on_gpu[0], on_cpu[0])
    if thresholds is None:
        assert on_gpu[1] is on_cpu[1] is None
    else:
        assert torch.equal(on_gpu[1], (affinities > thresholds).sum(0))
        assert torch.equal(on_cpu[1], on_gpu[1])


@pytest.mark.parametrize("width", [MANY_BLOCKS, ONE_BLOCK])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_feature_choice_asks_once(dtype: torch.dtype, width: int):
    encoder, _ = real_numbers(dtype)
    quotas = torch.randint(0, 5, (F,))
    max_pairs = int(quotas.sum())
    cut, thresholds = torch.tensor(4.0), 4 * torch.rand(F)
    bounds, n_short = torch.zeros(F), 0
    for step in range(8):
        x = torch.randn(B, 16).to(dtype)
        used = bounds
        on_gpu, on_cpu, n_asked = with_and_without(
            width,
            lambda: encode_feature_choice(  # noqa: B023
                encoder,
                x,  # noqa: B023
                quotas,
                thresholds,
                cut,
                used,  # noqa: B023
                max_pairs,
            ),
        )
        assert_same_pairs(on_gpu.pairs, on_cpu.pairs)
        for name in ("demand", "above", "bounds"):
            assert torch.equal(getattr(on_gpu, name), getattr(on_cpu, name)), name
        # nothing bounds the candidates of the first step, which overflow
        assert n_asked == 1 or (step == 0 and n_asked > 1)
        n_short += int(((encoder.affinities(x) >= used).sum(0) < quotas).sum())
        bounds = on_gpu.bounds
    # features that fell short of their quota did not cost a question
    assert n_short > 0


GUESSES = st.sampled_from([0.0, 1e-6, 0.5, 1.0, 1.02, 3.0, 1e38, torch.inf, torch.nan])


@settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    data=st.data(),
    seed=st.integers(0, 999),
    width=st.sampled_from([MANY_BLOCKS, ONE_BLOCK]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    budget=st.integers(1, 3000),
)
def test_wrong_guesses_cost_questions_and_change_nothing(
    data: st.DataObject, seed: int, width: int, dtype: torch.dtype, budget: int
):
    """Affinities are exact in every dtype, with many ties."""
    torch.manual_seed(seed)
    x, W_enc, b_enc, scale = exact_tensors(B, F, dtype)
    encoder = Encoder(W_enc, b_enc - data.draw(st.sampled_from([0, 8])), scale)
    cut = torch.tensor(4 * data.draw(GUESSES))
    thresholds = torch.rand(F) * data.draw(GUESSES)
    on_gpu, on_cpu, _ = with_and_without(
        width, lambda: encode_and_count(encoder, x, budget, cut, thresholds)
    )
    assert_same_pairs(on_gpu[0], on_cpu[0])
    assert torch.equal(on_gpu[1], on_cpu[1])

    quotas = torch.randint(0, data.draw(st.sampled_from([2, 9])), (F,))
    bounds = torch.rand(F) * data.draw(GUESSES)
    on_gpu, on_cpu, _ = with_and_without(
        width,
        lambda: encode_feature_choice(
            encoder, x, quotas, thresholds, cut, bounds, int(quotas.sum())
        ),
    )
    assert_same_pairs(on_gpu.pairs, on_cpu.pairs)
    for name in ("demand", "above"):
        assert torch.equal(getattr(on_gpu, name), getattr(on_cpu, name)), name
    torch.testing.assert_close(
        on_gpu.bounds, on_cpu.bounds, rtol=0, atol=0, equal_nan=True
    )


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("mutual_choice", {"selection_margin": 1.0}),
        ("mutual_choice", {"selection_margin": 0.0}),
        ("feature_choice", {"k_start": 6.0, "k_decay_steps": 20}),
    ],
)
@pytest.mark.parametrize("width", [MANY_BLOCKS, ONE_BLOCK])
def test_a_training_step_asks_once(
    architecture: str,
    options: dict[str, Any],
    width: int,
    monkeypatch: pytest.MonkeyPatch,
):
    """Once the running statistics serve as a guess; step 10 renews the flags."""
    monkeypatch.setattr(device_checks, "_is_late", lambda tensor: True)  # noqa: ARG005
    sae = make_sae(architecture, d_sae=F, aux_loss="aux_zipf", **options)
    patch = in_fixed_places(True, width)
    asked: list[int] = []
    try:
        for step in range(12):
            sae.checks.report(wait=True)
            with CountsQuestions() as questions:
                training_step(sae, tokens(4 * B, 8, seed=step), step)
            asked.append(len(questions.asked))
    finally:
        patch.undo()
    assert asked[0] > 1
    assert asked[6:] == [1, 1, 1, 1, 2, 1]
