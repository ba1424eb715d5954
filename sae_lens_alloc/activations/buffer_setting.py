"""The size of the activation buffer, under the name that the installed SAELens has for it."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from sae_lens.config import LanguageModelSAERunnerConfig

# The present name (it counts contexts), and the one that SAELens plans
NAMES = ("n_batches_in_buffer", "n_sequences_in_buffer")


def buffer_setting() -> str:
    """The name of the setting in the installed SAELens."""
    known = {field.name for field in fields(LanguageModelSAERunnerConfig)}
    return next(name for name in NAMES if name in known)


def contexts_in_buffer(holder: Any) -> int:
    """The size of the buffer, in contexts, of a run's config or of an activation store."""
    return next(getattr(holder, name) for name in NAMES if hasattr(holder, name))


def with_known_buffer_setting(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a file, with either name replaced by the one that SAELens knows."""
    known = buffer_setting()
    return {
        known if name in NAMES and known not in settings else name: value
        for name, value in settings.items()
    }
