"""`sae-lens-alloc doctor`: what a bug report should say about the machine."""

import os
import platform
import shutil
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import typer

LIBRARIES = (
    *("sae-lens-alloc", "sae-lens", "torch", "transformer-lens", "triton"),
    *("transformers", "datasets", "wandb"),
)


def doctor() -> None:
    """
    Print versions, devices, backends, logins, memory and disk, as text for a bug report.

    No network is used, and no name, path or key of yours is printed.

    \b
    Example:
      sae-lens-alloc doctor
    """
    parts: dict[str, Callable[[], Iterator[tuple[str, str]]]] = {
        "versions": _versions,
        "machine": _machine,
        "backends": _backends,
        "logins": _logins,
    }
    for title, part in parts.items():
        typer.echo(f"{title}:")
        try:
            for name, value in part():
                typer.echo(f"  {name:<24}{value}")
        except Exception as error:  # what is broken is what one wants to know
            typer.echo(f"  {type(error).__name__}: {' '.join(str(error).split())}")


def _versions() -> Iterator[tuple[str, str]]:
    yield "python", platform.python_version()
    yield "platform", platform.platform()
    for name in LIBRARIES:
        try:
            yield name, version(name)
        except PackageNotFoundError:
            yield name, "not installed"


def _machine() -> Iterator[tuple[str, str]]:
    import psutil

    memory = psutil.virtual_memory()
    yield "CPU cores", str(os.cpu_count())
    yield "memory", f"{_gb(memory.available)} of {_gb(memory.total)} available"
    yield "disk", f"{_gb(shutil.disk_usage(Path.cwd()).free)} free in this folder"


def _backends() -> Iterator[tuple[str, str]]:
    """By device: the backends that run there, the default one first, and why others do not."""
    from typing import get_args

    import torch

    from sae_lens_alloc.ops.backend import (
        BACKEND_VARIABLE,
        Backend,
        default_backend,
        why_unavailable,
    )

    n_gpus = torch.cuda.device_count()
    for device in map(torch.device, ("cpu", *(f"cuda:{i}" for i in range(n_gpus)))):
        what = "" if device.type == "cpu" else _gpu(device.index)
        yield str(device), f"{what}default {default_backend(device)}"
        for backend in get_args(Backend):
            yield f"  {backend}", why_unavailable(backend, device) or "works"
    if n_gpus == 0:
        yield "cuda", f"no GPU that torch sees (built for CUDA {torch.version.cuda})"
    yield BACKEND_VARIABLE, os.environ.get(BACKEND_VARIABLE, "not set")


def _gpu(index: int) -> str:
    import torch

    properties = torch.cuda.get_device_properties(index)
    return (
        f"{properties.name}, {_gb(properties.total_memory)}, compute capability "
        f"{properties.major}.{properties.minor}; "
    )


def _logins() -> Iterator[tuple[str, str]]:
    from huggingface_hub import constants, get_token
    from requests.utils import get_netrc_auth

    hub = _login(os.environ.get("HF_TOKEN"), get_token(), "HF_TOKEN", "hf auth login")
    yield "Hugging Face hub", hub
    yield "offline mode", "on" if constants.HF_HUB_OFFLINE else "off"
    server = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    key = os.environ.get("WANDB_API_KEY")
    wandb = _login(key, get_netrc_auth(server), "WANDB_API_KEY", "wandb login")
    yield "W&B", wandb


def _login(set_by_variable: object, found: object, variable: str, command: str) -> str:
    """Whether there is a login and where from, without a word of it."""
    if set_by_variable:
        return f"yes, by {variable}"
    if found:
        return f"yes, by `{command}`"
    return f"no (`{command}` or {variable})"


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"
