"""The Triton backend trains as torch's does, and never makes the host wait for the device."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from sae_lens_alloc.ops import device_checks
from sae_lens_alloc.ops.backend import BACKEND_VARIABLE
from sae_lens_alloc.saes.allocation_sae import AllocationTrainingSAE
from tests.questions import RefusesQuestions
from tests.saes.conftest import (
    ARCHITECTURES,
    gradients,
    make_sae,
    statistics,
    tokens,
    training_step,
)

pytestmark = pytest.mark.slow

# of which a kernel takes 32 at a time
D_SAE = 40


@contextlib.contextmanager
def no_questions(device: torch.device) -> Iterator[None]:
    with RefusesQuestions():
        if device.type == "cpu":
            yield
            return
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


def train(
    n_steps: int, device: torch.device, **options: Any
) -> tuple[AllocationTrainingSAE[Any], list[torch.Tensor]]:
    """A SAE after some steps of plain gradient descent, and the gradients of the last."""
    sae = make_sae(d_sae=D_SAE, **options).to(device)
    grads: dict[str, torch.Tensor] = {}
    for step in range(n_steps):
        # other data in the third batch
        size = 1 if step < 2 else 30
        x = size * tokens(12, 8, seed=step).to(device, sae.W_dec.dtype)
        dead = torch.arange(D_SAE, device=device) < 20
        grads = gradients(sae, training_step(sae, x, step, dead).loss)
        with torch.no_grad():
            for parameter in sae.parameters():
                assert parameter.grad is not None
                parameter -= 1e-5 * parameter.grad
    return sae, list(grads.values())


def assert_trained_alike(
    found: tuple[AllocationTrainingSAE[Any], list[torch.Tensor]],
    expected: tuple[AllocationTrainingSAE[Any], list[torch.Tensor]],
) -> None:
    """That two outcomes of `train` differ by rounding alone."""
    expected_state = expected[0].state_dict()
    for name, value in found[0].state_dict().items():
        close = torch.allclose(value, expected_state[name], rtol=1e-4, atol=1e-5)
        assert close, name
    for grad, expected_grad in zip(found[1], expected[1], strict=True):
        assert torch.allclose(grad, expected_grad, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"aux_loss": "aux_zipf", "apply_b_dec_to_input": True},
        # few affinities are positive, and the rest of the budget is padding
        {"aux_loss": "aux_k", "b_enc": -2.0, "rescale_acts_by_decoder_norm": False},
        # none at all
        {"b_enc": -1e6},
        {"architecture": "feature_choice", "aux_loss": "aux_zipf"},
        {"architecture": "feature_choice", "aux_loss": "aux_k", "b_enc": -2.0},
        {"architecture": "feature_choice", "b_enc": -1e6},
        {"architecture": "feature_choice", "mutual_choice_steps": 1},
        {"feature_choice_steps": 2},
        {"selection_margin": 0.25, "feature_choice_steps": 1},
        {"selection_margin": 0.5, "b_enc": -2.0},
    ],
)
def test_training_by_triton_is_training_by_torch(
    options: dict[str, Any],
    triton_device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
):
    by_triton = train(3, triton_device, **options)
    monkeypatch.setenv(BACKEND_VARIABLE, "torch")
    assert_trained_alike(by_triton, train(3, triton_device, **options))


def test_padding_fires_nowhere(triton_device: torch.device):
    sae = make_sae(d_sae=200, b_enc=-8.0).to(triton_device)
    x = tokens(24, 8).to(triton_device)
    output = training_step(sae, 3 * x)
    acts = output.feature_acts.to_dense()
    n_active = int((acts > 0).sum())
    # of a budget of 72
    assert 0 < n_active < 72
    assert (acts != 0).sum() == n_active
    density = statistics(sae).density
    assert torch.equal(density, (acts > 0).sum(0) / 24)
    assert statistics(sae).cut == acts[acts > 0].min()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_preview_has_no_padding(architecture: str, triton_device: torch.device):
    sae = make_sae(architecture, d_sae=200, b_enc=-8.0).to(triton_device)
    x = tokens(24, 8).to(triton_device)
    training_step(sae, 3 * x)
    pairs, _ = sae.autoencode_pairs(3 * x, by_threshold=False)
    assert 0 < len(pairs.values) < 72
    assert (pairs.values > 0).all()


@pytest.mark.parametrize("aux_loss", ["none", "aux_zipf"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "options",
    [
        {"architecture": "mutual_choice"},
        {"architecture": "feature_choice"},
        # the rule changes at the second of the steps that are watched
        {"architecture": "mutual_choice", "feature_choice_steps": 3},
        {"architecture": "mutual_choice", "selection_margin": 0.25},
    ],
)
def test_a_step_asks_the_device_nothing(
    options: dict[str, Any],
    dtype: str,
    aux_loss: str,
    triton_device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(device_checks, "_is_late", lambda tensor: True)  # noqa: ARG005
    sae, _ = train(2, triton_device, aux_loss=aux_loss, dtype=dtype, **options)
    # the second batch is of other data, which no guess fits
    for step, size in ((2, 1), (3, 100)):
        x = size * tokens(12, 8, seed=step).to(triton_device, sae.W_dec.dtype)
        sae.checks.report(wait=True)
        with no_questions(triton_device):
            output = training_step(sae, x, step)
            output.loss.backward()
    sae.checks.report(wait=True)


# The recipe: Feature Choice with a budget that falls, then Mutual Choice with its margin; or
# the paper's, the other way round. The rule changes between two of the renewals of the flags.
N_STEPS, SWITCH = 22, 12
FALLING: dict[str, Any] = {"k_start": 6.0, "k_decay_steps": 20, "selection_margin": 1.0}
RECIPES: dict[str, dict[str, Any]] = {
    "mutual_choice": {"feature_choice_steps": SWITCH},
    "feature_choice": {"mutual_choice_steps": SWITCH},
    "matryoshka_mutual_choice": {
        "feature_choice_steps": SWITCH,
        "matryoshka_widths": [8, 24],
    },
}


@pytest.mark.parametrize(
    ("architecture", "aux_loss"),
    [*((name, "aux_zipf") for name in RECIPES), ("mutual_choice", "aux_k")],
)
def test_no_step_of_a_recipe_asks_the_device(
    architecture: str,
    aux_loss: str,
    triton_device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(device_checks, "_is_late", lambda tensor: True)  # noqa: ARG005
    options = {**FALLING, **RECIPES[architecture], "aux_loss": aux_loss}
    sae, _ = train(2, triton_device, architecture=architecture, **options)
    dead = torch.arange(D_SAE, device=triton_device) < 20
    for step in range(2, N_STEPS):
        x = tokens(12, 8, seed=step).to(triton_device)
        sae.checks.report(wait=True)
        with no_questions(triton_device):
            output = training_step(sae, x, step, dead)
            output.loss.backward()
    sae.checks.report(wait=True)
    assert sae.rule_at(2) != sae.rule_at(N_STEPS - 1)


def test_what_outlives_a_step_stays_at_its_address():
    """As a CUDA graph needs it, which has captured the step before."""
    sae = make_sae(feature_choice_steps=12, **FALLING, aux_loss="aux_zipf")
    sae.allocation.quota_law.fill_(1.5)

    def addresses() -> dict[str, int]:
        state, allocator = sae.allocation, sae.allocator
        kept = {**dict(state.named_buffers()), **state.totals.start}
        kept |= {**vars(allocator.guesses), "by_rank": allocator.quotas.by_rank}
        curve = allocator.quotas.curve
        kept |= {} if curve is None else vars(curve)
        return {
            name: value.data_ptr()
            for name, value in kept.items()
            if isinstance(value, torch.Tensor)
        }

    known: dict[str, int] = {}
    for step in range(20):
        # another size of batch makes another curve
        training_step(sae, tokens(12 if step < 6 else 15, 8, seed=step), step)
        found = addresses()
        assert known == {name: found[name] for name in known}
        known = found
    assert {"bounds", "margin_cut", "lowered", "by_rank", "cap_sums"} <= {*known}


def test_the_test_notices_a_question(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(BACKEND_VARIABLE, "torch")
    sae = make_sae()
    with pytest.raises(AssertionError, match="asks the device"), RefusesQuestions():
        training_step(sae, tokens(16, 8))
    with pytest.raises(AssertionError, match="copied"), RefusesQuestions():
        torch.tensor(2.0)


@pytest.mark.parametrize(
    "question",
    [
        lambda x: x.tolist(),
        lambda x: x.numpy(),
        lambda x: x.cpu(),
        lambda x: x[0].item(),
        lambda x: float(x[0]),
        lambda x: int(x.sum()),
        lambda x: bool((x > 0).any()),
        lambda x: 1 if x[0] > 0 else 0,
        lambda x: x[x[0].long()] if x[0] else x,
        lambda x: x[x > 1],
        lambda x: x.clone().index_put_((x > 1,), torch.ones(2)),
        lambda x: x.masked_select(x > 1),
        lambda x: x.nonzero(),
        lambda x: x.unique(),
        lambda x: torch.bincount(x.long()),
        lambda x: torch.repeat_interleave(x.long()),
        lambda x: torch.equal(x, x),
        lambda x: torch.tensor([1.0, 2.0]),  # noqa: ARG005
    ],
)
def test_every_kind_of_question_is_noticed(
    question: Callable[[torch.Tensor], Any],
):
    x = torch.tensor([1.0, 2.0, 3.0])
    question(x)
    with (
        pytest.raises(AssertionError, match="asks the device|copied"),
        RefusesQuestions(),
    ):
        question(x)


def test_what_has_a_fixed_shape_is_no_question():
    x, where = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2, 0])
    with RefusesQuestions():
        torch.searchsorted(x, x[1])
        torch.nonzero_static(x > 1, size=3)
        x[where].where(x[where] > 1, 0.0)
        x.sort()
        x.cumsum(0).take(x.argmin())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_training_by_triton_is_the_same_bit_for_bit_twice(
    architecture: str, triton_device: torch.device
):
    torch.use_deterministic_algorithms(True)
    try:
        runs = [
            train(3, triton_device, architecture=architecture, aux_loss="aux_zipf")
            for _ in range(2)
        ]
    finally:
        torch.use_deterministic_algorithms(False)
    states = [sae.state_dict() for sae, _ in runs]
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name
    assert all(map(torch.equal, runs[0][1], runs[1][1]))
