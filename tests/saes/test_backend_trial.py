"""The backend of a GPU is found by trying: here by Triton's interpreter on the CPU."""

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from sae_lens import logger
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput

from sae_lens_alloc.ops import backend as backends
from sae_lens_alloc.ops.backend import BACKEND_VARIABLE, backend_for, choose_backend
from sae_lens_alloc.ops.triton_feature_choice import TritonFeatureKeyEncoder
from sae_lens_alloc.ops.triton_mutual_choice import TritonKeyEncoder
from sae_lens_alloc.saes import backend_trial
from sae_lens_alloc.saes.allocation_sae import AllocationTrainingSAE
from sae_lens_alloc.saes.backend_trial import fastest_right_backend
from tests.saes.conftest import changed, make_sae, state_of, tokens, training_step

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
BATCH = TrainStepInput(
    sae_in=tokens(24, 8),
    coefficients={},
    dead_neuron_mask=None,
    n_training_steps=0,
    is_logging_step=False,
)
RULES = ("mutual_choice", "feature_choice")


@pytest.fixture(autouse=True)
def no_choice(
    triton_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    if triton_device.type == "cuda":
        pytest.skip("the trial on a GPU is part of every training there")
    monkeypatch.delenv(BACKEND_VARIABLE)
    yield
    choose_backend(CPU, None)


@pytest.fixture
def messages() -> Iterator[list[logging.LogRecord]]:
    records: list[logging.LogRecord] = []

    class Keeps(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record)

    handler, level = Keeps(), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield records
    logger.removeHandler(handler)
    logger.setLevel(level)


def times(monkeypatch: pytest.MonkeyPatch, **seconds: float) -> None:
    """Lets each backend take so long, whatever it takes here."""

    def of_the_running_one(*_: Any) -> float:
        return seconds[backend_for(CPU)]

    monkeypatch.setattr(backend_trial, "_seconds_per_step", of_the_running_one)


def chosen(sae: AllocationTrainingSAE[Any]) -> str:
    return fastest_right_backend(sae, sae.training_forward_pass, BATCH)


@pytest.mark.parametrize("fastest", ["torch", "triton", "triton_prefilter"])
@pytest.mark.parametrize("architecture", RULES)
def test_the_fastest_one_is_taken_and_one_line_says_so(
    architecture: str,
    fastest: str,
    monkeypatch: pytest.MonkeyPatch,
    messages: list[logging.LogRecord],
):
    seconds = {"torch": 0.003, "triton": 0.002, "triton_prefilter": 0.004}
    times(monkeypatch, **{**seconds, fastest: 0.001})
    assert chosen(make_sae(architecture, aux_loss="aux_zipf")) == fastest
    (message,) = messages
    assert message.levelno == logging.INFO
    assert f"The backend {fastest} trains the SAE on cpu" in message.getMessage()
    assert f"{fastest} 1.00 ms" in message.getMessage()


@pytest.mark.parametrize("architecture", RULES)
def test_a_trial_leaves_no_trace(architecture: str, messages: list[Any]):
    sae = make_sae(architecture, aux_loss="aux_zipf", selection_margin=0.5)
    for step in range(2):
        training_step(sae, tokens(24, 8, seed=step), step)
    before = state_of(sae)
    assert chosen(sae) in ("torch", "triton", "triton_prefilter")
    assert len(messages) == 1
    assert changed(before, sae) == set()
    assert all(parameter.grad is None for parameter in sae.parameters())
    assert backend_for(CPU) == "torch"
    # and the next steps are what they would have been
    twin = make_sae(architecture, aux_loss="aux_zipf", selection_margin=0.5)
    for step in range(2):
        training_step(twin, tokens(24, 8, seed=step), step)
    for each in (sae, twin):
        training_step(each, tokens(24, 8, seed=2), 2)
    assert changed(state_of(twin), sae) == set()


def raising(error: Exception) -> Any:
    def collect(*_: Any, **__: Any) -> Any:
        raise error

    return collect


def wrong_value(keys: torch.Tensor) -> torch.Tensor:
    return torch.where(keys > 0, keys + (1 << 53), 0)


def wrong_index(keys: torch.Tensor) -> torch.Tensor:
    return torch.where(keys > 0, keys ^ 5, 0)


def changing(change: Any, original: Any) -> Any:
    def collect(encoder: Any, *args: Any, **kwargs: Any) -> Any:
        found = original(encoder, *args, **kwargs)
        return replace(found, keys=change(found.keys))

    return collect


BROKEN = {
    "exception": (raising(RuntimeError("an illegal address\nand more")), "it failed (RuntimeError: an illegal address)"),
    "compile error": (
        raising(triton.CompilationError("", __import__("ast").parse("x").body[0], "no")),
        "it failed (CompilationError: ",
    ),
    "out of memory": (
        raising(torch.cuda.OutOfMemoryError("CUDA out of memory.")),
        "it failed (OutOfMemoryError: CUDA out of memory.)",
    ),
    "wrong value": (changing(wrong_value, TritonKeyEncoder.collect), "it "),
    "wrong index": (
        changing(wrong_index, TritonKeyEncoder.collect),
        "it selects other pairs",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_kernel_costs_a_warning(
    fault: str, monkeypatch: pytest.MonkeyPatch, messages: list[logging.LogRecord]
):
    collect, reason = BROKEN[fault]
    monkeypatch.setattr(TritonKeyEncoder, "collect", collect)
    times(monkeypatch, torch=0.002, triton=0.001, triton_prefilter=0.003)
    sae = make_sae()
    before = state_of(sae)
    assert chosen(sae) in ("torch", "triton_prefilter")
    warning = messages[0]
    assert warning.levelno == logging.WARNING
    assert f"The backend triton is not used: {reason}" in warning.getMessage()
    assert "\n" not in warning.getMessage()
    assert changed(before, sae) == set()


def test_a_broken_kernel_of_feature_choice_costs_a_warning(
    monkeypatch: pytest.MonkeyPatch, messages: list[logging.LogRecord]
):
    monkeypatch.setattr(
        TritonFeatureKeyEncoder, "collect", raising(RuntimeError("no such kernel"))
    )
    times(monkeypatch, torch=0.002, triton=0.001, triton_prefilter=0.003)
    assert chosen(make_sae("feature_choice")) == "torch"
    assert "RuntimeError: no such kernel" in messages[0].getMessage()


def test_wrong_gradients_are_noticed(
    monkeypatch: pytest.MonkeyPatch, messages: list[logging.LogRecord]
):
    from sae_lens_alloc.ops import triton_sparse

    products = triton_sparse.sampled_products
    monkeypatch.setattr(
        triton_sparse, "sampled_products", lambda *args: 1.1 * products(*args)
    )
    times(monkeypatch, torch=0.002, triton=0.001, triton_prefilter=0.001)
    assert chosen(make_sae()) == "torch"
    assert "its gradients are others" in messages[0].getMessage()


def outcome(
    positions: list[int], affinities: list[float], by_feature: bool = False
) -> backend_trial.Outcome:
    return backend_trial.Outcome(
        torch.tensor(positions), torch.tensor(affinities), [], 4, by_feature
    )


def test_pairs_at_the_cut_may_differ():
    exact = backend_trial.FLOAT32
    one = outcome([0, 5, 9], [3.0, 2.0, 1.0])
    tie = outcome([0, 5, 10], [3.0, 2.0, 1.00001])
    other = outcome([0, 5, 10], [3.0, 2.0, 1.1])
    assert backend_trial.disagreement(one, tie, exact) is None
    assert backend_trial.disagreement(one, other, exact) == "it selects other pairs"
    # each feature has a cut of its own: that of feature 1 is 1.0, of position 9
    one = outcome([0, 5, 9], [3.0, 2.0, 1.0], by_feature=True)
    assert (
        backend_trial.disagreement(one, outcome([0, 5, 13], [3.0, 2.0, 1.00001]), exact)
        is None
    )
    # feature 2 is selected nowhere
    assert backend_trial.disagreement(one, tie, exact) == "it selects other pairs"


def test_both_rules_of_a_training_are_tried(
    monkeypatch: pytest.MonkeyPatch, messages: list[logging.LogRecord]
):
    """The first step is of Feature Choice, and the selection of Mutual Choice is broken."""
    monkeypatch.setattr(
        TritonKeyEncoder, "collect", raising(RuntimeError("no such kernel"))
    )
    times(monkeypatch, torch=0.002, triton=0.001, triton_prefilter=0.003)
    sae = make_sae(feature_choice_steps=5)
    assert sae.rule_at(0) == "feature"
    assert chosen(sae) != "triton"
    assert "RuntimeError: no such kernel" in messages[0].getMessage()


def test_where_nothing_works_the_default_remains(
    monkeypatch: pytest.MonkeyPatch, messages: list[logging.LogRecord]
):
    sae = make_sae()

    def fails(_: TrainStepInput) -> TrainStepOutput:
        raise RuntimeError("nothing works")

    assert fastest_right_backend(sae, fails, BATCH) == "torch"
    assert [record.levelno for record in messages] == [logging.WARNING] * 3


def test_the_choice_is_kept_and_survives_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, messages: list[Any]
):
    monkeypatch.setattr(backend_trial, "_has_a_choice", lambda device: True)  # noqa: ARG005
    times(monkeypatch, torch=0.002, triton=0.001, triton_prefilter=0.003)
    sae = make_sae()
    for step in range(3):
        training_step(sae, tokens(24, 8), step)
        assert backend_for(CPU) == "triton"
    assert len(messages) == 1  # of the first step
    sae.save_model(tmp_path)

    choose_backend(CPU, None)
    times(monkeypatch, torch=0.001, triton=0.002, triton_prefilter=0.003)
    resumed = make_sae(seed=3)
    resumed.load_weights_from_checkpoint(tmp_path)
    training_step(resumed, tokens(24, 8), 3)
    assert backend_for(CPU) == "triton"
    assert len(messages) == 1
    # on a machine without Triton it is tried anew
    monkeypatch.setattr(backends, "find_spec", lambda name: None)  # noqa: ARG005
    again = make_sae(seed=3)
    again.load_weights_from_checkpoint(tmp_path)
    training_step(again, tokens(24, 8), 3)
    assert backend_for(CPU) == "torch"


def test_the_environment_variable_overrides(
    monkeypatch: pytest.MonkeyPatch, messages: list[Any]
):
    monkeypatch.setattr(backend_trial, "_has_a_choice", lambda device: True)  # noqa: ARG005
    monkeypatch.setenv(BACKEND_VARIABLE, "reference")
    training_step(make_sae(), tokens(24, 8))
    assert backend_for(CPU) == "reference"
    assert messages == []


def test_nothing_is_tried_on_a_cpu(messages: list[Any]):
    training_step(make_sae(), tokens(24, 8))
    assert messages == []
