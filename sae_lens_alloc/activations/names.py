"""Names of models and datasets in pages that may be given to others."""

from pathlib import Path


def name_for_others(name: str) -> str:
    """A name of the hub as it is, and the end of a path of this machine or another one."""
    path = Path(name)
    if not path.is_absolute() and not path.exists():
        return name
    return "/".join(path.resolve().parts[-2:])
