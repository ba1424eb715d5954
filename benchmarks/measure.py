"""Measuring one subject at one shape, in a process of its own."""

import io
import itertools
import multiprocessing
import resource
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stderr, redirect_stdout
from typing import Any

import torch
from sae_lens import LanguageModelSAERunnerConfig

from benchmarks.shape import Shape
from benchmarks.subjects import SUBJECTS, Machine, Subject, floor
from sae_lens_alloc.training.summary import estimate_memory

N_BATCHES = 4
# Optimizers make their state in the first step and ours finds its bounds in the first two;
# where a step takes long, one is enough, and so is one round.
WARM_UP_STEPS, WARM_UP_SECONDS = 3, 10
MAX_ROUNDS, ROUNDS_SECONDS = 5, 10
MEMORY_STEPS = 3


def time_step(name: str, shape: Shape, machine: Machine) -> dict[str, Any]:
    """
    Seconds of training steps of a subject, each right after a step of the floor, so that a
    slow moment of the machine hits both; and the peak of the subject's working memory.
    """
    data = _data(shape, machine)
    floor_step = floor(shape, machine)
    floor_step(data[0])
    seconds: list[float] = []
    floor_seconds: list[float] = []

    def batches() -> Iterator[torch.Tensor]:
        warm_up: list[float] = []
        turn = itertools.cycle(data)
        while len(warm_up) < WARM_UP_STEPS and sum(warm_up) < WARM_UP_SECONDS:
            yield from _timed(next(turn), warm_up, machine)
        while len(seconds) < MAX_ROUNDS and sum(seconds) < ROUNDS_SECONDS:
            batch = next(turn)
            for _ in _timed(batch, floor_seconds, machine):
                floor_step(batch)
            yield from _timed(batch, seconds, machine)

    memory = _train(name, shape, machine, batches())
    return {"seconds": seconds, "floor_seconds": floor_seconds, **memory}


def peak_memory(name: str, shape: Shape, machine: Machine) -> dict[str, Any]:
    """The peak of the subject's working memory, and what ours foretells of it."""
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


def in_own_process(
    measure: Callable[[str, Shape, Machine], dict[str, Any]],
    name: str,
    shape: Shape,
    machine: Machine,
) -> dict[str, Any]:
    """
    What `measure` returns in a fresh process, which never had a higher peak and leaves
    nothing behind; or why it died.
    """
    # A server with the libraries loaded forks for each measurement: that saves loading them.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(measure, name, shape, machine).result()
        except BrokenProcessPool:
            return {"skipped": "the process was killed, probably for its memory"}


def _train(
    name: str, shape: Shape, machine: Machine, batches: Iterator[torch.Tensor]
) -> dict[str, Any]:
    """Trains a subject on the batches, and returns the memory this took."""
    torch.manual_seed(0)
    # Libraries load code on first use, which is not the step's memory.
    tiny = Shape(d_in=8, d_sae=64, k=2, batch=16, aux=shape.aux)
    _run_quietly(name, tiny, machine, iter(_data(tiny, machine)))
    before = _peak_bytes(machine)
    subject = _run_quietly(name, shape, machine, batches)
    persistent = subject.persistent_bytes()
    return {
        "persistent_bytes": persistent,
        "working_bytes": _peak_bytes(machine) - before - persistent,
    }


def _run_quietly(
    name: str, shape: Shape, machine: Machine, batches: Iterator[torch.Tensor]
) -> Subject:
    """A subject trained on the batches, without its progress bar."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        subject = SUBJECTS[name].build(shape, machine)
        subject.train(batches)
    return subject


def _timed(
    batch: torch.Tensor, seconds: list[float], machine: Machine
) -> Iterator[torch.Tensor]:
    """Yields the batch once, and records how long the caller took for it."""
    _synchronize(machine)
    start = time.perf_counter()
    yield batch
    _synchronize(machine)
    seconds.append(time.perf_counter() - start)


def _data(shape: Shape, machine: Machine) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    size = (shape.batch, shape.d_in)
    return [
        torch.randn(size, generator=generator).to(machine.device)
        for _ in range(N_BATCHES)
    ]


def _synchronize(machine: Machine) -> None:
    if torch.device(machine.device).type == "cuda":
        torch.cuda.synchronize()


def _peak_bytes(machine: Machine) -> int:
    """The most bytes this process has had so far."""
    if torch.device(machine.device).type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
