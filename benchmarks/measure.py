"""Measuring one subject at one shape."""

import itertools
import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from sae_lens import LanguageModelSAERunnerConfig

from benchmarks.shape import Shape
from benchmarks.subject import Machine
from benchmarks.subjects import SUBJECTS, floor
from sae_lens_alloc.training.summary import estimate_memory

N_BATCHES = 4
MEMORY_STEPS = 3


@dataclass(frozen=True)
class Pace:
    """
    How often a step is timed. Where steps take long, the limits of seconds end both the warm-up
    and the rounds earlier.

    Args:
        warm_up_steps: Steps before the first that counts. Optimizers make their state in the
            first step, and ours finds its bounds in the first two.
        steps_per_round: Steps from one look at the clock to the next. Where a device is waited
            for at each look, one step would not be what it is in a training.
        rounds: Rounds of the floor and the subject in turn.
        seconds: Limit of the warm-up, and of the subject's share of the rounds.
    """

    warm_up_steps: int = 3
    steps_per_round: int = 1
    rounds: int = 5
    seconds: float = 10


# Flags of the auxiliary loss are renewed at every tenth step: a round has one renewal.
GPU_PACE = Pace(warm_up_steps=20, steps_per_round=10)


def time_step(
    name: str, shape: Shape, machine: Machine, pace: Pace | None = None
) -> dict[str, Any]:
    """
    Seconds of a training step of a subject in each of some rounds, right after as many steps
    of the floor, so that a slow moment of the machine hits both; and the peak of the subject's
    working memory.
    """
    machine.prepare()
    if pace is None:
        pace = GPU_PACE if machine.is_cuda else Pace()
    data = _data(shape, machine)
    floor_step = floor(shape, machine)
    floor_step(data[0])
    seconds: list[float] = []
    floor_seconds: list[float] = []

    def batches() -> Iterator[torch.Tensor]:
        warm_up: list[float] = []
        turn = itertools.cycle(data)
        while len(warm_up) < pace.warm_up_steps and sum(warm_up) < pace.seconds:
            yield from _timed([next(turn)], warm_up, machine)
        while (
            len(seconds) < pace.rounds
            and pace.steps_per_round * sum(seconds) < pace.seconds
        ):
            taken = [next(turn) for _ in range(pace.steps_per_round)]
            for batch in _timed(taken, floor_seconds, machine):
                floor_step(batch)
            yield from _timed(taken, seconds, machine)

    memory = _train(name, shape, machine, batches())
    return {"seconds": seconds, "floor_seconds": floor_seconds, **memory}


def peak_memory(name: str, shape: Shape, machine: Machine) -> dict[str, Any]:
    """The peak of the subject's working memory, and what ours foretells of it."""
    machine.prepare()
    data = itertools.cycle(_data(shape, machine))
    memory = _train(name, shape, machine, itertools.islice(data, MEMORY_STEPS))
    config = SUBJECTS[name].config
    if config is None:
        return memory
    estimate = estimate_memory(
        LanguageModelSAERunnerConfig(
            sae=config(shape, machine),
            train_batch_size_tokens=shape.batch,
            device=machine.device,
        )
    )
    return {**memory, "estimated_working_bytes": estimate["step"]}


def _train(
    name: str, shape: Shape, machine: Machine, batches: Iterator[torch.Tensor]
) -> dict[str, Any]:
    """
    Trains a subject on the batches, and returns the memory this took, and whether it replays
    a CUDA graph where it was asked to, or why not.
    """
    torch.manual_seed(0)
    if not machine.is_cuda:
        # Libraries load code on first use, which is not the step's memory.
        tiny = Shape(d_in=8, d_sae=40, k=2, batch=8, aux=shape.aux)
        SUBJECTS[name].build(tiny, machine).train(iter(_data(tiny, machine)[:1]))
    before = _bytes_before(machine)
    subject = SUBJECTS[name].build(shape, machine)
    subject.train(batches)
    persistent = subject.persistent_bytes()
    result: dict[str, Any] = {
        "persistent_bytes": persistent,
        "working_bytes": _peak_bytes(machine) - before - persistent,
    }
    if machine.cuda_graph:
        why_not = subject.why_no_graph()
        result["replays_graph"] = why_not is None
        if why_not is not None:
            result["why_no_graph"] = why_not
    return result


def _timed(
    batches: list[torch.Tensor], seconds: list[float], machine: Machine
) -> Iterator[torch.Tensor]:
    """Yields the batches, and records how long the caller took for each on average."""
    synchronize(machine)
    start = time.perf_counter()
    yield from batches
    synchronize(machine)
    seconds.append((time.perf_counter() - start) / len(batches))


def _data(shape: Shape, machine: Machine) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    size = (shape.batch, shape.d_in)
    return [
        torch.randn(size, generator=generator).to(machine.device)
        for _ in range(N_BATCHES)
    ]


def synchronize(machine: Machine) -> None:
    """Waits for what the device has to do."""
    if machine.is_cuda:
        torch.cuda.synchronize()


def _bytes_before(machine: Machine) -> int:
    """What `_peak_bytes` would be if nothing more were needed from now on."""
    if machine.is_cuda:
        torch.cuda.reset_peak_memory_stats()
    return _peak_bytes(machine)


def _peak_bytes(machine: Machine) -> int:
    """The most bytes this process has had so far."""
    if machine.is_cuda:
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
