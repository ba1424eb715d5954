"""Steps that are recorded and replayed are the steps that are not, to the last bit."""

import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import logger

from sae_lens_alloc import AllocSAETrainer, AllocSAETrainerConfig
from sae_lens_alloc.ops import device_checks
from sae_lens_alloc.ops.backend import BACKEND_VARIABLE
from sae_lens_alloc.saes import reconstruction
from sae_lens_alloc.saes.allocation_sae import AllocationTrainingSAE
from sae_lens_alloc.training import step_graph
from sae_lens_alloc.training.step_graph import StepGraph
from sae_lens_alloc.training.train_step import clip_gradients, train_step
from tests.saes.conftest import changed, make_sae, state_of, tokens
from tests.saes.test_no_host_sync import no_questions
from tests.training.recorded_operations import OperationRecording

pytestmark = pytest.mark.slow

N_STEPS = 7


@pytest.fixture(autouse=True)
def on_a_cpu(triton_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    if triton_device.type == "cuda":
        pytest.skip("recorded by Triton's interpreter, on a CPU")
    monkeypatch.setattr(OperationRecording, "replays", 0)
    monkeypatch.setattr(step_graph, "STEPS_BEFORE_RECORDING", 1)


@pytest.fixture
def messages() -> Iterator[list[str]]:
    found: list[str] = []

    class Keeps(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record.getMessage())

    handler = Keeps()
    logger.addHandler(handler)
    yield found
    logger.removeHandler(handler)


def train(
    sae: AllocationTrainingSAE[Any],
    monkeypatch: pytest.MonkeyPatch,
    cuda_graph: bool,
    infinite_step: int | None = None,
    **overrides: Any,
) -> AllocSAETrainer[Any, Any]:
    settings: dict[str, Any] = {
        "total_training_samples": 12 * N_STEPS,
        "train_batch_size_samples": 12,
        "lr": 1e-2,
        "lr_end": 1e-3,
        "lr_warm_up_steps": 2,
        "dead_feature_window": 4,
        **overrides,
    }
    monkeypatch.setattr(
        AllocSAETrainer,
        "_make_graph",
        lambda trainer, sae: StepGraph(
            sae,
            partial(clip_gradients, trainer),
            trainer.autocast_if_enabled,
            OperationRecording,
        ),
    )
    batches = [tokens(12, 8, seed=seed) for seed in range(N_STEPS)]
    if infinite_step is not None:
        batches[infinite_step] /= 0.0
    cfg = AllocSAETrainerConfig(**settings, cuda_graph=cuda_graph)
    trainer = AllocSAETrainer(cfg, sae, iter(batches))
    trainer.fit()
    return trainer


def why_not_recorded(trainer: AllocSAETrainer[Any, Any]) -> str | None:
    assert trainer._graph is not None
    return trainer._graph.why_not_recorded


@pytest.mark.parametrize(
    ("options", "n_replays"),
    [
        ({"selection_margin": 0.5, "apply_b_dec_to_input": False}, 5),
        ({"aux_loss": "aux_zipf", "selection_margin": 0.25}, 5),
        ({"architecture": "feature_choice", "aux_loss": "aux_zipf"}, 5),
        # until the rule changes, and after it
        ({"feature_choice_steps": 3, "aux_loss": "aux_zipf"}, 3),
        # while the budget falls nothing is recorded
        ({"k_start": 6.0, "k_decay_steps": 2, "selection_margin": 0.25}, 4),
        (
            {
                "architecture": "matryoshka_mutual_choice",
                "matryoshka_widths": [8, 40],
                "selection_margin": 0.5,
                "aux_loss": "aux_zipf",
            },
            5,
        ),
        ({"normalize_activations": "layer_norm"}, 5),
    ],
    ids=str,
)
def test_replayed_steps_are_the_steps(
    options: dict[str, Any], n_replays: int, monkeypatch: pytest.MonkeyPatch
):
    expected, found = (make_sae(d_sae=40, **options) for _ in range(2))
    plain = train(expected, monkeypatch, cuda_graph=False)
    recorded = train(found, monkeypatch, cuda_graph=True)
    assert OperationRecording.replays == n_replays
    assert why_not_recorded(recorded) is None
    assert changed(state_of(expected), found) == set()
    for name in ("act_freq_scores", "n_forward_passes_since_fired"):
        assert torch.equal(getattr(plain, name), getattr(recorded, name)), name


def test_replayed_steps_write_the_metrics_of_the_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from sae_lens.config import LoggingConfig

    files = []
    for graph in (False, True):
        monkeypatch.setattr(
            AllocSAETrainer, "metrics_path", tmp_path / f"{graph}.jsonl"
        )
        logging_config = LoggingConfig(log_to_wandb=False, wandb_log_frequency=1)
        train(make_sae(d_sae=40), monkeypatch, graph, logger=logging_config)
        files.append((tmp_path / f"{graph}.jsonl").read_text())
    assert files[0] == files[1]
    assert len(files[0].splitlines()) == N_STEPS


def test_nan_is_reported_with_the_step(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match="activations of training step 4 contain NaN"):
        train(make_sae(d_sae=40), monkeypatch, True, infinite_step=4)
    assert OperationRecording.replays == 3


@pytest.mark.parametrize("reason", ["hooks", "backend", "optimizer", "refused"])
def test_what_makes_it_impossible_is_one_sentence(
    reason: str, messages: list[str], monkeypatch: pytest.MonkeyPatch
):
    expected, found = make_sae(d_sae=40), make_sae(d_sae=40)
    overrides: dict[str, Any] = {}
    if reason == "hooks":
        for sae in (expected, found):
            sae.hook_sae_recons.add_hook(lambda tensor, hook: tensor)  # noqa: ARG005
        sentence = (
            "cuda_graph is off: hook_sae_recons has hooks, which run on the host."
        )
    elif reason == "backend":
        monkeypatch.setenv(BACKEND_VARIABLE, "torch")
        sentence = (
            "the kernels of this backend make the host wait, and only Triton's do not"
        )
    elif reason == "optimizer":
        overrides = {"optimizer": "row_sparse_adam"}
        sentence = (
            "row_sparse_adam waits for the device to say which features were selected"
        )
    else:
        monkeypatch.setattr(
            reconstruction,
            "decode_pairs",
            lambda *args, decode=reconstruction.decode_pairs, **kwargs: (
                args[0].sum().item(),
                decode(*args, **kwargs),
            )[1],
        )
        sentence = "the step cannot be recorded (aten._local_scalar_dense.default asks"
    train(expected, monkeypatch, cuda_graph=False, **overrides)
    trainer = train(found, monkeypatch, cuda_graph=True, **overrides)
    assert OperationRecording.replays == 0
    off = [message for message in messages if "cuda_graph is off" in message]
    assert len(off) == 1
    assert sentence in off[0]
    assert off[0] == f"cuda_graph is off: {why_not_recorded(trainer)}."
    assert changed(state_of(expected), found) == set()


def test_why_nothing_is_recorded_while_the_budget_falls(
    monkeypatch: pytest.MonkeyPatch,
):
    sae = make_sae(d_sae=40, k_start=20.0, k_decay_steps=2 * N_STEPS)
    trainer = train(sae, monkeypatch, cuda_graph=True)
    assert OperationRecording.replays == 0
    assert why_not_recorded(trainer) == (
        "no 2 steps in a row had the same rule and budget"
    )


def test_on_a_cpu_it_is_off_with_a_sentence(messages: list[str]):
    cfg = AllocSAETrainerConfig(
        total_training_samples=12,
        train_batch_size_samples=12,
        lr_end=1e-4,
        cuda_graph=True,
    )
    AllocSAETrainer(cfg, make_sae(), iter([tokens(12, 8)])).fit()
    assert "cuda_graph is off: the SAE is trained on cpu, and graphs are for CUDA." in (
        messages
    )


def test_a_step_of_our_trainer_asks_the_device_nothing(
    monkeypatch: pytest.MonkeyPatch, triton_device: torch.device
):
    """Apart from Adam, which on a CPU reads the number of its step, a tensor there."""
    monkeypatch.setattr(device_checks, "_is_late", lambda tensor: True)  # noqa: ARG005
    sae = make_sae(d_sae=40, selection_margin=0.5, aux_loss="aux_zipf")
    trainer = train(sae, monkeypatch, cuda_graph=False)
    trainer.optimizer = torch.optim.SGD(sae.parameters(), lr=1e-3)
    sae.checks.report(wait=True)
    for step in range(9, 12):  # the flags are renewed at step 10
        trainer.n_training_steps = step
        batch = tokens(12, 8, seed=step)
        with no_questions(triton_device):
            train_step(trainer, batch)
        sae.checks.report(wait=True)


def test_kept_outputs_hold_no_graph(monkeypatch: pytest.MonkeyPatch):
    """
    Their nodes would add up gradients on the stream of an earlier step, and CUDA cannot record that.
    """
    kept: list[Any] = []
    forward = StepGraph.forward_and_backward

    def keep(graph: StepGraph, step_input: Any) -> Any:
        kept.append(forward(graph, step_input))
        return kept[-1]

    monkeypatch.setattr(StepGraph, "forward_and_backward", keep)
    train(make_sae(d_sae=40, aux_loss="aux_zipf"), monkeypatch, cuda_graph=True)
    assert len(kept) == N_STEPS
    for output in kept:
        tensors = [output.sae_out, output.feature_acts, output.loss]
        tensors += [output.hidden_pre, *output.losses.values()]
        assert not any(tensor.requires_grad for tensor in tensors)
