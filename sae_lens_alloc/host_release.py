"""Which releases of SAELens this package works with, and what to say of another."""

from importlib.metadata import PackageNotFoundError, version

# As in pyproject.toml.
SUPPORTED = "sae-lens>=6.54,<6.55"


def explained(error: ImportError) -> ImportError:
    """
    An error of importing SAELens, in one sentence that says which release would do; any other
    error as it is.
    """
    module = error.name or ""
    if module != "sae_lens" and not module.startswith("sae_lens."):
        return error
    try:
        found = f"not with the installed sae-lens {version('sae-lens')} ({error})"
    except PackageNotFoundError:
        found = "which is not installed"
    return ImportError(
        f"sae-lens-alloc works with {SUPPORTED}, {found}: run `pip install '{SUPPORTED}'`.",
        name=error.name,
    )
