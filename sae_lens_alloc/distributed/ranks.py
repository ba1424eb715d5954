"""The processes that train one SAE together, and all that they send to each other in a step."""

from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

T = TypeVar("T")

# which newer releases of torch call by another name
_all_gather: Any = getattr(dist, "all_gather_single", None)
if _all_gather is None:
    _all_gather = dist.all_gather_into_tensor


class Ranks:
    """
    The processes of a group. One process alone is a group, too: it sends nothing, and each
    method gives back what it was given.

    Every method that sends must be called by all ranks, in the same order.

    Args:
        group: Process group of torch.distributed that sends tensors of the device of the SAE, None
            for one process alone.
        host_group: Process group of the same processes that sends tensors of the CPU, by which
            hosts tell each other what no device is asked for. None if `group` is one.

    Attributes:
        size: Number of ranks S.
        rank: Number of this one, from 0.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        host_group: dist.ProcessGroup | None = None,
    ) -> None:
        self.group = group
        self.host_group = group if host_group is None else host_group
        self.size = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Ranks":
        return self  # a copy of an SAE belongs to the same ranks

    @property
    def is_alone(self) -> bool:
        """Whether there is no other rank."""
        return self.size == 1

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over all ranks of tensors of the same shape, the same bits on all of them."""
        return self._reduced(tensor, dist.ReduceOp.SUM)

    def largest(self, tensor: torch.Tensor) -> torch.Tensor:
        """Elementwise maximum over all ranks of tensors of the same shape."""
        return self._reduced(tensor, dist.ReduceOp.MAX)

    def smallest(self, tensor: torch.Tensor) -> torch.Tensor:
        """Elementwise minimum over all ranks of tensors of the same shape."""
        return self._reduced(tensor, dist.ReduceOp.MIN)

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Tensors of shape (n, ...) of all ranks, one after the other, shape (S * n, ...)."""
        if self.is_alone:
            return tensor
        shape = (self.size * tensor.shape[0], *tensor.shape[1:])
        gathered = tensor.new_empty(shape)
        _all_gather(gathered, tensor.contiguous(), group=self.group)
        return gathered

    def any(self, flag: bool) -> bool:
        """Whether something is so on any rank. The hosts wait for each other, not for a device."""
        if self.is_alone:
            return flag
        flags = torch.tensor(int(flag))
        dist.all_reduce(flags, dist.ReduceOp.MAX, group=self.host_group)
        return bool(flags)

    def objects(self, own: T) -> list[T]:
        """What each rank has, by rank: anything that can be pickled."""
        if self.is_alone:
            return [own]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, own, group=self.host_group)
        return found

    def send(self, tensor: torch.Tensor) -> None:
        """
        Gives a tensor to the first rank, which calls `receive` for it meanwhile. It goes by way
        of the hosts.
        """
        dist.send(_bytes_of(tensor.cpu()), group_dst=0, group=self.host_group)

    def receive(self, like: torch.Tensor, source: int) -> torch.Tensor:
        """What another rank sends to the first one, of the shape and dtype of `like`, on the CPU."""
        received = torch.empty(like.shape, dtype=like.dtype)
        dist.recv(_bytes_of(received), group_src=source, group=self.host_group)
        return received

    def _reduced(self, tensor: torch.Tensor, op: Any) -> torch.Tensor:
        if self.is_alone:
            return tensor
        reduced = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(reduced, op, group=self.group)
        return reduced


ALONE = Ranks()


def summed(parts: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """
    The sum of what each rank has of a reconstruction. The gradient of a rank's part is that of
    the sum: every rank computes the same loss from it.
    """
    return parts if ranks.is_alone else _Summed.apply(parts, ranks)


def used_by_all(weight: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """
    A weight that all ranks hold and each uses for its own features. Its gradient is the sum of
    those that each rank finds.
    """
    return weight if ranks.is_alone else _UsedByAll.apply(weight, ranks)


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor, of which a contiguous one is a view: not all dtypes can be sent."""
    return tensor.contiguous().view(-1).view(torch.uint8)


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, parts: torch.Tensor, ranks: Ranks) -> torch.Tensor:  # type: ignore[override]
        return ranks.sum(parts)

    @staticmethod
    @once_differentiable
    def backward(_: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return gradient, None


class _UsedByAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, ranks: Ranks) -> torch.Tensor:
        ctx.ranks = ranks
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return ctx.ranks.sum(gradient), None
