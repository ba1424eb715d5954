"""Training steps and their memory on a card: `benchmarks.measure`, where all is there for it."""

from dataclasses import asdict
from typing import Any

import torch

from benchmarks.gpu.task import NotAvailableError
from benchmarks.measure import Pace, peak_memory, time_step
from benchmarks.shape import Shape
from benchmarks.subject import Machine
from benchmarks.subjects import SUBJECTS
from sae_lens_alloc.ops.backend import backend_for, why_unavailable


def measure_step(
    name: str, shape: Shape, machine: Machine, pace: Pace | None
) -> dict[str, Any]:
    """`time_step`, and the backend that ran."""
    require_available(name, machine)
    result = time_step(name, shape, machine, pace)
    if SUBJECTS[name].config is not None:
        # the trial of a training names the device by its index
        index = torch.zeros(0, device=machine.device).device
        result["backend_used"] = backend_for(index)
    return result


def measure_memory(name: str, shape: Shape, machine: Machine) -> dict[str, Any]:
    """`peak_memory`."""
    require_available(name, machine)
    return peak_memory(name, shape, machine)


def require_available(name: str, machine: Machine) -> None:
    """Raises NotAvailableError if the library of a subject or the backend is not there."""
    kind = SUBJECTS[name]
    if not kind.is_installed:
        raise NotAvailableError(f"{kind.module} is not installed")
    if machine.backend is not None:
        backend: Any = machine.backend
        reason = why_unavailable(backend, torch.device(machine.device))
        if reason is not None:
            raise NotAvailableError(reason)


def facts(
    name: str, shape: Shape, machine: Machine, precision: str | None = None
) -> dict[str, Any]:
    """What a row of a table is of."""
    row = {"subject": name, "backend": machine.backend, **asdict(shape)}
    if precision is not None:
        row |= {"precision": precision, "cuda_graph": machine.cuda_graph}
    return row
