"""Which features of an SAE a rank holds."""

from functools import cached_property

import torch
from torch.nn.functional import pad

from sae_lens_alloc.distributed.ranks import ALONE, Ranks

# Features are dealt out in this many heaps: j goes to heap j mod N_HEAPS.
N_HEAPS = 1024


class FeatureShard:
    """
    The features of one rank, F_r of the F of the SAE, in ascending order.

    All features have an order, the same for every number of ranks (`storage_order`), and rank r
    has the r-th part of it, as `torch.chunk` divides. So a checkpoint that keeps them in that order
    is cut anew for another number of ranks without any permutation. The order goes through the
    features in large strides. So every rank has its share of the first features, which nested
    SAEs use most.

    Args:
        n_features: Number of features F of the SAE.
        ranks: The ranks that share them.

    Raises:
        ValueError: if a rank would have no feature.
    """

    def __init__(self, n_features: int, ranks: Ranks = ALONE) -> None:
        self.n_features = n_features
        self.ranks = ranks
        self.largest = -(-n_features // ranks.size)
        if self.largest * (ranks.size - 1) >= n_features:
            raise ValueError(
                f"{n_features} features cannot be shared by {ranks.size} processes so that each "
                "has some: start fewer processes, or give a larger d_sae."
            )
        self._below: dict[int, int] = {}
        self._on_device: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}

    @property
    def is_whole(self) -> bool:
        """Whether this is all of the features."""
        return self.ranks.is_alone

    def __len__(self) -> int:
        first = self.ranks.rank * self.largest
        return min(self.n_features - first, self.largest)

    @cached_property
    def _own(self) -> torch.Tensor:
        if self.is_whole:
            return torch.arange(self.n_features)
        return self._parts()[self.ranks.rank].sort().values

    def _parts(self) -> list[torch.Tensor]:
        return list(storage_order(self.n_features).split(self.largest))

    def ids(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """Numbers of the features within the SAE, ascending, int64 of shape (F_r,)."""
        return self._tensors(device)[0]

    def ids_by_rank(self) -> list[torch.Tensor]:
        """Numbers of the features of each rank, ascending, int64 on the CPU."""
        return [part.sort().values for part in self._parts()]

    def n_below(self, width: int) -> int:
        """How many of the first `width` features of the SAE are here; they come first."""
        if self.is_whole:
            return min(width, self.n_features)
        if width not in self._below:
            self._below[width] = int((self._own < width).sum())
        return self._below[width]

    def own(self, whole: torch.Tensor) -> torch.Tensor:
        """This rank's part of something of all features, shape (F, ...) -> (F_r, ...)."""
        return whole if self.is_whole else whole[self.ids(whole.device)]

    def gather(self, part: torch.Tensor) -> torch.Tensor:
        """Something of all features, shape (F_r, ...) -> (F, ...). All ranks must call it."""
        if self.is_whole:
            return part
        padding = [0, 0] * (part.ndim - 1) + [0, self.largest - len(self)]
        gathered = self.ranks.gather(pad(part, padding))
        return gathered[self._tensors(part.device)[1]]

    @cached_property
    def storage_places(self) -> torch.Tensor:
        """
        Where each own feature is in this rank's part of the storage order, int64 of shape
        (F_r,): `part = stored[storage_places]`.
        """
        return self._parts()[self.ranks.rank].argsort()

    @cached_property
    def stored_rows(self) -> torch.Tensor:
        """The other way round, int64 of shape (F_r,): `stored = part[stored_rows]`."""
        return self.storage_places.argsort()

    def _tensors(self, device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor]:
        """The own features, and where each feature of the SAE is in what `gather` receives."""
        device = torch.device(device)
        if device not in self._on_device:
            places = torch.empty(self.n_features, dtype=torch.int64)
            for rank, part in enumerate(self._parts()):
                first = rank * self.largest
                places[part.sort().values] = torch.arange(first, first + len(part))
            self._on_device[device] = self._own.to(device), places.to(device)
        return self._on_device[device]


def storage_order(n_features: int) -> torch.Tensor:
    """The features as they are dealt out to ranks, one heap after the other, int64 (F,)."""
    features = torch.arange(n_features)
    return (features % N_HEAPS).argsort(stable=True)
