"""Seed, versions and commit of a run, for those who want to repeat it."""

import platform
import subprocess
from importlib.metadata import version
from typing import Any

from sae_lens_alloc.version import __version__

LIBRARIES = ("sae-lens", "transformer-lens", "torch", "transformers", "datasets")


def provenance(seed: int) -> dict[str, Any]:
    """
    Seed, versions, and the git commit of the current directory. The commit ends in `-dirty` if
    files differ from it. It is None outside of a repository.
    """
    return {
        "seed": seed,
        "git_commit": _git_commit(),
        "versions": {
            "python": platform.python_version(),
            "sae-lens-alloc": __version__,
            **{name: version(name) for name in LIBRARIES},
        },
    }


def _git_commit() -> str | None:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()
