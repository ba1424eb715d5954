"""Files of results: where and with what they were measured, and how they are kept."""

import json
import platform
import re
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import sae_lens
import torch

import sae_lens_alloc


def load_results(path: Path, about: dict[str, Any]) -> dict[str, Any] | None:
    """
    What was measured so far, None if nothing was. Exits where the file is about something
    else than `about` says.
    """
    if not path.exists():
        return None
    content = json.loads(path.read_text())
    other = [key for key in about if content.get(key) != about[key]]
    if other:
        sys.exit(
            f"{path} was measured with another {' and '.join(other)}; name another file, or "
            "delete it to measure all of it again."
        )
    return content


def write_results(path: Path, content: dict[str, Any]) -> None:
    """Replaces a file of results, which is never half-written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(path)


def main_versions() -> dict[str, str]:
    """Versions of what figures of quality depend on, by the names of the modules."""
    return {
        module.__name__: module.__version__
        for module in (sae_lens_alloc, sae_lens, torch)
    }


def installed_versions(packages: Sequence[str]) -> dict[str, str]:
    """Versions of ours, of Python and of those of the packages that are installed."""
    versions = {
        "sae-lens-alloc": sae_lens_alloc.__version__,
        "python": platform.python_version(),
    }
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            print(f"{package} is not installed and left out", file=sys.stderr)
    return versions


def describe_machine(device: str) -> str:
    """The GPU, or the processor and the number of threads in use."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    models = (
        re.findall(r"model name\s*: (.*)", cpuinfo.read_text())
        if cpuinfo.exists()
        else []
    )
    model = models[0] if models else platform.processor()
    return f"{model} ({platform.machine()}), {torch.get_num_threads()} threads"
