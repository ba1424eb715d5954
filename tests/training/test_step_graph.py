"""Steps that are recorded and replayed are the steps that are not, to the last bit."""

import logging
import weakref
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import logger
from sae_lens.saes.sae import TrainStepOutput

from sae_lens_alloc import AllocSAETrainer, AllocSAETrainerConfig
from sae_lens_alloc.ops import device_checks
from sae_lens_alloc.ops.backend import BACKEND_VARIABLE
from sae_lens_alloc.ops.pair_autoencoder import decode_pairs
from sae_lens_alloc.saes import reconstruction
from sae_lens_alloc.saes.allocation_sae import AllocationTrainingSAE
from sae_lens_alloc.training import step_graph
from sae_lens_alloc.training.step_graph import RecordedStep, StepGraph
from sae_lens_alloc.training.train_step import clip_gradients, train_step
from tests.saes.conftest import changed, make_sae, state_of, tokens
from tests.saes.test_no_host_sync import no_questions
from tests.training.recorded_operations import OperationRecording

pytestmark = pytest.mark.slow

N_STEPS = 7
# of the trainers of a test, which give theirs back after the training
GRAPHS: weakref.WeakKeyDictionary[Any, StepGraph] = weakref.WeakKeyDictionary()


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
    cuda_graph: bool | None,
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

    def make_graph(
        trainer: AllocSAETrainer[Any, Any], sae: AllocationTrainingSAE[Any]
    ) -> StepGraph:
        GRAPHS[trainer] = StepGraph(
            sae,
            partial(clip_gradients, trainer),
            trainer.autocast_if_enabled,
            OperationRecording,
            says_why_not=bool(cuda_graph),
        )
        return GRAPHS[trainer]

    if cuda_graph is not False:  # as on CUDA
        monkeypatch.setattr(AllocSAETrainer, "_make_graph", make_graph)
    batches = [tokens(12, 8, seed=seed) for seed in range(N_STEPS)]
    if infinite_step is not None:
        batches[infinite_step] /= 0.0
    cfg = AllocSAETrainerConfig(**settings, cuda_graph=cuda_graph)
    trainer = AllocSAETrainer(cfg, sae, iter(batches))
    trainer.fit()
    return trainer


def why_not_recorded(trainer: AllocSAETrainer[Any, Any]) -> str | None:
    return GRAPHS[trainer].why_not_recorded


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
        ({"architecture": "refined_mutual_choice", "aux_loss": "aux_zipf"}, 5),
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


REASONS = {
    "hooks": "cuda_graph is off: hook_sae_recons has hooks, which run on the host.",
    "replaced": "training_forward_pass of the SAE was replaced, as by compile_sae.",
    "backend": "the kernels of this backend make the host wait, and only Triton's do not.",
    "optimizer": "row_sparse_adam waits for the device to say which features were selected.",
    "refused": "the step cannot be recorded (aten._local_scalar_dense.default asks",
    "memory": "the step cannot be recorded (CUDA out of memory).",
}


@pytest.mark.parametrize("reason", REASONS)
@pytest.mark.parametrize("cuda_graph", [True, None], ids=["asked for", "automatic"])
def test_what_makes_it_impossible_is_one_sentence_or_silence(
    reason: str,
    cuda_graph: bool | None,
    messages: list[str],
    monkeypatch: pytest.MonkeyPatch,
):
    expected, found = make_sae(d_sae=40), make_sae(d_sae=40)
    overrides: dict[str, Any] = {}
    if reason == "hooks":
        for sae in (expected, found):
            sae.hook_sae_recons.add_hook(lambda tensor, hook: tensor)  # noqa: ARG005
    elif reason == "replaced":
        own: Any = found.training_forward_pass
        monkeypatch.setattr(found, "training_forward_pass", lambda given: own(given))
    elif reason == "backend":
        monkeypatch.setenv(BACKEND_VARIABLE, "torch")
    elif reason == "optimizer":
        overrides = {"optimizer": "row_sparse_adam"}
    else:
        monkeypatch.setattr(
            reconstruction,
            "decode_pairs",
            partial(asks if reason == "refused" else has_no_memory, found),
        )
    recordings: list[weakref.ref[Any]] = []
    made = OperationRecording.__init__

    def note(recording: OperationRecording) -> None:
        made(recording)
        recordings.append(weakref.ref(recording))

    monkeypatch.setattr(OperationRecording, "__init__", note)
    train(expected, monkeypatch, cuda_graph=False, **overrides)
    trainer = train(found, monkeypatch, cuda_graph=cuda_graph, **overrides)
    assert OperationRecording.replays == 0
    off = [message for message in messages if "cuda_graph is off" in message]
    fails = reason in ("refused", "memory")
    # what is known beforehand is for those who asked
    assert len(off) == (1 if fails or cuda_graph else 0)
    why_not = f"cuda_graph is off: {why_not_recorded(trainer)}."
    assert REASONS[reason] in why_not
    assert all(message == why_not for message in off)
    assert changed(state_of(expected), found) == set()
    # and what was recorded by half is given back
    assert len(recordings) == fails
    assert all(recording() is None for recording in recordings)


def asks(sae: Any, values: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    del sae
    values.sum().item()
    return decode_pairs(values, *args, **kwargs)


def has_no_memory(sae: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    """As a device that has enough for a step, and not for a second one beside it."""
    if sae.checks._recorded is not None:
        raise torch.OutOfMemoryError("CUDA out of memory")
    return decode_pairs(*args, **kwargs)


def test_it_is_automatic(messages: list[str], monkeypatch: pytest.MonkeyPatch):
    expected, found = make_sae(d_sae=40), make_sae(d_sae=40)
    train(expected, monkeypatch, cuda_graph=False)
    train(found, monkeypatch, cuda_graph=None)
    assert OperationRecording.replays == 5
    assert changed(state_of(expected), found) == set()
    assert not any("cuda_graph" in message for message in messages)


def test_on_a_cpu_automatic_is_off_without_a_word(messages: list[str]):
    cfg = AllocSAETrainerConfig(
        total_training_samples=12, train_batch_size_samples=12, lr_end=1e-4
    )
    assert cfg.cuda_graph is None
    trainer = AllocSAETrainer(cfg, make_sae(), iter([tokens(12, 8)]))
    trainer.step(tokens(12, 8))
    assert trainer._graph is None
    assert not any("cuda_graph" in message for message in messages)


def test_weights_that_somebody_replaces_are_recorded_anew(
    monkeypatch: pytest.MonkeyPatch,
):
    """Otherwise the steps that follow would read and train the old ones."""
    step = AllocSAETrainer.step

    def replace_at_4(
        trainer: AllocSAETrainer[Any, Any], batch: torch.Tensor
    ) -> TrainStepOutput:
        if trainer.n_training_steps == 4:
            trainer.sae.W_dec.data = 0.5 * trainer.sae.W_dec.data
        return step(trainer, batch)

    monkeypatch.setattr(AllocSAETrainer, "step", replace_at_4)
    expected, found = make_sae(d_sae=40), make_sae(d_sae=40)
    train(expected, monkeypatch, cuda_graph=False)
    train(found, monkeypatch, cuda_graph=True)
    assert OperationRecording.replays == 3 + 1
    assert changed(state_of(expected), found) == set()


def test_a_transcoder_starts_from_its_first_batch(monkeypatch: pytest.MonkeyPatch):
    expected, found = (
        make_sae("mutual_choice_transcoder", d_in=4, d_out=4, d_sae=40)
        for _ in range(2)
    )
    train(expected, monkeypatch, cuda_graph=False)
    train(found, monkeypatch, cuda_graph=True)
    assert OperationRecording.replays == 5
    assert changed(state_of(expected), found) == set()
    assert found.get_buffer("input_mean").any()


def test_recorded_gradients_take_over_the_memory_of_those_before(
    monkeypatch: pytest.MonkeyPatch,
):
    sae = make_sae(d_sae=40)
    addresses: list[int] = []
    replay = StepGraph._replay

    def note(graph: StepGraph, recorded: RecordedStep, *args: Any) -> Any:
        memory = sae.gradient_memory
        kept = {memory.W_enc, memory.W_dec}
        # the first time the recording has it, and afterwards both
        given = {t for t in recorded.gradients if t is not None and t.ndim == 2}
        addresses.append(len((kept | given) - {None}))
        return replay(graph, recorded, *args)

    monkeypatch.setattr(StepGraph, "_replay", note)
    train(sae, monkeypatch, cuda_graph=True)
    assert addresses == [2] * 5


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
