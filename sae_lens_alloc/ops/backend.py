"""Which kernels run on a device, decided here and nowhere else."""

import os
from importlib.util import find_spec
from typing import Literal, get_args

import torch

Backend = Literal["reference", "torch", "triton"]

BACKEND_VARIABLE = "SAE_LENS_ALLOC_BACKEND"


def backend_for(device: torch.device) -> Backend:
    """
    The backend of tensors on a device: torch's CSR kernels where it has them, otherwise the
    plain reference. The environment variable SAE_LENS_ALLOC_BACKEND overrides; the Triton
    kernels are chosen by it alone until they have been measured against torch's on a GPU.

    Raises:
        ValueError: if the variable names no backend, or one that cannot run here.
    """
    wanted = os.environ.get(BACKEND_VARIABLE)
    if wanted is None:
        return "torch" if has_csr_kernels(device) else "reference"
    for backend in get_args(Backend):
        if backend == wanted:
            _require_available(backend, device)
            return backend
    raise ValueError(
        f"{BACKEND_VARIABLE} must be one of {', '.join(get_args(Backend))}, got "
        f"{wanted!r}; unset it to let the device decide."
    )


def has_csr_kernels(device: torch.device) -> bool:
    """Whether torch multiplies CSR matrices on this device (on CPU it needs MKL)."""
    return device.type == "cuda" or (
        device.type == "cpu" and torch.backends.mkl.is_available()
    )


def is_interpreted() -> bool:
    """Whether Triton interprets its kernels on the CPU instead of compiling them."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _require_available(backend: Backend, device: torch.device) -> None:
    if backend == "torch" and not has_csr_kernels(device):
        reason = f"torch has no CSR kernels for {device.type} here"
    elif backend == "triton" and find_spec("triton") is None:
        reason = "triton is not installed"
    elif backend == "triton" and device.type != "cuda" and not is_interpreted():
        reason = f"Triton kernels need a CUDA device, and the tensors are on {device}"
    else:
        return
    raise ValueError(
        f"{BACKEND_VARIABLE}={backend} cannot be used: {reason}; unset it to let the "
        "device decide."
    )
