"""How the processes of a training meet by a store, in which earlier ones may have left keys."""

import time
import uuid
from datetime import timedelta

import torch.distributed as dist

PREFIX = "sae-lens-alloc"
SECONDS_BETWEEN_LOOKS = 0.05


def meet(
    store: dist.Store,
    rank: int,
    world_size: int,
    patience: timedelta,
    launch: str = "",
) -> dist.Store:
    """
    Waits until a process of each rank is there.

    torchrun starts all processes again where one has ended, with the store of before and, on
    several machines, without a number of the attempt that all have. So each process has a name of
    its own. Rank 0 answers every name that it finds with its own, which is that of the attempt.

    Args:
        store: A store that all processes reach.
        rank: The number of this one.
        world_size: How many there are to be.
        patience: How long to wait.
        launch: A name of the launch: several on one machine may have been given one port, and so
            one store.

    Returns:
        A store of this attempt alone.

    Raises:
        ValueError: in one sentence, if one does not come, or comes twice, or counts otherwise.
    """
    root = dist.PrefixStore(f"{PREFIX}/{launch}", store)
    attempt = uuid.uuid4().hex
    if rank > 0:
        attempt = _answer(root, rank, world_size, attempt, patience)
    ours = dist.PrefixStore(attempt, root)
    if ours.add(f"count/{rank}", 1) > 1:
        raise ValueError(
            f"two processes have RANK {rank}: give each of the {world_size} another one."
        )
    ours.set(f"here/{rank}", str(world_size))
    if rank == 0:
        _answer_all(root, ours, world_size, attempt, patience)
    _require_all(ours, rank, world_size, patience)
    return ours


def _answer(
    root: dist.Store, rank: int, world_size: int, name: str, patience: timedelta
) -> str:
    """What rank 0 answers to the name of this process."""
    root.set(f"name/{rank}", name)
    try:
        root.wait([f"answer/{name}"], patience)
    except dist.DistError as error:
        raise ValueError(
            f"rank 0 has not answered rank {rank} within {patience.total_seconds():g} s: start "
            f"WORLD_SIZE ({world_size}) processes, each with another RANK."
        ) from error
    return root.get(f"answer/{name}").decode()


def _answer_all(
    root: dist.Store,
    ours: dist.Store,
    world_size: int,
    attempt: str,
    patience: timedelta,
) -> None:
    """Answers the names of all ranks until each is there; those of ended processes do no harm."""
    answered: set[str] = set()
    end = time.monotonic() + patience.total_seconds()
    while True:
        missing = [
            rank for rank in range(world_size) if not ours.check([f"here/{rank}"])
        ]
        if not missing:
            return
        if time.monotonic() > end:
            raise _missing(missing, world_size, patience)
        for rank in missing:
            if root.check([f"name/{rank}"]):
                name = root.get(f"name/{rank}").decode()
                if name not in answered:
                    answered.add(name)
                    root.set(f"answer/{name}", attempt)
        time.sleep(SECONDS_BETWEEN_LOOKS)


def _require_all(
    ours: dist.Store, rank: int, world_size: int, patience: timedelta
) -> None:
    keys = [f"here/{other}" for other in range(world_size)]
    try:
        ours.wait(keys, patience)
    except dist.DistError as error:
        missing = [i for i, key in enumerate(keys) if not ours.check([key])]
        raise _missing(missing, world_size, patience) from error
    for other, key in enumerate(keys):
        counted = int(ours.get(key))
        if counted != world_size:
            raise ValueError(
                f"WORLD_SIZE is {world_size} for rank {rank}, but {counted} for rank {other}: "
                "give all processes the same."
            )


def _missing(ranks: list[int], world_size: int, patience: timedelta) -> ValueError:
    which = ", ".join(map(str, ranks))
    return ValueError(
        f"WORLD_SIZE is {world_size}, but after {patience.total_seconds():g} s there is no "
        f"process with RANK {which}: start as many processes as WORLD_SIZE says."
    )
