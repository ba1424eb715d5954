"""Which kernels run on a device, decided here and nowhere else."""

import os
from importlib.util import find_spec
from typing import Literal, get_args

import torch

# triton_prefilter: the same kernels, where the selection first looks for candidates in
# bfloat16 and then decides by float32 products.
Backend = Literal["reference", "torch", "triton", "triton_prefilter"]

BACKEND_VARIABLE = "SAE_LENS_ALLOC_BACKEND"

_chosen: dict[str, Backend] = {}


def backend_for(device: torch.device) -> Backend:
    """
    The backend of tensors on a device: that of the environment variable
    SAE_LENS_ALLOC_BACKEND, or what `choose_backend` was told, or torch's CSR kernels where it
    has them, otherwise the plain reference.

    Raises:
        ValueError: if the variable names no backend, or one that cannot run here.
    """
    return wanted_backend(device) or _chosen.get(str(device)) or default_backend(device)


def uses_triton(device: torch.device) -> bool:
    """Whether Triton's kernels run on a device."""
    return backend_for(device) in ("triton", "triton_prefilter")


def choose_backend(device: torch.device, backend: Backend | None) -> None:
    """Sets the backend of a device for this process, None for the default one."""
    if backend is None:
        _chosen.pop(str(device), None)
    else:
        _chosen[str(device)] = backend


def default_backend(device: torch.device) -> Backend:
    """The backend where nobody chose one."""
    return "torch" if has_csr_kernels(device) else "reference"


def wanted_backend(device: torch.device) -> Backend | None:
    """
    The backend that the environment variable names, None where it is not set.

    Raises:
        ValueError: if it names no backend, or one that cannot run here.
    """
    wanted = os.environ.get(BACKEND_VARIABLE)
    if wanted is None:
        return None
    for backend in get_args(Backend):
        if backend == wanted:
            reason = why_unavailable(backend, device)
            if reason is None:
                return backend
            raise ValueError(
                f"{BACKEND_VARIABLE}={backend} cannot be used: {reason}; unset it to let "
                "the device decide."
            )
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


def why_unavailable(backend: Backend, device: torch.device) -> str | None:
    """Why a backend cannot run on a device, None where it can."""
    if backend == "torch" and not has_csr_kernels(device):
        return f"torch has no CSR kernels for {device.type} here"
    if backend.startswith("triton"):
        if find_spec("triton") is None:
            return "triton is not installed"
        if device.type != "cuda" and not is_interpreted():
            return f"Triton kernels need a CUDA device, and the tensors are on {device}"
    return None
