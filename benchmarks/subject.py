"""A trainer that is measured, and where it computes."""

import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch

from benchmarks.shape import Shape
from sae_lens_alloc.ops.backend import BACKEND_VARIABLE

MANY_STEPS = 10**6
NO_GRAPH = "its trainer makes none"


@dataclass(frozen=True)
class Machine:
    """
    Where and how to compute.

    Args:
        device: A torch device.
        autocast: Under bfloat16 autocast.
        matmul: Torch's precision of float32 products: "highest", or "high" for TF32.
        backend: Backend of ours, None for the one that it chooses itself.
        cuda_graph: Whether ours are asked to replay their step as a CUDA graph.
    """

    device: str = "cpu"
    autocast: bool = False
    matmul: str = "highest"
    backend: str | None = None
    cuda_graph: bool = False

    @property
    def is_cuda(self) -> bool:
        return torch.device(self.device).type == "cuda"

    def prepare(self) -> None:
        """Settings of the whole process."""
        torch.set_float32_matmul_precision(self.matmul)
        if self.backend is not None:
            os.environ[BACKEND_VARIABLE] = self.backend


@dataclass
class Subject:
    """
    A trainer about to start.

    Args:
        train: Trains on the batches, each of shape (B, d_in), until there are no more.
        parameters: What is trained.
        optimizers: Whatever has a `state` that maps parameters to dicts of tensors.
        why_no_graph: Why its steps are not the replay of a CUDA graph by now, None if they are.
        keeps_gradients: Whether there are gradients of all parameters from step to step.
    """

    train: Callable[[Iterator[torch.Tensor]], object]
    parameters: list[torch.Tensor]
    optimizers: list[Any]
    why_no_graph: Callable[[], str | None] = lambda: NO_GRAPH
    keeps_gradients: bool = True

    def persistent_bytes(self) -> int:
        """Bytes of the parameters, of their gradients if kept, and of the optimizers' state."""
        moments = [
            value
            for optimizer in self.optimizers
            for state in optimizer.state.values()
            for value in state.values()
            if isinstance(value, torch.Tensor)
        ]
        kept = self.parameters * (2 if self.keeps_gradients else 1)
        return _n_bytes(kept) + _n_bytes(moments)


@dataclass(frozen=True)
class SubjectKind:
    """
    Args:
        build: Makes the subject for a shape.
        module: What must be importable for it.
        swept: Measured along the sweeps too, rather than at the centre alone.
        has_aux: Has an auxiliary loss for dead features.
        config: The config of ours, whose memory `sae_lens_alloc` foretells.
    """

    build: Callable[[Shape, Machine], Subject]
    module: str = "sae_lens_alloc"
    swept: bool = False
    has_aux: bool = True
    config: Callable[[Shape, Machine], Any] | None = None

    @property
    def is_installed(self) -> bool:
        return find_spec(self.module) is not None


def before_each(
    batches: Iterator[torch.Tensor], action: Callable[[], None]
) -> Iterator[torch.Tensor]:
    """The batches, with something done before each."""
    for batch in batches:
        action()
        yield batch


def autocast(machine: Machine) -> Any:
    """The autocast that a machine computes under, if it does."""
    if not machine.autocast:
        return nullcontext()
    return torch.autocast(torch.device(machine.device).type, torch.bfloat16)


def _n_bytes(tensors: list[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
