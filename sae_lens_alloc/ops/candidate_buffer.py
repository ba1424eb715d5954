"""Candidates of a batch in a fixed number of places, so that a GPU is asked once how many."""

from functools import cache

import torch


class CandidateBuffer:
    """
    Collects affinities above a limit, block by block, in the order of the blocks. Nothing is
    asked of the device until all are in. Of more than the capacity the last are left out.

    Args:
        capacity: Places for candidates.
        shape: (number of tokens B, number of features F).
        like: Of the dtype and on the device of the affinities.
    """

    def __init__(
        self, capacity: int, shape: tuple[int, int], like: torch.Tensor
    ) -> None:
        self.capacity = capacity
        self.shape = shape
        # one more, for what is none or does not fit
        self._positions = like.new_empty(capacity + 1, dtype=torch.int64)
        self._values = like.new_empty(capacity + 1)
        self.count = like.new_zeros((), dtype=torch.int64)

    def add(
        self, affinities: torch.Tensor, limits: torch.Tensor, first_feature: int
    ) -> None:
        """
        Adds what exceeds its limit.

        Args:
            affinities: Affinities of a block of f features, shape (B, f).
            limits: Shape (f,) or ().
            first_feature: First feature of the block.
        """
        exceeds = (affinities > limits).flatten()
        n_exceeding = exceeds.sum()
        found = torch.nonzero_static(
            exceeds, size=min(self.capacity, len(exceeds)), fill_value=0
        ).squeeze(1)
        numbers = torch.arange(len(found), device=found.device)
        places = (self.count + numbers).where(numbers < n_exceeding, self.capacity)
        places = places.clamp(max=self.capacity)
        tokens = found // affinities.shape[1]
        features = found - tokens * affinities.shape[1] + first_feature
        self._positions.scatter_(0, places, tokens * self.shape[1] + features)
        self._values.scatter_(0, places, affinities.flatten()[found])
        self.count += n_exceeding

    def first(self, n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Tokens, features and affinities of the first n candidates, all of shape (n,)."""
        positions = self._positions[:n]
        tokens = positions // self.shape[1]
        return tokens, positions - tokens * self.shape[1], self._values[:n]


def asking_costs_a_wait(device: torch.device) -> bool:
    """Whether candidates are better collected in a `CandidateBuffer`, as on a GPU."""
    return device.type == "cuda" and _finds_a_fixed_number(device)


@cache
def _finds_a_fixed_number(device: torch.device) -> bool:
    """Whether `torch.nonzero_static` runs there; in torch 2.6 it did not on CUDA."""
    try:
        torch.nonzero_static(torch.ones(1, dtype=torch.bool, device=device), size=1)
    except NotImplementedError:
        return False
    return True
