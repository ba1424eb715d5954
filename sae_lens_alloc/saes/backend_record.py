"""Which backend an SAE trains by, as its statistics carry it over a checkpoint."""

from dataclasses import dataclass
from typing import get_args

from sae_lens_alloc.ops.backend import Backend
from sae_lens_alloc.saes.allocation_statistics import AllocationStatistics
from sae_lens_alloc.saes.running_statistics import Derived


@dataclass
class _Known:
    """What the host knows of the buffer; None where it has not asked."""

    name: Backend | None = None


class BackendRecord:
    """
    The backend that was found fastest.

    Args:
        statistics: The statistics, whose `backend` is its index.
    """

    def __init__(self, statistics: AllocationStatistics) -> None:
        self._statistics = statistics
        self._known = Derived(statistics, _Known)

    @property
    def name(self) -> Backend | None:
        """The backend that was found fastest, None if none was tried."""
        known = self._known.get()
        if known.name is None:
            index = int(self._statistics.backend)
            known.name = None if index < 0 else get_args(Backend)[index]
        return known.name

    def record(self, backend: Backend) -> None:
        """Keeps the backend for the steps to come, and for those after a checkpoint."""
        self._statistics.backend.fill_(get_args(Backend).index(backend))
        self._known.get().name = backend
