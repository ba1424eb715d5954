"""Which kernels train on a GPU, decided by trying them on the first batch of a training."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import repeat
from statistics import median
from typing import Any

import torch
from sae_lens import logger
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput

from sae_lens_alloc.distributed.feature_shard import FeatureShard
from sae_lens_alloc.ops.backend import (
    Backend,
    choose_backend,
    default_backend,
    wanted_backend,
    why_unavailable,
)
from sae_lens_alloc.ops.pair_autoencoder import GradientMemory
from sae_lens_alloc.saes.training_step import SparseStepTrainingSAE

# The first one is what the others must agree with.
CANDIDATES: tuple[Backend, ...] = ("torch", "triton", "triton_prefilter")
TIMED_STEPS = 3
# After all that a schedule may change.
LATE_STEP = 10**9
# Features whose gradients are compared: those of all would be as large as the weights.
N_COMPARED_FEATURES = 1024


@dataclass(frozen=True)
class Tolerance:
    """
    How much two backends may differ, relative to the size of what is compared.

    Args:
        affinities: Of the affinity of a pair, in units of the smallest affinity that is
            selected. Pairs closer than this to the cut may be selected or not.
        gradients: Of the gradient of a weight, by its norm.
    """

    affinities: float
    gradients: float


FLOAT32 = Tolerance(affinities=1e-3, gradients=1e-2)
# TF32 and bfloat16 have 10 and 7 bits, and pairs at the cut that differ change gradients.
LOW_PRECISION = Tolerance(affinities=5e-2, gradients=0.25)


@dataclass(frozen=True)
class Outcome:
    """
    What a step found with some backend.

    Args:
        positions: token * F + feature of the active pairs, ascending, int64 of shape (n,).
        affinities: Their affinities, shape (n,).
        gradients: Gradients of all weights, those of features only of some features.
        d_sae: Number of features F.
        by_feature: Whether each feature has a cut of its own, as under Feature Choice.
    """

    positions: torch.Tensor
    affinities: torch.Tensor
    gradients: Sequence[torch.Tensor]
    d_sae: int
    by_feature: bool


def settle_backend(
    sae: SparseStepTrainingSAE[Any],
    step: Callable[[TrainStepInput], TrainStepOutput],
    step_input: TrainStepInput,
) -> None:
    """
    Lets the training steps of an SAE on a GPU run by the backend that its first one found, or
    that a checkpoint of it records. The environment variable of the backends overrides, and
    then nothing is tried.

    Args:
        sae: The SAE.
        step: Its training step.
        step_input: The batch of the step that is about to run.
    """
    device = step_input.sae_in.device
    if not _has_a_choice(device) or wanted_backend(device) is not None:
        return
    backend = sae.backend_record.name
    if backend is None or why_unavailable(backend, device) is not None:
        backend = fastest_right_backend(sae, step, step_input)
        sae.backend_record.record(backend)
    choose_backend(device, backend)


def _has_a_choice(device: torch.device) -> bool:
    return device.type == "cuda"


def fastest_right_backend(
    sae: SparseStepTrainingSAE[Any],
    step: Callable[[TrainStepInput], TrainStepOutput],
    step_input: TrainStepInput,
    candidates: Sequence[Backend] = CANDIDATES,
) -> Backend:
    """
    Takes a training step with each backend that can run on the device of the batch, forward
    and backward: the step itself and one of the end of the training, where another rule may
    allocate. Then a few more like the latter run against the clock. Nothing is learned from it:
    weights, their gradients and all statistics are afterwards what they were.

    Where ranks share the features, each tries its own as if they were all, so that a failure on
    one is waited for by none, and the slowest rank counts.

    A backend that fails, or disagrees with the first one that did not, costs a warning. One
    line of the log names the backend that was fastest, and the times of all.

    Args:
        sae: The SAE, one of ours.
        step: Its training step.
        step_input: The batch.
        candidates: Backends to try. The first one that works is the one to agree with.

    Returns:
        The fastest backend that is right, or the device's default if none works.
    """
    device = step_input.sae_in.device
    tolerance = _tolerance(step_input.sae_in, sae.W_enc.dtype)
    late = replace(step_input, n_training_steps=LATE_STEP)
    seconds: dict[Backend, float] = {}
    expected: list[Outcome] = []
    for backend in candidates:
        if why_unavailable(backend, device) is not None:
            continue
        try:
            found = []
            for each in (step_input, late):
                with _untouched(sae, device, backend):
                    found.append(_outcome(sae, step, each))
            expected = expected or found
            difference = next(
                filter(None, map(disagreement, expected, found, repeat(tolerance))),
                None,
            )
            if difference is None:
                with _untouched(sae, device, backend):
                    seconds[backend] = _seconds_per_step(sae, step, late)
        except Exception as error:  # kernels fail in many ways; none may end the run
            first_line = str(error).strip().partition("\n")[0] or "no message"
            difference = f"it failed ({type(error).__name__}: {first_line})"
        if difference is not None:
            logger.warning(f"The backend {backend} is not used: {difference}.")
    seconds = _slowest(sae.shard.ranks.objects(seconds))
    if not seconds:
        return default_backend(device)
    best = min(seconds, key=lambda name: seconds[name])
    times = ", ".join(f"{name} {1e3 * t:.2f} ms" for name, t in seconds.items())
    logger.info(f"The backend {best} trains the SAE on {device}, of {times} a step.")
    return best


def disagreement(expected: Outcome, found: Outcome, tolerance: Tolerance) -> str | None:
    """
    What is wrong with an outcome, None if it is right up to rounding.

    Args:
        expected: The outcome to agree with.
        found: The other one.
        tolerance: How much both may differ.
    """
    if len(expected.positions) == 0:
        return None if len(found.positions) == 0 else "it selects other pairs"
    cuts = _cuts(expected)
    in_both = torch.isin(expected.positions, found.positions)
    others = ~torch.isin(found.positions, expected.positions)
    for outcome, differs in ((expected, ~in_both), (found, others)):
        values = outcome.affinities[differs]
        allowed = cuts[outcome.positions[differs] % len(cuts)]
        # an infinite cut is that of a feature from which nothing is selected
        near = (values - allowed).abs() <= tolerance.affinities * allowed
        if not (near & allowed.isfinite()).all():
            return "it selects other pairs"
    shared = found.affinities[~others] - expected.affinities[in_both]
    size = expected.affinities.abs().max()
    if shared.numel() and not shared.abs().max() <= tolerance.affinities * size:
        return "it finds other affinities"
    for one, other in zip(expected.gradients, found.gradients, strict=True):
        if not (one - other).norm() <= tolerance.gradients * one.norm() + 1e-12:
            return "its gradients are others"
    return None


def _cuts(outcome: Outcome) -> torch.Tensor:
    """Smallest selected affinity of each feature, or of all, shape (F,)."""
    values = outcome.affinities
    if not outcome.by_feature:
        return values.min().expand(outcome.d_sae)
    cuts = values.new_full((outcome.d_sae,), torch.inf)
    return cuts.scatter_reduce_(0, outcome.positions % outcome.d_sae, values, "amin")


def _outcome(
    sae: SparseStepTrainingSAE[Any],
    step: Callable[[TrainStepInput], TrainStepOutput],
    step_input: TrainStepInput,
) -> Outcome:
    output = step(step_input)
    gradients = torch.autograd.grad(
        output.loss, list(sae.parameters()), allow_unused=True
    )
    acts = output.feature_acts.detach()
    acts = (acts if acts.is_sparse else acts.to_sparse()).coalesce()
    positions = _flat_positions(acts.indices(), acts.shape)
    real = acts.values() != 0
    return Outcome(
        positions[real],
        acts.values()[real].float(),
        [
            sample
            for (name, _), gradient in zip(
                sae.named_parameters(), gradients, strict=True
            )
            if gradient is not None
            for sample in [_sample(name, gradient, len(sae.shard))]
        ],
        len(sae.shard),
        sae.rule_at(step_input.n_training_steps) == "feature",
    )


def _flat_positions(indices: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    positions = indices[0]
    for index, size in zip(indices[1:], shape[1:], strict=True):
        positions = positions * size + index
    return positions


def _sample(name: str, gradient: torch.Tensor, d_sae: int) -> torch.Tensor:
    """A copy of the gradient of a weight, of a weight of features only that of some."""
    some = slice(None, None, max(1, d_sae // N_COMPARED_FEATURES))
    if name == "W_enc":
        gradient = gradient[:, some]
    elif name == "W_dec":
        gradient = gradient[some]
    return gradient.float().clone()


def _seconds_per_step(
    sae: SparseStepTrainingSAE[Any],
    step: Callable[[TrainStepInput], TrainStepOutput],
    step_input: TrainStepInput,
) -> float:
    """Median seconds of a step, forward and backward, after one that does not count."""
    times = []
    for i in range(1 + TIMED_STEPS):
        start = _now(step_input.sae_in.device)
        output = step(
            replace(step_input, n_training_steps=step_input.n_training_steps + i)
        )
        torch.autograd.grad(output.loss, list(sae.parameters()), allow_unused=True)
        times.append(_now(step_input.sae_in.device) - start)
    return median(times[1:])


def _slowest(by_rank: Sequence[dict[Backend, float]]) -> dict[Backend, float]:
    """Seconds on the slowest rank, of what works on all of them."""
    return {
        backend: max(seconds[backend] for seconds in by_rank)
        for backend in by_rank[0]
        if all(backend in seconds for seconds in by_rank)
    }


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@contextmanager
def _untouched(
    sae: SparseStepTrainingSAE[Any], device: torch.device, backend: Backend
) -> Iterator[None]:
    """Within it a backend runs and the SAE may train; after it, it has not trained."""
    statistics = {
        name: value.clone() for name, value in sae.allocation.state_dict().items()
    }
    memory, sae.gradient_memory = sae.gradient_memory, GradientMemory()
    shard, sae.allocation.shard = sae.shard, FeatureShard(len(sae.shard))
    if not shard.is_whole:
        sae.allocation.forget_derived()  # of the features of all ranks
    choose_backend(device, backend)
    try:
        yield
    finally:
        choose_backend(device, None)
        sae.gradient_memory = memory
        sae.allocation.shard = shard
        sae.allocation.load_state_dict(statistics)


def _tolerance(x: torch.Tensor, dtype: torch.dtype) -> Tolerance:
    exact = (
        dtype == torch.float32
        and not torch.is_autocast_enabled(x.device.type)
        and torch.get_float32_matmul_precision() == "highest"
    )
    return FLOAT32 if exact else LOW_PRECISION
